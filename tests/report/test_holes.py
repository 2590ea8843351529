"""Runs with holes: a wrong number is refused, a missing picture is named on the page and in the terminal."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mm_cb import cli
from mm_cb.attacks.records import attacked
from mm_cb.cli.attacked import show_attacked
from mm_cb.core.errors import UserError
from mm_cb.core.runs import read_jsonl, write_json, write_jsonl
from mm_cb.metrics.results import read_results, write_results
from mm_cb.report import write_report
from mm_cb.report.load import load_run

KEPT = Path(__file__).resolve().parents[1] / "frozen" / "714213b"


@pytest.fixture
def run(tmp_path):
    def copied(name="attack-base"):
        return shutil.copytree(KEPT / name, tmp_path / name)

    return copied


def page(run, tmp_path, capsys):
    assert cli.run(["report", str(run), "--out", str(tmp_path / "page.html")]) == 0
    return (tmp_path / "page.html").read_text(), capsys.readouterr().out


def cut_in_the_middle(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def without_its_end(path):
    path.write_bytes(path.read_bytes()[:-20])


def without_a_record(path):
    write_jsonl(path, read_jsonl(path)[1:])


def with_a_record_twice(path):
    write_jsonl(path, [*(records := read_jsonl(path)), records[0]])


def with_another_id(path):
    records = read_jsonl(path)
    write_jsonl(path, [{**record, "id": f"x-{record['id']}"} for record in records])


def without_an_answer(path):
    records = read_jsonl(path)
    for one in (records[0], *(records[0].get("candidates") or ())):
        del one["completion"]
    write_jsonl(path, records)


DAMAGES = [
    lambda path: path.unlink(),
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(b"\x00\x80\xff" * 50 + b"\n"),
    *(cut_in_the_middle, without_its_end, without_a_record, with_a_record_twice, with_another_id),
    without_an_answer,
]


@pytest.mark.parametrize("name", ["attack-base", "mmmu", "beside", "over-refusal", "llava-wild"])
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_run_whose_items_are_not_those_that_were_counted_is_refused(name, damage, run, tmp_path):
    folder = run(name)
    damage(folder / "items.jsonl")
    with pytest.raises(UserError, match=r"items\.jsonl"):
        write_report([folder], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


@pytest.mark.parametrize("key", ["completion", "prompt", "target", "given", "k"])
def test_an_edit_that_moves_no_number_is_noticed(key, run):
    folder = run()
    write_results(folder / "results.json", read_results(folder / "results.json"))  # as this version writes it
    load_run(folder)
    first, *others = read_jsonl(folder / "items.jsonl")
    write_jsonl(folder / "items.jsonl", [first | {key: 7 if key == "k" else "another"}, *others])
    with pytest.raises(UserError, match=r"items\.jsonl` was changed after it was written"):
        load_run(folder)


def change(path, **fields):
    content = json.loads(path.read_text())
    content["measurements"][0] |= fields
    write_json(path, content)


@pytest.mark.parametrize(
    ("edit", "expected"),
    [
        (lambda path: change(path, value=1.0, ci95=[40.0, 60.0]), "outside its own interval 40 to 60"),
        (lambda path: change(path, n=3), r"must agree.*\(n = 3\) there and .*\(n = 4\) counted again"),
        (lambda path: path.unlink(), r"results\.json` is not there"),
        (lambda path: path.write_bytes(b"\xff"), r"results\.json` must be readable JSON"),
        (lambda path: write_json(path, {"schema": 1, "measurements": []}), "is absent there"),
    ],
)
def test_results_that_contradict_their_items_are_refused(edit, expected, run):
    folder = run()
    edit(folder / "results.json")
    with pytest.raises(UserError, match=expected):
        load_run(folder)


def test_verdicts_of_a_stopped_judge_are_refused(run):
    folder = run("judged")
    load_run(folder)
    (folder / "judgements" / "newest.json").unlink()
    with pytest.raises(UserError, match="give its `mm-cb judge` again"):
        load_run(folder)


def test_deleted_pictures_are_named_on_the_page_and_in_the_terminal(run, tmp_path, capsys):
    folder = run()
    whole = page(folder, tmp_path, capsys)
    gone = sorted((folder / "images").glob("*/*.png"))[:2]
    for picture in gone:
        picture.unlink()
    for text, before in zip(page(folder, tmp_path, capsys), whole, strict=True):
        assert "2 of " in text and gone[0].name in text and "HOLE" in text and "HOLE" not in before


@pytest.mark.parametrize("name", ["results.json", "items.jsonl"])
def test_a_file_that_is_gone_is_named_with_what_brings_it_back(name, run):
    folder = run()
    (folder / name).unlink()
    for opened in (load_run, show_attacked):
        with pytest.raises(UserError, match=rf"{name}.* whole folder .* command with another `--out`"):
            opened(folder)


def test_an_attack_that_finished_before_says_that_its_pictures_are_gone(run, capsys):
    folder = run()
    shutil.rmtree(folder / "images")
    show_attacked(folder)
    said = " ".join(capsys.readouterr().out.split())
    assert said.count("HOLE") == 1 and "another `--out`" in said


@pytest.mark.parametrize("with_json", [True, False])
def test_swapped_pictures_are_named_by_their_hash_or_by_how_far_they_are_from_the_clean_one(with_json, run):
    folder = run()
    if not with_json:
        for path in (folder / "images").glob("*/*.json"):
            path.unlink()
    attacked = next(picture for picture in sorted((folder / "images").glob("*/pgd*.png")))
    assert load_run(folder).holes == ()
    Image.new("RGB", Image.open(attacked).size, (255, 0, 255)).save(attacked)
    (hole,) = load_run(folder).holes
    assert "not the files that were judged" in hole and attacked.name in hole


def test_absent_curves_are_named(run, tmp_path, capsys):
    folder = run()
    (folder / "curves.json").unlink()
    assert all("lacks curves.json" in text for text in page(folder, tmp_path, capsys))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("train", "is a run of `mm-cb train`, in which nothing is measured: give runs of"),
        ("attack-base/images", "holds no run.json; give what `--out`"),
        (".", "holds no run.json; give a run, such as `"),
        ("attack-base/items.jsonl", "it is a file"),
    ],
)
def test_what_is_no_measured_run_says_what_to_give(name, expected, run, tmp_path, capsys):
    run("train"), run()
    assert cli.run(["report", str(tmp_path / name), "--out", str(tmp_path / "page.html")]) == 2
    assert expected in capsys.readouterr().err
    if name == "train":
        assert cli.run(["judge", str(tmp_path / name), "--judge", "refusal-strings"]) == 2
        assert expected in capsys.readouterr().err


@pytest.mark.parametrize("name", ["mmmu-base", "over-refusal", "beside", "llava-wild"])
def test_evaluations_of_a_made_up_world_say_so_whatever_wrote_them(name, run, tmp_path, capsys):
    folder = run(name)
    assert load_run(folder).fiction
    assert "A small model in a fictional world" in page(folder, tmp_path, capsys)[0]
    content = json.loads((folder / "run.json").read_text())
    content["recipe"]["endpoint"] = "served"
    write_json(folder / "run.json", content)
    assert not load_run(folder).fiction


@pytest.mark.parametrize("key", ["restart", "epsilon", "loss", "objective_logged", "completion"])
def test_a_try_that_lacks_what_every_try_holds_is_named(key, run):
    folder = run()
    (item, *_) = read_jsonl(folder / "items.jsonl")
    del item["candidates"][0][key]
    with pytest.raises(UserError, match=rf"record 1: `candidates\[0\]` must hold .*; it lacks {key}"):
        attacked([item], folder)
