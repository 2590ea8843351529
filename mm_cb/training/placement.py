"""Where the adapter sits: recipe blocks and projections expanded into full module paths, checked, asserted.

Two conventions meet here. ``layers_to_transform`` counts 0-based decoder blocks. ``target_layers`` counts hidden
states: 0 = embeddings, k = output of block k - 1. So target 4 is the output of block 3.
"""

from collections.abc import Sequence
from typing import NamedTuple

from peft import PeftModel
from torch import nn
from transformers.pytorch_utils import Conv1D

from mm_cb.models import ChatModel
from mm_cb.training.losses import Retain, RetainLayers
from mm_cb.training.recipes.config import CircuitBreaker, Lora


class KeptBlocks(NamedTuple):
    """How much of the language tower a run needs.

    Attributes:
        blocks: Decoder blocks 0..blocks-1.
        final_norm: Whether the last hidden state goes through the final norm. It does where it does in the whole model
            (all blocks kept) and, as in the released trainer, where it is no target layer.
        head: Whether a loss reads logits.
    """

    blocks: int
    final_norm: bool
    head: bool = False


def _if_default(section: type[CircuitBreaker | Lora], field: str, value: Sequence[int]) -> str:
    """A word for layers that perhaps nobody gave: they are those of the paper's model."""
    if list(value) != section.model_fields[field].default:
        return ""
    where = "peft_config=LoraConfig(layers_to_transform=...)" if section is Lora else "RRConfig(target_layers=...)"
    return f" (the default, of models with 32 blocks; give this model's: `{field}` of a recipe, `{where}` in Python)"


def lora_paths(model: ChatModel, blocks: Sequence[int], projections: Sequence[str]) -> list[str]:
    """Full paths of the linear layers that get LoRA, for PEFT's ``target_modules``, in the order of the model.

    Full paths cannot match the vision tower, whose layers carry the same short names.

    Raises:
        ValueError: If a block does not exist, or a projection is in none of the blocks; lists what was there.
    """
    tower, path = model.decoder_blocks, model.language_path
    absent = sorted({block for block in blocks if not 0 <= block < len(tower)})
    if absent or not blocks:
        raise ValueError(
            f"`layers_to_transform` must name 0-based blocks in 0..{len(tower) - 1} of this model, got {list(blocks)}"
            f"{_if_default(Lora, 'layers_to_transform', blocks)}."
        )
    there = linear_names(model, blocks)
    unmatched = [name for name in projections if name not in there]
    if unmatched or not projections:
        raise ValueError(f"`lora.modules` must be among {there} for this model, got {list(projections)}.")
    return [f"{path}.{block}.{name}" for block, name in _linear(model, blocks) if _short(name) in projections]


def linear_names(model: ChatModel, blocks: Sequence[int]) -> list[str]:
    """Short names of the linear layers of these decoder blocks: ``["down_proj", "gate_proj", ...]``."""
    return sorted({_short(name) for _, name in _linear(model, blocks)})


def _linear(model: ChatModel, blocks: Sequence[int]) -> list[tuple[int, str]]:
    """Block and name within it of every linear layer, in the order of the model."""
    return [
        (block, name)
        for block in sorted(set(blocks))
        if 0 <= block < len(model.decoder_blocks)
        for name, module in model.decoder_blocks[block].named_modules()
        if isinstance(module, nn.Linear | Conv1D)
    ]


def _short(name: str) -> str:
    return name.rsplit(".", 1)[-1]


def in_one_line(model: ChatModel, paths: Sequence[str]) -> str:
    """Modules of the decoder blocks in one line: ``model.layers.{0-2}.{self_attn.q_proj, mlp.up_proj}``."""
    pairs = [path.removeprefix(f"{model.language_path}.").split(".", 1) for path in paths]
    blocks, names = (list(dict.fromkeys(side)) for side in zip(*pairs, strict=True))
    whole = [str(block) for block in range(int(blocks[0]), int(blocks[-1]) + 1)]
    shown = f"{blocks[0]}-{blocks[-1]}" if blocks == whole and len(blocks) > 1 else ",".join(blocks)
    return f"{model.language_path}.{{{shown}}}.{{{', '.join(names)}}}"


def first_adapted_block(model: ChatModel) -> int:
    """The lowest decoder block with LoRA; below it, adapter on and off are the same."""
    adapted = [any("lora_" in name for name, _ in block.named_parameters()) for block in model.decoder_blocks]
    return adapted.index(True)


def features(layer: nn.Module) -> tuple[int, int]:
    """Input and output width of a linear layer; GPT-2's are transposed."""
    if isinstance(layer, Conv1D):
        return layer.nx, layer.nf
    assert isinstance(layer, nn.Linear)
    return layer.in_features, layer.out_features


def adapter_size(model: ChatModel, paths: Sequence[str], r: int) -> int:
    """How many parameters LoRA of rank ``r`` on ``paths`` has: A is ``(r, in)`` and B ``(out, r)``."""
    return sum(r * sum(features(model.base.get_submodule(path))) for path in paths)


def check_targets(
    target_layers: Sequence[int],
    blocks: Sequence[int],
    model_blocks: int,
    retain_layers: RetainLayers,
    retain: Retain = "l2",
) -> KeptBlocks:
    """Check that every target can change and every adapted block is reached by a loss.

    Args:
        target_layers: Hidden-state indices.
        blocks: 0-based blocks with LoRA.
        model_blocks: Decoder blocks of the model.
        retain_layers: Whether the retain loss sees all kept hidden states or the targets only.
        retain: The retain loss; ``kl`` sees the logits.

    Returns:
        What has to be kept of the language tower: up to the top target and the top LoRA block, or all and the head.

    Raises:
        ValueError: If a target is out of range or not above the first LoRA block (its cosine would stay 1), or if a
            LoRA block lies above everything that the losses look at.
    """
    outside = not target_layers or not all(1 <= layer <= model_blocks for layer in target_layers)
    if outside or len(set(target_layers)) < len(target_layers):
        raise ValueError(
            f"`target_layers` must be different indices in 1..{model_blocks} for a model with {model_blocks} decoder "
            f"blocks, got {list(target_layers)}{_if_default(CircuitBreaker, 'target_layers', target_layers)}."
        )
    unfed = [layer for layer in target_layers if layer <= min(blocks)]
    if unfed:
        raise ValueError(
            f"`target_layers` {unfed} cannot change: target k is the output of block k - 1, and the first block with "
            f"LoRA is {min(blocks)}{_if_default(Lora, 'layers_to_transform', blocks)}; use targets from "
            f"{min(blocks) + 1} on."
        )
    if retain == "kl":
        return KeptBlocks(model_blocks, final_norm=True, head=True)
    top = max(target_layers)
    unreached = [block for block in blocks if block >= top]
    if unreached and retain_layers == "targets":
        raise ValueError(
            f"`layers_to_transform` {unreached} get no gradient: with `retain_layers: targets` no loss looks above "
            f"hidden state {top}, the output of block {top - 1}."
        )
    kept = max(top, max(blocks) + 1)
    return KeptBlocks(kept, final_norm=kept == model_blocks or kept > top)


def assert_trained_modules(model: PeftModel, paths: Sequence[str]) -> None:
    """Make sure that LoRA sits on exactly ``paths`` and that nothing else can train.

    Raises:
        RuntimeError: Naming what is adapted or trainable and should not be, and what is missing.
    """
    parameters = {name.removeprefix("base_model.model.") for name, p in model.named_parameters() if p.requires_grad}
    adapter = model.active_adapter
    expected = {f"{path}.lora_{side}.{adapter}.weight" for path in paths for side in "AB"}
    if parameters != expected:
        raise RuntimeError(
            f"Exactly the LoRA of {len(paths)} language modules must train. Too much: "
            f"{sorted(parameters - expected)[:5]}, missing: {sorted(expected - parameters)[:5]}."
        )
