"""From an attack's name to pixels: which objective, which search, from where, and what is kept on the way."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from image_attacks import AttackError, AttackResult, Linf, ResumeError, ThreatModel, adam_pgd, apgd, pgd
from mm_cb.attacks.checkpoint import Watch
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.entry import resolved
from mm_cb.attacks.objectives.anneal import Annealed
from mm_cb.attacks.objectives.moving import Moving, without_handicap
from mm_cb.attacks.objectives.target import Objective, Relaxed
from mm_cb.core.errors import UserError
from mm_cb.data.behaviors_file import Behavior
from mm_cb.inference.subjects import Subject
from mm_cb.models import ChatModel

OPTIMIZERS: Mapping[str, Callable[..., AttackResult]] = {
    "adam": adam_pgd,
    "sign": pgd,
    "momentum": partial(pgd, momentum=0.9),
}
"""The values of ``--optimizer``; 0.9 was not tuned."""


def make_objective(
    subject: Subject,
    behaviors: Sequence[Behavior],
    pictures: Sequence[Image | None],
    config: AttackConfig,
    responses: Sequence[str | None] | None = None,
    restart: int = 0,
) -> Objective:
    """What an attack minimises, its weight not balanced yet.

    Args:
        subject: The model under attack.
        behaviors: What to ask, one per row.
        pictures: Clean pictures, all of one size; None where an attack makes none.
        config: Its attack's row names the objective.
        responses: Forced responses; None lets the base model continue the targets.
        restart: Which run it is, for objectives that draw something.
    """
    make = resolved(config.entry.objective)
    own = {"config": config, "restart": restart} if config.entry.reads else {}
    return make(
        subject,
        behaviors,
        pictures,
        weight=config.term_weight,
        max_new_tokens=config.max_new_tokens,
        responses=responses,
        **own,
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
    config: AttackConfig,
    *,
    model: ChatModel,
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
        config: Search and budget; what is kept, judged and saved on the way.
        model: What the objective looks at, to scale its adapter on the way.
        generators: One random stream per behaviour.
        random_start: Start at random instead of at the clean pictures.
        first: Start here instead (pixels), unless the start is random.
        broken: The judge of iterates, for an early stop.
        state: File of the saved state: a run that was killed goes on from there, to the same bits on a CPU.
        show: Called with (iterates so far, their losses).

    Raises:
        UserError: If the objective is not finite or has no gradient, or the saved state is another version's.
    """
    allowed: ThreatModel = config.threat.allowed((clean.shape[2], clean.shape[3]))
    if first is not None:
        allowed = Started(allowed, first)
    watch = Watch(
        config.moments,
        broken=broken if config.early_stop else None,
        path=state,
        seconds=config.checkpoint_seconds,
    )
    stepping = config.entry.optimizer or OPTIMIZERS[config.optimizer]
    run: Callable[..., AttackResult] = apgd if config.entry.search == "apgd" else stepping
    if isinstance(objective, Relaxed):
        allowed, clean = Linf(0.5), objective.start()
    if config.entry.first_step is not None and config.threat.norm != "l2":  # whose steps have another unit
        run = partial(run, step_size=config.entry.first_step, step_schedule="cosine")
    resume = watch.resume()

    by, known = config.annealing, 0
    minimised = objective if by == "none" else Annealed(objective, model, by, len(clean))
    moving = minimised if isinstance(minimised, Moving) else None
    if moving is not None:
        moving.begin(config.steps)
        for losses in resume["curves"] if resume and "curves" in resume else ():
            moving.saw(losses)
            known += 1

    def stop(pixels: Tensor, losses: Tensor) -> Tensor:
        nonlocal known
        known += 1
        if moving is not None:
            moving.saw(losses)
        return watch.stop(pixels, losses)

    def told(seen: int, losses: Tensor, _: Tensor) -> None:
        if show is not None:
            show(seen, losses if moving is None else losses - torch.as_tensor(moving.handicap(seen - 1)).to(losses))

    try:
        result = run(
            minimised,
            clean,
            threat_model=allowed,
            steps=config.steps,
            random_start=random_start,
            generator=generators,
            callback=told,
            stop=stop,
            checkpoint=watch.checkpoint,
            resume=resume,
        )
    except ResumeError as error:
        raise UserError(
            f"`{state}` must be the state of this attack, but another version or another attack saved it: {error} "
            f"Delete it and give the command again: `{config.name}` starts anew on this batch, what is finished stays."
        ) from error
    except AttackError as error:
        raise UserError(
            f"`{config.name}` cannot attack this model: {error} Try `--dtype float32`; if it stays, look at the "
            "behaviours named by their place in the batch."
        ) from error
    finally:
        if moving is not None:
            moving.rest()
    if moving is not None:
        result = replace(result, curves=without_handicap(moving, result.curves, known))
    pictures: dict[int | None, Tensor] = {None: result.images}
    for step, pixels in watch.kept.items():
        pictures[step] = pixels
    return Found(pictures, result)
