"""A decoder block of which only some positions are looked at: what stands at one position alone is computed there only.

Keys and values come from every token. Queries, the output of attention and the feed-forward are one token's own, and
make up nearly all of a block.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn

from mm_cb.models.last_positions import instead_of

OF_ONE_TOKEN = ("self_attn.q_proj", "self_attn.o_proj", "mlp", "feed_forward")
"""Modules of a block whose output at a token depends on their input at that token alone."""

_CHOSEN = "_counted_positions"


@contextmanager
def only_counted_positions(block: nn.Module, chosen: Tensor | None) -> Iterator[None]:
    """Run a decoder block for its output at some positions alone; there it is equal to the whole block's.

    At the other positions the output is finite and means nothing. Modules that are not found, fused projections among
    them, run whole. Dropout of an adapter draws for the chosen positions alone.

    Args:
        block: Takes states of shape ``(1, N, H)``.
        chosen: Indices of positions, ``(C,)``; None = all of them, in which case nothing is changed.
    """
    held = chosen_positions(block)
    with ExitStack() as undo:
        if chosen is not None:
            for path in OF_ONE_TOKEN:
                if (module := _at(block, path)) is not None:
                    undo.enter_context(instead_of(module, partial(_at_chosen, module.forward, chosen)))
        vars(block)[_CHOSEN] = chosen
        try:
            yield
        finally:
            vars(block)[_CHOSEN] = held


def chosen_positions(block: nn.Module) -> Tensor | None:
    """The positions that a block is being run for; None = all."""
    return vars(block).get(_CHOSEN)


def _at_chosen(forward: Any, chosen: Tensor, states: Tensor, *further: Any, **options: Any) -> Any:
    """What a module makes of the chosen positions of ``(1, N, H)``, zeros at the others; what else it returns stays."""
    chosen = chosen.to(states.device)  # accelerate may have put this block elsewhere
    made = forward(states[:, chosen], *further, **options)
    own, *beside = made if isinstance(made, tuple) else (made,)
    spread = own.new_zeros(*states.shape[:-1], own.shape[-1]).index_copy(1, chosen, own)
    return (spread, *beside) if beside else spread


def _at(block: nn.Module, path: str) -> nn.Module | None:
    try:
        return block.get_submodule(path)
    except AttributeError:
        return None
