"""Part of ``mm-cb attack verify``: losses and answers of the saved pictures, and verdicts, each made again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mm_cb.attacks.judged_files import Judge, base_nll, complete, read_pictures, to_pixels
from mm_cb.attacks.objectives.adaptive import AdaptiveObjective
from mm_cb.attacks.objectives.target import Objective, TargetObjective, encode
from mm_cb.attacks.registry import Attack
from mm_cb.attacks.run import judge_of
from mm_cb.attacks.search import make_objective
from mm_cb.core.embedded import embedded
from mm_cb.core.errors import UserError
from mm_cb.core.paths import safe_id
from mm_cb.core.runs import read_jsonl
from mm_cb.data.behaviors_file import KEPT_AS, Behavior
from mm_cb.inference.subjects import Subject
from mm_cb.inference.tolerance import tolerance
from mm_cb.judges.rejudge import AS_RUN, FOLDER
from mm_cb.metrics.agreement import completions_of, key_of

NUMBERS = {
    "loss": "target loss",
    "objective_file": "objective",
    "loss_clean": "target loss of the clean picture",
    "nll_base": "loss of the answer under the base model",
}
"""What is computed again of a picture: key of its JSON -> what it is."""


@dataclass(frozen=True)
class Again:
    """What a file was found to hold."""

    numbers: Mapping[str, float | None]
    """By their name in the picture's JSON."""
    other: bool
    """Whether the answer is another one than stored; its loss under the base model is then not known."""

    def disagreements(self, artefact: Mapping[str, Any], dtype: str) -> list[str]:
        """One phrase per number that is not the recorded one."""
        wrong = []
        for key, found in self.numbers.items():
            told = artefact[key]
            allowed = tolerance(max(abs(found or 0), 1) if key == "nll_base" else found or 0, dtype)
            if told is None or found is None or not round(abs(found - told), 6) <= allowed:
                wrong += [] if told is found is None else [f"{NUMBERS[key]} {told} recorded, {found} found"]
        return wrong


def compute_again(subject: Subject, group: Sequence[dict[str, Any]], folder: Path) -> list[Again]:
    """Losses and answers per file of one attack and one size."""
    behaviors = [Behavior(a["id"], a["prompt"], a["target"], None) for a in group]
    clean = read_pictures([a["clean_image"] for a in group], folder)
    subject = Subject(subject.name, subject.model, subject.adapted, group[0]["subject"].get("system"))
    attack = Attack(**{**group[0]["attack"], "canvas": tuple(group[0]["attack"]["canvas"])})
    target = TargetObjective(subject, behaviors, clean)
    objective: Objective = target
    if group[0].get("response") is not None:
        objective = make_objective(subject, behaviors, clean, attack, [a["response"] for a in group])
        assert isinstance(objective, AdaptiveObjective)
        objective.weight = torch.tensor([a["weight"] for a in group], device=subject.model.device)
    attacked = read_pictures([a["image"] for a in group], folder)
    saved = encode(subject, behaviors, attacked, None)
    assert saved.pixel_values is not None
    pixels = torch.stack([to_pixels(picture) for picture in clean]).to(subject.model.device)
    with torch.no_grad():
        losses = target.loss(saved.pixel_values), objective.loss(saved.pixel_values), target(pixels)
    said = complete(subject, behaviors, attacked, attack)
    likely = base_nll(subject, behaviors, clean, said)
    again = []
    for i, artefact in enumerate(group):
        numbers: dict[str, float | None] = {
            key: round(float(loss[i]), 5) for key, loss in zip(NUMBERS, losses, strict=False)
        }
        other = hashlib.sha256(said[i].encode()).hexdigest() != artefact["completion_sha256"]
        again.append(Again(numbers if other else numbers | {"nll_base": likely[i]}, other))
    return again


def check_verdicts(folder: Path, model: str) -> str:
    """Hold verdicts to the judge's file in judgements/, and the run's own to the exact judge of an embedded model.

    The completions themselves are those of `check_items`: they hash to what the pictures' JSON states.

    Returns:
        One line: whose verdicts they are, how many were judged again, or why none was.

    Raises:
        UserError: If a verdict is another one than the judge's, or verdicts of several judges are mixed.
    """
    items = read_jsonl(folder / "items.jsonl")
    judge = _judge_of(folder, items)
    told = "verdicts were not checked" if judge is None else f"verdicts are those of {judge} as in {FOLDER}/"
    if embedded(model) is None:
        return f"{told}; there is no exact judge for `{model}`"
    if not (folder / KEPT_AS).is_file():
        return f"{told}; without {KEPT_AS} the exact judge does not know what was asked"
    judge_again = judge_of(model)
    asked = {behavior.id: behavior for behavior in kept_behaviors(folder)}
    again = [
        _agrees(folder, item, one, asked[item["id"]], judge_again)
        for item in as_run(folder, items)
        for one in completions_of(item)
    ]
    unruled = f"; the judge has no rule for the other {len(again) - sum(again)}" if sum(again) < len(again) else ""
    whose = "" if judge is None else f"{told}; of the run's own: "
    return f"{whose}{sum(again)} of {len(again)} verdicts judged again, the same{unruled}"


def as_run(folder: Path, items: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Items with the verdicts that were given when the run was made, which `mm-cb judge` keeps."""
    if not any("judge" in item for item in items):
        return list(items)
    path = folder / FOLDER / f"{AS_RUN}.jsonl"
    own = {record["key"]: record["outcome"] for record in read_jsonl(path)}
    return [
        item | {"candidates": [c | {"outcome": _kept(own, path, item, c)} for c in item["candidates"]]}
        for item in items
    ]


def _judge_of(folder: Path, items: Sequence[Mapping[str, Any]]) -> str | None:
    """Whose verdicts the items carry, after they were compared with that judge's; None = the run's own."""
    judges = {item.get("judge") for item in items}
    if judges <= {None}:
        return None
    if len(judges) > 1:
        named = ", ".join(sorted("the run's own" if judge is None else str(judge) for judge in judges))
        raise UserError(f"`{folder / 'items.jsonl'}` must carry the verdicts of one judge, it mixes those of: {named}.")
    judge = str(judges.pop())
    path = folder / FOLDER / f"{safe_id(judge)}.jsonl"
    given = {record["key"]: (record["outcome"], record["score"]) for record in read_jsonl(path)}
    for item in items:
        for one in completions_of(item):
            if (one.get("outcome"), one.get("judge_score")) != _kept(given, path, item, one):
                raise UserError(
                    f"`{path}` has another verdict on the answer to `{one.get('image')}` ({item['id']}, "
                    f"{item['condition']}) than items.jsonl. Do not use the run's numbers; give `mm-cb judge` again."
                )
    return judge


def _kept(verdicts: Mapping[str, Any], path: Path, item: Mapping[str, Any], one: Mapping[str, Any]) -> Any:
    key = key_of(item, one)
    if key not in verdicts:
        raise UserError(
            f"`{path}` must hold a verdict on every answer, it lacks the one to `{one.get('image')}` ({item['id']}, "
            f"{item['condition']})."
        )
    return verdicts[key]


def kept_behaviors(folder: Path) -> list[Behavior]:
    """What a run asked, from the copy of its behaviours file; pictures are the run's own, so none is named."""
    lines = [json.loads(line) for line in (folder / KEPT_AS).read_text(encoding="utf-8").split("\n") if line.strip()]
    return [
        Behavior(b["id"], b["prompt"], b["target"], None, str(b.get("category", "all")), str(b.get("split", "all")), b)
        for b in lines
    ]


def _agrees(folder: Path, item: Mapping[str, Any], one: Mapping[str, Any], asked: Behavior, judge: Judge) -> bool:
    """Whether a verdict was judged again; False for what the judge has no rule for."""
    found = judge(asked, one["completion"])
    if "not_judged" in (found, one.get("outcome")):
        return False
    if found != one["outcome"]:
        raise UserError(
            f"`{folder / 'items.jsonl'}` calls the answer to `{one.get('image')}` ({item['id']}, {item['condition']}) "
            f"{one['outcome']}, judged again it is {found}. Do not use the run's numbers."
        )
    return True
