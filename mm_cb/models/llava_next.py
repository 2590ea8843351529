"""LLaVA-NeXT: a language model that sees pictures, cut into tiles of its image tower's size."""

import logging
from pathlib import Path
from typing import Any

from torch import Tensor

from image_attacks import Plan
from mm_cb.models.any_resolution import any_resolution
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
    text_types = ("llama", "mistral", "qwen2")
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
        grids = [list(canvas) for canvas in canvases]
        check_pictures(processor, folder, **tile, do_pad=True, image_grid_pinpoints=grids)

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
        seen = self.matched(inputs, self.image_features(inputs, pixel_values) if features is None else features)
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
