"""Low-rank changes of linear layers beside whatever adapter a model carries: put on for a pass, and gone behind it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.other import get_pattern_key
from torch import Tensor, nn

from mm_cb.core.errors import UserError
from mm_cb.models.adapters import SETTINGS, check_base, read_settings, read_tensors
from mm_cb.models.base import ChatModel
from mm_cb.models.patterns import pattern_fault

RANK = 4
"""Of a random change. Our choice."""
SIZE = 0.25
"""Norm of a random change at scale 1, as a share of its layer's: adapters of breakers had 0.1 to 0.5 of it."""
_ROWS = 1024
_PREFIX, _DOWN, _UP = "base_model.model.", ".lora_A.weight", ".lora_B.weight"


@dataclass(frozen=True)
class LowRankChange:
    """A layer's weight W becomes W + B A."""

    layer: nn.Module
    down: Tensor
    """A, shape ``(r, in)``."""
    up: Tensor
    """B, shape ``(out, r)``."""


@contextmanager
def changed(changes: Sequence[LowRankChange], scale: float) -> Iterator[None]:
    """Run with ``scale`` times the changes; at 0 nothing is added at all. Restored at the end."""

    def add(change: LowRankChange, layer: Any, given: Any, output: Tensor) -> Tensor:
        moved = nn.functional.linear(nn.functional.linear(given[0].to(change.down), change.down), change.up)
        return output + (scale * moved).to(output)

    hooks = [one.layer.register_forward_hook(partial(add, one)) for one in changes] if scale else []
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def linear_layers(model: ChatModel) -> list[nn.Linear]:
    """The linear layers of the decoder blocks, below an adapter if there is one."""
    found = [(name, module) for name, module in model.decoder_blocks.named_modules() if isinstance(module, nn.Linear)]
    return [module for name, module in found if "lora_" not in name]


@torch.no_grad()
def norm_of(layer: nn.Linear) -> float:
    """The Frobenius norm of a layer's weight, from what it does: a quantised one holds no plain matrix."""
    some = next(layer.parameters())
    dtype = some.dtype if some.is_floating_point() else torch.bfloat16
    offset = 0 if layer.bias is None else layer.bias
    total = 0.0
    for start in range(0, layer.in_features, _ROWS):
        rows = torch.zeros(min(_ROWS, layer.in_features - start), layer.in_features, dtype=dtype, device=some.device)
        rows[:, start:].fill_diagonal_(1)
        total += float((layer(rows) - offset).float().square().sum())
    return total**0.5


def random_changes(
    layers: Sequence[nn.Linear], norms: Sequence[float], generator: torch.Generator
) -> list[LowRankChange]:
    """Random changes of rank `RANK`, whose norms are about `SIZE` times those of their layers.

    Args:
        layers: From `linear_layers`.
        norms: Their `norm_of`.
        generator: On the CPU, so that every device has the same numbers.
    """
    made = []
    for layer, norm in zip(layers, norms, strict=True):
        device = next(layer.parameters()).device
        down = torch.randn(RANK, layer.in_features, generator=generator)
        up = torch.randn(layer.out_features, RANK, generator=generator)
        up *= SIZE * norm / (layer.in_features * layer.out_features * RANK) ** 0.5
        made.append(LowRankChange(layer, down.to(device), up.to(device)))
    return made


def changes_of(model: ChatModel, folder: Path) -> list[LowRankChange]:
    """What an adapter in a folder changes of a model, whose own adapter is left alone.

    Raises:
        UserError: If it is no plain LoRA, another model's, or a tensor finds no place.
    """
    config, tensors = read_settings(folder), read_tensors(folder)
    check_base(folder, model.name)
    modules = dict(model.base.named_modules())
    if fault := pattern_fault(config, modules):
        raise UserError(f"`{folder / SETTINGS}`: {fault}.")
    made: list[LowRankChange] = []
    for name in sorted(tensors):
        path = name.removeprefix(_PREFIX).removesuffix(_DOWN).removesuffix(_UP)
        partner = f"{_PREFIX}{path}{_UP if name.endswith(_DOWN) else _DOWN}"
        layer: Any = modules.get(path)
        layer = layer.get_base_layer() if isinstance(layer, LoraLayer) else layer
        if partner not in tensors or not isinstance(layer, nn.Linear):
            raise _misfit(folder, f"the tensor `{name}` has no linear layer or no partner")
        if name.endswith(_UP):
            continue
        down, up = tensors[name].float(), tensors[partner].float()
        ranks, alphas = config.rank_pattern or {}, config.alpha_pattern or {}
        rank = ranks.get(get_pattern_key(list(ranks), path), config.r)
        alpha = alphas.get(get_pattern_key(list(alphas), path), config.lora_alpha)
        if down.shape != (rank, layer.in_features) or up.shape != (layer.out_features, rank):
            raise _misfit(folder, f"`{name}` and its partner have the shapes {list(down.shape)} and {list(up.shape)}")
        device = next(layer.parameters()).device
        factor = alpha / (rank**0.5 if config.use_rslora else rank)
        made.append(LowRankChange(layer, down.to(device), (factor * up).to(device)))
    return made


def _misfit(folder: Path, why: str) -> UserError:
    return UserError(f"the adapter in `{folder}` does not fit this model: {why}. Give one that was trained for it.")
