"""Qwen3.5: Qwen3-VL's pictures in front of a tower whose blocks are mostly recurrent.

A recurrent block carries a state from token to token. Rows laid end to end are therefore run one by one in it: a row
that began with another's state would have other hidden states, and nothing would say so.

The chat template puts a thinking block in front of an answer, empty in a chat that has one. Here it is empty in prompts
too, ``enable_thinking=False``: what the model goes on with, and every target and prefill, stands behind the block. With
``--thinking`` (``model.thinking = True``) prompts leave it open, and all three stand in it.
"""

from typing import ClassVar

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import LinearAttentionLayer

from mm_cb.models.qwen_vl import QwenVLModel
from mm_cb.models.tower import BlockArguments

_ATTENTION = "full_attention"


class _RecurrentCache(LinearAttentionLayer):
    """The cache of a recurrent block. Transformers' own writes into states that a gradient still needs."""

    def update_recurrent_state(self, recurrent_states: Tensor, state_idx: int = 0, **kwargs: object) -> Tensor:
        self.recurrent_states[state_idx] = recurrent_states
        self.is_recurrent_states_initialized[state_idx] = True
        return recurrent_states

    def batch_repeat_interleave(self, repeats: int) -> None:
        for states in (self.conv_states, self.recurrent_states):
            states.update({i: one.repeat_interleave(repeats, dim=0) for i, one in states.items() if one is not None})


class Qwen35Model(QwenVLModel):
    """A ``Qwen3_5ForConditionalGeneration`` with its processor."""

    model_types: ClassVar[tuple[str, ...]] = ("qwen3_5",)
    text_types: ClassVar[tuple[str, ...]] = ("qwen3_5_text",)
    thinking_switch = "enable_thinking"

    def run_block(self, index: int, state: Tensor, arguments: BlockArguments) -> Tensor:
        """As `LanguageTower.run_block`; a recurrent block sees one row at a time."""
        if self.tower.config.layer_types[index] == _ATTENTION:
            return super().run_block(index, state, arguments)
        block, angles = self.decoder_blocks[index], arguments["position_embeddings"]  # which it does not look at
        rows = state.split(arguments["row_lengths"], dim=1)
        return torch.cat([block(row, position_embeddings=angles, attention_mask=None) for row in rows], dim=1)

    def cache(self) -> DynamicCache:
        """As `LanguageTower.cache`."""
        cache = super().cache()
        cache.layers = [_RecurrentCache() if type(one) is LinearAttentionLayer else one for one in cache.layers]
        return cache
