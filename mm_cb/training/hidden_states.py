"""Hidden states with the adapter off and on, of rows laid end to end, without computing anything twice.

Below the first block with LoRA both passes are the same and need no gradient: they are run once. Rows are not padded:
their tokens stand behind each other, and attention looks at one row at a time. Nothing above the last state that a loss
looks at is run, and never the head; that state is computed for the tokens that count alone. None of this changes the
mathematics; it saves most of the work
(``scripts/benchmarks/rr.py`` counts and times it against the plain computation).
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mm_cb.models import ChatModel, ModelInputs
from mm_cb.models.switch import only_dropout_of_adapter
from mm_cb.models.tower import BlockArguments, Rows

_LARGEST_HEAD = 256
"""Of those that flash attention takes."""


class HiddenStates(NamedTuple):
    """Hidden states ``first + 1`` to ``last``, each ``(N, H)``; those up to ``first`` are the same in both passes."""

    reference: list[Tensor]
    adapted: list[Tensor]


def lay_out(
    model: ChatModel,
    inputs: ModelInputs,
    mask: Tensor,
    lengths: Sequence[int] | None = None,
    counted: Sequence[int] | None = None,
) -> Rows:
    """Embed a padded batch (its pictures once, for both passes) and leave the padding out.

    Embeddings are constants, whatever a hook says (those of gradient checkpointing make them require gradients): a
    backward pass through all blocks below the adapter, for nothing, would cost more than everything else.

    Args:
        model: The model.
        inputs: The batch.
        mask: 1 for tokens that count in the loss, ``(B, T)``.
        lengths: Real tokens of each row, which a batch of the collator knows: nothing then waits for the device.
        counted: Those of them that count, likewise.
    """
    counts = tuple(inputs.attention_mask.sum(-1).tolist() if lengths is None else lengths)
    real = torch.nonzero_static(inputs.attention_mask.flatten(), size=sum(counts))[:, 0]
    start, positions = model.tower_inputs(inputs), model.positions(inputs)
    extras = tuple(extra.detach().flatten(0, 1)[real] for extra in start.extras)
    embeds, images = start.embeds.detach().flatten(0, 1)[real], inputs.image_mask.flatten()[real]
    mask, number = mask.flatten()[real], int(mask.sum()) if counted is None else sum(counted)
    places = torch.nonzero_static(mask, size=number)[:, 0] if number < len(mask) else None
    return Rows(embeds, positions.flatten(-2)[..., real], counts, mask, extras, images, places)


def hidden_states(model: ChatModel, rows: Rows, first: int, last: int) -> HiddenStates:
    """Run the language tower with the adapter off (no gradient) and on.

    Only the adapter's own dropout is active, only in the second pass, and only where gradients are on.

    Args:
        model: A model with an adapter whose tower uses our attention, see `use_row_attention`.
        rows: What to run. Gradients reach its embeddings only if they require them (for an adversary).
        first: The first block with LoRA, 0-based; ``hidden_states[first]`` is its input.
        last: Index of the last hidden state needed: the output of block ``last - 1``, behind the final norm if that is
            the model's last block.

    Returns:
        The states that can differ, in order. The last is one only at the tokens of ``rows.counted``.
    """
    start = _below(model, rows, first)
    reference = _reference(model, first, last, start)
    only_dropout_of_adapter(model.model, on=torch.is_grad_enabled())
    return HiddenStates(reference, _run(model, first, last, start))


def target_states(model: ChatModel, rows: Rows, first: int, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Adapted and reference states of the target layers (indices of hidden states), each ``(L, N, H)``."""
    states = hidden_states(model, rows, first, max(targets))
    return _stack(states.adapted, first, targets), _stack(states.reference, first, targets)


def adapted_states(model: ChatModel, rows: Rows, first: int, targets: Sequence[int]) -> Tensor:
    """The adapted half of `target_states` alone and without dropout, for rows whose reference is known."""
    start = _below(model, rows, first)
    return _stack(_run(model, first, max(targets), start), first, targets)


def reference_states(model: ChatModel, rows: Rows, first: int, targets: Sequence[int]) -> Tensor:
    """The reference half of `target_states` alone."""
    return _stack(_reference(model, first, max(targets), _below(model, rows, first)), first, targets)


def _stack(states: Sequence[Tensor], first: int, targets: Sequence[int]) -> Tensor:
    return torch.stack([states[target - first - 1] for target in targets])


class _FirstBlockInput(NamedTuple):
    """The input of the first block that differs, which is the same in both passes, and what blocks take besides."""

    state: Tensor
    rows: Rows
    arguments: BlockArguments


def _below(model: ChatModel, rows: Rows, first: int) -> _FirstBlockInput:
    """Run what lies below block ``first``."""
    only_dropout_of_adapter(model.model, on=False)
    with model.adapter(enabled=False), torch.set_grad_enabled(torch.is_grad_enabled() and rows.embeds.requires_grad):
        state, arguments = model.first_state(rows), model.block_arguments(rows)
        for index in range(first):
            state = model.next_state(index, model.run_block(index, state, arguments), rows)
    return _FirstBlockInput(state, rows, arguments)


@torch.no_grad()
def _reference(model: ChatModel, first: int, last: int, start: _FirstBlockInput) -> list[Tensor]:
    with model.adapter(enabled=False):
        return _run(model, first, last, start)


def _run(model: ChatModel, first: int, last: int, start: _FirstBlockInput) -> list[Tensor]:
    """The states behind blocks ``first`` to ``last - 1``."""
    state, states, counted = start.state, list[Tensor](), start.rows.counted
    for index in range(first, last):
        arguments = start.arguments
        if index == last - 1 and counted is not None:
            arguments = {**arguments, "counted": counted}
        state = model.run_block(index, state, arguments)
        states.append(state[0])
        state = model.next_state(index, state, start.rows)
    if last == len(model.decoder_blocks) and not isinstance(model.final_norm, nn.Identity):
        ended = state[0]
        if counted is None:
            states[-1] = model.final_norm(ended)
        else:
            there = counted.to(ended.device)
            states[-1] = ended.index_copy(0, there, model.final_norm(ended[there]))
    return states


def use_row_attention(model: ChatModel, attention: str = "sdpa") -> None:
    """Let the language tower attend within rows where it is told their lengths; elsewhere it is ``sdpa``.

    Args:
        model: The model.
        attention: ``"sdpa"``, row by row, or ``"flash_attention_2"``, all rows in one call of its kernel, which must be
            here: see `mm_cb.models.loading.refuse_attention`.
    """
    name, way = ("rows", _row_attention) if attention == "sdpa" else ("rows_in_one_call", _varlen_attention)
    AttentionInterface.register(name, way)
    AttentionMaskInterface.register(name, sdpa_mask)
    model.tower.config._attn_implementation = name


def _row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row_lengths: tuple[int, ...] | None = None,
    row_masks: Sequence[Tensor | None] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Attention within each row, causal unless masks say more; ``(1, heads, N, D)`` in, ``(1, N, heads, D)`` out."""
    if row_lengths is None:
        if attention_mask is None and 1 < query.shape[2] < key.shape[2]:  # the last positions' queries alone
            attention_mask = torch.ones(query.shape[2], key.shape[2], dtype=torch.bool, device=query.device)
            attention_mask = attention_mask.tril(key.shape[2] - query.shape[2])[None, None]
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    split = (states.split(row_lengths, dim=2) for states in (query, key, value))
    window = options.get("sliding_window")
    masks = row_masks or [_within_window(length, window, query.device) for length in row_lengths]
    outputs = [
        sdpa_attention_forward(module, q, k, v, mask, **options)[0] for q, k, v, mask in zip(*split, masks, strict=True)
    ]
    return torch.cat(outputs, dim=1), None


def _varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row_lengths: tuple[int, ...] | None = None,
    row_masks: Sequence[Tensor | None] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """As `_row_attention`, by flash attention's kernel where it can: without masks, heads not too large."""
    masked = any(mask is not None for mask in row_masks or ())
    if row_lengths is None or masked or not query.shape[-1] == value.shape[-1] <= _LARGEST_HEAD:
        return _row_attention(module, query, key, value, attention_mask, row_lengths, row_masks, **options)
    from flash_attn import flash_attn_varlen_func

    ends = torch.tensor([0, *accumulate(row_lengths)], dtype=torch.int32).to(query.device, non_blocking=True)
    longest, window, softcap = max(row_lengths), options.get("sliding_window"), options.get("softcap")
    output = flash_attn_varlen_func(
        *(states[0].transpose(0, 1) for states in (query, key, value)),
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        softmax_scale=options.get("scaling"),
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        **({} if softcap is None else {"softcap": softcap}),
    )
    return output[None], None


def _within_window(length: int, window: int | None, device: torch.device) -> Tensor | None:
    """The mask ``(1, 1, T, T)`` of a row that is longer than the sliding window; None = plainly causal."""
    if window is None or length <= window:
        return None
    places = torch.arange(length, device=device)
    back = places[:, None] - places
    return ((back >= 0) & (back < window))[None, None]
