"""Views of a picture: what a model's image processor does with it, said in steps that a gradient can follow.

A processor turns a picture into one or more views. Each is a chain of steps on whole 8-bit levels (`crop`, `resize`,
`pad`); the views are then normalised and arranged as the model takes them.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from .resampling import BICUBIC, Resize, fitting_resize


@dataclass(frozen=True)
class ViewStep:
    """One step of a view; made by `crop`, `resize` or `pad`."""

    kind: Literal["crop", "resize", "pad"]
    size: tuple[int, int]
    """Height and width afterwards."""
    corner: tuple[int, int] = (0, 0)
    """Row and column: where a crop begins, or where a pad puts what is there."""
    level: int = 0
    """Of the margins of a pad, 0..255."""
    resample: int = BICUBIC
    """Filter of a resize, by Pillow's number."""


def crop(top: int, left: int, height: int, width: int) -> ViewStep:
    """Keep ``height`` x ``width`` pixels from row ``top`` and column ``left`` on."""
    return ViewStep("crop", (height, width), (top, left))


def resize(height: int, width: int, resample: int = BICUBIC) -> ViewStep:
    """Resize to ``height`` x ``width``; ``resample`` is Pillow's number: 1 Lanczos, 2 bilinear, 3 bicubic."""
    return ViewStep("resize", (height, width), resample=int(resample))


def pad(top: int, left: int, height: int, width: int, level: int = 0) -> ViewStep:
    """Put the picture at row ``top`` and column ``left`` of a canvas of ``height`` x ``width`` of one level."""
    return ViewStep("pad", (height, width), (top, left), level)


def _pixel_values(made: Any) -> Tensor:
    return made["pixel_values"]


@dataclass(frozen=True)
class Plan:
    """What an image processor does with pictures of one size."""

    views: Sequence[Sequence[ViewStep]]
    """The chain of steps of each view; an empty chain is the picture itself."""
    arrange: Callable[[list[Tensor]], Tensor]
    """From the normalised views, each ``(B, 3, h, w)``, to what the model takes of B pictures."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Settings that the processor is called with."""
    nested: bool = False
    """Whether the processor wants a list of pictures for each sample."""
    read: Callable[[Any], Tensor] = _pixel_values
    """Takes from the processor's output what ``arrange`` makes."""

    @property
    def resizes(self) -> int:
        """Resizes in the longest chain."""
        return max(sum(step.kind == "resize" for step in view) for view in self.views)


def tiles(view: Tensor, height: int, width: int) -> Tensor:
    """Cut a view ``(B, 3, H, W)`` into tiles of ``height`` x ``width``, row by row: ``(B, N, 3, height, width)``."""
    rows, columns = view.shape[-2] // height, view.shape[-1] // width
    grid = view.view(-1, 3, rows, height, columns, width)
    return grid.permute(0, 2, 4, 1, 3, 5).reshape(len(view), -1, 3, height, width)


class Views:
    """The views of pictures of one size: exact on levels, smooth on pixels; steps that several begin with run once."""

    def __init__(self, views: Sequence[Sequence[ViewStep]], image_size: tuple[int, int], backend: str) -> None:
        """Prepare every resize, each as the library does it between these two sizes.

        Raises:
            ValueError: If a crop or a pad does not fit the size it meets, or a resize leaves no pixel.
        """
        self._views = [tuple(view) for view in views]
        self._resizes: dict[tuple[ViewStep, ...], Resize] = {}
        self.sizes = list[tuple[int, int]]()
        """Height and width of each view."""
        for view in self._views:
            size = image_size
            for number, step in enumerate(view, 1):
                _check(step, size)
                if step.kind == "resize" and view[:number] not in self._resizes:
                    self._resizes[view[:number]] = fitting_resize(size, step.size, step.resample, backend)
                size = step.size
            self.sizes.append(size)

    def to(self, device: torch.device) -> None:
        """Move the weights to a device."""
        for made in self._resizes.values():
            made.to(device)

    def exact(self, levels: Tensor) -> list[Tensor]:
        """Whole levels 0..255 ``(B, 3, H, W)`` to whole levels equal to the library's, for each view."""
        return self._walked(levels, Resize.exact, 1)

    def smooth(self, pixels: Tensor) -> list[Tensor]:
        """The same on pixels in [0, 1], without rounding."""
        return self._walked(pixels, Resize.smooth, 255)

    def _walked(self, start: Tensor, run: Callable[[Resize, Tensor], Tensor], unit: int) -> list[Tensor]:
        """Every view of ``start``, in which a level is ``1 / unit``."""
        made: dict[tuple[ViewStep, ...], Tensor] = {(): start}
        for view in self._views:
            for number, step in enumerate(view):
                before, after = made[view[:number]], view[: number + 1]
                if after not in made:
                    library = self._resizes.get(after)
                    made[after] = run(library, before) if library else _moved(before, step, step.level / unit)
        return [made[view] for view in self._views]


def _check(step: ViewStep, size: tuple[int, int]) -> None:
    """Make sure that a crop lies inside the picture, and the picture inside a pad, and that something is left."""
    if min(step.size) < 1:
        raise ValueError(f"`{step.kind}` must leave at least one pixel, got {step.size[0]} x {step.size[1]} of {size}.")
    inner, outer = (size, step.size) if step.kind == "pad" else (step.size, size)
    fits = all(0 <= at and at + a <= b for at, a, b in zip(step.corner, inner, outer, strict=True))
    if step.kind != "resize" and not fits:
        raise ValueError(f"`{step.kind}` to {step.size} at {step.corner} must fit a picture of {size}.")


def _moved(values: Tensor, step: ViewStep, level: float) -> Tensor:
    """A crop or a pad."""
    (top, left), (height, width) = step.corner, step.size
    if step.kind == "crop":
        return values[..., top : top + height, left : left + width]
    margins = (left, width - values.shape[-1] - left, top, height - values.shape[-2] - top)
    return torch.nn.functional.pad(values, margins, value=level) if any(margins) else values
