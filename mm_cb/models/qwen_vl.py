"""Qwen2-VL, Qwen2.5-VL and Qwen3-VL: pictures at their own size, cut into patches; tokens with a place in space.

A token's position has three parts (time, row, column), which differ within a picture. Two-dimensional positions are
accepted by transformers and give other logits without a word, so that `QwenVLModel.positions` is the only way to them.
Qwen3-VL adds features of the image tower's lower blocks behind its first decoder blocks (deepstack). A training
adversary moves the embeddings of a picture and leaves those as they are.
"""

import math
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from image_attacks import Plan, resize
from mm_cb.models.inputs import ModelInputs
from mm_cb.models.laws import check_patches, check_pictures
from mm_cb.models.tower import TowerInputs
from mm_cb.models.vision import VisionModel, put

_CANVAS = 448
"""Side of the grey picture of behaviours that have none: 256 tokens, 196 in Qwen3-VL. Our choice."""

_MOST_TOKENS = 16384
"""Of a picture, with the published image processors of all three."""

_PICTURE = "<|vision_start|><|image_pad|><|vision_end|>"
"""What the published templates of all three write for one."""
_FLAT = (
    "{%- set flat = namespace(turns=[]) %}{%- for turn in messages %}"
    "{%- set said %}{% if turn.content is string %}{{ turn.content }}{% else %}{% for part in turn.content or [] %}"
    "{% if part.type == 'image' %}" + _PICTURE + "{% else %}{{ part.text }}{% endif %}{% endfor %}{% endif %}"
    "{% endset %}{%- set flat.turns = flat.turns + [dict(turn, content=said)] %}{%- endfor %}"
    "{%- set messages = flat.turns %}"
)
"""Turns of parts as turns of plain texts, which is what the templates of text models take."""


class QwenVLModel(VisionModel):
    """A ``Qwen2VL``-, ``Qwen2_5_VL``- or ``Qwen3VLForConditionalGeneration`` with its processor."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
    text_types: ClassVar[tuple[str, ...]] = ("qwen2_vl_text", "qwen2_5_vl_text", "qwen3_vl_text")
    full_precision = ("visual", "lm_head")
    beside = ("image_grid_thw",)
    end_of_turn = "<|im_end|>"
    stop_tokens = ("<|endoftext|>",)

    @classmethod
    def read_processor(cls, folder: str, image_backend: str) -> Any:
        """As `VisionModel.read_processor`; chats with tools by the tokenizer's template where that alone takes them.

        Qwen2.5-VL is published so: its processor's template leaves tools out, its tokenizer's knows no pictures.
        """
        processor = super().read_processor(folder, image_backend)
        seeing, taught = processor.chat_template, processor.tokenizer.chat_template
        if isinstance(seeing, str) and isinstance(taught, str) and "tools" in taught and "tools" not in seeing:
            seeing, taught = (
                text.removesuffix("\n") + "{{ '' }}" for text in (seeing, taught)
            )  # as each alone is read
            processor.chat_template = f"{{% if tools %}}{_FLAT}\n{taught}{{% else %}}\n{seeing}{{% endif %}}"
        return processor

    @classmethod
    def check_processor(cls, processor: Any, config: Any, folder: Path) -> None:
        """As `VisionModel.check_processor`, and for patches that are the model's."""
        vision = config.vision_config
        patches = {"patch_size": vision.patch_size, "temporal_patch_size": vision.temporal_patch_size}
        check_pictures(processor, folder, **patches, merge_size=vision.spatial_merge_size)
        check_patches(processor.image_processor, folder)

    def _canvas(self) -> tuple[int, int]:
        """448 x 448, or the largest square below that the image processor leaves as it is."""
        images = self.processor.image_processor
        token = images.patch_size * images.merge_size
        side = min(_CANVAS, math.isqrt(images.size["longest_edge"])) // token * token
        return side, side

    def largest_picture(self) -> int:
        """Tokens of a picture at the image processor's upper limit; the published one's where there is none here."""
        if self.processor is None:
            return _MOST_TOKENS
        images = self.processor.image_processor
        return images.size["longest_edge"] // (images.patch_size * images.merge_size) ** 2

    def pixel_rows(self, made: Mapping[str, Tensor]) -> Tensor:
        """One row a patch."""
        return made["image_grid_thw"].prod(-1)

    def token_arguments(self, inputs: ModelInputs) -> dict[str, Tensor]:
        """Which tokens stand for pictures: the model places them by it."""
        return {"mm_token_type_ids": inputs.image_mask.int()}

    def positions(self, inputs: ModelInputs) -> Tensor:
        """``(3, B, T)``: time, row and column."""
        if inputs.pixel_values is None:
            return inputs.text_positions.expand(3, -1, -1)
        return self.base.model.get_rope_index(
            inputs.input_ids,
            **self.token_arguments(inputs),
            **inputs.beside,
            attention_mask=inputs.attention_mask,
        )[0]

    def with_features(self, inputs: ModelInputs, features: Any) -> TowerInputs:
        """As `VisionModel.with_features`, and what is added behind the first blocks."""
        embeds = super().with_features(inputs, features).embeds
        layers = getattr(features, "deepstack_features", None) or []
        return TowerInputs(embeds, tuple(put(torch.zeros_like(embeds), inputs, layer) for layer in layers))

    def plan(self, image_size: tuple[int, int]) -> Plan:
        """One resize to a multiple of the patches that make a token, then patches: ``(patches, 3 * time * side**2)``.

        Raises:
            ValueError: If one side of the picture is more than 200 times the other.
        """
        processor = self.processor.image_processor
        side, merge, time = processor.patch_size, processor.merge_size, processor.temporal_patch_size
        least, most = processor.size["shortest_edge"], processor.size["longest_edge"]
        fitted = import_module(type(processor).__module__).smart_resize  # of its own backend: one may be absent
        height, width = fitted(*image_size, factor=side * merge, min_pixels=least, max_pixels=most)

        def arrange(views: list[Tensor]) -> Tensor:
            rows, columns = height // (side * merge), width // (side * merge)
            cut = views[0].view(-1, 3, rows, merge, side, columns, merge, side)
            patches = cut.permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6).expand(*[-1] * 6, time, -1, -1)
            return patches.reshape(-1, 3 * time * side**2)

        return Plan([[resize(height, width, processor.resample)]], arrange)
