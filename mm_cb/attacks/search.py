"""From an attack's name to pixels: which objective, which search, from where, and what is kept on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from image_attacks import AttackError, AttackResult, Linf, ResumeError, ThreatModel, adam_pgd, apgd, pgd
from mm_cb.attacks.checkpoint import Watch
from mm_cb.attacks.objectives import adaptive
from mm_cb.attacks.objectives.embedding import EmbeddingObjective
from mm_cb.attacks.objectives.target import Objective, TargetObjective
from mm_cb.attacks.registry import Attack, Protocol
from mm_cb.core.errors import UserError
from mm_cb.data.behaviors_file import Behavior
from mm_cb.inference.subjects import Subject

_ADAPTIVE: Mapping[str, type[adaptive.AdaptiveObjective]] = {
    "long": adaptive.LongTargetObjective,
    "continuation": adaptive.ContinuationObjective,
    "matching": adaptive.MatchingObjective,
    "clean_teacher": adaptive.CleanTeacherObjective,
    "distill": adaptive.DistillObjective,
    "fluent": adaptive.FluentObjective,
}

OPTIMIZERS: Mapping[str, Callable[..., AttackResult]] = {
    "adam": adam_pgd,
    "sign": pgd,
    "momentum": partial(pgd, momentum=0.9),
}
"""The values of ``optimizer=``; 0.9 was not tuned."""


def make_objective(
    subject: Subject,
    behaviors: Sequence[Behavior],
    pictures: Sequence[Image],
    attack: Attack,
    responses: Sequence[str | None] | None = None,
) -> Objective:
    """What an attack minimises, its weight not balanced yet.

    Args:
        subject: The model under attack.
        behaviors: What to ask, one per row.
        pictures: Clean pictures, all of one size.
        attack: Its name decides the loss.
        responses: Forced responses; None lets the base model continue the targets.
    """
    kind = _ADAPTIVE.get(attack.kind.loss or "target")
    if attack.kind.search == "embedding":
        return EmbeddingObjective(subject, behaviors, pictures)
    if kind is None:
        return TargetObjective(subject, behaviors, pictures)
    return kind(
        subject,
        behaviors,
        pictures,
        weight=attack.matching_weight,
        max_new_tokens=attack.max_new_tokens,
        responses=responses,
    )


@dataclass(frozen=True)
class Started:
    """A threat model with a first run that starts at given pictures (a chain of attacks)."""

    within: ThreatModel
    first: Tensor = field(repr=False)

    @property
    def step_range(self) -> tuple[float, float]:
        """That of the threat model."""
        return self.within.step_range

    def start(self, clean: Tensor) -> Tensor:
        """The given pictures, brought into the allowed set where they lie outside."""
        return self.within.project(self.first.to(clean), clean)

    def project(self, pixels: Tensor, clean: Tensor) -> Tensor:
        """As the threat model does."""
        return self.within.project(pixels, clean)

    def random_start(self, clean: Tensor, generator: Any) -> Tensor:
        """As the threat model does."""
        return self.within.random_start(clean, generator)

    def descent_direction(self, gradient: Tensor) -> Tensor:
        """As the threat model does."""
        return self.within.descent_direction(gradient)


@dataclass(frozen=True)
class Found:
    """What a search leaves behind."""

    pictures: Mapping[int | None, Tensor]
    """None -> the selected picture of every behaviour, step -> the iterate there; pixels ``(B, 3, H, W)``."""
    result: AttackResult


def search(
    objective: Objective,
    clean: Tensor,
    attack: Attack,
    protocol: Protocol,
    *,
    generators: list[torch.Generator],
    random_start: bool,
    first: Tensor | None = None,
    broken: Callable[[Tensor], list[bool]] | None = None,
    state: Path | None = None,
    show: Callable[[int, Tensor], None] | None = None,
) -> Found:
    """Minimise an objective over the pictures in the ball.

    Args:
        objective: What to minimise.
        clean: Clean pixels ``(B, 3, H, W)``.
        attack: Search and budget.
        protocol: What is kept, judged and saved on the way.
        generators: One random stream per behaviour.
        random_start: Start at random instead of at the clean pictures.
        first: Start here instead (pixels), unless the start is random.
        broken: The judge of iterates, for an early stop.
        state: File of the saved state: a run that was killed goes on from there, to the same bits on a CPU.
        show: Called with (iterates so far, their losses).

    Raises:
        UserError: If the objective is not finite or has no gradient, or the saved state is another version's.
    """
    allowed: ThreatModel = attack.threat.allowed(attack.epsilon, (clean.shape[2], clean.shape[3]))
    if first is not None:
        allowed = Started(allowed, first)
    watch = Watch(
        protocol.moments(attack.steps),
        broken=broken if protocol.early_stop else None,
        path=state,
        seconds=protocol.checkpoint_seconds,
    )
    run: Callable[..., AttackResult] = OPTIMIZERS[attack.optimizer]
    if attack.kind.search == "apgd":
        run = apgd
    if attack.kind.search == "embedding":
        allowed, clean = Linf(0.5), objective.start()  # type: ignore[attr-defined]
    try:
        result = run(
            objective,
            clean,
            threat_model=allowed,
            steps=attack.steps,
            random_start=random_start,
            generator=generators,
            callback=show,
            stop=watch.stop,
            checkpoint=watch.checkpoint,
            resume=watch.resume(),
        )
    except ResumeError as error:
        raise UserError(
            f"`{state}` must be the state of this attack, but another version or another attack saved it: {error} "
            f"Delete it and give the command again: `{attack.name}` starts anew on this batch, what is finished stays."
        ) from error
    except AttackError as error:
        raise UserError(
            f"`{attack.name}` cannot attack this model: {error} Try `--dtype float32`; if it stays, look at the "
            "behaviours named by their place in the batch."
        ) from error
    pictures: dict[int | None, Tensor] = {None: result.images}
    for step, pixels in watch.kept.items():
        pictures[step] = pixels
    return Found(pictures, result)
