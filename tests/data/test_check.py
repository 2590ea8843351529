import json

import pytest

from mm_cb import cli
from mm_cb.data.check import SHOWN, Limits, Report, check_sources
from mm_cb.data.sources import Source
from tests.data.conftest import breaker_row, llava_row, own_row
from tests.tiny_llava import picture


def check(path, images=None, **limits):
    return check_sources([Source(str(path), images=images)], Limits(**limits))


def test_a_clean_set_has_no_problems(save, pictures):
    report = check(save("l.json", [llava_row(i) for i in range(3)], array=True), pictures)
    assert not report.problems and not report.has_errors and report.images == 3
    assert report.used == {"l:retain": {"retain multimodal": 3}}


def test_every_planted_fault_is_found_and_named(save, pictures):
    empty = llava_row(0)
    empty["conversations"][1]["value"] = "  "
    (pictures / "000000000001.png").write_bytes((pictures / "000000000001.png").read_bytes()[:200])
    rows = [llava_row(0), llava_row(1), llava_row(9), empty, "{broken", llava_row(0), llava_row(2, "word " * 30)]
    report = check(save("l.jsonl", rows), pictures, max_length=25)
    assert {kind: (p.count, p.first[0].split(": ")[0].split(":")[-1]) for kind, p in report.problems.items()} == {
        "corrupt image": (1, "2"),
        "missing image": (1, "3"),
        "broken row": (1, "5"),
        "duplicate": (1, "6"),
        "longer": (1, "7"),
    }
    assert report.has_errors and report.skipped == {"l:retain": {"empty turn": 1}}


@pytest.mark.parametrize(
    ("kind", "stops"),
    [
        *((kind, True) for kind in ("broken row", "repeated id", "missing image", "corrupt image", "too long")),
        ("broken encoding", True),
        *((kind, True) for kind in ("in both sets", "contaminated", "no example", "missing rows", "refusals")),
        *((kind, False) for kind in ("duplicate", "longer", "some refusals", "unreadable image", "not checked")),
        *((kind, False) for kind in ("unknown tokens",)),
    ],
)
def test_faults_are_errors_and_the_rest_are_warnings(kind, stops):
    report = Report()
    report.add(kind, lambda: "somewhere")
    assert report.has_errors == stops


def chat_row(**turn):
    return {"messages": [{"role": "user", "content": "What is this?", **turn}, {"role": "assistant", "content": "A."}]}


@pytest.mark.parametrize(
    "row",
    [
        chat_row() | {"img": "a.png"},
        chat_row() | {"image": None, "image_path": "a.png"},
        chat_row(images=["a.png"]),
        {"prompt": "p", "output": "o", "image": "a.png"},
        {"prompt": "p", "completion": "c", "final_label": "1_full_compliance", "picture": "a.png"},
        {"conversations": llava_row(0)["conversations"][1:] * 2, "picture": "a.png"},
        own_row(0) | {"messages": chat_row(images=["a.png"])["messages"]},
    ],
)
def test_a_row_whose_picture_would_not_be_read_is_no_text_row(row, save):
    report = check(save("rows.jsonl", [row]))
    ((where, *_),) = [problem.first for problem in report.problems.values() if problem.count]
    assert "rows.jsonl:1" in where and "names a picture" in where and report.has_errors


@pytest.mark.parametrize("key", ["weight", "thinking", "reasoning", "reasoning_content"])
def test_what_a_turn_says_that_would_change_training_is_not_passed_over(key, save):
    rows = [chat_row(**{key: 0 if key == "weight" else "hm"}), chat_row(**{key: None})]
    (problem,) = check(save("rows.jsonl", rows)).problems.values()
    assert problem.count == 1 and f"rows.jsonl:1: turn 1 says `{key}`, which is not read" in problem.first[0]
    assert ("put it into the text" in problem.first[0]) == (key != "weight")


def test_what_else_a_row_says_is_left_alone(save):
    rows = [chat_row(images=None) | {"image": None, "image_id": 7, "source_url": "u", "pages": 3}]
    assert not check(save("rows.jsonl", rows)).problems


@pytest.mark.parametrize(
    ("rows", "kind"),
    [
        ([own_row(0), own_row(0, text="other")], "repeated id"),
        ([own_row(0), own_row(1) | {"id": "OWN-0"}], "repeated id"),
        ([own_row(0), own_row(0, "circuit_breaker") | {"id": "x"}], "in both sets"),
        ([own_row(0, text="a b"), own_row(0, "circuit_breaker", text="\u0430\u200b b") | {"id": "x"}], "in both sets"),
    ],
)
def test_own_files_are_held_against_themselves(save, rows, kind):
    report = check(save("own.jsonl", rows))
    assert list(report.problems) == [kind] and report.has_errors
    assert ":2: " in report.problems[kind].first[0] and ":1" in report.problems[kind].first[0]


def test_a_text_that_lost_characters_is_refused(save):
    report = check(save("own.jsonl", [own_row(0), own_row(1, text="caf\ufffd")]))
    assert list(report.problems) == ["broken encoding"] and report.has_errors
    assert "own.jsonl:2: a text cannot be used: it holds U+FFFD" in report.problems["broken encoding"].first[0]


def test_pictures_are_the_same_by_content_not_by_name(save, folder):
    """Both sets ask the same about files of one name: one of them holds the same picture, the other does not."""
    for number, name in enumerate(("a/1.png", "b/1.png", "c/2.png")):
        (folder / name).parent.mkdir()
        picture(number % 2).save(folder / name)
    answer = {"role": "assistant", "content": "a square"}

    def asked(name, set_name):
        question = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]}
        return {"id": name, "messages": [question, answer], "images": [name], "set": set_name}

    rows = [asked("a/1.png", "retain"), asked("b/1.png", "circuit_breaker")]
    assert not check(save("own.jsonl", rows)).problems
    same = check(save("own.jsonl", [*rows, asked("c/2.png", "circuit_breaker")]))
    assert same.problems["in both sets"].count == 1 and "own.jsonl:3" in same.problems["in both sets"].first[0]


def test_a_picture_inside_a_saved_data_set_is_decoded_too(folder):
    import datasets

    picture().save(folder / "a.png")
    content = (folder / "a.png").read_bytes()
    chat = [{"role": "user", "content": "<image>what"}, {"role": "assistant", "content": "a square"}]
    images = [[{"bytes": content, "path": None}], [{"bytes": content[:200], "path": None}]]
    features = datasets.Features(
        {
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "images": datasets.List(datasets.Image()),
        }
    )
    saved = datasets.Dataset.from_dict({"messages": [chat] * 2, "images": images}, features=features)
    saved.save_to_disk(folder / "saved")
    report = check(folder / "saved")
    assert report.problems["corrupt image"].first[0].startswith(f"{folder / 'saved'} row 2: ")


def test_only_the_first_offenders_are_listed(save):
    report = check(save("c.jsonl", [breaker_row(0)] * 20))
    assert report.problems["duplicate"].count == 19 and len(report.problems["duplicate"].first) == SHOWN
    assert not report.has_errors


def test_a_limited_source_is_checked_where_it_is_used(save):
    path = save("c.jsonl", [breaker_row(i) for i in range(30)])
    report = check_sources([Source(str(path), limit=4)], Limits())
    assert sum(report.used["c:circuit_breaker"].values()) == 4


def test_rows_of_one_kind_are_trained_on_by_the_line_that_it_ends_with(save, capsys):
    chat = [{"role": "user", "content": "what is tea ?"}, {"role": "assistant", "content": "a drink"}]
    rows = [{"id": s, "messages": chat, "images": [], "set": s} for s in ("circuit_breaker", "retain")]
    rows[1]["messages"] = [{"role": one["role"], "content": f"{one['content']} or a star"} for one in chat]
    assert cli.run(["data", "check", str(save("rows.jsonl", rows))]) == 0
    out = capsys.readouterr().out
    assert "mm-cb train RECIPE" in out and "batches=text" in out and "other formats" not in out


@pytest.mark.parametrize("sets", [("retain",), ("circuit_breaker",), ("retain", "circuit_breaker")])
def test_a_file_without_rows_of_both_sets_is_not_sent_to_a_training_that_refuses_it(sets, save, capsys):
    path = save("rows.jsonl", [own_row(i, one, text=f"word {i}") for i, one in enumerate(sets)])
    assert cli.run(["data", "check", str(path)]) == 0
    told = capsys.readouterr().out
    refused = cli.run(["train", "miniature", f"data=[{path}]", "batches=text", "training.held_out=0", "--dry-run"]) == 2
    assert refused == (len(sets) == 1) == ("both sets" in told) and refused == ("mm-cb train RECIPE" not in told)


def test_the_command_prints_counts_and_ends_with_2_on_errors(save, capsys):
    data = save("c.jsonl", [breaker_row(i) for i in range(3)])
    behaviors = save("b.jsonl", [{"id": "b", "prompt": "how to brew tea number 2 ?", "target": "sure", "image": None}])
    assert cli.run(["data", "check", str(data)]) == 0
    out = capsys.readouterr().out
    assert "nothing wrong found" in out and "data=[" not in out and "RECIPE > mine.yaml" in out
    assert cli.run(["data", "check", str(data), "--behaviors", str(behaviors)]) == 2
    output = capsys.readouterr()
    assert "error: contaminated: 3" in output.out and "c.jsonl:1: too close to behaviour `b` (" in output.out
    assert "b.jsonl:1), BLEU 0." in output.out
    assert "brew" not in output.out.replace("brew it", "")  # places and numbers, not the texts


def test_the_command_reads_a_recipe_and_counts_its_tokens(save, folder, capsys):
    save(
        "train.jsonl", [own_row(0, text="one two three four five six seven"), own_row(1, "circuit_breaker", text="one")]
    )
    recipe = {"name": "mine", "model": "miniature", "data": ["train.jsonl"], "batches": "text"}
    recipe |= {"training": {"held_out": 0}}
    (folder / "mine.yaml").write_text(json.dumps(recipe))
    assert cli.run(["data", "check", "mine.yaml", "--max-length", "9"]) == 0
    assert "warning: longer: 1" in (out := capsys.readouterr().out) and "tokens, more than 9" in out
    (folder / "mine.yaml").write_text(json.dumps(recipe | {"batches": "alternate"}))
    assert cli.run(["data", "check", "mine.yaml"]) == 2
    assert "error: missing rows: 1" in (out := capsys.readouterr().out) and "multimodal examples" in out
    assert cli.run(["data", "check", "mine.yaml", "batches=text", "training.max_length=9"]) == 0
    assert "tokens, more than 9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (["check", "nowhere.jsonl"], "`nowhere.jsonl` is not there"),
        (["check", "xstest"], "the data set `xstest` is not here: download"),
        (["check", "x.yaml"], "cannot read the recipe"),
        (["check", "--set", "bad", "xstest"], "`set`"),
        (["check", "xstest", "--tokenizer", "nowhere"], "tokenizer is on this machine, got `nowhere`; give its folder"),
        (["chek"], "did you mean `check`"),
        (["check", "xstest", "--behaviors", "b.jsonl"], "`b.jsonl` is not there; write one"),
    ],
)
def test_mistakes_are_one_line(folder, arguments, match, capsys):
    assert cli.run(["data", *arguments]) == 2
    error = capsys.readouterr().err
    assert match in error and error.count("\n") == 1


def test_the_list_names_every_card_with_licence_and_source(folder, capsys):
    assert cli.run(["data", "list"]) == 0
    out = capsys.readouterr().out
    for name in ("circuit-breakers-train", "llava-instruct-150k", "harmbench-multimodal", "mossbench", "mmmu"):
        assert f"\n{name} (" in out
    assert "\nminiature (here; for demo)" in out and "\nxstest (not here; for training)" in out
    assert "licence: CC-BY-4.0" in out
