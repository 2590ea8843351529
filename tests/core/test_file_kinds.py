"""A file of one of our formats is read by its own reader, and named by every other one."""

import json
from pathlib import Path

import pytest

from mm_cb.benchmarks.base import Benchmark, Question
from mm_cb.benchmarks.function_calling.questions import read_asked
from mm_cb.benchmarks.function_calling.stored import read_answers
from mm_cb.benchmarks.harmful_calls.rows import read_harmful_rows
from mm_cb.benchmarks.llava_wild.reviews import read_reviews
from mm_cb.benchmarks.over_refusal.data import read_requests
from mm_cb.benchmarks.pope import Pope, PopeAnswers, PopeSettings
from mm_cb.benchmarks.settings import StoredAnswers
from mm_cb.cli.options import read_system
from mm_cb.core.errors import UserError
from mm_cb.core.file_kinds import KINDS, kind_of
from mm_cb.data.benign import read_targets

EXAMPLES = Path(__file__).parents[2] / "data" / "examples"
LINES = {
    "items of a run": {"id": "1", "metric": "compliance", "subject": "base", "condition": "pgd", "prompt": "p"},
    "completions of a run": {"key": "1", "completion": "c"},
    "judgements of a run": {"key": "1", "outcome": "other"},
    "LLaVA-Wild reviews": {"question_id": 0, "category": "llava_bench_conv", "tuple": [8, 7]},
    "POPE questions": {"question_id": 1, "question": "?", "answer": "yes", "image": "a.png"},
    "stored answers": {"id": "1", "completion": "yes"},
    "imported prompts": {"id": "1", "messages": [], "source": "s"},
    "BFCL's right calls": {"id": "simple_python_0", "ground_truth": []},
}
FILES = {
    "behaviours": EXAMPLES / "behaviors.jsonl",
    "benign requests": EXAMPLES / "benign.jsonl",
    "harmful calls": EXAMPLES / "harmful_calls.jsonl",
    "POPE questions": EXAMPLES / "pope.jsonl",
    "BFCL answers": EXAMPLES / "call_answers.jsonl",
    "training rows": EXAMPLES / "rows.jsonl",
    "imported prompts": EXAMPLES / "prompts.jsonl",
    "BFCL questions": next((EXAMPLES / "calls").glob("*.json")),
}
ASKED = [Question("1", "?", reference="yes")]
READERS = {
    "benign requests": lambda file: read_requests(file),
    "harmful calls": lambda file: read_harmful_rows(str(file), None, split="validation", accepted=False),
    "POPE questions": lambda file: Pope().questions(str(file), PopeSettings(images=str(EXAMPLES / "pictures"))),
    "BFCL questions": lambda file: read_asked(str(file)),
    "BFCL answers": lambda file: read_answers([file]),
    "LLaVA-Wild reviews": lambda file: read_reviews(file),
    "stored answers": lambda file: Benchmark().stored_answers(StoredAnswers(answers=str(file)), ASKED),
    "stored answers of POPE": lambda file: Pope().stored_answers(PopeAnswers(answers=str(file)), ASKED),
    "targets": lambda file: read_targets(file),
    "system": lambda file: read_system(file),
}
ALSO = {
    ("stored answers", "BFCL answers"),
    ("stored answers", "stored answers of POPE"),
    ("benign requests", "harmful calls"),
}


@pytest.mark.parametrize("reader", READERS)
def test_a_file_of_another_format_is_named(reader, tmp_path):
    held = [(name, file.read_text()) for name, file in FILES.items()]
    held += [(name, json.dumps(record)) for name, record in LINES.items()]
    for number, (name, text) in enumerate(held):
        if name == reader or (name, reader) in ALSO:
            continue
        file = tmp_path / f"{number}.jsonl"
        file.write_text(text)
        with pytest.raises(UserError, match=f"{name}, read by `mm-cb"):
            READERS[reader](file)


@pytest.mark.parametrize("name", sorted(FILES.keys() & READERS.keys()))
def test_a_file_of_its_own_format_is_read(name):
    assert READERS[name](FILES[name])


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.name)
def test_no_format_is_taken_for_another(kind):
    assert kind_of(dict.fromkeys(kind.keys)).name == kind.name


@pytest.mark.parametrize(
    "record",
    [
        {"id": "1", "completion": "c", "prompt": "p"},
        {"id": "1", "completion": "c", "prompt": "p", "target": "t"},
        {"id": "1", "completion": "c", "messages": []},
    ],
)
def test_answers_may_hold_what_was_asked(record, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    assert READERS["stored answers"](tmp_path / "a.jsonl") == {"1": "c"}


@pytest.mark.parametrize(
    "record",
    [
        {"answer": "yes", "question": "?"},
        {"question_id": 1, "prompt": "?", "text": "yes", "answer_id": "x"},
        {"question_id": 1, "text": "yes", "label": "no"},
        {"id": 1, "prompt": "?", "text": "yes"},
    ],
)
def test_answers_to_popes_questions_come_in_many_layouts(record, tmp_path):
    (tmp_path / "a.jsonl").write_text(json.dumps(record))
    assert READERS["stored answers of POPE"](tmp_path / "a.jsonl") == {"1": "yes"}


@pytest.mark.parametrize("text", ["Sure .", '{"a": "target"', "[1] is it\n{x}", '{"role": "you are a cook"}'])
def test_plain_text_with_braces_is_plain_text(text, tmp_path):
    (tmp_path / "t.txt").write_text(text)
    assert read_system(tmp_path / "t.txt") == text
    if text.endswith("}"):  # a line in braces is no sentence to force
        with pytest.raises(UserError, match="looks like JSON"):
            read_targets(tmp_path / "t.txt")
    else:
        assert read_targets(tmp_path / "t.txt") == text.split("\n")


def test_an_operators_text_may_be_json_that_is_no_record(tmp_path):
    (tmp_path / "system.txt").write_text(json.dumps({"role": "clerk", "rules": ["be kind"]}, indent=1))
    assert read_system(tmp_path / "system.txt").startswith("{")
    for record in ({"id": "a", "prompt": "b", "target": "c"}, [{"rules": "be kind"}]):
        (tmp_path / "system.txt").write_text(json.dumps(record, indent=1))
        with pytest.raises(UserError, match="as plain text, it holds JSON"):
            read_system(tmp_path / "system.txt")
