import pytest

from mm_cb.core.errors import LONGEST, UserError, called, nearest, one_line, unknown
from mm_cb.core.paths import data_path, safe_id


def test_a_user_error_is_one_line_without_control_characters():
    message = str(UserError("a\n  b\x1b[2J\r\nc\u202e"))
    assert message == "a b?[2J c?"


@pytest.mark.parametrize("length", [LONGEST, LONGEST + 1, 10**6])
def test_a_message_that_quotes_something_endless_keeps_its_beginning_and_its_end(length):
    message = str(UserError(f"`id` must be short, got {'a' * length}; shorten it."))
    assert len(message) <= LONGEST and message.startswith("`id` must be short") and message.endswith("; shorten it.")


def test_nearest_ignores_case_and_admits_that_nothing_is_close():
    assert nearest("MINIATUR", ["miniature", "llava"]) == "miniature"
    assert nearest("xyz", ["miniature", "llava"]) is None
    assert nearest("x", []) is None


def test_unknown_names_the_nearest_and_the_valid_ones():
    assert str(unknown("recipe", "miniatur", ["miniature", "llava"])) == (
        "unknown recipe `miniatur`, did you mean `miniature`? valid: llava, miniature"
    )
    assert "did you mean" not in str(unknown("recipe", "q", ["miniature"]))
    assert str(unknown("key", "q", [f"k{i:02}" for i in range(40)])).endswith("k29, and 10 more")


@pytest.mark.parametrize("text", ["", " \t\n", "plain"])
def test_one_line_keeps_plain_text(text):
    assert one_line(text) == text.strip()


def test_safe_ids_are_plain_stems_and_differ_when_ids_do():
    ids = [
        "a-1",
        "A-1",
        "a 1",
        "a/1",
        "../a",
        "..",
        ".",
        "",
        "x.clean",
        "x",
        "é",
        "-rf",
        "a" * 300,
        "a" * 301,
        "\udc80",
    ]
    stems = [safe_id(id) for id in ids]
    assert len(set(stems)) == len(ids)
    for stem in stems:
        assert stem and len(stem) < 100
        assert set(stem) <= set("abcdefghijklmnopqrstuvwxyz0123456789_-") and not stem.startswith("-")
    assert stems[0] == "a-1" and safe_id("x") == "x"


def test_data_is_found_in_the_checkout():
    assert data_path("README.md").is_file()


@pytest.mark.parametrize(
    ("name", "meant"),
    [("lr", "training.learning_rate"), ("training.bs", "training.batch_size"), ("epochs", "training.max_steps"),
     ("lora.rank", "lora.r"), ("training.wd", "training.weight_decay"), ("--lr", "--learning-rate")],
)  # fmt: skip
def test_common_short_names_are_known(name, meant):
    from mm_cb.training.recipes.recipe import recipe_keys

    valid = [*recipe_keys(), "held_out", "report_to"] if meant[0] != "-" else ["--learning-rate", "--loss"]
    assert nearest(name, valid) == meant
    assert f"did you mean `{meant}`?" in str(unknown("key", name, valid))


def test_first_letters_stand_for_no_single_word():
    assert called("s", ["seed"]) == called("sd", ["seed"]) == []
