"""How far an adapter turns the hidden states, layer by layer: the breaker's own effect, before any attack.

For pairs of request and answer, the states of the answer's tokens are compared between adapter on and off. Where the
breaker works, the cosine falls on harmful answers and stays at 1 on benign ones (Zou et al. 2024, Figure 6).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image

from mm_cb.models import LlavaNextModel


@torch.no_grad()
def compare(
    model: LlavaNextModel,
    prompts: Sequence[str],
    pictures: Sequence[Image | None],
    answers: Sequence[str],
    batch: int = 32,
) -> dict[str, Any]:
    """Mean cosine and norms per entry of ``hidden_states`` over the answers' tokens.

    Returns:
        ``cosine``, ``norm_reference`` (adapter off), ``norm_adapted`` (on): lists of length L + 1, 0 = embeddings, and
        ``n``, the number of answers. Every answer weighs the same.
    """
    sums = torch.zeros(3, 0)
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        inputs = model.encode(list(prompts[rows]), list(pictures[rows]), completions=list(answers[rows]))
        mask = inputs.completion_mask.float()
        weight = mask / mask.sum(dim=1, keepdim=True)
        with model.adapter(False):
            reference = torch.stack(model.forward(inputs, logits_to_keep=1, hidden_states=True).hidden_states).float()
        adapted = torch.stack(model.forward(inputs, logits_to_keep=1, hidden_states=True).hidden_states).float()
        measured = torch.stack(
            (
                torch.cosine_similarity(reference, adapted, dim=-1),
                torch.linalg.vector_norm(reference, dim=-1),
                torch.linalg.vector_norm(adapted, dim=-1),
            )
        )
        total = (measured * weight).sum(dim=(2, 3)).cpu()
        sums = total if sums.numel() == 0 else sums + total
    cosine, norm_reference, norm_adapted = ([round(v, 5) for v in row] for row in (sums / len(prompts)).tolist())
    return {"cosine": cosine, "norm_reference": norm_reference, "norm_adapted": norm_adapted, "n": len(prompts)}
