"""LLaVA-NeXT: a language model that sees pictures, cut into tiles of its image tower's size."""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from image_attacks import Plan, pad, resize, tiles
from mm_cb.models.inputs import Arguments, ModelInputs
from mm_cb.models.laws import check_pictures, check_tiles
from mm_cb.models.llava import check_llava_processor
from mm_cb.models.vision import VisionModel

_WRONG_END = "<\\s>"
"""How older copies of the chat template end an answer: not the end-of-sequence token, but four characters."""

_BICUBIC = 3

logger = logging.getLogger(__name__)


class LlavaNextModel(VisionModel):
    """A ``LlavaNextForConditionalGeneration`` with its ``LlavaNextProcessor``."""

    model_types = ("llava_next",)
    beside = ("image_sizes",)

    @classmethod
    def read_processor(cls, folder: str, image_backend: str) -> Any:
        """As `VisionModel.read_processor`; a chat template that ends answers wrongly is mended."""
        processor = super().read_processor(folder, image_backend)
        if isinstance(processor.chat_template, str) and _WRONG_END in processor.chat_template:
            logger.info("the chat template of `%s` ends answers with %s; read as the end token.", folder, _WRONG_END)
            processor.chat_template = processor.chat_template.replace(_WRONG_END, processor.tokenizer.eos_token)
        return processor

    @classmethod
    def check_processor(cls, processor: Any, config: Any, folder: Path) -> None:
        """As `check_llava_processor`, and for the canvases that processor and model both choose from."""
        check_llava_processor(processor, config, folder)
        canvases, side = config.image_grid_pinpoints, config.vision_config.image_size
        check_tiles(canvases, side, folder)
        tile = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        check_pictures(processor, folder, **tile, image_grid_pinpoints=[list(canvas) for canvas in canvases])

    def _canvas(self) -> tuple[int, int]:
        """Two tiles square: 672 x 672."""
        tile = self.processor.image_processor.crop_size["height"]
        return 2 * tile, 2 * tile

    def largest_picture(self) -> int:
        """Tokens of a picture that fills the largest canvas; each line of its patches ends in one of its own."""
        vision = self.base.config.vision_config
        side = vision.image_size // vision.patch_size
        grids = [
            (height // vision.image_size * side, width // vision.image_size * side)
            for height, width in self.base.config.image_grid_pinpoints
        ]
        return side**2 + max(height * width + height for height, width in grids)

    def embed(self, inputs: ModelInputs, pixel_values: Tensor | None = None, features: Any = None) -> Arguments:
        """As `ChatModel.embed`, from embeddings that hold the pictures."""
        if inputs.pixel_values is None:
            return self.start_from(inputs, self.tower_inputs(inputs).embeds)
        seen = self.image_features(inputs, pixel_values) if features is None else features
        return self.start_from(inputs, self.with_features(inputs, seen).embeds)

    def plan(self, image_size: tuple[int, int]) -> Plan:
        """The whole picture as one tile, and the picture fitted into a black canvas that is cut into tiles."""
        return next_plan(self.processor.image_processor, image_size)


def next_plan(image_processor: Any, image_size: tuple[int, int]) -> Plan:
    """LLaVA-NeXT's views of a picture.

    Raises:
        ValueError: If the processor is set up in a way that this does not follow.
    """
    tile = _tile_size(image_processor)
    return any_resolution(image_size, tile, image_processor.image_grid_pinpoints, _BICUBIC)


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


def _tile_size(image_processor: Any) -> tuple[int, int]:
    """Read the tile size, refusing settings under which views are processed differently."""
    missing = [name for name in ("image_grid_pinpoints", "crop_size", "size") if not hasattr(image_processor, name)]
    if missing:
        raise ValueError(
            f"`image_processor` must be a LLaVA-NeXT image processor, got {type(image_processor).__name__} without "
            f"{', '.join(missing)}."
        )
    crop, size = image_processor.crop_size, image_processor.size
    tile = (crop["height"], crop["width"])
    edges = {length for length in dict(size).values() if length is not None}
    if edges | {tile[0], tile[1]} != {tile[0]}:
        raise ValueError(f"`size` and `crop_size` must be one and the same square, got {dict(size)} and {dict(crop)}.")
    if int(image_processor.resample) != _BICUBIC:
        raise ValueError(f"`resample` of the image processor must be bicubic (3), got {image_processor.resample!r}.")
    return tile
