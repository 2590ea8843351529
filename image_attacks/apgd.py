"""Auto-PGD: projected gradient descent that halves its own step, per image, when progress stalls."""

import math
from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from .loop import AttackResult, Budget, Iterate, Objective, Running, run_attack
from .noise import Generators
from .threat_models import ThreatModel

NEW_SHARE = 0.75
"""Weight of the new displacement; the rest repeats the previous one."""
SUCCESS_SHARE = 0.75
"""At a checkpoint the step is halved unless this share of the steps since the last one lowered the loss."""


def apgd(
    objective: Objective,
    images: Tensor,
    *,
    threat_model: ThreatModel,
    steps: int = 100,
    restarts: int = 1,
    random_start: bool = False,
    **running: Unpack[Running],
) -> AttackResult:
    """Minimise ``objective`` with a step size that every image adapts by itself.

    The step starts at the threat model's first. At checkpoints, after 22 % of the budget and then ever more often, an
    image halves its step and goes back to its best point if too few steps since the last checkpoint lowered its loss,
    or if neither its step nor its best loss has changed since then.

    Args:
        objective: As for :func:`~image_attacks.pgd`, like all the arguments that are not named here.
        images: Clean pixels in [0, 1], float32, shape ``(B, C, H, W)``.
        threat_model: The allowed set around each image.
        steps: Updates per run.
        restarts: Runs in all.
        random_start: Start the first run at random as well.
        running: ``generator``, ``callback``, ``stop``, ``checkpoint``, ``resume``: as for :func:`~image_attacks.pgd`.

    Returns:
        The best images found, never worse than the start.

    Raises:
        AttackError: As :func:`~image_attacks.pgd` does.

    Source:
        Croce & Hein 2020 (arXiv:2003.01690), Algorithm 1. Deviations: the initial loss counts in the first
        checkpoint's comparison; the step never falls below a quarter of the threat model's last step, where rounding
        to 8 bits would make it stand still; the first run starts at the image, later ones as those of
        :func:`~image_attacks.pgd`.
    """
    budget = Budget(threat_model, steps, restarts, random_start)
    return run_attack(objective, images, _AutoStep(threat_model, budget.steps), budget, **running)


@dataclass(frozen=True)
class _AutoStep:
    threat_model: ThreatModel
    steps: int
    uses_gradient: bool = True

    def next(self, at: Iterate, memory: dict[str, Tensor], generator: Generators) -> Tensor:
        if at.step == 0:
            self._begin(at, memory)
        wide = (-1, 1, 1, 1)
        memory["successes"] = memory["successes"] + (at.losses < memory["previous_losses"])
        memory["best_gradient"] = torch.where(at.better.view(wide), at.gradient, memory["best_gradient"])
        pixels, losses, gradient = at.pixels, at.losses, at.gradient
        intervals = {end: end - start for start, end in _intervals(self.steps)}
        if at.step in intervals:
            back = self._halve(at, memory, intervals[at.step])
            pixels = torch.where(back.view(wide), at.best_pixels, pixels)
            losses = torch.where(back, at.best_losses, losses)
            gradient = torch.where(back.view(wide), memory["best_gradient"], gradient)
        size = memory["step_sizes"].to(pixels.dtype).view(wide)
        target = self.threat_model.project(pixels + size * self.threat_model.descent_direction(gradient), at.clean)
        moved = target
        if at.step > 0:
            momentum = pixels - memory["previous_pixels"]
            mixed = pixels + NEW_SHARE * (target - pixels) + (1 - NEW_SHARE) * momentum
            moved = self.threat_model.project(mixed, at.clean)
        memory["previous_pixels"], memory["previous_losses"] = pixels, losses
        return moved

    def _begin(self, at: Iterate, memory: dict[str, Tensor]) -> None:
        memory["step_sizes"] = torch.full_like(at.losses, self.threat_model.step_range[0])
        memory["successes"] = torch.zeros_like(at.losses, dtype=torch.long)
        memory["previous_losses"] = memory["best_at_checkpoint"] = at.losses
        memory["halved_before"] = torch.ones_like(at.losses, dtype=torch.bool)
        memory["best_gradient"] = at.gradient

    def _halve(self, at: Iterate, memory: dict[str, Tensor], interval: int) -> Tensor:
        """Halve the steps that stall; return which ones they are."""
        few = memory["successes"] < SUCCESS_SHARE * interval
        stuck = ~memory["halved_before"] & (at.best_losses >= memory["best_at_checkpoint"])
        halve, sizes = few | stuck, memory["step_sizes"]
        floor = min(self.threat_model.step_range[1] / 4, self.threat_model.step_range[0])
        memory["step_sizes"] = torch.where(halve, (sizes / 2).clamp(min=floor), sizes)
        memory["halved_before"], memory["best_at_checkpoint"] = halve, at.best_losses
        memory["successes"] = torch.zeros_like(memory["successes"])
        return halve


def _intervals(steps: int) -> list[tuple[int, int]]:
    """Return first and last iterate of every interval between checkpoints.

    >>> _intervals(100)[:4]
    [(0, 22), (22, 41), (41, 57), (57, 70)]
    """
    before, share = 0.0, 0.22
    ends = [0]
    while share < 1:
        ends.append(math.ceil(round(share * steps, 6)))
        before, share = share, share + max(share - before - 0.03, 0.06)
    return [(start, end) for start, end in zip(ends, ends[1:], strict=False) if start < end <= steps]
