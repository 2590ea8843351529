"""Is the gradient that an attack follows the gradient of what is attacked?"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .arguments import number, whole
from .loop import Objective, evaluate
from .noise import Generators, uniform_like


@dataclass(frozen=True)
class GradientHealth:
    """What is known about an objective's gradient at some images, per image."""

    zero_share: Tensor
    """Share of the pixels' values whose gradient is exactly 0, shape ``(B,)``; 1 means that no step moves anything."""
    ratios: Tensor
    """Change of the loss along a direction divided by what the gradient predicts, shape ``(D, B)``; NaN where it
    predicts no change."""

    def suspicious(self, tolerance: float = 0.1) -> Tensor:
        """Tell where the gradient is zero everywhere or the median ratio is off 1 by more than ``tolerance``, ``(B,)``.

        The median leaves room for a direction along which the loss bends.
        """
        median = self.ratios.nanmedian(dim=0).values
        return (self.zero_share == 1) | ~((median - 1).abs() <= tolerance)


def gradient_health(
    objective: Objective,
    images: Tensor,
    *,
    step: float = 1e-3,
    directions: int = 5,
    generator: Generators | None = None,
) -> GradientHealth:
    """Compare the gradient with central differences along random directions that lean on it.

    A direction is the gradient's sign with half of the signs redrawn at random, so that it predicts a change well
    above rounding noise. Give the smooth surrogate of a straight-through objective with a ``step`` below one level
    (1/255), or the exact one with a step of several levels.

    Args:
        objective: Pixels to losses ``(B,)``.
        images: Where to look, in [0, 1], shape ``(B, C, H, W)``; the differences are clamped to [0, 1] as pixels are.
        step: Half the distance between the two points, in [0, 1] units per value.
        directions: How many, D.
        generator: Source of the directions, or one per example; None is a fresh one with seed 0.

    Returns:
        Shares and ratios.

    Raises:
        AttackError: If the objective has the wrong shape, is not finite, or has no gradient at all.
    """
    generator = generator or torch.Generator().manual_seed(0)
    _, gradient = evaluate(objective, images, 0, with_gradient=True)
    step, ratios = number("step", step), []
    for _ in range(whole("directions", directions)):
        redrawn = torch.where(uniform_like(images, generator) < 0.5, -1.0, 1.0)
        signs = torch.where(uniform_like(images, generator) < 0.5, gradient.sign(), redrawn)
        ahead, behind = (images + step * signs).clamp(0, 1), (images - step * signs).clamp(0, 1)
        change = evaluate(objective, ahead, 0, with_gradient=False)[0]
        change = change - evaluate(objective, behind, 0, with_gradient=False)[0]
        predicted = (gradient.double() * (ahead.double() - behind.double())).flatten(1).sum(1)
        ratios.append(torch.where(predicted == 0, torch.nan, change.double() / predicted).float())
    return GradientHealth((gradient == 0).flatten(1).float().mean(1), torch.stack(ratios))
