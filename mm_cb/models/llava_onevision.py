"""LLaVA-OneVision: tiles of a padded canvas, which a picture has to itself only where it is the chat's only one."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image
from torch import Tensor

from image_attacks import Plan
from mm_cb.core.errors import UserError
from mm_cb.models.any_resolution import any_resolution
from mm_cb.models.inputs import ModelInputs
from mm_cb.models.laws import check_fields, check_pictures, check_tiles
from mm_cb.models.vision import VisionModel

_TOLERATED = 1.1**2
"""So much larger than its limit may the grid of a picture's features be before it is scaled down."""


class LlavaOnevisionModel(VisionModel):
    """A ``LlavaOnevisionForConditionalGeneration`` with its ``LlavaOnevisionProcessor``.

    The pictures of a chat with several are padded to squares and seen at the image tower's size, without tiles, as the
    model learnt them and as its processor makes them of lists of pictures.
    """

    model_types = ("llava_onevision",)
    text_types = ("qwen2",)
    beside = ("image_sizes",)
    nested = True
    end_of_turn = "<|im_end|>"
    stop_tokens = ("<|endoftext|>",)

    @classmethod
    def check_processor(cls, processor: Any, config: Any, folder: Path) -> None:
        """As `VisionModel.check_processor`, and for tiles and their tokens that are the model's."""
        canvases, side = config.image_grid_pinpoints, config.vision_config.image_size
        if not re.fullmatch("anyres_max_[1-9][0-9]{0,2}", config.vision_aspect_ratio):
            raise UserError(
                f"`config.json` of `{folder}`: `vision_aspect_ratio` must be anyres_max_ and a number of tiles, got "
                f"{config.vision_aspect_ratio!r:.80}."
            )
        shared = ("vision_aspect_ratio", "vision_feature_select_strategy")
        tokens = (side // config.vision_config.patch_size) ** 2
        check_fields(processor, folder, num_image_tokens=tokens, **{name: getattr(config, name) for name in shared})
        check_tiles(canvases, side, folder)
        tile = {"height": side, "width": side}
        grids = [list(canvas) for canvas in canvases]
        check_pictures(processor, folder, size=tile, do_pad=True, image_grid_pinpoints=grids)

    def grouped(self, rows: Sequence[Sequence[Image]]) -> list[Any]:
        """A list of pictures for each chat."""
        return [list(row) for row in rows]

    def _canvas(self) -> tuple[int, int]:
        """One tile: 384 x 384."""
        size = self.processor.image_processor.size
        return size["height"], size["width"]

    def largest_picture(self) -> int:
        """No picture has more tokens: the whole, as many features as are not scaled down, and one a line of them."""
        config, vision = self.base.config, self.base.config.vision_config
        side = vision.image_size // vision.patch_size
        limit = int(_TOLERATED * int(config.vision_aspect_ratio.rpartition("_")[2]) * side**2)
        lines = max(height for height, _ in config.image_grid_pinpoints) // vision.image_size * side
        area = max(height * width for height, width in config.image_grid_pinpoints) // vision.image_size**2 * side**2
        return side**2 + min(area, limit) + lines

    def _tower_arguments(self, inputs: ModelInputs, pixel_values: Tensor | None) -> dict[str, Tensor]:
        """As `VisionModel._tower_arguments`, and how many pictures each chat has."""
        counts = inputs.images_per_row
        assert counts is not None
        return {**super()._tower_arguments(inputs, pixel_values), "batch_num_images": counts[counts > 0]}

    def plan(self, image_size: tuple[int, int]) -> Plan:
        """The whole picture as one tile, and the picture fitted into a black canvas that is cut into tiles."""
        processor = self.processor.image_processor
        tile = processor.size["height"], processor.size["width"]
        return any_resolution(image_size, tile, processor.image_grid_pinpoints, processor.resample)
