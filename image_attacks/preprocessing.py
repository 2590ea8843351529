"""From the pixels of an image file to what a vision-language model takes: exact forward, smooth backward."""

import math
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .png import to_levels
from .resampling import RECIPES, Resize

SURROGATE_TOLERANCE = 1.2
"""Largest accepted distance between the surrogate and the real processor, in 8-bit levels."""

_BICUBIC = 3


class LlavaNextPreprocessing:
    """LLaVA-NeXT's any-resolution preprocessing for images of one size, as a function to attack through.

    Forward: bit for bit what the given image processor makes of the image rounded to 8 bits, that is of the file
    :func:`~image_attacks.save_png` would write. Backward: the gradient of :meth:`surrogate`, taken at the rounded
    values and straight through the rounding (backward-pass differentiable approximation, Athalye et al. 2018,
    arXiv:1802.00420). The black padding takes no gradient.

    The forward is a vectorised imitation of the processor's resize where that reproduces the processor on test images,
    else (``exact_by == "processor"``) the processor itself, image by image.

    >>> preprocess = LlavaNextPreprocessing(processor.image_processor, (480, 640))  # doctest: +SKIP
    >>> preprocess(torch.rand(1, 3, 480, 640)).shape                                # doctest: +SKIP
    torch.Size([1, 5, 3, 336, 336])
    """

    def __init__(self, image_processor: Any, image_size: tuple[int, int]) -> None:
        """Plan the views of an image of this size and check them against the processor.

        Args:
            image_processor: A Hugging Face LLaVA-NeXT image processor, Pillow or torchvision backend.
            image_size: Height and width of the images to attack.

        Raises:
            ValueError: If the processor is configured in a way that this class does not follow.
        """
        self.image_size = _whole_pair(image_size)
        self._processor = image_processor
        self._tile = _tile_size(image_processor)
        self._canvas = best_canvas(self.image_size, image_processor.image_grid_pinpoints)
        if any(length % tile for length, tile in zip(self._canvas, self._tile, strict=True)):
            raise ValueError(f"Every entry of `image_grid_pinpoints` must be a multiple of the tile {self._tile}.")
        self._fitted = fitted_size(self.image_size, self._canvas)
        self._table = self._level_table()
        self._plan(_test_images(self.image_size))

    @property
    def exact_by(self) -> str:
        """Say what computes the forward: "emulation" (fast) or "processor" (the real one, image by image)."""
        return "emulation" if self._emulated else "processor"

    def __call__(self, pixels: Tensor) -> Tensor:
        """Turn pixels into the model's input.

        Args:
            pixels: Values in [0, 1], shape ``(B, 3, H, W)`` with the H and W given at construction.

        Returns:
            ``pixel_values`` of shape ``(B, 1 + tiles, 3, h, w)``, float32: the base view, then the tiles row by row.

        Raises:
            ValueError: If the shape is another one or a value is outside [0, 1].
            TypeError: If the pixels are not float32.
        """
        if pixels.ndim != 4 or pixels.shape[1] != 3 or tuple(pixels.shape[2:]) != self.image_size:
            raise ValueError(f"`pixels` must have shape (B, 3, {self.image_size}), got {tuple(pixels.shape)}.")
        if pixels.dtype != torch.float32:
            raise TypeError(f"`pixels` must be float32: half precision cannot hold 8-bit levels, got {pixels.dtype}.")
        if self._emulated:
            return self._emulate(pixels)
        exact = self._call_processor(to_levels(pixels.detach())).to(pixels.device)
        return _StraightThrough.apply(self.surrogate(pixels), exact)

    def _emulate(self, pixels: Tensor) -> Tensor:
        self._to(pixels.device)
        levels = _StraightThrough.apply(pixels * 255, to_levels(pixels.detach()))
        return _Lookup.apply(self._assemble(self._base.exact(levels), self._main.exact(levels)), self._table)

    def surrogate(self, pixels: Tensor) -> Tensor:
        """Compute the same without rounding: smooth, and within 1.2 levels of the real thing on 8-bit images."""
        self._to(pixels.device)
        views = self._assemble(self._base.smooth(pixels), self._main.smooth(pixels))
        low, high = self._table.to(pixels)[:, [0, 255]].view(3, 2, 1, 1).unbind(dim=1)
        return torch.addcmul(low, views, high - low)

    def _to(self, device: torch.device) -> None:
        """Keep the constants where the pixels are, instead of copying them at every step."""
        if self._table.device != device:
            self._table = self._table.to(device)
            self._base.to(device)
            self._main.to(device)

    def _assemble(self, base: Tensor, main: Tensor) -> Tensor:
        """Put the main view on its black canvas, cut that into tiles, and stack both views: (B, 1 + tiles, 3, h, w)."""
        (height, width), (tile_h, tile_w) = self._canvas, self._tile
        top, left = (height - main.shape[-2]) // 2, (width - main.shape[-1]) // 2
        margins = (left, width - main.shape[-1] - left, top, height - main.shape[-2] - top)
        if any(margins):
            main = torch.nn.functional.pad(main, margins)
        grid = main.view(-1, 3, height // tile_h, tile_h, width // tile_w, tile_w)
        tiles = grid.permute(0, 2, 4, 1, 3, 5).reshape(len(main), -1, 3, tile_h, tile_w)
        return torch.cat([base.unsqueeze(1), tiles], dim=1)

    def _plan(self, images: Iterable[Tensor]) -> None:
        """Choose per view the resize that reproduces the processor on ``images``; check the surrogate on them too.

        One image after another: a large one then takes no more memory here than in an attack.
        """
        recipes = RECIPES.get(getattr(self._processor, "backend", "pil"), RECIPES["pil"])
        plans = [[Resize(self.image_size, size, recipe) for size in (self._tile, self._fitted)] for recipe in recipes]
        differs, errors = torch.zeros(2, len(plans), dtype=torch.bool), torch.zeros(2, len(plans))
        for levels in images:
            real = self._call_processor(levels)
            for number, (self._base, self._main) in enumerate(plans):
                unlike, error = self._compare(levels.float() / 255, real)
                differs[:, number] |= unlike
                errors[:, number] = errors[:, number].maximum(error)
        trials = zip(differs.tolist(), errors.tolist(), strict=True)
        base, main = (min(zip(*view, range(len(plans)), strict=True)) for view in trials)
        self._base, self._main = plans[base[2]][0], plans[main[2]][1]
        self._emulated = not (base[0] or main[0])
        error = max(base[1], main[1])
        if not error <= SURROGATE_TOLERANCE:
            raise ValueError(
                f"The image processor differs from LLaVA-NeXT's preprocessing by {error:.1f} levels for images of "
                f"{self.image_size} (at most {SURROGATE_TOLERANCE} expected); it cannot be attacked through."
            )

    def _compare(self, images: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Per view, base and main: whether the emulation differs from ``real``, and the surrogate's error in levels."""
        emulated, smooth = self._emulate(images), self.surrogate(images)
        if emulated.shape != real.shape:
            raise ValueError(
                f"The image processor returned shape {tuple(real.shape)} for images of {self.image_size}, expected "
                f"{tuple(emulated.shape)}: it is not LLaVA-NeXT's preprocessing."
            )
        level = (self._table[:, 255] - self._table[:, 0]).view(3, 1, 1).abs() / 255
        views = (slice(0, 1), slice(1, None))
        unlike = [not torch.equal(emulated[:, view], real[:, view]) for view in views]
        return torch.tensor(unlike), torch.stack([((smooth - real).abs() / level)[:, view].max() for view in views])

    def _call_processor(self, levels: Tensor) -> Tensor:
        """Run the real processor on whole levels ``(B, 3, H, W)``."""
        arrays = levels.to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy()
        images = [Image.fromarray(np.ascontiguousarray(array)) for array in arrays]
        return self._processor(images=images, return_tensors="pt")["pixel_values"].float()

    def _level_table(self) -> Tensor:
        """Ask the processor what it makes of each of the 256 levels: shape (3, 256), float32.

        The test images have the size of a tile, so that the base view shows them unresized.
        """
        height, width = self._tile
        count = math.ceil(256 / (height * width))
        levels = (torch.arange(count * height * width) % 256).view(count, 1, height, width).expand(-1, 3, -1, -1)
        shown = self._call_processor(levels)[:, 0]
        return shown.transpose(0, 1).flatten(1)[:, :256].contiguous()


class _StraightThrough(torch.autograd.Function):
    """Show ``exact`` to the model and hand its gradient to ``smooth``."""

    @staticmethod
    def forward(ctx: Any, smooth: Tensor, exact: Tensor) -> Tensor:
        return exact.view_as(exact)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0], None


class _Lookup(torch.autograd.Function):
    """Replace whole levels ``(..., 3, h, w)`` by the processor's values; backward as if the table were a line."""

    @staticmethod
    def forward(ctx: Any, levels: Tensor, table: Tensor) -> Tensor:
        ctx.save_for_backward((table[:, 255] - table[:, 0]).view(3, 1, 1) / 255)
        entries = levels.int().add_(256 * torch.arange(3, dtype=torch.int32, device=levels.device).view(3, 1, 1))
        return table.flatten().index_select(0, entries.flatten()).view(levels.shape)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (slope,) = ctx.saved_tensors
        return gradients[0] * slope, None


def best_canvas(image_size: tuple[int, int], pinpoints: list[list[int]]) -> tuple[int, int]:
    """Choose the canvas that keeps most of the image's pixels, and of these the one that wastes least.

    Args:
        image_size: Height and width of the image.
        pinpoints: Possible canvases, height and width each.

    Returns:
        Height and width; the earliest entry wins a tie.
    """
    height, width = image_size

    def merit(canvas: list[int]) -> tuple[int, int]:
        scale = min(canvas[1] / width, canvas[0] / height)
        kept = min(int(width * scale) * int(height * scale), width * height)
        return kept, kept - canvas[0] * canvas[1]

    best = max(pinpoints, key=merit)
    return best[0], best[1]


def fitted_size(image_size: tuple[int, int], canvas: tuple[int, int]) -> tuple[int, int]:
    """Return the largest size with the image's aspect ratio inside the canvas; the free side is rounded up."""
    height, width = image_size
    scale_h, scale_w = canvas[0] / height, canvas[1] / width
    if scale_w < scale_h:
        return min(math.ceil(height * scale_w), canvas[0]), canvas[1]
    return canvas[0], min(math.ceil(width * scale_h), canvas[1])


def _tile_size(image_processor: Any) -> tuple[int, int]:
    """Read the tile size, refusing settings under which views are processed differently."""
    missing = [name for name in ("image_grid_pinpoints", "crop_size", "size") if not hasattr(image_processor, name)]
    if missing:
        raise ValueError(
            f"`image_processor` must be a LLaVA-NeXT image processor, got {type(image_processor).__name__} without "
            f"{', '.join(missing)}. For another model write a differentiable preprocessing of its own."
        )
    crop, size = image_processor.crop_size, image_processor.size
    tile = (crop["height"], crop["width"])
    edges = {length for length in dict(size).values() if length is not None}
    if edges | {tile[0], tile[1]} != {tile[0]}:
        raise ValueError(f"`size` and `crop_size` must be one and the same square, got {dict(size)} and {dict(crop)}.")
    if int(image_processor.resample) != _BICUBIC:
        raise ValueError(f"`resample` of the image processor must be bicubic (3), got {image_processor.resample!r}.")
    return tile


def _whole_pair(image_size: tuple[int, int]) -> tuple[int, int]:
    height, width = image_size
    if min(height, width) < 1 or int(height) != height or int(width) != width:
        raise ValueError(f"`image_size` must be (height, width) in whole pixels, got {image_size!r}.")
    return int(height), int(width)


def _test_images(image_size: tuple[int, int]) -> Iterator[Tensor]:
    """Levels ``(1, 3, H, W)`` that tell resizes apart, more if they are small: noise, the last one black and white."""
    count, generator = min(max(10_000 // (image_size[0] * image_size[1]), 3), 64), torch.Generator().manual_seed(0)
    for number in range(count):
        levels = torch.randint(0, 256, (1, 3, *image_size), generator=generator, dtype=torch.uint8)
        yield levels if number < count - 1 else (levels > 127).to(torch.uint8) * 255
