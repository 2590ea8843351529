"""What is written down of an attack: one record per judged picture, one item per behaviour, curves of the losses."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_cb.attacks.judged_files import clean_name
from mm_cb.attacks.registry import Attack, Protocol, tries
from mm_cb.attacks.search import Found
from mm_cb.data.behaviors_file import Behavior
from mm_cb.metrics.observations import rank

Record = dict[str, Any]


def one_per_answer(record: Record) -> list[Record]:
    """A picture's record and, for every answer drawn at random, a copy that holds this answer as its ``sample``."""
    drawn = record.pop("samples", [])
    return [record, *(record | one | {"sample": i, "curve": None} for i, one in enumerate(drawn, start=1))]


def seen_before(left: Mapping[int | None, Tensor], step: int, row: int) -> bool:
    """Whether a behaviour's picture at a step is the one of the kept step before: it has stopped."""
    earlier = [s for s in left if s is not None and s < step]
    return bool(earlier) and torch.equal(left[max(earlier)][row], left[step][row])


def logged(found: Found | None, step: int | None, row: int) -> Record:
    """What the search said about this picture: the loss it had there, and for the selected one the whole curve.

    ``selected_step`` is the selected picture's place in that curve, 0 = the start; ``zero_gradients`` is the share of
    steps whose gradient was exactly zero, said only where there were any.
    """
    if found is None:
        return {"objective_logged": None, "curve": None}
    curve = found.result.curves[0, :, row].tolist()
    if step is not None:
        return {"objective_logged": round(curve[step], 5), "curve": None}
    selected = int(found.result.per_restart.steps[0, row])
    zeros = float(found.result.zero_gradients[0, :, row].float().mean())
    record = {"objective_logged": round(curve[selected], 5), "selected_step": selected}
    record["curve"] = [round(value, 4) for value in curve]
    return record | ({"zero_gradients": round(zeros, 4)} if zeros else {})


def make_item(
    subject: str, attack: Attack, protocol: Protocol, behavior: Behavior, candidates: Sequence[Record]
) -> Record:
    """One record of items.jsonl: the worst case over the restarts (harmful first, then the lowest loss)."""
    worst = min(candidates, key=rank)
    shown = ("restart", "image", "epsilon", "loss", "objective_file", "objective_logged", "completion", "outcome")
    further = [
        key
        for key in ("iterate", "sample", "nll_base", "selected_step", "zero_gradients", "distance")
        if any(key in candidate for candidate in candidates)
    ]
    item = {
        "id": behavior.id,
        "metric": "compliance",
        "subject": subject,
        "condition": attack.name,
        "split": behavior.split,
        "category": behavior.category,
        "prompt": behavior.prompt,
        "target": behavior.target,
        "completion": worst["completion"],
        "outcome": worst["outcome"],
        "score": None,
        "gibberish": worst["outcome"] == "gibberish",
        "seed": attack.seed,
        "image": worst["image"],
        "clean_image": clean_name(behavior),
        "loss": worst["loss"],
        "loss_clean": worst["loss_clean"],
        "prefix_emitted": worst["prefix_emitted"],
        "candidates": [{key: c.get(key) for key in (*shown, *further)} for c in candidates],
    }
    if protocol.artefacts:
        item |= {"nll_base": worst.get("nll_base"), **facts(attack, protocol)}
    if behavior.extra.get("benign_target"):
        item["benign_target"] = True
    if protocol.early_stop:
        item["stopped_early"] = stopped_early(candidates, attack.steps)
    return item


def facts(attack: Attack, protocol: Protocol) -> Record:
    """What an item says of its attack's protocol."""
    fixed = {"k": tries(attack, protocol), "early_stop": protocol.early_stop}
    return fixed | {"relaxation": attack.kind.relaxation}


def stopped_early(candidates: Sequence[Mapping[str, Any]], steps: int) -> bool:
    """Whether a run was ended by the verdict on one of its iterates, before its last step."""
    greedy = [one for one in candidates if not one.get("sample")]
    return any(one["outcome"] == "harmful" and (one.get("iterate") or steps) < steps for one in greedy)


def curves(folder: Path, attack_name: str) -> list[list[float]]:
    """Loss curves of the first run of every behaviour under one attack, in the order they were attacked."""
    found = []
    for path in sorted((folder / "parts").glob(f"{attack_name}-s*-r0-*.json")):
        found += [record["curve"] for record in json.loads(path.read_bytes()) if record["curve"] is not None]
    return found
