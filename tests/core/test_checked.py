"""Reading records: whatever is missing or of another type is told with file, line and key."""

import dataclasses
import json
import typing
from pathlib import Path

import pytest

from mm_cb.attacks.records import Artefact
from mm_cb.core.checked import checked, made, read_list, read_record, read_records
from mm_cb.core.errors import UserError
from mm_cb.core.files import write_json
from mm_cb.core.records import Agreement, Check, Completion, Curve, Item, Representations, Run, StoredVerdict, Timing
from mm_cb.core.runs import read_run
from mm_cb.metrics.results import Measurement, read_results
from mm_cb.metrics.table import Metric

KINDS = (Agreement, Check, Completion, Curve, Item, Measurement, Representations, Run, StoredVerdict, Timing)
FROZEN = Path(__file__).parent.parent / "frozen"
EXAMPLES = {str: "a", int: 1, float: 0.5, bool: True, typing.Any: None}


def example_of(kind):
    """A value of the type, as JSON holds it, with every key."""
    if kind in EXAMPLES:
        return EXAMPLES[kind]
    inner = typing.get_args(kind)
    origin = typing.get_origin(kind)
    if origin is tuple:
        return [example_of(one) for one in inner if one is not ...]
    if origin is list:
        return [example_of(inner[0])]
    if origin is not None and issubclass(origin, typing.Mapping):
        return {"a": example_of(inner[1])}
    if inner:
        return example_of(inner[0])
    return {name: example_of(field) for name, field in typing.get_type_hints(kind).items()}


@pytest.mark.parametrize("kind", KINDS)
def test_every_key_holds_values_of_its_own_type(kind):
    whole = example_of(kind)
    assert checked(whole, kind, "f:1") == whole
    for key, field in typing.get_type_hints(kind).items():
        if field is not typing.Any:
            with pytest.raises(UserError, match=rf"^f:1: `{key}[^`]*` must be "):
                checked({**whole, key: [[None]]}, kind, "f:1")  # fits no type but that


@pytest.mark.parametrize("kind", KINDS)
def test_a_required_key_is_missed_and_any_other_is_not(kind):
    whole = example_of(kind)
    required = getattr(kind, "__required_keys__", None)
    if required is None:
        nothing = dataclasses.MISSING
        required = {f.name for f in dataclasses.fields(kind) if f.default is f.default_factory is nothing}
    for key in whole:
        rest = {name: value for name, value in whole.items() if name != key}
        if key in required:
            with pytest.raises(UserError, match=rf"^f:1 must hold .*; it lacks {key}\."):
                checked(rest, kind, "f:1")
        else:
            assert checked(rest, kind, "f:1") == rest
    assert checked({**whole, "of_a_later_version": 1}, kind, "f:1")


def test_a_required_key_is_missed_where_annotations_are_put_off():
    """Python's own list of them is empty in such a module."""
    with pytest.raises(UserError, match=r"it lacks id, clean_sha256, "):
        checked({"sha256": "a"}, Artefact, "f:1")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"candidates": [{}, {"epsilon": "8"}]}, r"`candidates\[1\]\.epsilon` must be a whole number, got \"8\""),
        ({"candidates": [3]}, r"`candidates\[0\]` must be an object, got 3"),
        ({"counts": {"tp": 0.5}}, r"`counts\.tp` must be a whole number, got 0\.5"),
        ({"score": True}, "`score` must be a number or null, got true"),
    ],
)
def test_what_lies_deeper_is_named_by_its_place(change, said, tmp_path):
    item = {"id": "a", "metric": "m", "subject": "base", "condition": "c"}
    (tmp_path / "items.jsonl").write_text(f"{json.dumps(item)}\n\n{json.dumps(item | change)}\n")
    with pytest.raises(UserError, match=f"items.jsonl:3: {said}"):
        read_records(tmp_path / "items.jsonl", Item)


def test_a_list_names_its_entry_and_no_file_is_no_record(tmp_path):
    assert read_list(tmp_path / "checks.json", Check) == read_records(tmp_path / "items.jsonl", Item) == []
    check = {"name": "n", "passed": True, "value": "v", "expected": "e", "why": "w"}
    write_json(tmp_path / "checks.json", [check, {**check, "why": 1}])
    with pytest.raises(UserError, match="checks.json`, entry 2: `why` must be a text, got 1"):
        read_list(tmp_path / "checks.json", Check)
    with pytest.raises(UserError, match="absent.json` must be a file with a JSON object, there is none"):
        read_record(tmp_path / "absent.json", Check)
    for content, said in (("{}", "must hold a JSON list, got dict"), ("[" * 100_000, "must be readable JSON")):
        (tmp_path / "checks.json").write_text(content)
        with pytest.raises(UserError, match=said):
            read_list(tmp_path / "checks.json", Check)


def test_a_dataclass_is_made_of_what_it_knows():
    again = made({"name": "f1", "label": "F1", "columns": ["tp", "fp"], "of_a_later_version": 1}, Metric, "f")
    assert again == Metric("f1", "F1", columns=("tp", "fp"))
    held = {"subject": "s", "metric": "m", "condition": "c", "split": "all", "value": 1.0, "n": 1, "ci95": [1.0]}
    with pytest.raises(UserError, match="`ci95` must be a list of 2, got 1"):
        made(held, Measurement, "f")


def test_what_revision_714213b_wrote_is_read():
    runs = [file.parent for file in FROZEN.rglob("run.json")]
    assert len(runs) > 10
    for folder in runs:
        read_run(folder)
        read_records(folder / "items.jsonl", Item)
        read_records(folder / "timings.jsonl", Timing)
        read_list(folder / "checks.json", Check)
        read_list(folder / "curves.json", Curve)
        read_list(folder / "judgements" / "agreement.json", Agreement)
        for file in (folder / "images").glob("*/*.json"):
            read_record(file, Artefact)
        read_records(folder / "parts" / "completions.jsonl", Completion)
        for file in (folder / "judgements").glob("*.jsonl"):
            read_records(file, StoredVerdict)
        if (folder / "results.json").is_file():
            assert read_results(folder / "results.json")


@pytest.mark.parametrize("kind", [float, int])
def test_a_number_that_no_float_holds_is_refused(kind):
    of = typing.TypedDict("of", {"n": kind})  # noqa: UP013 (the type is the parameter)
    with pytest.raises(UserError, match="64 bits"):
        checked({"n": 10**400}, of, "x.json")
    assert checked({"n": 2**63 - 1}, of, "x.json")
