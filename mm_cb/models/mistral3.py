"""Pixtral and Mistral 3 (Mistral Small 3.1 and later): pictures at their own size, a token of the text behind each row.

Pixtral is read by LLaVA's classes in transformers, and has nothing else of it.
"""

import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from image_attacks import Plan, resize
from mm_cb.core.errors import UserError
from mm_cb.models.laws import CONFIG, check_fields, check_longest, check_pictures
from mm_cb.models.vision import VisionModel


class Mistral3Model(VisionModel):
    """A ``Mistral3``- or, with Pixtral's tower, a ``LlavaForConditionalGeneration`` with its ``PixtralProcessor``."""

    model_types = ("llava+pixtral", "mistral3")
    text_types = ("mistral",)
    beside = ("image_sizes",)

    @classmethod
    def check_processor(cls, processor: Any, config: Any, folder: Path) -> None:
        """As `VisionModel.check_processor`, and for patches that are the model's."""
        check_pictures(processor, folder)
        check_longest(processor.image_processor, folder)
        check_fields(processor, folder, patch_size=config.vision_config.patch_size, spatial_merge_size=_merged(config))
        if (strategy := getattr(config, "vision_feature_select_strategy", "full")) != "full":
            raise UserError(
                f"`{CONFIG}` of `{folder}`: `vision_feature_select_strategy` must be 'full', as every token of "
                f"Pixtral's tower stands for a patch, got {strategy!r:.40}."
            )

    @property
    def options(self) -> Mapping[str, object]:
        """A token's side in pixels, which the processor puts in place of its image processor's own patch."""
        return {"patch_size": self._side()}

    def _side(self) -> int:
        config = self.base.config
        return config.vision_config.patch_size * _merged(config)

    def _canvas(self) -> tuple[int, int]:
        """16 tokens square: 448 x 448 with the published patches."""
        return 16 * self._side(), 16 * self._side()

    def largest_picture(self) -> int:
        """Tokens of a square picture at the image processor's upper limit; the image tower's where there is none."""
        longest = self.base.config.vision_config.image_size
        if self.processor is not None:
            longest = self.processor.image_processor.size["longest_edge"]
        return math.ceil(longest / self._side()) ** 2

    def pixels(self, made: Mapping[str, Any]) -> Tensor:
        """As `VisionModel.pixels`.

        Raises:
            UserError: For a picture of one token, which transformers loses on the way through the projector.
        """
        side = self._side()
        if any(max(size) <= side for size in made["image_sizes"].tolist()):
            raise UserError(f"a picture for `{self.name}` must be longer than {side} pixels on one side; enlarge it.")
        return super().pixels(made)

    def plan(self, image_size: tuple[int, int]) -> Plan:
        """One resize to whole tokens, smaller where a side is longer than the limit.

        Raises:
            ValueError: If the shorter side would have no pixel.
        """
        processor, side = self.processor.image_processor, self._side()
        sizes = import_module(type(processor).__module__).get_resize_output_image_size  # of its own backend
        longest = processor.size["longest_edge"]
        height, width = sizes(torch.empty(3, *image_size, device="meta"), (longest, longest), (side, side))
        return Plan([[resize(height, width, processor.resample)]], _only)


def _merged(config: Any) -> int:
    """Patches along a token's side."""
    return getattr(config, "spatial_merge_size", 1)


def _only(views: list[Tensor]) -> Tensor:
    return views[0]
