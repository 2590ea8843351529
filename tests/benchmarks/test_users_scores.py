"""What a benchmark of the user's gives is checked before anything is written: the corrected file goes on."""

import json
import re

import pytest

from mm_cb import cli
from mm_cb.benchmarks import registry
from mm_cb.core.runs import read_jsonl
from mm_cb.metrics import table
from mm_cb.metrics.results import read_results

FILE = """
import numpy as np
from mm_cb.benchmarks.base import Benchmark, Question, Score
from mm_cb.benchmarks.registry import register_benchmark
from mm_cb.metrics.table import Metric

class Mine(Benchmark):
    name, title, about, needs = "mine", "Mine", "a test", "nothing"
    metrics = (Metric("mine", "mine", "share of right answers"),)
    dataset = "nothing"

    def questions(self, data, settings):
        return [Question(id, f"what is the colour of {{id}} ?") for id in "ab"]

    def score(self, question, completion):
        return Score(1.0) if question.id == "a" else {given}
{more}
register_benchmark(Mine())
"""
GOOD = "Score(0.0)"


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """Runs the benchmark that scores the second question so; exit code and error line."""
    answers = tmp_path / "answers.jsonl"
    answers.write_text("".join(json.dumps({"id": id, "completion": "red"}) + "\n" for id in "ab"))
    (tmp_path / "data").write_text("x")

    def run(given, more="", *, stored=False):
        for module, name in ((registry, "_BENCHMARKS"), (table, "_METRICS")):
            monkeypatch.setattr(module, name, {k: v for k, v in getattr(module, name).items() if k != "mine"})
        (tmp_path / "mine.py").write_text(FILE.format(given=given, more=more))
        words = [str(tmp_path / "mine.py"), "--data", str(tmp_path / "data"), "--out", str(tmp_path / "run")]
        asked = ["score", *words, "--answers", str(answers)]
        asked = asked if stored else ["eval", *words, "--model", "miniature", "--max-new-tokens", "2"]
        return cli.run(asked), capsys.readouterr().err

    return run


REFUSED = [
    *("Score(1.0, parsed=float('nan'))", "Score(True)", "None"),
    *("Score(np.bool_(True))", "Score(float('nan'))"),
    *("Score(float('inf'))", "Score(1.5)", "Score('1')", "Score(1.0, counts={'x': True})", "1.0"),
    *("Score(1.0, counts={'x': float('nan')})", "Score(1.0, counts=[1])"),
    *("Score(1.0, counts={1: 1})", "Score(1.0, parsed={1, 2})"),
    "Score(None, reason=7)",
]


@pytest.mark.parametrize(
    ("given", "stored"),  # of a model's answers some: they are scored by the same lines
    [*((given, True) for given in REFUSED), *((given, False) for given in REFUSED[:3])],
)
def test_a_score_that_cannot_be_kept_is_refused_and_the_corrected_file_goes_on(given, stored, command, tmp_path):
    code, said = command(given, stored=stored)
    assert code == 2 and said.count("\n") == 1 and "Traceback" not in said, said
    assert "mine.py" in said and re.search("question `b`", said) and "`score` must give" in said, said
    assert not (tmp_path / "run" / "items.jsonl").exists()
    assert command(GOOD, stored=stored) == (0, "")
    assert [item["score"] for item in read_jsonl(tmp_path / "run" / "items.jsonl")] == [1.0, 0.0]
    (found,) = (m for m in read_results(tmp_path / "run" / "results.json") if m.split == "all" and m.metric == "mine")
    assert found.value == 50


@pytest.mark.parametrize(
    "given",
    ["Score(np.float32(0.5), counts={'x': np.int64(1)})", "Score(np.mean([0, 1]))", "Score(np.float64(0.5), 1)"],
)
def test_numpys_numbers_are_numbers(given, command, tmp_path):
    assert command(given, stored=True) == (0, "")
    items = read_jsonl(tmp_path / "run" / "items.jsonl")
    assert [item["score"] for item in items] == [1.0, 0.5] and all(type(item["score"]) is float for item in items)


@pytest.mark.parametrize(
    "more",
    [
        "    def items(self, session): return [{**i, 'score': True} for i in super().items(session)]",
        "    def items(self, session): return [{**i, 'score': float('nan')} for i in super().items(session)]",
        "    def items(self, session): return [{**i, 'gibberish': 1} for i in super().items(session)]",
        "    def items(self, session): return [{'score': 1.0} for i in super().items(session)]",
        "    def checks(self, session): return [{'name': 'x', 'passed': np.bool_(True)}]",
    ],
)
def test_so_are_lines_that_the_users_own_code_writes(more, command, tmp_path):
    code, said = command(GOOD, more)
    assert code == 2 and said.count("\n") == 1 and "mine.py" in said, said
    assert not (tmp_path / "run" / "items.jsonl").exists()
    assert command(GOOD) == (0, "")
