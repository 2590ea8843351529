"""One image against many objectives: prompts, targets, models."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import ObjectiveShapeError
from .loop import AttackResult
from .pgd import pgd

ManyObjectives = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class UniversalResult:
    """One image and what it does to every objective."""

    image: Tensor
    """Pixels in [0, 1], shape ``(C, H, W)``."""
    losses: Tensor
    """Each objective at ``image``, shape ``(M,)``; report these, a mean hides the ones that failed."""
    result: AttackResult
    """Of the attack on the mean; its batch is 1."""


def universal(
    objective: ManyObjectives, image: Tensor, *, attack: Callable[..., AttackResult] = pgd, **options: Any
) -> UniversalResult:
    """Find one image that lowers the mean of many objectives.

    The objective sees the image once, so that it can run whatever its members share (the image tower, the image's
    tokens) a single time.

    Args:
        objective: Maps one image ``(1, C, H, W)`` to M losses ``(M,)``, e.g. one per prompt and target.
        image: Clean pixels in [0, 1], shape ``(C, H, W)``.
        attack: ``pgd``, ``apgd`` or ``random_search``.
        options: Arguments of the attack: ``threat_model``, ``steps``, ``restarts`` and so on.

    Returns:
        The image with the lowest mean, and every single loss there.

    Raises:
        ObjectiveShapeError: If the objective does not return a vector.
    """
    if image.ndim != 3:
        raise ValueError(f"`image` must have shape (C, H, W), got {tuple(image.shape)}.")

    def losses_of(pixels: Tensor) -> Tensor:
        losses = objective(pixels)
        if not isinstance(losses, Tensor) or losses.ndim != 1 or len(losses) == 0:
            got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
            raise ObjectiveShapeError(f"The objective must return one value per target, shape (M,), got {got}.")
        return losses

    result = attack(lambda pixels: losses_of(pixels).mean(dim=0, keepdim=True), image.unsqueeze(0), **options)
    with torch.no_grad():
        losses = losses_of(result.images.clone())
    return UniversalResult(result.images[0], losses, result)
