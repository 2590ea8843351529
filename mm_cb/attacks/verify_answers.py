"""Recorded answers again, for ``mm-cb attack verify``: what the attack's own code says of a picture or a text now."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mm_cb.attacks import texts
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.judged_files import Asked, judge_files
from mm_cb.attacks.objectives.adaptive import AdaptiveObjective
from mm_cb.attacks.objectives.target import Objective, TargetObjective
from mm_cb.attacks.records import Answer, Artefact
from mm_cb.attacks.saved import SavedPicture, by_size, clean_name, images, read
from mm_cb.attacks.search import make_objective
from mm_cb.core.errors import UserError
from mm_cb.data.behaviors_file import Behavior
from mm_cb.data.prompts_file import ImportedPrompt
from mm_cb.inference.subjects import Subject
from mm_cb.inference.tolerance import dtype_of, tolerance

AGAIN = "Do not use the run's numbers; run the attack again."
_NUMBERS = ("epsilon", "distance", "loss", "objective_file", "loss_clean")


@dataclass(frozen=True)
class Recorded:
    """A greedy answer as a run recorded it."""

    config: AttackConfig
    behavior: Behavior
    answer: Answer
    """In items.jsonl."""
    told: Artefact | None
    """In the JSON beside its picture; None of an answer to a text."""

    @property
    def name(self) -> str:
        """The picture in the run's folder, or the behaviour and its attack where there is none."""
        prompt = f", prompt {self.answer.restart + 1}" if self.config.entry.imported else ""
        return self.answer.image or f"{self.behavior.id} under {self.config.name}{prompt}"


@dataclass(frozen=True)
class Verified:
    """One answer: what was recorded, what was found, and what disagrees (empty = nothing)."""

    image: str
    epsilon: int
    loss_recorded: float
    loss_found: float
    disagreements: tuple[str, ...]
    other_answer: bool
    """The greedy answer, generated again, is another one. A disagreement only where arithmetic is the run's."""


def answers_again(
    subject: Subject,
    folder: Path,
    prompts: Mapping[str, Sequence[ImportedPrompt]] | None,
    group: Sequence[Recorded],
    same_arithmetic: bool,
) -> list[Verified]:
    """Answers under one attack again, all to pictures or all to texts of one run of it.

    Args:
        subject: Who answered.
        folder: The run.
        prompts: Imported ones, by behaviour.
        group: What was recorded.
        same_arithmetic: Whether another answer than the recorded one is a disagreement.
    """
    if group[0].told is None:
        return [
            _row(*both, [], subject, same_arithmetic)
            for both in zip(group, _texts(subject, prompts, group), strict=True)
        ]
    files = [(read(folder, one.name), read(folder, clean_name(one.behavior.id))) for one in group]
    for one, (saved, clean) in zip(group, files, strict=True):
        if saved.image.size != clean.image.size:
            wanted, came = ("{} x {}".format(*picture.image.size) for picture in (clean, saved))
            raise UserError(
                f"`{folder / one.name}` must have the size of its clean picture, {wanted} pixels, got {came}. {AGAIN}"
            )
    rows = []
    for places in by_size([clean.image for _, clean in files]):
        some, held = [group[i] for i in places], [files[i] for i in places]
        for one, found, pair in zip(some, _pictures(subject, some, held), held, strict=True):
            rows.append(_row(one, found, _wrong(one, found, *pair), subject, same_arithmetic))
    return rows


def _texts(
    subject: Subject, prompts: Mapping[str, Sequence[ImportedPrompt]] | None, group: Sequence[Recorded]
) -> list[Answer]:
    """What the attack's own code says of texts of one run of one attack."""
    config, behaviors = group[0].config, [one.behavior for one in group]
    asked = texts.ask(subject, behaviors, prompts if config.entry.imported else None, group[0].answer.restart)
    if config.entry.search == "suffix":
        sent = [replace(one.behavior, prompt=one.answer.sent or one.behavior.prompt) for one in group]
        asked = replace(asked, prompts=sent)
    judged = texts.judge(asked, replace(config, samples=0), lambda *_: "not_judged", (), lambda _: None)
    plain = texts.target_losses(replace(asked, prompts=behaviors)).tolist()
    return [replace(judged[i].greedy, loss_clean=round(loss, 5)) for i, loss in enumerate(plain)]


def _pictures(
    subject: Subject, group: Sequence[Recorded], files: Sequence[tuple[SavedPicture, SavedPicture]]
) -> list[Answer]:
    """The same of pictures of one size; files are the attacked and the clean one."""
    behaviors, config, told = [one.behavior for one in group], group[0].config, [one.told for one in group if one.told]
    saved, clean = [one for one, _ in files], [one for _, one in files]
    prompts = [replace(b, prompt=one.get("sent", b.prompt)) for b, one in zip(behaviors, told, strict=True)]
    target = TargetObjective(subject, prompts, images(clean))
    objective: Objective = target
    if told[0]["objective"] != TargetObjective.__name__:
        objective = make_objective(subject, prompts, images(clean), config, [one["response"] for one in told])
        if isinstance(objective, AdaptiveObjective):
            weights = [math.nan if one["weight"] is None else one["weight"] for one in told]
            objective.weight = torch.tensor(weights, device=subject.model.device)
    asked = Asked(subject, behaviors, prompts, clean)
    answers = judge_files(asked, saved, target, objective, config, lambda *_: "not_judged")
    with torch.no_grad():
        losses = target(torch.stack([one.pixels for one in clean]).to(subject.model.device)).tolist()
    return [replace(one, loss_clean=round(loss, 5)) for one, loss in zip(answers, losses, strict=True)]


def _wrong(one: Recorded, found: Answer, saved: SavedPicture, clean: SavedPicture) -> list[str]:
    """In phrases, what of the files is not as the run recorded it."""
    assert one.told is not None
    told: Mapping[str, Any] = one.told
    wrong = [
        f"the {what} is another one than its JSON has (SHA-256)"
        for what, key, now in (("picture", "sha256", saved), ("clean picture", "clean_sha256", clean))
        if told.get(key) != now.sha256
    ]
    threat = one.config.threat
    if one.config.entry.stays_in_threat and not (found.linf <= threat.levels and threat.holds(found.distance)):
        wrong.append(f"the picture is outside {threat.text} of {threat.levels}/255")
    return wrong


def _row(one: Recorded, found: Answer, wrong: list[str], subject: Subject, same_arithmetic: bool) -> Verified:
    """With the numbers that are not as they were recorded; of another answer the base's loss is not known."""
    dtype, other = dtype_of(subject.model), found.completion != one.answer.completion
    again: Mapping[str, Any] = found.as_json()
    told: list[Mapping[str, Any]] = [one.answer.as_json(), *([one.told] if one.told else [])]
    wrong += [
        f"{key} {recorded.get(key)} recorded, {again.get(key)} found"
        for recorded in told
        for key in (*_NUMBERS, *(() if other else ("nll_base",)))
        if not _near(key, recorded.get(key), again.get(key), dtype)
    ]
    wrong += ["the model's answer is another one than the run stored"] * (other and same_arithmetic)
    if found.prompt_sha256 != one.answer.prompt_sha256:
        wrong.append("the prompt is another one than the run stored (SHA-256)")
    numbers = found.linf, one.answer.loss or 0.0, found.loss or 0.0
    return Verified(one.name, *numbers, tuple(dict.fromkeys(wrong)), other)


def _near(key: str, told: float | None, now: float | None, dtype: str) -> bool:
    if told is None or now is None or key in ("epsilon", "distance"):
        return told == now
    return round(abs(now - told), 6) <= tolerance(max(abs(now), 1) if key == "nll_base" else now, dtype)
