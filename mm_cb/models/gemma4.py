"""Gemma 4: pictures at their own shape, cut into patches; small models give every block an input of its own."""

from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from image_attacks import Plan, resize
from mm_cb.core.errors import UserError
from mm_cb.models.gemma3 import Gemma3Model
from mm_cb.models.inputs import ModelInputs
from mm_cb.models.laws import check_pictures
from mm_cb.models.tower import BlockArguments, Rows, TowerInputs
from mm_cb.models.vision import put

_MOST_TOKENS = 280
"""Of a picture, with the published image processors."""


class Gemma4Model(Gemma3Model):
    """A ``Gemma4ForConditionalGeneration`` with its ``Gemma4Processor``, for pictures and texts.

    In the small models (E2B, E4B) every block takes an input made of each token's id and embedding, and the upper
    blocks take their keys and values from lower ones. The large ones have neither; there the tokens of a picture see
    each other both ways in blocks with a window.
    """

    model_types = ("gemma4",)
    text_types = ("gemma4_text",)
    text_fields = {"use_bidirectional_attention": (None, "vision"), "enable_moe_block": (False,)}
    full_precision = (
        *("vision_tower", "embed_vision", "audio_tower", "embed_audio"),
        *("per_layer_model_projection", "lm_head"),
    )
    beside = ("image_position_ids",)
    end_of_turn = "<turn|>"
    stop_tokens = ("<eos>", "<|tool_response>")

    @classmethod
    def check_processor(cls, processor: Any, config: Any, folder: Path) -> None:
        """As `VisionModel.check_processor`, for pictures that are not normalised, and for the model's patches."""
        if (vision := config.vision_config) is None:
            raise UserError(
                f"`config.json` of `{folder}` must have a `vision_config`, it has none: that model takes no pictures."
            )
        patches = {"patch_size": vision.patch_size, "pooling_kernel_size": vision.pooling_kernel_size}
        check_pictures(processor, folder, do_normalize=False, **patches)

    @property
    def looks_ahead(self) -> frozenset[str]:  # type: ignore[override]
        """Types of blocks in which the tokens of a picture see those behind them."""
        both = self.tower.config.use_bidirectional_attention == "vision"
        return frozenset({"sliding_attention"} if both else ())

    @property
    def _side(self) -> int:
        """Pixels along the square that one token stands for: 48."""
        images = self.processor.image_processor
        return images.patch_size * images.pooling_kernel_size

    def _canvas(self) -> tuple[int, int]:
        """The largest square, which no resize changes: 768 x 768."""
        side = int(self.processor.image_processor.max_soft_tokens**0.5) * self._side
        return side, side

    def largest_picture(self) -> int:
        """Tokens of a picture at the image processor's upper limit; the published one's where there is none here."""
        return self.processor.image_processor.max_soft_tokens if self.processor else _MOST_TOKENS

    def token_arguments(self, inputs: ModelInputs) -> dict[str, Tensor]:
        """Which tokens stand for pictures: in large models these see each other both ways."""
        return {"mm_token_type_ids": inputs.image_mask.int()}

    @torch.no_grad()
    def tower_inputs(self, inputs: ModelInputs) -> TowerInputs:
        """What the language tower starts from, also for texts alone."""
        if inputs.pixel_values is None:
            return self.with_features(inputs, None)
        return super().tower_inputs(inputs)

    def with_features(self, inputs: ModelInputs, features: Any) -> TowerInputs:
        """As `VisionModel.with_features`, and each token's part in the inputs of all blocks, ``(B, T, blocks, P)``."""
        tower = self.tower
        with torch.no_grad():
            ids = inputs.input_ids.masked_fill(inputs.image_mask, tower.config.pad_token_id)
            embeds = self.base.get_input_embeddings()(ids)
            extras = (tower.get_per_layer_inputs(ids),) if tower.config.hidden_size_per_layer_input else ()
        return TowerInputs(embeds if features is None else put(embeds, inputs, features.pooler_output), extras)

    def block_arguments(self, rows: Rows) -> BlockArguments:
        """As `Gemma3Model.block_arguments`, with the inputs of all blocks.

        Keys and values that blocks share are written by lower blocks in every pass, before upper ones read them.
        """
        shared: Any = {"shared_kv_states": {}, "per_layer_inputs": None}
        if rows.extras:
            (own,) = rows.extras
            shared["per_layer_inputs"] = self.tower.project_per_layer_inputs(rows.embeds[None], own[None])
        return {**super().block_arguments(rows), **shared}

    def run_block(self, index: int, state: Tensor, arguments: BlockArguments) -> Tensor:
        """As `ChatModel.run_block`, with the block's own input."""
        own: Any = dict(arguments)
        inputs = own.pop("per_layer_inputs")
        own["per_layer_input"] = None if inputs is None else inputs[:, :, index]
        return super().run_block(index, state, own)

    def next_state(self, index: int, state: Tensor, rows: Rows) -> Tensor:
        """The output of the block before: nothing is added in between."""
        return state

    @classmethod
    def blocks_read(cls, config: Any, blocks: int) -> int:
        """All blocks of a model in which they share inputs, keys or values."""
        text = config.get_text_config()
        shares = text.hidden_size_per_layer_input or text.num_kv_shared_layers
        return text.num_hidden_layers if shares else blocks

    def plan(self, image_size: tuple[int, int]) -> Plan:
        """One resize within the limit of patches, then patches, padded: ``(B, most patches, side * side * 3)``.

        Raises:
            ValueError: If the picture is so long that its shorter side gets no patch.
        """
        processor = self.processor.image_processor
        side, pool = processor.patch_size, processor.pooling_kernel_size
        most = processor.max_soft_tokens * pool**2
        fitted = import_module(type(processor).__module__).get_aspect_ratio_preserving_size  # of its own backend
        height, width = fitted(*image_size, patch_size=side, max_patches=most, pooling_kernel_size=pool)

        def arrange(views: list[Tensor]) -> Tensor:
            cut = views[0].view(-1, 3, height // side, side, width // side, side)
            patches = cut.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)
            return torch.nn.functional.pad(patches, (0, 0, 0, most - patches.shape[1]))

        return Plan([[resize(height, width, processor.resample)]], arrange)
