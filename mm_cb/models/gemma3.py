"""Gemma 3: one square view of a picture, whose tokens see each other; most blocks look back a window's length."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from image_attacks import Plan, resize
from mm_cb.core.errors import UserError
from mm_cb.models.inputs import ModelInputs
from mm_cb.models.laws import PROCESSOR, check_fields, check_pictures
from mm_cb.models.tower import BlockArguments, ByType, Rows
from mm_cb.models.vision import VisionModel


class Gemma3Model(VisionModel):
    """A ``Gemma3ForConditionalGeneration`` with its ``Gemma3Processor``, as published: without pan-and-scan.

    Its tokenizer's end-of-sequence token is not what ends a turn. Without token types the model takes pictures for
    text, and says nothing.
    """

    model_types = ("gemma3",)
    text_types = ("gemma3_text",)
    text_fields: ClassVar[Mapping[str, tuple[object, ...]]] = {
        "use_bidirectional_attention": (None, False),
        **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (None,)),
    }
    nested = True
    end_of_turn = "<end_of_turn>"
    looks_ahead = frozenset({"full_attention", "sliding_attention"})
    """Types of blocks in which the tokens of a picture see those behind them."""

    @classmethod
    def check_processor(cls, processor: Any, config: Any, folder: Path) -> None:
        """As `VisionModel.check_processor`, and for views of the model's size and as many tokens as it has features."""
        side = config.vision_config.image_size
        check_pictures(processor, folder, size={"height": side, "width": side})
        check_fields(processor, folder, image_seq_length=config.mm_tokens_per_image)
        if processor.image_processor.do_pan_and_scan:
            raise UserError(
                f"`{folder / PROCESSOR}` must have `do_pan_and_scan` false, as published: its crops are not followed."
            )

    @property
    def soft_token(self) -> str:
        """Another one than what the template writes."""
        return self.processor.tokenizer.image_token

    def _canvas(self) -> tuple[int, int]:
        """What the image tower sees: 896 x 896."""
        size = self.processor.image_processor.size
        return size["height"], size["width"]

    def largest_picture(self) -> int:
        """Tokens of any picture: 256."""
        return self.base.config.mm_tokens_per_image

    def token_arguments(self, inputs: ModelInputs) -> dict[str, Tensor]:
        """Which tokens stand for pictures: these see each other both ways."""
        return {"token_type_ids": inputs.image_mask.int()}

    def block_arguments(self, rows: Rows) -> BlockArguments:
        """As `ChatModel.block_arguments`, and what the tokens of each row see in blocks of each type."""
        config = self.tower.config
        windows = {kind: config.sliding_window if kind.startswith("sliding") else None for kind in self.layer_types}
        assert rows.images is not None
        images = rows.images.split(rows.lengths)
        masks = {
            kind: tuple(seen(row, window, ahead=kind in self.looks_ahead) for row in images)
            for kind, window in windows.items()
        }
        return {**super().block_arguments(rows), "row_masks": ByType(masks)}

    def plan(self, image_size: tuple[int, int]) -> Plan:
        """One resize, whatever the picture's shape."""
        processor = self.processor.image_processor
        size = processor.size["height"], processor.size["width"]
        return Plan([[resize(*size, processor.resample)]], lambda views: views[0])


def seen(images: Tensor, window: int | None, *, ahead: bool) -> Tensor | None:
    """What the tokens of a row see.

    Args:
        images: True where a token stands for a part of a picture, ``(T,)``; a run of them is one picture.
        window: How many tokens they look back on, themselves included; None = on all.
        ahead: Whether the tokens of a picture see those behind them.

    Returns:
        ``(1, 1, T, T)``, or None: all before them.
    """
    length = len(images)
    if not (ahead and bool(images.any())) and (window is None or length <= window):
        return None
    places = torch.arange(length, device=images.device)
    back = places[:, None] - places
    mask = back >= 0
    if ahead:
        begins = images & ~torch.nn.functional.pad(images, (1, -1))
        picture = begins.cumsum(0) * images
        mask |= (picture[:, None] == picture) & images
    return (mask if window is None else mask & (back < window))[None, None]
