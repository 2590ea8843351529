"""Attacks that survive what happens to an image on its way: rescaling, JPEG, cropping (expectation over them)."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from .arguments import number, whole
from .loop import Objective
from .png import to_levels
from .straight_through import StraightThrough

Transformation = Callable[[Tensor, torch.Generator], Tensor]
"""Maps pixels ``(B, 3, H, W)`` in [0, 1] to pixels of the same shape; one draw serves the whole batch."""


def eot(
    objective: Objective, transformations: Sequence[Transformation], *, samples: int, generator: torch.Generator
) -> Objective:
    """Average an objective over random transformations, drawn anew at every call.

    An image's losses do not depend on its batch: one draw serves all. Give the attack the same generator, then its
    saved state covers these draws too. The attack picks its best iterate by noisy values, so report the loss of the
    image it returns from a fresh ``eot`` with many samples, not ``result.losses``.

    Args:
        objective: Pixels to losses ``(B,)``.
        transformations: Applied one after the other in every sample; none averages a model that is itself random.
        samples: Draws per call; the cost is that many passes.
        generator: Source of the draws.

    Returns:
        The averaged objective.

    Raises:
        ValueError: If ``samples`` is less than 1.

    Source:
        Athalye et al. 2018 (arXiv:1707.07397).
    """
    samples = whole("samples", samples)
    if samples < 1:
        raise ValueError(f"`samples` must be at least 1, got {samples}.")

    def averaged(pixels: Tensor) -> Tensor:
        losses = []
        for _ in range(samples):
            view = pixels.clone()  # each draw begins at the same pixels, whatever was written into the last one's
            for transformation in transformations:
                view = transformation(view, generator)
            losses.append(objective(view))
        return torch.stack(losses).mean(dim=0)

    return averaged


@dataclass(frozen=True)
class Rescale:
    """Shrink or enlarge the image by a random factor and bring it back to its size, bilinearly."""

    low: float = 0.5
    high: float = 1.0

    def __post_init__(self) -> None:
        _check_range("Rescale", self.low, self.high, 0.01, 4)

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Rescale the batch by one factor between ``low`` and ``high``."""
        size, factor = pixels.shape[-2:], _between(self.low, self.high, generator)
        middle = [max(round(length * factor), 1) for length in size]
        return _resized(_resized(pixels, middle), list(size))


@dataclass(frozen=True)
class Crop:
    """Cut a random window of the image and enlarge it to the image's size, bilinearly."""

    low: float = 0.8
    high: float = 1.0

    def __post_init__(self) -> None:
        _check_range("Crop", self.low, self.high, 0.01, 1)

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Crop the batch to one window, whose sides are between ``low`` and ``high`` of the image's."""
        height, width = pixels.shape[-2:]
        share = _between(self.low, self.high, generator)
        tall, wide = max(round(height * share), 1), max(round(width * share), 1)
        top, left = (int(_between(0, extra + 1, generator)) for extra in (height - tall, width - wide))
        return _resized(pixels[..., top : top + tall, left : left + wide], [height, width])


@dataclass(frozen=True)
class Jpeg:
    """Save as JPEG of a random quality and read back; the gradient goes straight through."""

    low: int = 50
    high: int = 95

    def __post_init__(self) -> None:
        _check_range("Jpeg", self.low, self.high, 1, 100)

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Compress the batch with one quality between ``low`` and ``high``."""
        quality = int(_between(self.low, self.high + 1, generator))
        decoded = torch.stack([_through_jpeg(levels, quality) for levels in to_levels(pixels.detach())])
        return StraightThrough.apply(pixels, decoded.to(pixels))


@dataclass(frozen=True, eq=False)
class Place:
    """Take what stands in the upper left corner, a patch, and put it anywhere on the clean image instead.

    >>> image = torch.zeros(1, 3, 4, 4)
    >>> moved = Place(image, (2, 2))(image + 1, torch.Generator().manual_seed(0))
    >>> int(moved[0, 0].sum())
    4
    """

    clean: Tensor
    """The images without the patch, ``(B, 3, H, W)``."""
    size: tuple[int, int]
    """Height and width of the patch in pixels."""

    def __post_init__(self) -> None:
        height, width = self.clean.shape[-2:]
        if not (1 <= self.size[0] <= height and 1 <= self.size[1] <= width):
            raise ValueError(
                f"`Place` needs a patch inside images of {(height, width)} (height, width), got {self.size}."
            )

    def __call__(self, pixels: Tensor, generator: torch.Generator) -> Tensor:
        """Move the batch's patches to one random place."""
        tall, wide = self.size
        extra = self.clean.shape[-2] - tall, self.clean.shape[-1] - wide
        top, left = (int(_between(0, more + 1, generator)) for more in extra)
        placed = self.clean.to(pixels).clone()
        placed[..., top : top + tall, left : left + wide] = pixels[..., :tall, :wide]
        return placed


def _through_jpeg(levels: Tensor, quality: int) -> Tensor:
    array = levels.to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    file = io.BytesIO()
    Image.fromarray(array).save(file, format="JPEG", quality=quality)
    with Image.open(file) as image:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


def _resized(pixels: Tensor, size: list[int]) -> Tensor:
    # the weights add up to one only up to rounding, which can lead out of [0, 1]
    return F.interpolate(pixels, size=size, mode="bilinear", align_corners=False, antialias=True).clamp(0, 1)


def _between(low: float, high: float, generator: torch.Generator) -> float:
    return low + (high - low) * torch.rand((), generator=generator, device=generator.device).item()


def _check_range(name: str, low: float, high: float, least: float, most: float) -> None:
    low, high = number(f"{name}.low", low), number(f"{name}.high", high)
    if not least <= low <= high <= most:
        raise ValueError(f"`{name}` needs {least} <= low <= high <= {most}, got {low} and {high}.")
