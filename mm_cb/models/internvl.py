"""InternVL 2.5, 3 and 3.5 as transformers has them: a grid of tiles, and a small view of the whole behind them."""

from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from image_attacks import Plan, resize, tiles
from mm_cb.models.laws import check_fields, check_pictures, check_tile_limits
from mm_cb.models.vision import VisionModel

_MOST_TILES = 12
"""Of a picture, with the published image processors."""


class InternVLModel(VisionModel):
    """An ``InternVLForConditionalGeneration`` with its ``InternVLProcessor``.

    Checkpoints with code of their own (``OpenGVLab/InternVL3-8B``) have twins in transformers' layout, ``...-hf``.
    """

    model_types: ClassVar[tuple[str, ...]] = ("internvl",)
    text_types: ClassVar[tuple[str, ...]] = ("llama", "qwen2", "qwen3")
    end_of_turn = "<|im_end|>"
    stop_tokens: ClassVar[tuple[str, ...]] = ("<|endoftext|>",)

    @classmethod
    def check_processor(cls, processor: Any, config: Any, folder: Path) -> None:
        """As `VisionModel.check_processor`, and for tiles and their tokens that are the model's."""
        height, width = config.vision_config.image_size
        check_pictures(processor, folder, size={"height": height, "width": width})
        check_fields(processor, folder, image_seq_length=config.image_seq_length)
        check_tile_limits(processor.image_processor, folder)

    @property
    def options(self) -> Mapping[str, object]:
        """Tiles, which the processor asks for whatever its image processor's file says."""
        return {"crop_to_patches": True}

    def _canvas(self) -> tuple[int, int]:
        """One tile: 448 x 448."""
        size = self.processor.image_processor.size
        return size["height"], size["width"]

    def largest_picture(self) -> int:
        """Tokens of as many tiles as the image processor makes, and of the view of the whole."""
        most = self.processor.image_processor.max_patches if self.processor else _MOST_TILES
        return (most + (most > 1)) * self._tokens_of_a_tile()

    def _tokens_of_a_tile(self) -> int:
        return self.base.config.image_seq_length

    def pixel_rows(self, made: Mapping[str, Any]) -> Tensor:
        """One row a tile."""
        return torch.as_tensor(made["num_patches"])

    def plan(self, image_size: tuple[int, int]) -> Plan:
        """A resize to the grid of tiles whose shape is the picture's, and a small view: ``(tiles, 3, h, w)``."""
        processor = self.processor.image_processor
        height, width = processor.size["height"], processor.size["width"]
        canvas = import_module(type(processor).__module__).get_optimal_tiled_canvas  # of its own backend
        columns, rows = canvas(image_size, (height, width), processor.min_patches, processor.max_patches)
        views = [[resize(height * rows, width * columns, processor.resample)]]
        if rows * columns > 1:
            views.append([resize(height, width, processor.resample)])
        return Plan(views, lambda made: torch.cat([tiles(view, height, width) for view in made], dim=1).flatten(0, 1))
