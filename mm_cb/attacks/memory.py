"""How much memory an attack on pictures needs at its peak, from the model's shape alone.

    weights      every parameter, in the run's dtype
    activations  of a behaviour: tokens of its picture (the largest, unless told) and of a short chat x what every
                 decoder block saves for its backward pass (`block_bytes`, without an adapter), and likewise of the
                 image tower
    overhead     1 GiB: the device's own context and kernels' workspaces

It is an estimate and was not measured on a GPU. The head is run on the target's positions alone and is left out.
"""

from typing import NamedTuple

import torch
from torch import nn

from mm_cb.models import ChatModel
from mm_cb.models.vision import VisionModel
from mm_cb.training.planning.memory import block_bytes

CHAT = 128
"""Tokens of request, template and target."""
_GIB = 2**30


class AttackMemory(NamedTuple):
    """Bytes on the device."""

    fixed: float
    """Whatever the batch is."""
    each: float
    """Of every behaviour that is attacked at once (``--batch``)."""

    def fitting(self, free: float) -> int:
        """How many behaviours go at once into so many bytes; 0 if not one does."""
        return max(0, int((free - self.fixed) // self.each))


def estimate_attack(model: ChatModel, dtype: str, picture: int | None = None) -> AttackMemory:
    """The peak of a step of PGD.

    Args:
        model: The whole model; shapes are enough (`mm_cb.models.families.skeleton`).
        dtype: The run's.
        picture: Tokens of a picture; None = of the largest.
    """
    size = getattr(torch, dtype).itemsize
    picture, path = model.largest_picture() if picture is None else picture, model.language_path
    each = (picture + CHAT) * sum(
        block_bytes(model, f"{path}.{i}.", (), 0, size) for i in range(len(model.decoder_blocks))
    )
    if isinstance(model, VisionModel):
        each += picture * _image_tower(model, size)
    weights = sum(parameter.numel() for parameter in model.base.parameters()) * size
    return AttackMemory(weights + _GIB, each)


def _image_tower(model: ChatModel, size: int) -> float:
    """Bytes that a picture leaves in the blocks of the image tower, for each of its tokens."""
    merged = getattr(model.base.config.vision_config, "spatial_merge_size", 1) ** 2
    lists = {name: m for name, m in model.base.named_modules() if isinstance(m, nn.ModuleList)}
    own = [blocks for name, blocks in lists.items() if not name.startswith(model.language_path.rpartition(".")[0])]
    blocks = max(own, key=len, default=nn.ModuleList())
    total = 0.0
    for block in blocks:
        layers = [layer for layer in block.modules() if isinstance(layer, nn.Linear)]
        hidden, inner = min(layer.in_features for layer in layers), max(layer.out_features for layer in layers)
        total += 2 * 4 * hidden + 4 * size * hidden + 3 * size * inner
    return merged * total
