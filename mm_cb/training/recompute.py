"""Blocks that store their input alone and are run again in the backward pass: memory for time."""

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from mm_cb.models import ChatModel
from mm_cb.models.counted_positions import chosen_positions, only_counted_positions


def recompute_blocks(model: ChatModel) -> None:
    """Let the decoder blocks be recomputed wherever gradients are on; below the first adapted one, an adversary's are.

    The second run draws the same dropout masks, so that gradients stay the same to the last bit on a CPU.
    """
    for block in model.decoder_blocks:
        block.forward = partial(_run, block, block.forward)


def _run(block: nn.Module, forward: Any, *arguments: Any, **options: Any) -> Tensor:
    if not torch.is_grad_enabled():
        return forward(*arguments, **options)
    chosen = chosen_positions(block)  # of this pass: in the backward pass nobody says so any more
    return checkpoint(
        forward,
        *arguments,
        use_reentrant=False,
        context_fn=lambda: (nullcontext(), only_counted_positions(block, chosen)),
        **options,
    )
