"""Hold made runs against kept ones: bit for bit on the machine that made them, by their structure on another one."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from PIL import Image
from safetensors.torch import load_file

from mm_cb.attacks.checks import BALL
from mm_cb.metrics.table import WORST_GIVEN

IGNORED_KEYS = {"versions", "git", "hardware", "started", "ended", "resumed", "seconds", "schema", "seal", "files"}
"""When, where and how fast something ran, and how it is sealed. Paths are compared: all of them are relative."""
ADDED_KEYS = {"worst_case", "prefilled", "in_worst_case", "labels", "loss", "loss_settings", "fiction"}
ADDED_KEYS |= {"given", "knows_breaker", "settles", "target_outcome", "at_limit", "address", "matched", "run", "checks"}
ADDED_KEYS |= {
    "retain",
    "retain_scale",
    "schedule_steps",
    "start_distance",
    "stop_at_cosine",
    "shared_openings",
    "answer_ends",
    "lr_scheduler_type",
    "dial_from",
    "average_last",
}
ADDED_KEYS |= {
    "start_norm_2",
    "start_norm_4",
    "start_b",
    "start_b_rate",
    "start_reroute_gradient",
    "start_retain_gradient",
    "stuck",
}
"""What today's runs say beside what the frozen ones said."""
ADDED_CONDITIONS = tuple(WORST_GIVEN)
"""Measurements of results.json that today's runs have beside the frozen ones'."""
ADDED_VERDICTS = "target of "
"""Begins the key of a verdict that today's judges give beside the frozen ones': of a target alone."""
HASHED_ITEMS = "items.jsonl"
"""Hashes of such files, in run.json of what was made from a run: they have these keys now."""
MEASURED = ("items.jsonl", "results.json")
"""Of a battery: its arms are the same, but for its sweep over epsilon, and so are the checks that it still makes."""
ONLY_THERE = ("*.md",)
"""Files whose content is for people."""
UNORDERED = ("parts/*.jsonl", "judgements/*.jsonl")
"""Records in the order in which they came; a server answers in any order."""
FIRST = ("run.json", "metrics.jsonl", "adapter_model.safetensors", "items.jsonl", "results.json")
"""Files that are looked at before all others: the rest follows from them."""

IDENTITY = ("id", "metric", "subject", "condition", "split", "category", "prompt", "target", "beside", "seed")
"""What an item is about, on every machine."""
UNATTACKED = ("no_attack", "beside_no_attack", "official", "strict")
"""Conditions without an optimised picture: their completions and values are the same on every machine, and their losses
within `TOLERANCE`."""
STEP_0 = (
    *("reroute_loss", "retain_loss", "length_loss"),
    *("held_out_circuit_breaker_norm_reference", "held_out_retain_norm_reference"),
)
"""Numbers of the first training step, which no rounding of an earlier one has moved."""
TOLERANCE = 1e-3
"""Relative, for these numbers on another machine."""
BY_VERDICT = ("*-s0-r1*",)
"""Files of a second run, which only a behaviour gets that the first one did not break."""

Difference = str | None


def first_difference(kept: Path, made: Path, *, exact: bool) -> Difference:
    """The first difference of a run, as file, item and values; None where there is none.

    Args:
        kept: A frozen run.
        made: The run that should be like it.
        exact: Whether everything must be equal, or its structure.
    """
    names = [_names(folder, exact) for folder in (kept, made)]
    for text, found in (("is not written any more", names[0] - names[1]), ("is new", names[1] - names[0])):
        if found:
            return f"{sorted(found)[0]} {text} ({len(found)} such files)"
    compare = _exactly if exact else _by_structure
    for name in sorted(names[0], key=lambda name: (FIRST.index(name) if name in FIRST else len(FIRST), name)):
        if found_here := compare(name, kept / name, made / name):
            return f"{name}{found_here}"
    return None


def battery_difference(kept: Path, made: Path, *, exact: bool) -> Difference:
    """The first difference of a sanity battery in what it measures and in the checks that both have."""
    compare = _exactly if exact else _by_structure
    for name in MEASURED:
        if found := compare(name, kept / name, made / name):
            return f"{name}{found}"
    before, now = ({c["name"]: c for c in _read("checks.json", folder / "checks.json")} for folder in (kept, made))
    if absent := sorted(now.keys() - before.keys()):
        return f"checks.json: {absent[0]} is new"
    return _walk({name: before[name] for name in now}, now, "checks.json") if exact else None


def _names(folder: Path, exact: bool) -> set[str]:
    found = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    return found if exact else {name for name in found if not _matches(name, BY_VERDICT)}


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch(name, pattern) for pattern in patterns)


def _read(name: str, path: Path) -> Any:
    """A JSON file's value, or the records of a JSONL file."""
    if path.suffix == ".json":
        content = json.loads(path.read_bytes())
        if path.name == "results.json":
            content.pop("items", None)  # the hash of what is compared itself
            content["measurements"] = [m for m in content["measurements"] if m["condition"] not in ADDED_CONDITIONS]
        if path.name == "checks.json":  # the frozen ones counted clean pictures among the attacked
            content = [{k: v for k, v in one.items() if k != "value" or one["name"] != BALL} for one in content]
        return content
    records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    if not _unordered(name):
        return records
    shared = [one for one in records if not str(one.get("key")).startswith(ADDED_VERDICTS)]
    return sorted(
        shared, key=lambda one: json.dumps({k: v for k, v in one.items() if k not in ADDED_KEYS}, sort_keys=True)
    )


def _unordered(name: str) -> bool:
    return _matches(name, UNORDERED) or _matches(name, [f"*/{pattern}" for pattern in UNORDERED])


def _exactly(name: str, kept: Path, made: Path) -> Difference:
    if _matches(name, ONLY_THERE):
        return None
    if kept.suffix in (".json", ".jsonl"):
        return _walk(_read(name, kept), _read(name, made))
    if kept.suffix == ".safetensors":
        return _walk(_tensors(kept, exact=True), _tensors(made, exact=True))
    hashes = [hashlib.sha256(path.read_bytes()).hexdigest() for path in (kept, made)]
    return None if hashes[0] == hashes[1] else f": SHA-256 {hashes[0]} kept, {hashes[1]} made"


def _walk(kept: Any, made: Any, place: str = "") -> Difference:
    """Depth first, in the kept order."""
    if isinstance(kept, dict) and isinstance(made, dict):
        for key in [*kept, *(key for key in made if key not in kept)]:
            if key in IGNORED_KEYS or (key in ADDED_KEYS and key not in kept) or key.endswith(HASHED_ITEMS):
                continue
            if key not in made or key not in kept:
                return f"{place}, {key}: {'only kept' if key in kept else 'only made'}"
            if found := _walk(kept[key], made[key], f"{place}, {key}"):
                return found
        return None
    if isinstance(kept, list) and isinstance(made, list):
        for number, (one, other) in enumerate(zip(kept, made, strict=False)):
            if found := _walk(one, other, f"{place}, {_label(one, number)}"):
                return found
        return None if len(kept) == len(made) else f"{place}: {len(kept)} kept, {len(made)} made"
    same = type(kept) is type(made) and (kept == made or kept != kept and made != made)
    return None if same else f"{place}: {_short(kept)} kept, {_short(made)} made"


def _label(record: Any, number: int) -> str:
    """What a record is about, where it says so."""
    if not isinstance(record, dict):
        return f"[{number}]"
    about = [str(record[key]) for key in ("name", "key", "step", *IDENTITY[:5]) if record.get(key) is not None]
    return f"[{number}] ({' '.join(about)})" if about else f"[{number}]"


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."


def _tensors(path: Path, exact: bool) -> dict[str, str]:
    """Type, shape and, where they must be equal, the hash of every tensor."""
    found = {}
    for name, tensor in sorted(load_file(path).items()):
        content = f" {hashlib.sha256(tensor.contiguous().numpy().tobytes()).hexdigest()}" if exact else ""
        found[name] = f"{tensor.dtype} {tuple(tensor.shape)}{content}"
    return found


def _by_structure(name: str, kept: Path, made: Path) -> Difference:
    """What another machine must share: settings, items, keys, shapes, the first losses, answers to clean pictures."""
    if kept.suffix == ".png":
        return _walk(*(_picture(path) for path in (kept, made)))
    if kept.suffix == ".safetensors":
        return _walk(_tensors(kept, exact=False), _tensors(made, exact=False))
    if kept.suffix not in (".json", ".jsonl"):
        return None
    reduce = {"run.json": _settings, "items.jsonl": _items, "results.json": _addresses, "checks.json": _checks}
    contents = [_read(name, path) for path in (kept, made)]
    if Path(name).name == "metrics.jsonl":
        return _steps(*contents)
    if Path(name).name in reduce:
        found = _walk(*(reduce[Path(name).name](content) for content in contents))
        return found or (_losses(*contents) if Path(name).name == "items.jsonl" else None)
    return _walk(
        *(
            sorted(content.keys() - ADDED_KEYS - IGNORED_KEYS) if isinstance(content, dict) else type(content).__name__
            for content in contents
        )
    )


def _picture(path: Path) -> list[Any]:
    """The size; of a clean picture, which nobody has searched, the content as well."""
    with Image.open(path) as image:
        clean = path.name.endswith(".clean.png")
        return [*image.size, *([hashlib.sha256(image.tobytes()).hexdigest()] if clean else [])]


def _losses(kept: list[dict[str, Any]], made: list[dict[str, Any]]) -> Difference:
    """Of answers to pictures that nobody has searched, and of the clean picture of those that somebody has."""
    for number, (one, other) in enumerate(zip(kept, made, strict=True)):
        for key in ("loss_clean", *(("loss",) if one["condition"] in UNATTACKED else ())):
            values = one.get(key), other.get(key)
            if None not in values and not math.isclose(*values, rel_tol=TOLERANCE, abs_tol=1e-6):
                return f", {_label(one, number)}, {key}: {values[0]} kept, {values[1]} made"
    return None


def _settings(run: dict[str, Any]) -> dict[str, Any]:
    keys = {"keys": sorted(run.keys() - IGNORED_KEYS), "inputs": sorted(run["inputs"])}
    return keys | {key: run[key] for key in ("command", "recipe", "seed")}


def _items(items: list[dict[str, Any]]) -> list[dict[str, Any]]:
    shown = []
    for item in items:
        known = {key: item[key] for key in IDENTITY if key in item} | {"keys": sorted(item.keys() - ADDED_KEYS)}
        shown.append(known | ({"completion": item["completion"]} if item["condition"] in UNATTACKED else {}))
    return shown


def _addresses(results: dict[str, Any]) -> list[dict[str, Any]]:
    address = ("subject", "metric", "condition", "split", "n", "paired_with")
    return [
        {key: m[key] for key in (*address, *(("value",) if m["condition"] in UNATTACKED else ()))} | {"keys": sorted(m)}
        for m in results["measurements"]
    ]


def _checks(checks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{"name": check["name"], "keys": sorted(check)} for check in checks]


def _steps(kept: list[dict[str, Any]], made: list[dict[str, Any]]) -> Difference:
    for name in STEP_0:
        values = kept[0].get(name), made[0].get(name)
        if None in values or not math.isclose(*values, rel_tol=TOLERANCE, abs_tol=1e-6):
            return f", step 0, {name}: {values[0]} kept, {values[1]} made"
    keys = ([{"step": one["step"], "keys": sorted(one.keys() - ADDED_KEYS)} for one in steps] for steps in (kept, made))
    return _walk(*keys)
