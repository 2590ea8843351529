"""Recorded answers again, for ``mm-cb attack verify``: what the attack's own code says of a picture or a text now."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mm_cb.attacks import texts
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.config_files import RUN_WIDE
from mm_cb.attacks.judged_files import Asked, judge_files
from mm_cb.attacks.objectives.adaptive import AdaptiveObjective
from mm_cb.attacks.objectives.target import Objective, TargetObjective
from mm_cb.attacks.records import Answer, Artefact
from mm_cb.attacks.saved import SavedPicture, by_size, clean_name, images, read
from mm_cb.attacks.search import make_objective
from mm_cb.core.errors import UserError
from mm_cb.core.files import text_sha256
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

    @property
    def name(self) -> str:
        """The picture in the run's folder, or the behaviour and its attack where there is none."""
        prompt = f", prompt {self.answer.restart + 1}" if self.config.entry.imported else ""
        return self.answer.image or f"{self.behavior.id} under {self.config.name}{prompt}"


@dataclass(frozen=True)
class RecordedPicture(Recorded):
    """The same of an answer to an attacked picture."""

    told: Artefact
    """In the JSON beside it."""
    stated: AttackConfig
    """The attack, as that JSON has it."""


@dataclass(frozen=True)
class Row:
    """One answer: what was recorded, what was found, and what disagrees (empty = nothing)."""

    image: str
    epsilon: int
    loss_recorded: float
    loss_found: float
    disagreements: tuple[str, ...]
    other_answer: bool
    """The greedy answer, generated again, is another one. A disagreement only where arithmetic is the run's."""


def pictures_again(
    subject: Subject, folder: Path, group: Sequence[RecordedPicture], same_arithmetic: bool
) -> list[Row]:
    """Answers to pictures of one attack again; those of one size go together."""
    files = [(read(folder, one.name), read(folder, clean_name(one.behavior.id))) for one in group]
    rows = []
    for places in by_size([clean.image for _, clean in files]):
        some, held = [group[i] for i in places], [files[i] for i in places]
        for one, found, pair in zip(some, _answers(subject, folder, some, held), held, strict=True):
            rows.append(_row(one, found, _wrong(one, found, *pair), subject, same_arithmetic))
    return rows


def texts_again(
    subject: Subject,
    prompts: Mapping[str, Sequence[ImportedPrompt]] | None,
    group: Sequence[Recorded],
    same_arithmetic: bool,
) -> list[Row]:
    """Answers to texts again; all of ``group`` are of one run of one attack."""
    config, behaviors = group[0].config, [one.behavior for one in group]
    asked = texts.ask(subject, behaviors, prompts if config.entry.imported else None, group[0].answer.restart)
    if config.entry.search == "suffix":
        asked = replace(
            asked, prompts=[replace(one.behavior, prompt=one.answer.sent or one.behavior.prompt) for one in group]
        )
    judged = texts.judge(asked, replace(config, samples=0), lambda *_: "not_judged", (), lambda _: None)
    plain = texts.target_losses(replace(asked, prompts=behaviors)).tolist()
    found = [replace(judged[i].greedy, loss_clean=round(loss, 5)) for i, loss in enumerate(plain)]
    return [_row(one, now, [], subject, same_arithmetic) for one, now in zip(group, found, strict=True)]


def _answers(
    subject: Subject, folder: Path, group: Sequence[RecordedPicture], files: Sequence[tuple[SavedPicture, SavedPicture]]
) -> list[Answer]:
    """What the attack's own code says of pictures of one size; files are the attacked and the clean one."""
    behaviors, config = [one.behavior for one in group], group[0].config
    saved, clean = [one for one, _ in files], [one for _, one in files]
    prompts = [replace(one.behavior, prompt=one.told.get("sent", one.behavior.prompt)) for one in group]
    target = TargetObjective(subject, prompts, images(clean))
    objective: Objective = target
    if group[0].told["objective"] != TargetObjective.__name__:
        forced = [one.told["response"] for one in group]
        objective = make_objective(subject, prompts, images(clean), config, forced)
        if isinstance(objective, AdaptiveObjective):
            objective.weight = torch.tensor([_weight(one, folder) for one in group], device=subject.model.device)
    asked = Asked(subject, behaviors, prompts, clean)
    answers = judge_files(asked, saved, target, objective, config, lambda *_: "not_judged")
    with torch.no_grad():
        losses = target(torch.stack([one.pixels for one in clean]).to(subject.model.device)).tolist()
    return [replace(one, loss_clean=round(loss, 5)) for one, loss in zip(answers, losses, strict=True)]


def _weight(one: RecordedPicture, folder: Path) -> float:
    if (weight := one.told["weight"]) is None:
        file = (folder / one.name).with_suffix(".json")
        raise UserError(f"`{file}` `weight` must be a number under {one.config.name}, got null. {AGAIN}")
    return weight


def _wrong(one: RecordedPicture, found: Answer, saved: SavedPicture, clean: SavedPicture) -> list[str]:
    """In phrases, what of the files is not as the run recorded it."""
    threat, answer = one.config.threat, text_sha256(one.answer.completion)
    hashes = {"picture": ("sha256", saved.sha256), "clean picture": ("clean_sha256", clean.sha256)}
    hashes |= {"answer": ("completion_sha256", answer)}
    wrong = [
        f"the {what} is another one than its JSON has (SHA-256)"
        for what, (key, now) in hashes.items()
        if one.told.get(key) != now
    ]
    if one.config.entry.stays_in_threat and not (found.linf <= threat.levels and threat.holds(found.distance)):
        wrong.append(f"the picture is outside {threat.text} of {threat.levels}/255")
    run_wide = {key: getattr(one.config, key) for key in RUN_WIDE}
    if one.stated.annealing != one.config.annealing or replace(one.stated, **run_wide) != one.config:
        wrong.append("its JSON states other settings than run.json")
    return wrong


def _row(one: Recorded, found: Answer, wrong: list[str], subject: Subject, same_arithmetic: bool) -> Row:
    """With the numbers that are not as they were recorded; of another answer the base's loss is not known."""
    dtype, other = dtype_of(subject.model), found.completion != one.answer.completion
    again: Mapping[str, Any] = found.as_json()
    told: list[Mapping[str, Any]] = [one.answer.as_json(), *([one.told] if isinstance(one, RecordedPicture) else [])]
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
    return Row(one.name, *numbers, tuple(dict.fromkeys(wrong)), other)


def _near(key: str, told: float | None, now: float | None, dtype: str) -> bool:
    if told is None or now is None or key in ("epsilon", "distance"):
        return told == now
    return round(abs(now - told), 6) <= tolerance(max(abs(now), 1) if key == "nll_base" else now, dtype)
