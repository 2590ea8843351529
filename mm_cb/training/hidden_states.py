"""Hidden states with the adapter off and on, of rows laid end to end, without computing anything twice.

Below the first block with LoRA both passes are the same and need no gradient: they are run once. Rows are not padded:
their tokens stand behind each other, and attention looks at one row at a time. Nothing above the last state that a loss
looks at is run, and never the head. None of this changes the mathematics; it saves most of the work
(``scripts/benchmark_rr.py`` counts and times it against the plain computation).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from mm_cb.models import ChatModel, ModelInputs

ATTENTION = "rows"
"""What our attention is registered as in transformers: each row on its own where lengths are given, else ``sdpa``."""


class Rows(NamedTuple):
    """The real tokens of some rows, one row behind the other; N tokens in all.

    Attributes:
        embeds: What the language tower starts from, shape ``(N, H)``.
        positions: Place of every token in its row, shape ``(N,)``.
        lengths: Tokens of each row.
        mask: 1 for tokens that count in the loss, shape ``(N,)``.
    """

    embeds: Tensor
    positions: Tensor
    lengths: tuple[int, ...]
    mask: Tensor


class States(NamedTuple):
    """Hidden states ``first + 1`` to ``last``, each ``(N, H)``; those up to ``first`` are the same in both passes."""

    reference: list[Tensor]
    adapted: list[Tensor]


def lay_out(model: ChatModel, inputs: ModelInputs, mask: Tensor) -> Rows:
    """Embed a padded batch (its pictures once, for both passes) and leave the padding out.

    Embeddings are constants, whatever a hook says (those of gradient checkpointing make them require gradients): a
    backward pass through all blocks below the adapter, for nothing, would cost more than everything else.
    """
    real = inputs.attention_mask.bool()
    lengths = tuple(real.sum(-1).tolist())
    return Rows(model.embed(inputs)["inputs_embeds"].detach()[real], inputs.position_ids[real], lengths, mask[real])


def hidden_states(model: ChatModel, rows: Rows, first: int, last: int) -> States:
    """Run the language tower with the adapter off (no gradient) and on.

    Only the adapter's own dropout is active, only in the second pass, and only where gradients are on.

    Args:
        model: A model with an adapter whose tower uses our attention, see `use_row_attention`.
        rows: What to run. Gradients reach its embeddings only if they require them (for an adversary).
        first: The first block with LoRA, 0-based; ``hidden_states[first]`` is its input.
        last: Index of the last hidden state needed: the output of block ``last - 1``, behind the final norm if that is
            the model's last block.

    Returns:
        The states that can differ, in order.
    """
    start, arguments = _below(model, rows, first)
    reference = _reference(model, first, last, start, arguments)
    return States(reference, _adapted(model, first, last, start, arguments))


def target_states(model: ChatModel, rows: Rows, first: int, targets: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Adapted and reference states of the target layers (indices of hidden states), each ``(L, N, H)``."""
    states = hidden_states(model, rows, first, max(targets))
    return _stack(states.adapted, first, targets), _stack(states.reference, first, targets)


def adapted_states(model: ChatModel, rows: Rows, first: int, targets: Sequence[int]) -> Tensor:
    """The adapted half of `target_states` alone, for rows whose reference is known or not their own."""
    return _stack(_adapted(model, first, max(targets), *_below(model, rows, first)), first, targets)


def reference_states(model: ChatModel, rows: Rows, first: int, targets: Sequence[int]) -> Tensor:
    """The reference half of `target_states` alone."""
    return _stack(_reference(model, first, max(targets), *_below(model, rows, first)), first, targets)


def _stack(states: Sequence[Tensor], first: int, targets: Sequence[int]) -> Tensor:
    return torch.stack([states[target - first - 1] for target in targets])


def _below(model: ChatModel, rows: Rows, first: int) -> tuple[Tensor, dict[str, Any]]:
    """The input of block ``first``, which is the same in both passes, and what every block takes besides."""
    model.model.eval()
    with model.adapter(enabled=False), torch.set_grad_enabled(torch.is_grad_enabled() and rows.embeds.requires_grad):
        state, arguments = _start(_tower(model), rows)
        for block in model.decoder_blocks[:first]:
            state = block(state, **arguments)
    return state, arguments


@torch.no_grad()
def _reference(model: ChatModel, first: int, last: int, start: Tensor, arguments: dict[str, Any]) -> list[Tensor]:
    with model.adapter(enabled=False):
        return _run(model, first, last, start, arguments)


def _adapted(model: ChatModel, first: int, last: int, start: Tensor, arguments: dict[str, Any]) -> list[Tensor]:
    for name, module in model.model.named_modules():
        module.training = torch.is_grad_enabled() and "lora_dropout" in name.split(".")
    return _run(model, first, last, start, arguments)


def _tower(model: ChatModel) -> Any:
    return model.base.get_submodule(model.language_path.rpartition(".")[0])


def _run(model: ChatModel, first: int, last: int, state: Tensor, arguments: dict[str, Any]) -> list[Tensor]:
    """The states behind blocks ``first`` to ``last - 1``."""
    tower, blocks, states = _tower(model), list(model.decoder_blocks), []
    for block in blocks[first:last]:
        state = block(state, **arguments)
        states.append(state[0])
    if last == len(blocks):
        final_norm = tower.ln_f if hasattr(tower, "ln_f") else tower.norm
        states[-1] = final_norm(states[-1])
    return states


def _start(tower: Any, rows: Rows) -> tuple[Tensor, dict[str, Any]]:
    """The input of block 0, ``(1, N, H)``, and what every block takes besides."""
    embeds, positions = rows.embeds[None], rows.positions[None]
    arguments = {"attention_mask": None, "row_lengths": rows.lengths}
    if hasattr(tower, "rotary_emb"):
        return embeds, {**arguments, "position_embeddings": tower.rotary_emb(embeds, positions)}
    return embeds + tower.wpe(positions), arguments  # learned positions (GPT-2)


def use_row_attention(model: ChatModel) -> None:
    """Let the language tower attend within rows where it is told their lengths; elsewhere it works as before."""
    AttentionInterface.register(ATTENTION, _row_attention)
    AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    _tower(model).config._attn_implementation = ATTENTION


def _row_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    row_lengths: tuple[int, ...] | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row; ``(1, heads, N, D)`` in, ``(1, N, heads, D)`` out."""
    if row_lengths is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    window = options.get("sliding_window")
    if window is not None and max(row_lengths) > window:
        raise ValueError(f"Rows must fit into the model's sliding window of {window} tokens, got {max(row_lengths)}.")
    split = (states.split(row_lengths, dim=2) for states in (query, key, value))
    outputs = [sdpa_attention_forward(module, q, k, v, None, **options)[0] for q, k, v in zip(*split, strict=True)]
    return torch.cat(outputs, dim=1), None
