"""Resizing as image libraries do it on 8-bit images: exactly, and as a smooth function with a gradient.

Both work on one matrix per axis. The libraries resize one axis, clamp and round to 8 bits, then resize the other; the
smooth version clamps in between as they do and only leaves the rounding out, which keeps it within 1.2 levels of them
(without that clamp it would be off by up to 28).
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Axis = Literal["horizontal", "vertical"]
Weights = Literal["pillow", "torchvision"]

LANCZOS, BILINEAR, BICUBIC = 1, 2, 3
"""Filters by the numbers that Pillow gives them."""

_PILLOW_BITS = 22
_CUBIC_A = -0.5


@dataclass(frozen=True)
class Recipe:
    """How one library resizes: the order of the passes and the fixed-point weights."""

    first: Axis
    weights: Weights


RECIPES = {
    "pil": (Recipe("horizontal", "pillow"), Recipe("vertical", "pillow")),
    "torchvision": (Recipe("horizontal", "torchvision"),),
}
"""What may apply, per backend. Pillow before 13 and torchvision on the CPU start with the horizontal pass; Pillow 13
starts with the vertical one where the height shrinks much more than the width (python-pillow/Pillow#9549)."""


class Resize:
    """Resizing from one size to another; a pass whose length does not change is left out, as the libraries do."""

    def __init__(
        self, source: tuple[int, int], target: tuple[int, int], recipe: Recipe, resample: int = BICUBIC
    ) -> None:
        """Prepare the weights.

        Args:
            source: Height and width before.
            target: Height and width after.
            recipe: Whose resize to follow.
            resample: The filter, by Pillow's number.
        """
        self.recipe = recipe
        lengths: dict[Axis, tuple[int, int]] = {
            "vertical": (source[0], target[0]),
            "horizontal": (source[1], target[1]),
        }
        order: list[Axis] = ["horizontal", "vertical"] if recipe.first == "horizontal" else ["vertical", "horizontal"]
        changed = [axis for axis in order if lengths[axis][0] != lengths[axis][1]]
        matrices = {axis: filter_matrix(*lengths[axis], resample) for axis in changed}
        self._smooth = [(axis, torch.from_numpy(matrix).float()) for axis, matrix in matrices.items()]
        self._exact = [(axis, torch.from_numpy(quantised(matrix, recipe.weights))) for axis, matrix in matrices.items()]

    def to(self, device: torch.device) -> None:
        """Move the weights to a device."""
        self._smooth = [(axis, matrix.to(device)) for axis, matrix in self._smooth]
        self._exact = [(axis, matrix.to(device)) for axis, matrix in self._exact]

    def smooth(self, pixels: Tensor) -> Tensor:
        """Resize pixels in [0, 1], shape ``(..., H, W)``, differentiably, with a clamp to [0, 1] after each pass."""
        for axis, matrix in self._smooth:
            pixels = _apply(pixels, matrix.to(pixels.dtype), axis).clamp(0, 1)
        return pixels

    def exact(self, levels: Tensor) -> Tensor:
        """Resize whole levels 0..255, shape ``(..., H, W)``, float32, to whole levels equal to the library's.

        The gradient is that of :meth:`smooth`: straight through the rounding, blocked where the clamp acted.
        """
        for (axis, matrix), (_, fixed_point) in zip(self._smooth, self._exact, strict=True):
            levels = _RoundedPass.apply(levels, fixed_point, matrix, axis)
        return levels


class _RoundedPass(torch.autograd.Function):
    """One pass of a library's resize on whole levels, with the gradient of the pass without rounding."""

    @staticmethod
    def forward(ctx: Any, levels: Tensor, fixed_point: Tensor, matrix: Tensor, axis: Axis) -> Tensor:
        # The weights are multiples of a power of two, so that the float64 sums are exact, and floor(sum + 1/2) is the
        # library's shift with rounding.
        sums = _apply(levels.double(), fixed_point, axis)
        clamped = sums.clamp(0, 255)
        ctx.axis = axis
        if ctx.needs_input_grad[0]:
            ctx.save_for_backward(clamped == sums, matrix)
        return clamped.add_(0.5).floor_().float()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None, None]:
        inside, matrix = ctx.saved_tensors
        return _apply(gradients[0] * inside, matrix.T, ctx.axis), None, None, None


def _apply(values: Tensor, matrix: Tensor, axis: Axis) -> Tensor:
    return values @ matrix.T if axis == "horizontal" else matrix @ values


def fitting_resize(source: tuple[int, int], target: tuple[int, int], resample: int, backend: str) -> Resize:
    """The resize of a library between two sizes: of the recipes that may apply, the one that reproduces it.

    Pillow's order of passes depends on the sizes and on its version; it is told from what Pillow makes of test images.

    Args:
        source: Height and width before.
        target: Height and width after.
        resample: The filter, by Pillow's number.
        backend: ``"pil"`` or ``"torchvision"``.
    """
    trials = [Resize(source, target, recipe, resample) for recipe in RECIPES.get(backend, RECIPES["pil"])]
    if len(trials) == 1 or source[0] == target[0] or source[1] == target[1]:
        return trials[0]
    unlike, errors = [False] * len(trials), [0.0] * len(trials)
    for levels in trial_images(source):
        real = _by_pillow(levels, target, resample)
        for number, trial in enumerate(trials):
            unlike[number] |= not torch.equal(trial.exact(levels.float()), real)
            errors[number] = max(errors[number], float((trial.smooth(levels / 255) * 255 - real).abs().max()))
    return trials[min(zip(unlike, errors, range(len(trials)), strict=True))[2]]


def trial_images(image_size: tuple[int, int]) -> Iterator[Tensor]:
    """Levels ``(1, 3, H, W)`` that tell resizes apart, more if they are small: noise, the last one black and white."""
    count, generator = min(max(10_000 // (image_size[0] * image_size[1]), 3), 64), torch.Generator().manual_seed(0)
    for number in range(count):
        levels = torch.randint(0, 256, (1, 3, *image_size), generator=generator, dtype=torch.uint8)
        yield levels if number < count - 1 else (levels > 127).to(torch.uint8) * 255


def _by_pillow(levels: Tensor, target: tuple[int, int], resample: int) -> Tensor:
    """What Pillow itself makes of one image's levels, float32."""
    array = np.ascontiguousarray(levels[0].permute(1, 2, 0).numpy())
    resized = Image.fromarray(array).resize((target[1], target[0]), Image.Resampling(resample))
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)[None].float()


def filter_matrix(source: int, target: int, resample: int) -> np.ndarray:
    """Return the antialiased weights of a filter, shape ``(target, source)``, float64; every row sums to 1."""
    kernel, support = _KERNELS[resample]
    scale = source / target
    stretch = max(scale, 1.0)
    matrix = np.zeros((target, source))
    for row in range(target):
        centre = (row + 0.5) * scale
        start = max(int(centre - support * stretch + 0.5), 0)
        stop = min(int(centre + support * stretch + 0.5), source)
        weights = kernel((np.arange(start, stop) - centre + 0.5) * (1.0 / stretch))
        matrix[row, start:stop] = weights / weights.sum()
    return matrix


def _triangle(x: np.ndarray) -> np.ndarray:
    return np.maximum(1 - np.abs(x), 0)


def _lanczos(x: np.ndarray) -> np.ndarray:
    return np.where(np.abs(x) < 3, np.sinc(x) * np.sinc(x / 3), 0.0)


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' cubic convolution kernel with a = -1/2."""
    x, a = np.abs(x), _CUBIC_A
    near = ((a + 2) * x - (a + 3)) * x * x + 1
    far = (((x - 5) * x + 8) * x - 4) * a
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


_KERNELS: dict[int, tuple[Callable[[np.ndarray], np.ndarray], float]] = {
    LANCZOS: (_lanczos, 3.0),
    BILINEAR: (_triangle, 1.0),
    BICUBIC: (_cubic, 2.0),
}
"""Each filter and how far it reaches."""


def quantised(matrix: np.ndarray, weights: Weights) -> np.ndarray:
    """Round weights to the library's fixed-point grid: 22 bits in Pillow, as many as fit in int16 in torchvision."""
    bits = _PILLOW_BITS if weights == "pillow" else _int16_bits(float(matrix.max()))
    scaled = matrix * (1 << bits)
    return np.trunc(scaled + np.copysign(0.5, scaled)) / (1 << bits)


def _int16_bits(largest: float) -> int:
    """Return the number of fractional bits with which the largest weight still fits in an int16."""
    bits = 0
    while bits < _PILLOW_BITS and int(0.5 + largest * (1 << (bits + 1))) < (1 << 15):
        bits += 1
    return bits
