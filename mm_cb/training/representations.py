"""How far an adapter turns the hidden states, layer by layer: the breaker's own effect, before any attack.

For pairs of request and answer, the states of every token are compared between adapter on and off, apart for picture,
prompt and answer. Where the breaker works, the cosine falls on harmful answers and stays at 1 on benign ones (Zou et
al. 2024, Figure 6, here for a model that sees).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from mm_cb.core.records import SetStates, StateMeans
from mm_cb.models import ChatModel, ModelInputs, TokenRole

TOKEN_TYPES = ("image", "prompt", "completion")


@torch.no_grad()
def compare(
    model: ChatModel,
    prompts: Sequence[str],
    pictures: Sequence[Image | None],
    answers: Sequence[str],
    batch: int = 32,
) -> SetStates:
    """Mean cosine and norms per entry of ``hidden_states``, over the answers' tokens and by type of token.

    Returns:
        ``cosine``, ``norm_reference`` (adapter off), ``norm_adapted`` (on): lists of length L + 1, 0 = embeddings, and
        ``n``, the number of answers, all for the answers' tokens; the same again for each of `TOKEN_TYPES` under
        ``tokens``. Every row that has such tokens weighs the same.
    """
    sums: dict[str, Tensor] = {}
    rows_with = dict.fromkeys(TOKEN_TYPES, 0)
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        inputs = model.encode(list(prompts[rows]), list(pictures[rows]), completions=list(answers[rows]))
        measured = _measure(model, inputs)
        for name, mask in _masks(inputs).items():
            weight = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
            total = (measured * weight).sum(dim=(2, 3)).cpu()
            sums[name] = sums.get(name, torch.zeros_like(total)) + total
            rows_with[name] += int(mask.any(dim=1).sum())
    tokens = {name: _means(sums[name], rows_with[name]) for name in TOKEN_TYPES if rows_with[name]}
    return {**tokens["completion"], "tokens": tokens}


def _measure(model: ChatModel, inputs: ModelInputs) -> Tensor:
    """Cosine, norm off and norm on, ``(3, L + 1, B, T)``."""
    with model.adapter(False):
        reference = torch.stack(model.forward(inputs, logits_to_keep=1, hidden_states=True).hidden_states).float()
    adapted = torch.stack(model.forward(inputs, logits_to_keep=1, hidden_states=True).hidden_states).float()
    norms = [torch.linalg.vector_norm(states, dim=-1) for states in (reference, adapted)]
    return torch.stack([torch.cosine_similarity(reference, adapted, dim=-1), *norms])


def _masks(inputs: ModelInputs) -> dict[str, Tensor]:
    """1 for the tokens of each type, ``(B, T)``; the template's own count as prompt."""
    image, completion = inputs.roles == TokenRole.IMAGE, inputs.said
    prompt = inputs.attention_mask.bool() & ~image & ~completion
    return {name: mask.float() for name, mask in zip(TOKEN_TYPES, (image, prompt, completion), strict=True)}


def _means(sums: Tensor, n: int) -> StateMeans:
    cosine, norm_reference, norm_adapted = ([round(v, 5) for v in row] for row in (sums / n).tolist())
    return {"cosine": cosine, "norm_reference": norm_reference, "norm_adapted": norm_adapted, "n": n}
