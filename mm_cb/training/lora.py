"""Which modules a LoRA of the user's own sits on: those of the language tower that its configuration names."""

import re
from collections.abc import Sequence
from typing import Any

from peft import LoraConfig

from mm_cb.models import ChatModel
from mm_cb.models.patterns import pattern_fault
from mm_cb.training.placement import linear_names, lora_paths
from mm_cb.training.recipes.config import Lora

_REFUSED = (
    "modules_to_save",
    "exclude_modules",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "use_dora",
)


def recipe_lora(lora: Lora) -> LoraConfig:
    """A recipe's adapter as PEFT writes it."""
    return LoraConfig(
        r=lora.r,
        lora_alpha=lora.lora_alpha,
        lora_dropout=lora.dropout,
        target_modules=list(lora.modules),
        layers_to_transform=list(lora.layers_to_transform),
    )


def placed(model: ChatModel, config: Any, target_layers: Sequence[int]) -> tuple[list[str], list[int]]:
    """Expand a LoRA's ``target_modules`` and ``layers_to_transform`` into modules of the language tower.

    The same short names in an image tower are not meant: what the adapter changes has to lie below the hidden states
    that the losses look at.

    Args:
        model: The whole model, or its shapes.
        config: A ``LoraConfig``. ``target_modules``: short names, ends of paths, full paths, or a pattern for full
            paths; None and ``"all-linear"`` = every linear layer of the blocks. ``layers_to_transform``: 0-based
            blocks; None = those that full paths name, else all that feed the top target.
        target_layers: Hidden states that the loss reroutes.

    Returns:
        Full paths in the order of the model, and the 0-based blocks that they lie in.

    Raises:
        TypeError: If it is no ``LoraConfig``.
        ValueError: If it names modules outside the language tower or none in it, or would train more than LoRA.
    """
    if not isinstance(config, LoraConfig):
        raise TypeError(f"`peft_config` must be a peft.LoraConfig, got {type(config).__name__}.")
    for name in _REFUSED:
        if getattr(config, name, None):
            raise ValueError(f"`peft_config.{name}` must be left out: nothing but LoRA's A and B may train.")
    if config.bias != "none":
        raise ValueError(f"`peft_config.bias` must be 'none': nothing but LoRA may train, got {config.bias!r}.")
    targets, blocks = config.target_modules, config.layers_to_transform
    if isinstance(blocks, int):
        blocks = [blocks]
    chosen = list(range(len(model.decoder_blocks))) if blocks is None else list(blocks)
    everything = lora_paths(model, chosen, linear_names(model, chosen))
    if fault := pattern_fault(config, everything):
        raise ValueError(f"`peft_config`: {fault}.")
    if isinstance(targets, str) and targets != "all-linear":
        paths, unmatched = [path for path in everything if re.fullmatch(targets, path)], [targets]
    else:
        names = linear_names(model, chosen) if targets is None or isinstance(targets, str) else sorted(targets)
        paths = [path for path in everything if any(_ends(path, name) for name in names)]
        unmatched = [name for name in names if not any(_ends(path, name) for path in everything)]
        if blocks is None and set(names) == set(paths):  # full paths say where they are
            blocks = chosen
        paths = [] if unmatched else paths
    if blocks is None:
        paths = [path for path in paths if _block(model, path) < max(target_layers)]
    if not paths:
        raise ValueError(
            f"`peft_config.target_modules` must name linear layers of the language tower, `{model.language_path}`, in "
            f"blocks {chosen[0]}..{chosen[-1]}; {unmatched} are not there, {linear_names(model, chosen)} are."
        )
    return paths, sorted({_block(model, path) for path in paths})


def _ends(path: str, name: str) -> bool:
    return path == name or path.endswith(f".{name}")


def _block(model: ChatModel, path: str) -> int:
    return int(path.removeprefix(f"{model.language_path}.").partition(".")[0])
