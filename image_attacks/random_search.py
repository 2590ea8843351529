"""An attack without gradients: what it finds and white-box attacks miss is a sign of masked gradients."""

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from .loop import AttackResult, Budget, Iterate, Objective, Running, run_attack
from .noise import Generators, uniform_like
from .threat_models import ThreatModel

FIRST_SHARE = 0.8
"""Share of the image that the first squares cover."""
HALVINGS = (0.001, 0.005, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.8)
"""Shares of the budget after which the squares' area halves."""


def random_search(
    objective: Objective,
    images: Tensor,
    *,
    threat_model: ThreatModel,
    steps: int = 1000,
    restarts: int = 1,
    **running: Unpack[Running],
) -> AttackResult:
    """Minimise ``objective`` by trying random squares of random colour and keeping what helps.

    It asks for ``steps + 1`` forward passes per run and for no gradient, so that it also works on an objective that is
    not differentiable; compare with an attack by gradients at equal numbers of forward passes.

    Args:
        objective: As for :func:`~image_attacks.pgd`, like all the arguments that are not named here.
        images: Clean pixels in [0, 1], float32, shape ``(B, C, H, W)``.
        threat_model: The allowed set; a square is one large step of it.
        steps: Tries per run.
        restarts: Runs in all.
        running: ``generator``, ``callback``, ``stop``, ``checkpoint``, ``resume``: as for :func:`~image_attacks.pgd`.

    Returns:
        The best images found; ``curves`` hold the losses of the tries, not of the best so far.

    Source:
        Andriushchenko et al. 2020 (arXiv:1912.00049), the l-inf attack: stripes, then squares that shrink. Deviations:
        for other threat models a square is a step of twice epsilon, projected; the start is the image.
    """
    budget = Budget(threat_model, steps, restarts)
    return run_attack(objective, images, _Squares(threat_model, budget.steps), budget, **running)


@dataclass(frozen=True)
class _Squares:
    threat_model: ThreatModel
    steps: int
    uses_gradient: bool = False

    def next(self, at: Iterate, memory: dict[str, Tensor], generator: Generators) -> Tensor:
        if at.step == 0:
            bump = torch.where(uniform_like(at.clean[:, :, :1], generator) < 0.5, -1.0, 1.0).expand_as(at.clean)
        else:
            halvings = sum(at.step > share * self.steps for share in HALVINGS)
            bump = _square(at.clean, FIRST_SHARE / 2**halvings, generator)
        move = self.threat_model.step_range[0] * self.threat_model.descent_direction(bump)
        return self.threat_model.project(at.best_pixels + move, at.clean)


def _square(images: Tensor, share: float, generator: Generators) -> Tensor:
    """Draw plus or minus one per channel inside one square of each image, 0 elsewhere."""
    height, width = images.shape[-2:]
    side = max(round((share * height * width) ** 0.5), 1)
    tall, wide = min(side, height), min(side, width)
    place = [uniform_like(images[:, :1, 0, 0], generator) for _ in range(2)]
    top, left = (place[0] * (height - tall + 1)).long(), (place[1] * (width - wide + 1)).long()
    rows, columns = torch.arange(height, device=images.device), torch.arange(width, device=images.device)
    in_rows, in_columns = (rows >= top) & (rows < top + tall), (columns >= left) & (columns < left + wide)
    signs = torch.where(uniform_like(images[:, :, :1, :1], generator) < 0.5, -1.0, 1.0)
    return signs * (in_rows.unsqueeze(2) & in_columns.unsqueeze(1)).unsqueeze(1)
