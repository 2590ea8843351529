"""docs/add_a_benchmark.md and docs/add_a_judge.md: what they show works as it stands there."""

import json
import re
import shlex
from pathlib import Path

import pytest
from PIL import Image

import mm_cb
from mm_cb import cli
from mm_cb.benchmarks import registry as benchmarks
from mm_cb.core.progress import Progress
from mm_cb.core.runs import read_jsonl, write_json, write_jsonl
from mm_cb.judges import registry as judges
from mm_cb.judges.rejudge import rejudge
from mm_cb.metrics import table
from mm_cb.metrics.results import find, measure, read_results, write_results

DOCS = Path(__file__).resolve().parents[2] / "docs"


@pytest.fixture(autouse=True)
def as_before(monkeypatch, tmp_path):
    """The tables are those of a fresh process, before and after."""
    monkeypatch.chdir(tmp_path)
    for module, name in ((benchmarks, "_BENCHMARKS"), (judges, "_JUDGES"), (table, "_METRICS")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))


def block(page, language):
    return re.search(rf"```{language}\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), flags=re.DOTALL)[1]


@pytest.mark.parametrize(("page", "longest"), [("add_a_benchmark.md", 80), ("add_a_judge.md", 60)])
def test_pages_are_short(page, longest):
    assert len((DOCS / page).read_text(encoding="utf-8").splitlines()) <= longest


def stones():
    Path("stones.py").write_text(block("add_a_benchmark.md", "python"))
    Path("stones.jsonl").write_text(block("add_a_benchmark.md", "json"))
    for name, colour in (("red", (200, 30, 30)), ("blue", (30, 30, 200))):
        Image.new("RGB", (84, 42), colour).save(f"{name}.png")


def test_the_benchmark_of_the_page_is_asked_reported_and_scored():
    stones()
    write_jsonl(Path("answers.jsonl"), [{"id": "1", "completion": "Red."}, {"id": "2", "completion": ""}])
    for line in block("add_a_benchmark.md", "bash").splitlines():
        assert cli.run(shlex.split(line)[1:]) == 0, line
        table._METRICS.pop("stones", None)  # as in another process, which has never seen the file
        benchmarks._BENCHMARKS.pop("stones", None)
    assert ">stones</th>" in Path("report.html").read_text()
    theirs = find(read_results(Path("runs/theirs/results.json")), "theirs", "stones", "strict")
    assert (theirs.value, theirs.n, theirs.counts["unscored"]) == (100, 1, 1)
    items = read_jsonl(Path("runs/theirs/items.jsonl"))
    assert [item.get("reason") for item in items] == [None, "empty answer"]
    assert json.loads(Path("runs/base/metrics.json").read_text())[0]["label"] == "stones"


def test_the_benchmark_of_the_page_in_python(tmp_path):
    stones()
    found = mm_cb.evaluate("stones.py", "miniature", data="stones.jsonl", out="run", max_new_tokens=4, hint=" ?")
    assert found.find("stones").n == 2 and found.benchmark == "stones"
    assert read_jsonl(tmp_path / "run" / "items.jsonl")[0]["prompt"].endswith("? ?")
    with pytest.raises(Exception, match="did you mean `hint`"):
        mm_cb.evaluate("stones.py", "miniature", data="stones.jsonl", out="run", hnt="x")


def test_help_of_a_benchmark_in_a_file_shows_its_flags(capsys):
    stones()
    assert cli.run(["eval", "stones.py", "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--hint TEXT" in shown and "colours of stones" in shown and "--max-new-tokens N" in shown
    assert "Example: mm-cb eval stones.py " in shown


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "there is no such file"),
        ("1 / 0", "cannot be run: ZeroDivisionError"),
        ("x = 1", "must call `register_benchmark`"),
    ],
)
def test_files_that_register_nothing(content, expected, capsys):
    if content is not None:
        Path("mine.py").write_text(content)
    assert cli.run(["eval", "mine.py", "--model", "miniature", "--data", "d", "--out", "o"]) == 2
    line = capsys.readouterr().err
    assert expected in line and line.count("\n") == 1


def test_a_fault_in_a_users_file_is_the_users(capsys):
    stones()
    code = Path("stones.py").read_text()
    Path("stones.py").write_text(code.replace("completion.lower()", "completion.lowr()"))
    (ask, *_) = block("add_a_benchmark.md", "bash").splitlines()
    assert cli.run(shlex.split(ask)[1:]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"`stones.py`, line \d+, in `score`: AttributeError: .*lowr", line)
    Path("stones.py").write_text(code)  # mended, the same command goes on
    assert cli.run(shlex.split(ask)[1:]) == 0


@pytest.mark.parametrize("came", ["0.5", "None", '{"strict": 1}', 'Score("1")', 'Score(1.0, counts={"said": "yes"})'])
def test_a_score_that_is_none_is_the_users_mistake(came, capsys):
    stones()
    code = Path("stones.py").read_text()
    Path("stones.py").write_text(code.replace("return Score(float", f"return {came}\n        return Score(float"))
    write_jsonl(Path("answers.jsonl"), [{"id": "1", "completion": "Red."}, {"id": "2", "completion": "Blue."}])
    assert cli.run(["score", "stones.py", "--data", "stones.jsonl", "--answers", "answers.jsonl", "--out", "o"]) == 2
    line = capsys.readouterr().err
    assert "`score` must give a `Score`" in line and "question `1`" in line and line.count("\n") == 1


@pytest.mark.parametrize(("field", "came"), [("category", "3"), ("id", "7"), ("prompt", "None")])
def test_a_question_whose_texts_are_none_is_the_users_mistake(field, came, capsys):
    stones()
    code = Path("stones.py").read_text()
    asked = f"replace(found[0], {field}={came})"
    code = code.replace("        return found\n", f"        return [{asked}, *found[1:]]\n")
    Path("stones.py").write_text(code.replace("import dataclass\n", "import dataclass, replace\n"))
    write_jsonl(Path("answers.jsonl"), [{"id": "1", "completion": "Red."}, {"id": "2", "completion": "Blue."}])
    assert cli.run(["score", "stones.py", "--data", "stones.jsonl", "--answers", "answers.jsonl", "--out", "o"]) == 2
    line = capsys.readouterr().err
    assert f"a text as `{field}`, got {came}" in line and line.count("\n") == 1


def test_a_file_holds_one_benchmark(capsys):
    stones()
    again = "class More(Stones):\n    name = 'more'\n\n\nregister_benchmark(More())\n"
    Path("two.py").write_text(Path("stones.py").read_text() + again)
    assert cli.run(["eval", "two.py", "--model", "miniature", "--data", "stones.jsonl", "--out", "o"]) == 2
    assert "must call `register_benchmark` once, it registers 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "other", "expected"),
    [
        ("    name = ", "    name = 'mmmu'  # ", "the benchmark `mmmu` has the name of mm-cb's own"),
        ('Metric("stones"', 'Metric("pope"', "the metric `pope` has the name of mm-cb's own"),
    ],
)
def test_a_benchmark_and_its_metrics_have_names_of_their_own(line, other, expected, capsys):
    stones()
    code = Path("stones.py").read_text()
    assert line in code
    Path("stones.py").write_text(code.replace(line, other))
    assert cli.run(["eval", "stones.py", "--model", "miniature", "--data", "stones.jsonl", "--out", "o"]) == 2
    assert expected in capsys.readouterr().err


def test_help_shows_a_default_of_zero(capsys):
    stones()
    code = Path("stones.py").read_text()
    Path("stones.py").write_text(code.replace("    hint: str", '    slack: int = setting(0, "Off by.")\n    hint: str'))
    assert cli.run(["eval", "stones.py", "--help"]) == 0
    assert "Off by. [default: 0]" in " ".join(capsys.readouterr().out.split())


def attack_run(folder):
    texts = ["no .", "take this and that , then chant", ""]
    items = [
        {"id": str(n), "metric": "compliance", "subject": "base", "condition": "pgd", "split": "all", "category": "c",
         "prompt": "ask", "completion": text, "outcome": "not_judged", "gibberish": False, "image": None}
        for n, text in enumerate(texts)
    ]  # fmt: skip
    folder.mkdir(parents=True)
    write_json(folder / "run.json", {"command": "attack", "recipe": {}, "seed": 0, "ended": "now", "inputs": {}})
    write_jsonl(folder / "items.jsonl", items)
    write_results(folder / "results.json", measure(items, pairs=[]))
    for name in ("checks.json", "curves.json"):
        write_json(folder / name, [])
    write_json(folder / "protocol.json", {})
    return folder


def test_the_judge_of_the_page_judges_a_run(capsys):
    Path("length_judge.py").write_text(block("add_a_judge.md", "python"))
    folder = attack_run(Path("runs/attack"))
    (line,) = block("add_a_judge.md", "bash").splitlines()
    assert cli.run(shlex.split(line)[1:]) == 0
    assert "By length (proxy): a proxy sees" in " ".join(capsys.readouterr().out.split())
    assert [item["outcome"] for item in read_jsonl(folder / "items.jsonl")] == ["refusal", "harmful", "gibberish"]
    m = find(read_results(folder / "results.json"), "base", "compliance", "pgd")
    assert m.n == m.counts["proxy"] == 3 and round(m.value) == 33
    with Progress() as progress:
        opened = judges.open_judge(judges.JudgeOptions("length"))
        rejudge(str(folder), opened, progress=progress)
    assert len(read_jsonl(folder / "judgements" / "length__proxy_.jsonl") or [1, 2, 3]) == 3


@pytest.mark.parametrize(
    ("verb", "names"),
    [
        ("eval", ["mmmu", "llava-wild", "pope", "function-calling", "harmful-calls", "over-refusal"]),
        ("judge", judges.judge_names),  # tests before this one may have added some
    ],
)
def test_lists_say_what_each_is_and_needs(verb, names, capsys):
    names = names() if callable(names) else names
    assert cli.run([verb, "--list"]) == 0
    shown = capsys.readouterr().out
    assert [line for line in shown.splitlines() if line[0] != " "] == names
    assert shown.count("\n    needs ") == len(names)


def test_a_users_benchmark_may_change_the_working_directory_as_it_is_read(tmp_path, capsys):
    stones()
    Path("else").mkdir()
    code, moves = Path("stones.py").read_text(), f"__import__('os').chdir({str(tmp_path / 'else')!r})"
    Path("stones.py").write_text(f"{moves}\n{code}")
    ask = ["eval", "stones.py", "--model", "miniature", "--data", "stones.jsonl", "--out", "runs/stones"]
    assert cli.run([*ask, "--max-new-tokens", "2"]) == 0, capsys.readouterr().err
    assert (tmp_path / "runs" / "stones" / "results.json").is_file() and not list((tmp_path / "else").iterdir())
