import json
import os
import random
import sys
from pathlib import Path

import pytest

from mm_cb import cli
from mm_cb.benchmarks.mmmu.protocol import protocol
from mm_cb.core.files import read_jsonl
from mm_cb.metrics.degenerate import is_noise
from mm_cb.report import headline_table
from mm_cb.report.combine import combine
from mm_cb.report.load import load_run
from tests.benchmarks.test_mmmu import OFFICIAL, exam, open_record, record

KNOWN = ("A", "The answer is (C).", "B. unreadable", "", "I say B and not A then")


def records(per_subject=3):
    rng = random.Random(0)
    return exam(lambda *_: rng.choice(KNOWN), per_subject)


def write_responses(folder, records):
    by_subject = {}
    for one in records:
        by_subject.setdefault("_".join(one["id"].split("_")[1:-1]), []).append(one)
    for subject, those in by_subject.items():
        (folder / subject).mkdir(parents=True, exist_ok=True)
        (folder / subject / "output.json").write_text(json.dumps(those))
    return folder


def run(*arguments):
    verb = "eval" if "--model" in arguments else "score"
    return cli.run([verb, "mmmu", *map(str, arguments)])


def results(out):
    measured = json.loads((out / "results.json").read_text())["measurements"]
    return {(m["metric"], m["condition"], m["split"]): m for m in measured}


def one_line_of(capsys):
    output = capsys.readouterr()
    assert output.err.count("\n") == 1 and "Traceback" not in output.err, output.err
    return output.err


@pytest.fixture(scope="module")
def scored(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    write_responses(folder / "outputs", records())
    assert run("--responses", folder / "outputs", "--out", folder / "run") == 0
    return folder / "run"


def test_results_hold_both_rules_every_domain_and_every_subject(scored):
    found = results(scored)
    splits = {"all", *protocol().domains, *protocol().subjects}
    for rule in ("official", "strict"):
        assert {split for metric, condition, split in found if (metric, condition) == ("mmmu", rule)} == splits
    official, strict = found["mmmu", "official", "all"], found["mmmu", "strict", "all"]
    assert official["n"] == strict["n"] == 90 and official["subject"] == "base"
    assert {"correct", "fallback", "open_correct", "degenerate"} <= official["counts"].keys()
    assert strict["value"] < official["value"]
    assert official["ci95"][0] < official["value"] < official["ci95"][1]


def test_counts_add_up(scored):
    found, items = results(scored), read_jsonl(scored / "items.jsonl")
    assert len(items) == 2 * 90
    for rule in ("official", "strict"):
        mine = [item for item in items if item["condition"] == rule]
        whole = found["mmmu", rule, "all"]
        assert whole["counts"]["correct"] == sum(item["score"] for item in mine)
        assert whole["counts"]["fallback"] == sum(item["parsed"] is None for item in mine) > 0
        assert whole["counts"]["degenerate"] == sum(item["completion"] == "" for item in mine) > 0
        for names in (protocol().domains, protocol().subjects):
            assert sum(found["mmmu", rule, name]["counts"]["correct"] for name in names) == whole["counts"]["correct"]
    lucky = sum(i["score"] == 1 and i["parsed"] is None for i in items if i["condition"] == "official")
    assert (
        lucky
        == found["mmmu", "official", "all"]["counts"]["correct"] - found["mmmu", "strict", "all"]["counts"]["correct"]
    )


def test_equal_runs_give_equal_bytes_and_the_finished_one_is_left_alone(scored, tmp_path, capsys):
    write_responses(tmp_path / "outputs", records())
    assert run("--responses", tmp_path / "outputs", "--out", tmp_path / "run") == 0
    for name in ("items.jsonl", "results.json", "checks.json"):
        assert (tmp_path / "run" / name).read_bytes() == (scored / name).read_bytes()
    before = (tmp_path / "run" / "results.json").stat().st_mtime_ns
    assert run("--responses", tmp_path / "outputs", "--out", tmp_path / "run") == 0
    assert (tmp_path / "run" / "results.json").stat().st_mtime_ns == before
    assert "random letters, expected at most" in " ".join(capsys.readouterr().out.split())


def test_answers_that_are_no_numbers_can_be_written(tmp_path):
    write_responses(
        tmp_path / "o", [open_record(response="nan"), open_record(number=2, response="the answer is 1e999")]
    )
    assert run("--responses", tmp_path / "o", "--out", tmp_path / "run", "--subjects", "Math") == 0
    assert read_jsonl(tmp_path / "run" / "items.jsonl")[0]["parsed"] == ["nan"]


def test_another_models_outputs_need_another_directory(scored, tmp_path, capsys):
    rest = records()
    rest[0] |= {"response": "something else"}
    write_responses(tmp_path / "outputs", rest)
    assert run("--responses", tmp_path / "outputs", "--out", scored) == 2
    assert "holds another run's results" in one_line_of(capsys)


# parsed answers


def write_predictions(folder, records):
    given = {r["id"]: r["response"] for r in records}
    known = {r["id"]: {"question_type": r["question_type"], "ground_truth": r["answer"]} for r in records}
    (folder / "given.json").write_text(json.dumps(given))
    (folder / "known.json").write_text(json.dumps(known))
    return "--predictions", folder / "given.json", "--answers", folder / "known.json"


def test_predictions_have_an_official_score_and_no_strict_one(tmp_path):
    files = write_predictions(
        tmp_path,
        [record(response="B"), record(number=2, response="A"), open_record(response="7.0", answer=["x", "7"])],
    )
    assert run(*files, "--out", tmp_path / "run") == 0
    found = results(tmp_path / "run")
    assert found["mmmu", "official", "all"]["counts"]["correct"] == 2
    assert found["mmmu", "official", "Art"]["value"] == 50 and found["mmmu", "official", "Math"]["value"] == 100
    strict = found["mmmu", "strict", "all"]
    assert strict["value"] is None and strict["n"] == 0 and strict["counts"]["unscored"] == 3
    assert "fallback" not in strict["counts"]


def test_predictions_say_nothing_about_broken_text_which_nobody_saw(tmp_path, capsys):
    files = write_predictions(tmp_path, [record(response="B"), open_record(response="7", answer="7")])
    runs = [tmp_path / "base", tmp_path / "rr"]
    for seed, folder in enumerate(runs):  # which decides no number here, so that it keeps no two runs apart
        assert run(*files, "--out", folder, "--subject", folder.name, "--seed", seed) == 0
    found = results(runs[0])
    assert {metric for metric, *_ in found} == {"mmmu"}
    assert not any("degenerate" in m["counts"] for m in found.values())
    checks = json.loads((runs[0] / "checks.json").read_text())
    assert "few broken completions" not in {check["name"] for check in checks}
    assert capsys.readouterr().out.splitlines()[1].split()[-1] == "–"
    rows = headline_table(combine([load_run(folder) for folder in runs]).measurements).rows
    assert "broken text" not in {row.label for row in rows if any(row.cells)}


@pytest.mark.parametrize(
    ("given", "known", "expected"),
    [
        ({"validation_Art_1": "B"}, {}, "`validation_Art_1` is not in it"),
        ({"validation_Art_1": "B"}, {"validation_Art_2": "B"}, "answer file of the same split and version"),
        ({}, {"validation_Art_2": "B"}, "`validation_Art_2` is missing"),
        ({}, {}, "at least one answer"),
        ({"validation_Art_1": 3}, {"validation_Art_1": "B"}, "must be a text"),
        ({"validation_Art_1": "B"}, {"validation_Art_1": "?"}, "withheld"),
        ({"validation_Art_1": "B", "dev_Art_1": "B"}, {"validation_Art_1": "B", "dev_Art_1": "B"}, "one split"),
        ({"validation_Kunst_1": "B"}, {"validation_Kunst_1": "B"}, "unknown MMMU subject `Kunst`"),
        ([], {}, "must hold an object"),
    ],
)
def test_predictions_that_do_not_fit_their_answer_file(tmp_path, capsys, given, known, expected):
    (tmp_path / "g.json").write_text(json.dumps(given))
    kind = "multiple-choice"
    answers = {id: {"question_type": kind, "ground_truth": letter} for id, letter in known.items()}
    (tmp_path / "k.json").write_text(json.dumps(answers))
    arguments = ("--predictions", tmp_path / "g.json", "--answers", tmp_path / "k.json", "--out", tmp_path / "run")
    assert run(*arguments) == 2
    assert expected in one_line_of(capsys)
    assert not (tmp_path / "run").exists()


# bad input


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ([], "give one of"),
        (["--responses", "x", "--predictions", "y"], "give one of"),
        (["--model", "miniature", "--responses", "x"], "write `mm-cb score mmmu --responses ... --out DIR`"),
        (["--predictions", "x"], "belong together"),
        (["--responses", "x", "--adapter", "a"], "unknown option `--adapter`"),
        (["--responses", "nowhere"], "30 MMMU subjects, `Accounting`, `Agriculture`"),
        (["--responses", "x", "--subjects", "Arts"], "unknown MMMU subject `Arts`, did you mean `Art`?"),
        (["--responses", "x", "--split", "dev"], "unknown option `--split`"),
        (["--responses", "x", "nonsense"], "unexpected `nonsense`: settings are flags"),
        (["--model", "miniature", "--split", "test"], "withheld"),
        (["--model", "miniature", "--prompt", "offcial"], "unknown prompt `offcial`, did you mean `official`?"),
        (["--model", "miniature", "--pictures", "all"], "unknown pictures `all`"),
        (["--model", "miniature", "--batch", "0"], "`--batch` must be a whole number from 1"),
        (["--model", "miniature", "--batch", "two"], "`--batch` must be a whole number"),
        (["--model", "miniature", "batch=2"], "write `--batch 2` instead of `batch=2`"),
        (["--model", "miniature", "--btch", "2"], "did you mean `--batch`?"),
    ],
)
def test_bad_command_lines(arguments, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(*arguments, "--out", "run") == 2
    assert expected in one_line_of(capsys)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "`Music` is missing; to score what is there: --subjects Art"),
        ("{", "output.json:1: expected a list of records"),
        ("{}", "must hold a list of records"),
        ("[]", "at least one record"),
        ('["x"]', "record 0 must be a JSON object"),
        (json.dumps([record("Art", 3)]), "must belong to subject Music"),
        (json.dumps([record("Music", 3, split="dev")]), "one split"),
        (json.dumps([record("Music", 3, answer="?")]), "withheld"),
        (json.dumps([record("Music", 3), record("Music", 3)]), "output.json, record 1: question"),
        (json.dumps([record("Music", 3), record("Music", 4), record("Music", 3)]), "record 2: question"),
        (json.dumps([record("Music", 3), record("Music", 3)]), "comes again, first at record 0"),
    ],
)
def test_bad_response_folders(content, expected, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mm_cb.benchmarks.mmmu.stored.chosen_subjects", lambda names: tuple(names) or ("Art", "Music"))
    write_responses(tmp_path / "o", [record("Art")])
    if content is not None:
        (tmp_path / "o" / "Music").mkdir()
        (tmp_path / "o" / "Music" / "output.json").write_text(content)
    assert run("--responses", tmp_path / "o", "--out", tmp_path / "run") == 2
    assert expected in one_line_of(capsys)
    assert not (tmp_path / "run").exists()


# the authors' own outputs, where a checkout of their repository is at hand

CHECKOUT = os.environ.get("MM_CB_MMMU_REPO")
"""A checkout of github.com/MMMU-Benchmark/MMMU; its outputs are not ours to ship."""
needs_checkout = pytest.mark.skipif(CHECKOUT is None, reason="set MM_CB_MMMU_REPO to a checkout of MMMU's repository")


@pytest.fixture
def official(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(CHECKOUT or "") / "mmmu"))
    import importlib

    module = importlib.import_module("utils.eval_utils")
    yield module
    for name in ("utils", "utils.eval_utils"):
        sys.modules.pop(name, None)


@needs_checkout
@pytest.mark.parametrize("model", sorted(OFFICIAL))
def test_official_outputs_give_the_official_answers_and_accuracies(model, official, tmp_path):
    folder = Path(CHECKOUT or "") / "mmmu" / "example_outputs" / model
    assert run("--responses", folder, "--out", tmp_path / "run") == 0
    items = {i["id"]: i for i in read_jsonl(tmp_path / "run" / "items.jsonl") if i["condition"] == "official"}
    assert len(items) == 900
    official.random.seed(42)
    for subject in protocol().subjects:
        outputs = json.loads((folder / subject / "output.json").read_text())
        for output in outputs:
            mine = items[output["id"]]
            if output["question_type"] == "multiple-choice":
                theirs = official.parse_multi_choice_response(
                    output["response"], output["all_choices"], output["index2ans"]
                )
                assert mine["letter"] == theirs
                assert mine["score"] == official.eval_multi_choice(output["answer"], theirs)
            else:
                theirs = official.parse_open_response(output["response"])
                assert set(mine["parsed"]) == set(theirs)
                assert mine["score"] == official.eval_open(output["answer"], theirs)
    found = results(tmp_path / "run")
    assert round(found["mmmu", "official", "all"]["value"] / 100, 3) == OFFICIAL[model]["overall"]
    correct = {subject: found["mmmu", "official", subject]["counts"]["correct"] for subject in protocol().subjects}
    assert correct == OFFICIAL[model]["correct"]
    assert not any(is_noise(item["completion"]) for item in items.values())  # strict loses no answer to it
    drawn = [[i["id"], i["letter"]] for i in items.values() if i["parsed"] is None]
    assert drawn == [[id, letter] for id, _, letter in OFFICIAL[model]["drawn"]]


@needs_checkout
@pytest.mark.parametrize(("model", "overall"), [("llava1.5_13b", 36.7), ("qwen_vl", 36.1)])
def test_official_predictions_give_the_official_accuracy(model, overall, tmp_path):
    root = Path(CHECKOUT or "") / "mmmu"
    predictions = root / "example_outputs" / model / "total_val_output.json"
    arguments = ("--predictions", predictions, "--answers", root / "answer_dict_val.json", "--out", tmp_path / "run")
    assert run(*arguments) == 0
    assert round(results(tmp_path / "run")["mmmu", "official", "all"]["value"], 1) == overall


def test_a_thought_in_front_of_a_stored_output_is_not_scored(tmp_path, capsys):
    exams = [record for record in records() if "_Art_" in record["id"]]
    said = ["(A)", "The answer is B.", "C"]
    plain = [{**one, "response": text} for one, text in zip(exams, said, strict=False)]
    thinks = [{**one, "response": f"<think>(D) {i}</think>\n{one['response']}"} for i, one in enumerate(plain)]
    items = []
    for name, those in (("plain", plain), ("thinks", thinks)):
        write_responses(tmp_path / name, those)
        out = tmp_path / f"run-{name}"
        assert run("--responses", tmp_path / name, "--subjects", "Art", "--out", out) == 0
        items.append(read_jsonl(out / "items.jsonl"))
    assert all("(D)" in item.pop("thought") for item in items[1]) and items[0] == items[1]
    assert "3 answers came with a thought" in " ".join(capsys.readouterr().out.split())
