"""Random starts and the random-sign placebo, drawn without touching the global random state."""

from collections.abc import Sequence

import torch
from torch import Tensor

from .arguments import number

Generators = torch.Generator | Sequence[torch.Generator]
"""One generator for the batch, or one per example: then an example's draws do not depend on its batch mates."""


def uniform_like(images: Tensor, generator: Generators) -> Tensor:
    """Draw uniform numbers in [0, 1) shaped like ``images``.

    Args:
        images: Batch of shape ``(B, ...)``; only its shape, dtype and device are used.
        generator: One generator, or one per example.

    Returns:
        Tensor like ``images``; the draws happen on the generator's device, so a CPU generator gives the same
        numbers whatever device the images are on.

    Raises:
        ValueError: If a list of generators does not hold one per example.
    """
    if isinstance(generator, torch.Generator):
        return _draw(images.shape, images, generator)
    if len(generator) != len(images):
        raise ValueError(f"`generator` must hold one generator per image, got {len(generator)} for {len(images)}.")
    return torch.stack([_draw(images.shape[1:], images, each) for each in generator])


def _draw(shape: torch.Size, like: Tensor, generator: torch.Generator) -> Tensor:
    return torch.rand(shape, generator=generator, dtype=like.dtype, device=generator.device).to(like.device)


def sign_noise(images: Tensor, epsilon: float, generator: Generators | None = None) -> Tensor:
    """Add plus or minus ``epsilon`` at random to every value: the placebo an attack has to beat.

    Args:
        images: Pixels in [0, 1], shape ``(B, C, H, W)``.
        epsilon: Size of the noise in [0, 1] units, e.g. ``8 / 255``.
        generator: One generator, or one per example; None is a fresh generator with seed 0.

    Returns:
        Noisy pixels, clamped to [0, 1]: as far from the image as a PGD image may be, but blind to the model.
    """
    signs = torch.where(uniform_like(images, generator or torch.Generator().manual_seed(0)) < 0.5, -1.0, 1.0)
    return (images + number("epsilon", epsilon) * signs).clamp(0, 1)
