import json

import pytest
import torch
from PIL import Image

from mm_cb.core import provenance
from mm_cb.core.errors import UserError
from mm_cb.data.behaviors_file import asked_once, grey_canvas, kept_behaviors, read_behaviors, refuse_too_large
from mm_cb.data.pictures import open_picture
from mm_cb.models.chat import chat
from tests.image_attacks.helpers import build_processor
from tests.tiny_llava import picture, tiny_llava

GOOD = {"id": "a", "prompt": "how", "target": "sure", "image": None}


def write(folder, *records):
    path = folder / "behaviors.jsonl"
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records) + "\n")
    return path


def test_reads_pictures_and_keeps_other_keys_for_the_judge(tmp_path):
    picture().save(tmp_path / "a.png")
    (behavior,) = read_behaviors(write(tmp_path, GOOD | {"image": "a.png", "category": "x", "brew": ["hex"]}))
    assert behavior.image == (tmp_path / "a.png").resolve()
    assert behavior.category == "x" and behavior.split == "all" and behavior.extra == {"brew": ["hex"]}


@pytest.mark.parametrize(
    ("records", "match"),
    [
        ([GOOD, "{broken"], r"behaviors\.jsonl:2: expected one JSON object on the line, got broken"),
        ([GOOD, "[1]"], r":2: expected one JSON object on the line, got list"),
        ([{"id": "a", "prompt": "p"}], r":1 must have non-empty texts .*'target'"),
        ([GOOD | {"prompt": " "}], r":1 .*'prompt'"),
        ([{"id": "a", "messages": [], "images": [], "set": "retain"}], r":1 has `messages`, as training rows have"),
        ([GOOD, GOOD], r":2: .*its own id, `a` comes more than once, first at .*:1"),
        (
            [GOOD, GOOD | {"id": "A "}],
            r":2: .*its own id, `A ` differs from `a` by case, blanks or how a letter is encoded alone, first at .*:1",
        ),
        ([GOOD | {"prompt": "caf\ufffd"}], r":1: `prompt` cannot be used: it holds U\+FFFD"),
        ([GOOD | {"split": "x"}, GOOD | {"id": "b", "split": "X"}], r":2: `split` `X` differs from `x`, at .*:1"),
        ([GOOD | {"category": "x"}, GOOD | {"id": "b", "category": "X"}], r":2: `category` `X` differs from `x`"),
        (
            [GOOD, GOOD | {"id": "b", "split": "x"}, GOOD | {"id": "c", "split": "all"}],
            r":3: `split` `all` is the name of",
        ),
        (
            [GOOD | {"split": "x", "category": "y"}, GOOD | {"id": "b", "split": "y", "category": "x"}],
            r":1: `category` `y` is a `split` too, of other rows, at .*:2; both would be counted as one group",
        ),
        ([GOOD, GOOD | {"prompt": "what \ud83d"}], r":2: .*half of a surrogate pair"),
        ([GOOD | {"id": "a\ud83d"}], r":1: .*half of a surrogate pair"),
        ([GOOD | {"target": "\0"}], r":1: .*NUL"),
        ([GOOD | {"image": "a\0.png"}], r":1: .*NUL"),
        ([GOOD | {"image": ""}], r":1: `image` must be a path or null, got ''"),
        ([GOOD | {"id": 3}], r":1 must have non-empty texts .*'id'"),
        ([GOOD | {"target": "\u200b\u00ad"}], r":1 must have non-empty texts for .*wrong or missing: \['target'\]"),
        ([GOOD | {"category": 3}], r":1: `category` must be a text or null, got 3"),
        ([GOOD | {"category": ""}], r":1: `category` must be a text without blanks around it, or null, got ''"),
        ([GOOD, GOOD | {"id": "b", "split": " \u200b"}], r":2: `split` must be a text without blanks"),
        ([GOOD | {"category": "fraud "}], r":1: `category` must be a text without blanks around it.* got 'fraud '"),
        ([{"id": "b", "prompt": "p", "target": "t", "images": "a.png"}], r":1: unknown key `images`, did you mean"),
        (["[", json.dumps(GOOD), "]"], r":1: .*got a JSON array"),
        ([GOOD | {"image": "missing.png"}], r":1: picture .*missing\.png: .*cannot be read"),
        ([GOOD | {"image": "../outside.png"}], r":1: `image` must lie inside"),
        ([GOOD | {"image": 3}], r":1: `image` must be a path or null, got 3"),
        ([""], "at least one behaviour"),
    ],
)
def test_broken_files_name_file_and_line(tmp_path, records, match):
    with pytest.raises(UserError, match=match) as caught:
        read_behaviors(write(tmp_path, *records))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("content", "match"), [(b"", "got an empty one"), (b"\x89PNG\r\n", "damaged header")])
def test_broken_pictures_are_named(tmp_path, content, match):
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UserError, match=match):
        read_behaviors(write(tmp_path, GOOD | {"image": "a.png"}))


def test_truncated_picture_is_named(tmp_path):
    picture(size=(200, 200)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "a.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match=r"a\.png: .*damaged one"):
        open_picture(tmp_path / "a.png")


def test_a_mark_carriage_returns_and_line_separators_are_no_matter(tmp_path):
    texts = [GOOD | {"category": None}, GOOD | {"id": "b\u2028c", "prompt": "x\u0085y\u2029"}]
    lines = "\r\n".join(json.dumps(text, ensure_ascii=False) for text in texts)
    (tmp_path / "b.jsonl").write_text("\ufeff" + lines, encoding="utf-8", newline="")
    first, second = read_behaviors(tmp_path / "b.jsonl")
    assert first.category == "all" and (second.id, second.prompt) == ("b\u2028c", "x\u0085y\u2029")


def test_missing_file_is_a_user_error(tmp_path):
    with pytest.raises(UserError, match="is not there; write one.*docs/formats.md"):
        read_behaviors(tmp_path / "none.jsonl")


def test_other_modes_become_rgb_once(tmp_path):
    picture().convert("RGBA").save(tmp_path / "a.png")
    picture().convert("L").save(tmp_path / "b.png")
    assert open_picture(tmp_path / "a.png").mode == open_picture(tmp_path / "b.png").mode == "RGB"


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "1"])
def test_the_picture_attacked_is_the_one_the_processor_sees(tmp_path, mode, backend):
    see_through = picture(0, (61, 37)).convert("RGBA")
    see_through.putalpha(picture(1, (61, 37)).convert("L"))
    if mode == "P":
        see_through.quantize(16).save(tmp_path / "a.png", transparency=bytes(range(0, 256, 16)))
    else:
        see_through.convert(mode).save(tmp_path / "a.png")
    processor = build_processor(backend)
    with Image.open(tmp_path / "a.png") as uploaded:
        assert uploaded.mode == mode
        seen = processor(images=[uploaded], return_tensors="pt")["pixel_values"]
    attacked = open_picture(tmp_path / "a.png")
    assert torch.equal(processor(images=[attacked], return_tensors="pt")["pixel_values"], seen)


def test_a_model_given_a_transparent_picture_sees_it_on_white():
    model, clear = tiny_llava(), Image.new("RGBA", (20, 20), (255, 0, 0, 0))
    given, white = (
        model.encode_chats([chat("hi", images=1)], [[p]]) for p in (clear, Image.new("RGB", (20, 20), "white"))
    )
    assert torch.equal(given.pixel_values, white.pixel_values)


def test_grey_canvas_has_height_and_width_in_order():
    canvas = grey_canvas((42, 84))
    assert canvas.size == (84, 42) and set(canvas.get_flattened_data()) == {(128, 128, 128)}


@pytest.mark.parametrize(
    ("mode", "name", "match"),
    [
        ("I;16", "a.png", "16 bits per channel"),
        ("I", "a.tiff", "mode I"),
        ("F", "a.tiff", "mode F"),
    ],
)
def test_pictures_that_rgb_would_change_are_refused(tmp_path, mode, name, match):
    Image.new(mode, (8, 8)).save(tmp_path / name)
    with pytest.raises(UserError, match=f"{match}.*Convert it"):
        open_picture(tmp_path / name)


def test_an_animation_is_no_picture(tmp_path):
    picture(0).save(tmp_path / "a.gif", save_all=True, append_images=[picture(1)])
    with pytest.raises(UserError, match="got 2 frames"):
        open_picture(tmp_path / "a.gif")


@pytest.mark.parametrize("mode", ["RGBA", "L", "LA", "P", "1"])
def test_everyday_modes_become_rgb(tmp_path, mode):
    picture(0).convert(mode).save(tmp_path / "a.png")
    assert open_picture(tmp_path / "a.png").mode == "RGB"


def test_a_picture_larger_than_memory_is_refused_before_it_is_attacked(tmp_path, monkeypatch):
    picture(0).save(tmp_path / "a.png")
    (behavior,) = read_behaviors(write(tmp_path, GOOD | {"image": "a.png"}))
    refuse_too_large([behavior], 8)
    monkeypatch.setattr("mm_cb.data.behaviors_file.available_memory_bytes", lambda: 100_000)
    with pytest.raises(UserError, match="a.png.*GiB.*batch"):
        refuse_too_large([behavior], 8)


def test_the_batch_of_a_large_picture_is_of_those_of_its_size(tmp_path, monkeypatch):
    picture(0).resize((200, 300)).save(tmp_path / "large.png")
    picture(1).save(tmp_path / "small.png")
    records = [GOOD | {"id": str(n), "image": "small.png"} for n in range(8)] + [GOOD | {"image": "large.png"}]
    behaviors = read_behaviors(write(tmp_path, *records))
    monkeypatch.setattr("mm_cb.data.behaviors_file.available_memory_bytes", lambda: 200 * 300 * 3 * 4 * 33)
    refuse_too_large(behaviors, 8)
    with pytest.raises(UserError, match=r"large.png` \(200 x 300\) .* batch of 2,"):
        refuse_too_large([*behaviors, behaviors[-1]], 8)


def test_free_memory_is_what_linux_says_and_no_more_than_there_is(monkeypatch):
    free = {"MemAvailable:": 3, "anon": 1000}
    monkeypatch.setattr(provenance, "memory_bytes", lambda: 10_000)
    monkeypatch.setattr(provenance, "_entry", lambda file, name: free[name])
    assert provenance.available_memory_bytes() == 3 * 1024
    free["MemAvailable:"] = 64
    assert provenance.available_memory_bytes() == 9_000  # the container's limit, less what it holds
    free.update({"MemAvailable:": None, "anon": None})
    assert provenance.available_memory_bytes() == 10_000  # where the system does not say


def test_free_memory_of_this_machine_is_some_and_less_than_all():
    assert 0 < provenance.available_memory_bytes() < provenance.memory_bytes()


def test_a_behaviour_under_two_ids_is_asked_once_and_that_is_said(tmp_path, capsys):
    for name in ("a.png", "b.png", "c.png"):
        picture(int(name == "c.png")).save(tmp_path / name)
    changes = [{}, {"image": "a.png"}, {"image": "b.png"}, {"image": "c.png"}, {}, {"target": "of course"}]
    read = read_behaviors(write(tmp_path, *(GOOD | {"id": f"r{i}"} | one for i, one in enumerate(changes))))
    assert [one.id for one in asked_once(read)] == ["r0", "r1", "r3", "r5"]
    said = " ".join(capsys.readouterr().out.split())
    assert "left out: 2 of 6 behaviours, which repeat another one: `r2` is `r1`" in said and "behaviors.jsonl:3" in said
    assert asked_once(read[:2]) == read[:2] and not capsys.readouterr().out


@pytest.mark.parametrize("label", ["", " x"])
def test_labels_that_a_run_of_an_earlier_version_took_still_open(label, tmp_path):
    path = write(tmp_path, GOOD | {"category": label, "split": None})
    with pytest.raises(UserError, match="`category` must be a text without blanks"):
        read_behaviors(path)
    (kept,) = kept_behaviors(tmp_path)
    assert (kept.category, kept.split) == (label, "all") and kept.extra["category"] == label
