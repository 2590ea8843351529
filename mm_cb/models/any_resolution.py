"""Tiles of a padded canvas and a view of the whole: how several families see a picture of any shape."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from image_attacks import Plan, pad, resize, tiles


def any_resolution(
    image_size: tuple[int, int], tile: tuple[int, int], pinpoints: Sequence[Sequence[int]], resample: int
) -> Plan:
    """The whole as one tile, and tiles of a padded canvas: ``(B, 1 + tiles, 3, h, w)``, the tiles row by row.

    Raises:
        ValueError: If a canvas is no number of whole tiles.
    """
    canvas = best_canvas(image_size, pinpoints)
    if any(length % side for length, side in zip(canvas, tile, strict=True)):
        raise ValueError(f"Every entry of `image_grid_pinpoints` must be a multiple of the tile {tile}.")
    height, width = fitted_size(image_size, canvas)
    corner = (canvas[0] - height) // 2, (canvas[1] - width) // 2

    def arrange(views: list[Tensor]) -> Tensor:
        base, main = views
        return torch.cat([base.unsqueeze(1), tiles(main, *tile)], dim=1)

    main = [resize(height, width, resample), pad(*corner, *canvas)]
    return Plan([[resize(*tile, resample)], main], arrange)


def best_canvas(image_size: tuple[int, int], pinpoints: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Choose the canvas that keeps most of the image's pixels, and of these the one that wastes least.

    Args:
        image_size: Height and width of the image.
        pinpoints: Possible canvases, height and width each.

    Returns:
        Height and width; the earliest entry wins a tie.
    """
    height, width = image_size

    def merit(canvas: Sequence[int]) -> tuple[int, int]:
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
