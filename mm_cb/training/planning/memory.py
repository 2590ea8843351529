"""How much memory of the device a training run needs at its peak, from the model's shape alone.

    weights      every parameter that is kept, in the run's dtype (4-bit weights: 0.516 bytes each, scales included)
    adapter      LoRA parameters x 20 bytes: float32 value, gradient, Adam's two moments, a copy of the gradient that an
                 out-of-memory retry starts from
    activations  tokens of one pass x LoRA blocks (one, where they are recomputed) x what a block saves for its backward
                 pass (`block_bytes`); with an adversary, of the blocks below as well, with the KL of logits, of those
                 above
    states       tokens x hidden states that can change x hidden size x (reference and adapted in the run's dtype, and
                 8 bytes that the losses save in float32), and those below the adapter once with an adversary
    working      tokens x (3 x inner width + 4 x hidden size) in the run's dtype: one block at work, and the image
                 tower; where logits are read, those of 256 tokens, six times in float32
    overhead     1 GiB: the device's own context and kernels' workspaces, and fragmentation

It is an estimate: measured peaks belong beside it (``scripts/benchmarks/gpu.py``). Sizes are in bytes and shown in GiB
(2**30 bytes), which is what cards are sold by; goals in GB (1e9 bytes) are the stricter ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields

import torch
from torch import nn
from transformers.pytorch_utils import Conv1D

from mm_cb.core.sizes import GIB, told_size, unit_of
from mm_cb.models import ChatModel
from mm_cb.training.objective import LOGITS_OF
from mm_cb.training.placement import KeptBlocks, adapter_size, features

FOUR_BIT = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Bytes of a weight in NF4: a nibble, an 8-bit scale for 64 weights, a float32 scale for 256 scales."""


@dataclass(frozen=True)
class Memory:
    """Bytes on the device at the peak of a training step, see the module's text."""

    weights: float
    adapter: float
    activations: float
    states: float
    working: float
    overhead: float = GIB

    @property
    def total(self) -> float:
        """All of it."""
        return sum(getattr(self, field.name) for field in fields(self))

    def __str__(self) -> str:
        """``"13.9 GiB: weights 7.8, ..."``."""
        unit, _ = unit_of(self.total)
        parts = ", ".join(f"{field.name} {getattr(self, field.name) / unit:.2g}" for field in fields(self))
        return f"{told_size(self.total)}: {parts}"


def estimate(
    model: ChatModel,
    paths: Sequence[str],
    kept: KeptBlocks,
    *,
    r: int,
    dtype: str,
    tokens: int,
    quantize: str | None = None,
    recompute: bool = False,
    adversary: bool = False,
) -> Memory:
    """The peak of a training step.

    Args:
        model: The whole model; shapes are enough (`mm_cb.models.families.skeleton`).
        paths: Modules that get LoRA.
        kept: What is loaded of the language tower.
        r: Rank.
        dtype: The run's.
        tokens: Tokens of one pass: the recipe's ``tokens_per_pass``, or the longest row if that is longer.
        quantize: ``"4bit"`` or None.
        recompute: Whether adapted blocks are run again in the backward pass; what is between them counts as states.
        adversary: Whether a gradient goes on through the blocks below the adapter, to the pictures' embeddings.

    Returns:
        The estimate.
    """
    size = getattr(torch, dtype).itemsize
    config = getattr(model.base.config, "text_config", model.base.config)
    blocks = {path.removeprefix(f"{model.language_path}.").partition(".")[0] for path in paths}
    first = min(map(int, blocks))
    changing, below = kept.blocks - first, range(first if adversary else 0)
    above = range(max(map(int, blocks)) + 1, kept.blocks if kept.head else 0)
    saved = [block_bytes(model, f"{model.language_path}.{i}.", paths, r, size) for i in [*blocks, *below, *above]]
    inner = max(features(layer)[1] for layer in model.decoder_blocks[0].modules() if isinstance(layer, _LINEAR))
    return Memory(
        weights=kept_weights(model, kept, size, quantize),
        adapter=20 * adapter_size(model, paths, r),
        activations=tokens * (max(saved) if recompute else sum(saved)),
        states=tokens * config.hidden_size * (changing * (2 * size + 8) + len(below) * size),
        working=tokens * (3 * inner + 4 * config.hidden_size) * size
        + (24 * min(tokens, LOGITS_OF) * config.vocab_size if kept.head else 0),
    )


def kept_weights(model: ChatModel, kept: KeptBlocks, size: int, quantize: str | None = None) -> float:
    """Bytes of the parameters that a run loads: all but the blocks, and the head, that need not be read."""
    total, path = 0.0, model.language_path
    read = model.blocks_read(model.base.config, kept.blocks)
    dropped = [f"{path}.{i}." for i in range(read, len(model.decoder_blocks))]
    dropped += [] if kept.head else ["lm_head."]
    for name, parameter in model.base.named_parameters():
        if name.startswith(tuple(dropped)):
            continue
        four_bit = quantize == "4bit" and name.startswith(f"{path}.") and parameter.dim() == 2
        total += parameter.numel() * (FOUR_BIT if four_bit else size)
    return total


def block_bytes(model: ChatModel, prefix: str, paths: Sequence[str], r: int, size: int) -> float:
    """Bytes that one token leaves in one adapted block for the backward pass.

    Frozen linear layers save nothing. Each adapted one saves the float32 input of LoRA's A, its dropout mask and A's
    output; each norm its float32 input; attention its queries, keys, values and output; the MLP three inner states.
    """
    block = model.base.get_submodule(prefix.rstrip("."))
    hidden = getattr(model.base.config, "text_config", model.base.config).hidden_size
    lora = sum(5 * features(model.base.get_submodule(path))[0] + 4 * r for path in paths if path.startswith(prefix))
    inner = max(
        features(layer)[1] for name, layer in block.named_modules() if isinstance(layer, _LINEAR) and "mlp" in name
    )
    return lora + 2 * 4 * hidden + 4 * size * hidden + 3 * size * inner


_LINEAR = (nn.Linear, Conv1D)
