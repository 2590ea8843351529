"""Resizing as image libraries do it on 8-bit images: exactly, and as a smooth function with a gradient.

Both work on one matrix per axis. The libraries resize one axis, clamp and round to 8 bits, then resize the other; the
smooth version clamps in between as they do and only leaves the rounding out, which keeps it within 1.2 levels of them
(without that clamp it would be off by up to 28).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

Axis = Literal["horizontal", "vertical"]
Weights = Literal["pillow", "torchvision"]

LANCZOS, BILINEAR, BICUBIC = 1, 2, 3
"""Filters by the numbers that Pillow gives them."""

_TORCH_FILTERS = {BILINEAR: "bilinear", BICUBIC: "bicubic"}
_PILLOW_BITS = 22
_BAND, _WHOLE = 16, 2**16
"""Rows of a band, and entries of a matrix that is not cut into bands."""
_CUBIC_A = -0.5


@dataclass(frozen=True)
class ResizeRecipe:
    """How one library resizes: the order of the passes and the fixed-point weights."""

    first: Axis
    weights: Weights


RECIPES = {
    "pil": (ResizeRecipe("horizontal", "pillow"), ResizeRecipe("vertical", "pillow")),
    "torchvision": (ResizeRecipe("horizontal", "torchvision"),),
}
"""What may apply, per backend. Pillow before 13 and torchvision on the CPU start with the horizontal pass; Pillow 13
starts with the vertical one where the height shrinks much more than the width (python-pillow/Pillow#9549)."""


class Resize:
    """Resizing from one size to another; a pass whose length does not change is left out, as the libraries do."""

    def __init__(
        self, source: tuple[int, int], target: tuple[int, int], recipe: ResizeRecipe, resample: int = BICUBIC
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
        self._passes = [_Pass(axis, *lengths[axis], recipe.weights, resample) for axis in changed]

    def to(self, device: torch.device) -> None:
        """Move the weights to a device."""
        for one in self._passes:
            one.to(device)

    def smooth(self, pixels: Tensor) -> Tensor:
        """Resize pixels in [0, 1], shape ``(..., H, W)``, differentiably, with a clamp to [0, 1] after each pass."""
        for one in self._passes:
            pixels = _SmoothPass.apply(pixels, one).clamp(0, 1)
        return pixels

    def exact(self, levels: Tensor) -> Tensor:
        """Resize whole levels 0..255, shape ``(..., H, W)``, float32, to whole levels equal to the library's.

        The gradient is that of :meth:`smooth`: straight through the rounding, blocked where the clamp acted.
        """
        for one in self._passes:
            levels = _RoundedPass.apply(levels, one)
        return levels


class _Band(NamedTuple):
    """Some rows of a matrix, without the columns in which all of them are 0."""

    columns: slice
    weights: Tensor


class _Pass:
    """A resize of one axis. A filter reaches a few pixels far, so that next to all of a large matrix is 0."""

    def __init__(self, axis: Axis, source: int, target: int, weights: Weights, resample: int) -> None:
        self.axis, self._target = axis, target
        matrix = filter_matrix(source, target, resample)
        self._smooth = torch.from_numpy(matrix).float()
        exact = quantised(matrix, weights)
        self._exact = torch.from_numpy(exact)
        self._library = _TORCH_FILTERS.get(resample) if weights == "torchvision" else None
        self._narrow = _fits_float32(exact, _bits(matrix, weights))
        self.to(torch.device("cpu"))

    def to(self, device: torch.device) -> None:
        self._smooth, self._exact = self._smooth.to(device), self._exact.to(device)
        self.smooth, self.back, self.exact = map(_bands, (self._smooth, self._smooth.T, self._exact))

    def by_library(self, levels: Tensor) -> Tensor | None:
        """What the library itself makes of whole levels, where it is torch on the CPU; None = it is not."""
        if self._library is None or levels.device.type != "cpu":
            return None
        height, width = levels.shape[-2:]
        size = (height, self._target) if self.axis == "horizontal" else (self._target, width)
        shown = levels.to(torch.uint8).view(-1, 1, height, width)
        resized = torch.nn.functional.interpolate(shown, size, mode=self._library, antialias=True)
        return resized.view(*levels.shape[:-2], *size).float()

    def sums(self, levels: Tensor) -> Iterator[Tensor]:
        """The library's sums before it rounds and clamps, exactly."""
        narrow = self._narrow and levels.device.type == "cpu" and torch.get_float32_matmul_precision() == "highest"
        return self.along(levels, self.exact, torch.float32 if narrow else torch.float64)

    def along(self, values: Tensor, bands: Sequence[_Band], kind: torch.dtype) -> Iterator[Tensor]:
        """What each band makes of values ``(..., H, W)``, computed in a type."""
        for columns, weights in bands:
            if self.axis == "horizontal":
                yield values[..., columns].to(kind) @ weights.to(kind).T
            else:
                yield weights.to(kind) @ values[..., columns, :].to(kind)

    def joined(self, parts: Sequence[Tensor]) -> Tensor:
        """The parts of all bands as one."""
        return torch.cat(list(parts), dim=-1 if self.axis == "horizontal" else -2) if len(parts) > 1 else parts[0]


def _bands(matrix: Tensor) -> list[_Band]:
    """A matrix in bands of `_BAND` rows; whole if it is small, or on an accelerator, to which few large steps are less.

    The sums are the same: a band leaves out nothing but zeros.
    """
    if matrix.device.type != "cpu" or matrix.numel() <= _WHOLE:
        return [_Band(slice(None), matrix)]
    bands = []
    for rows in matrix.split(_BAND):
        there = rows.any(dim=0).nonzero()
        first, last = (int(there[0]), int(there[-1])) if len(there) else (0, 0)
        bands.append(_Band(slice(first, last + 1), rows[:, first : last + 1].contiguous()))
    return bands


class _SmoothPass(torch.autograd.Function):
    """One pass without rounding."""

    @staticmethod
    def forward(ctx: Any, values: Tensor, one: _Pass) -> Tensor:
        ctx.one = one
        return one.joined(list(one.along(values, one.smooth, values.dtype)))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.one.joined(list(ctx.one.along(gradients[0], ctx.one.back, gradients[0].dtype))), None


class _RoundedPass(torch.autograd.Function):
    """One pass of a library's resize on whole levels, with the gradient of the pass without rounding."""

    @staticmethod
    def forward(ctx: Any, levels: Tensor, one: _Pass) -> Tensor:
        # The weights are multiples of a power of two, so that the sums are exact, and floor(sum + 1/2) is the library's
        # shift with rounding.
        ctx.one = one
        if (rounded := one.by_library(levels)) is not None:
            ctx.save_for_backward(levels, None)
            return rounded
        parts, inside = list[Tensor](), list[Tensor]()
        for sums in one.sums(levels):
            clamped = sums.clamp(0, 255)
            if ctx.needs_input_grad[0]:
                inside.append(clamped == sums)
            parts.append(clamped.add_(0.5).floor_().float())
        ctx.save_for_backward(None, one.joined(inside) if inside else None)
        return one.joined(parts)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        levels, inside = ctx.saved_tensors
        if inside is None:
            inside = ctx.one.joined([sums.clamp(0, 255) == sums for sums in ctx.one.sums(levels)])
        slopes = gradients[0] * inside
        return ctx.one.joined(list(ctx.one.along(slopes, ctx.one.back, slopes.dtype))), None


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
    shown = [(levels, _by_pillow(levels, target, resample)) for levels in trial_images(source)]
    alike = [one for one in trials if all(torch.equal(one.exact(levels.float()), real) for levels, real in shown)]
    if len(alike) == 1:
        return alike[0]

    def error(one: Resize) -> float:
        return max(float((one.smooth(levels / 255) * 255 - real).abs().max()) for levels, real in shown)

    return min(alike or trials, key=error)


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
    bits = _bits(matrix, weights)
    scaled = matrix * (1 << bits)
    return np.trunc(scaled + np.copysign(0.5, scaled)) / (1 << bits)


def _bits(matrix: np.ndarray, weights: Weights) -> int:
    """Fractional bits of a library's weights."""
    return _PILLOW_BITS if weights == "pillow" else _int16_bits(float(matrix.max()))


def _fits_float32(exact: np.ndarray, bits: int) -> bool:
    """Whether sums of levels under weights of so many fractional bits are exact in float32, in whatever order.

    In units of the weights' last bit all partial sums are whole numbers, and so is the half that rounds.
    """
    largest = 255 * np.abs(exact).sum(axis=1).max() + 0.5
    return bool(largest * (1 << bits) <= 2**24)


def _int16_bits(largest: float) -> int:
    """Return the number of fractional bits with which the largest weight still fits in an int16."""
    bits = 0
    while bits < _PILLOW_BITS and int(0.5 + largest * (1 << (bits + 1))) < (1 << 15):
        bits += 1
    return bits
