"""Answers to texts again, for ``mm-cb attack verify``: losses and greedy answers of what left no picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mm_cb.attacks import texts
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.records import Answer
from mm_cb.data.behaviors_file import Behavior
from mm_cb.data.prompts_file import ImportedPrompt
from mm_cb.inference.subjects import Subject
from mm_cb.inference.tolerance import dtype_of, tolerance


@dataclass(frozen=True)
class Row:
    """One picture or text: what was recorded, what was found, and what disagrees (empty = nothing)."""

    image: str
    """The picture in the run's folder, or the behaviour and its attack where there is none."""
    epsilon: int
    loss_recorded: float
    loss_found: float
    disagreements: tuple[str, ...]
    other_answer: bool
    """The greedy answer, generated again, is another one. A disagreement only where arithmetic is the run's."""


@dataclass(frozen=True)
class AnswerToText:
    """What a run recorded of a behaviour that it attacked by a text."""

    behavior: Behavior
    tried: Answer


def texts_again(
    subject: Subject,
    config: AttackConfig,
    prompts: Mapping[str, Sequence[ImportedPrompt]] | None,
    group: Sequence[AnswerToText],
    same_arithmetic: bool,
) -> list[Row]:
    """Answer texts of one attack again; all of ``group`` are of one of its runs."""
    number, behaviors = group[0].tried.restart, [one.behavior for one in group]
    asked = texts.ask(subject, behaviors, prompts if config.entry.imported else None, number)
    if config.entry.search == "suffix":
        asked = replace(
            asked,
            prompts=[replace(b, prompt=one.tried.sent or b.prompt) for b, one in zip(behaviors, group, strict=True)],
        )
    judged = texts.judge(asked, replace(config, samples=0), lambda *_: "not_judged", (), lambda _: None)
    plain = texts.target_losses(replace(asked, prompts=behaviors)).tolist()
    rows = []
    for i, one in enumerate(group):
        found = replace(judged[i].greedy, loss_clean=round(plain[i], 5))
        other = found.completion != one.tried.completion
        wrong = disagreements(one.tried.as_json(), found.as_json(), other, dtype_of(subject.model))
        wrong += ["the model's answer is another one than the run stored"] * (other and same_arithmetic)
        if found.prompt_sha256 != one.tried.prompt_sha256:
            wrong.append("the prompt is another one than the run stored (SHA-256)")
        name = f"{one.behavior.id} under {config.name}" + (f", prompt {number + 1}" if config.entry.imported else "")
        rows.append(Row(name, 0, one.tried.loss or 0.0, found.loss or 0.0, tuple(wrong), other))
    return rows


def disagreements(recorded: Mapping[str, Any], again: Mapping[str, Any], other_answer: bool, dtype: str) -> list[str]:
    """In phrases, the numbers that are not as they were recorded; of another answer the base's loss is not known."""
    keys = ["epsilon", "distance", "loss", "objective_file", "loss_clean", *([] if other_answer else ["nll_base"])]
    return [
        f"{key} {recorded.get(key)} recorded, {again.get(key)} found"
        for key in keys
        if not _near(key, recorded.get(key), again.get(key), dtype)
    ]


def _near(key: str, told: float | None, now: float | None, dtype: str) -> bool:
    if told is None or now is None or key in ("epsilon", "distance"):
        return told == now
    return round(abs(now - told), 6) <= tolerance(max(abs(now), 1) if key == "nll_base" else now, dtype)
