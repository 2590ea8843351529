"""What a text model says before and after: coherent or not, and how far the base's own answers are kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypedDict

import torch

from image_attacks import target_nll
from mm_cb.inference.cached_chunks import chunks
from mm_cb.metrics.degenerate import degenerate
from mm_cb.models import ChatModel

UNLIKELY = 3.0
"""Mean loss per token, in nats, from which the base would not have written a text. Our choice: its own greedy answers
to such prompts have about 0.7, words in a random order about 6."""


class Answers(TypedDict):
    """One set of prompts before and after; B prompts."""

    prompts: list[str]
    base: list[str]
    breaker: list[str]
    coherent_base: list[bool]
    coherent_breaker: list[bool]
    nll_base: float
    """Of the base's answers under the base, in nats a token."""
    nll_breaker: float
    """The same answers under the breaker."""
    agreement: float
    """Share of their tokens that the breaker finds likeliest too, of those that the base does."""


def before_and_after(model: ChatModel, prompts: Sequence[str], max_new_tokens: int, batch: int = 5) -> Answers:
    """Greedy answers with the adapter off and on, and the base's own answers under both."""
    said: dict[bool, list[str]] = {}
    for adapted in (False, True):
        with model.adapter(adapted):
            said[adapted] = [
                text
                for group in chunks(prompts, batch)
                for text in model.generate(model.encode(group, [None] * len(group)), max_new_tokens)
            ]
    own = [_kept(model, prompt, text) for prompt, text in zip(prompts, said[False], strict=True) if text.strip()]
    nll_base, nll_breaker, agreement = (sum(values) / len(own) for values in zip(*own, strict=True))
    return {
        "prompts": list(prompts),
        "base": said[False],
        "breaker": said[True],
        "coherent_base": coherent(model, prompts, said[False]),
        "coherent_breaker": coherent(model, prompts, said[True]),
        "nll_base": round(nll_base, 4),
        "nll_breaker": round(nll_breaker, 4),
        "agreement": round(agreement, 4),
    }


def coherent(model: ChatModel, prompts: Sequence[str], texts: Sequence[str]) -> list[bool]:
    """Which answers the base might have written: no loop or noise, and a loss per token below `UNLIKELY`."""
    return [
        degenerate(text) is None and _losses(model, prompt, text, adapted=False)[0] < UNLIKELY
        for prompt, text in zip(prompts, texts, strict=True)
    ]


def _kept(model: ChatModel, prompt: str, text: str) -> tuple[float, float, float]:
    """Loss of an answer under base and breaker, and the share of the base's likeliest tokens that are the breaker's."""
    (before, first), (after, second) = (_losses(model, prompt, text, adapted=adapted) for adapted in (False, True))
    return before, after, float((first == second).float().mean())


@torch.no_grad()
def _losses(model: ChatModel, prompt: str, text: str, *, adapted: bool) -> tuple[float, torch.Tensor]:
    """Mean loss per token of an answer, and the likeliest token at each of its places."""
    inputs = model.encode([prompt], [None], completions=[text], close_turn=False)
    count = int((inputs.labels != -100).sum())
    with model.adapter(adapted):
        logits = model.forward(inputs, logits_to_keep=count + 1).logits
    return float(target_nll(logits, inputs.labels[:, -count - 1 :])), logits[0, :-1].argmax(dim=-1)
