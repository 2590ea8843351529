"""Aya Vision: InternVL's tiles in front of a Cohere 2 tower, whose blocks of full attention have no places."""

from pathlib import Path
from typing import Any

from torch import Tensor

from mm_cb.models.internvl import InternVLModel
from mm_cb.models.laws import check_fields, check_pictures, check_tile_limits


class AyaVisionModel(InternVLModel):
    """An ``AyaVisionForConditionalGeneration`` with its ``AyaVisionProcessor``; the 32B model's tower is another."""

    model_types = ("aya_vision",)
    text_types = ("cohere2",)
    end_of_turn = "<|END_RESPONSE|>"
    stop_tokens = ()

    @classmethod
    def check_processor(cls, processor: Any, config: Any, folder: Path) -> None:
        """As `VisionModel.check_processor`, and for tiles and their tokens that are the model's."""
        side, token = config.vision_config.image_size, config.vision_config.patch_size * config.downsample_factor
        check_pictures(processor, folder, size={"height": side, "width": side})
        check_fields(processor, folder, img_size=side, patch_size=token)
        check_tile_limits(processor.image_processor, folder)

    @property
    def soft_token(self) -> str:
        """Another one than what the template writes."""
        return self.processor.img_patch_token

    def _tokens_of_a_tile(self) -> int:
        config = self.base.config
        return (config.vision_config.image_size // config.vision_config.patch_size // config.downsample_factor) ** 2

    def logits(self, states: Tensor) -> Tensor:
        """The head's, without the tower's ``logit_scale``: so has transformers' class, whose answers are the same."""
        return self.base.lm_head(states)
