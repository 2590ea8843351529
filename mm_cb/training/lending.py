"""A model lent to a training run: without what no loss reads while it lasts, and afterwards as it was."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from mm_cb.models import ChatModel, VisionModel
from mm_cb.training.hidden_states import use_row_attention
from mm_cb.training.placement import KeptBlocks
from mm_cb.training.precision import adapter_products
from mm_cb.training.recompute import recompute_blocks

_CHANGED = ("num_hidden_layers", "layer_types", "_attn_implementation")
"""Of the tower's configuration."""


def language_tower(model: ChatModel) -> Any:
    """The module that holds the decoder blocks and their final norm."""
    return model.base.get_submodule(model.language_path.rpartition(".")[0])


@contextmanager
def lent(
    model: ChatModel, kept: KeptBlocks, *, recompute: bool, attention: str = "sdpa", pictures: Path | None = None
) -> Iterator[None]:
    """Cut a model to what training needs, attending within rows, perhaps recomputing; all of it undone at the end.

    Args:
        model: With its adapter.
        kept: What is needed of the language tower.
        recompute: Whether blocks are run again in the backward pass.
        attention: As for `use_row_attention`.
        pictures: Folder of prepared pictures; None = kept nowhere.
    """
    tower, head = language_tower(model), model.base.lm_head
    children = dict(tower.named_children())
    config = tower.config
    held = {name: getattr(config, name) for name in _CHANGED if hasattr(config, name)}
    cache = getattr(model, "picture_cache", None)
    forwards = [(block, vars(block).get("forward")) for block in model.decoder_blocks]
    try:
        model.keep_blocks(kept.blocks, final_norm=kept.final_norm, head=kept.head)
        use_row_attention(model, attention)
        if recompute:
            recompute_blocks(model)
        if pictures is not None and isinstance(model, VisionModel):
            model.keep_pictures(pictures)
        with adapter_products(model.device, model.base.dtype):
            yield
    finally:
        if isinstance(model, VisionModel):
            model.picture_cache = cache
        model.base.lm_head = head
        for name, child in children.items():
            setattr(tower, name, child)
        for name, value in held.items():
            setattr(config, name, value)
        for block, forward in forwards:
            _restore(block, forward)


def _restore(block: nn.Module, forward: Any) -> None:
    vars(block).pop("forward", None)
    if forward is not None:
        vars(block)["forward"] = forward
