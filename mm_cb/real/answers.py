"""What a text model says before and after: coherent or not, and how far the base's own answers are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import NamedTuple, TypedDict

import torch

from image_attacks import target_nll
from mm_cb.inference.cached_chunks import chunks
from mm_cb.metrics.degenerate import degenerate
from mm_cb.models import ChatModel

UNLIKELY = 3.0
"""Mean loss per token, in nats, from which the base would not have written a text. Our choice: its own greedy answers
to such prompts have about 0.7, words in a random order about 6."""

ASKED, READ = 32, 10
"""Prompts that are asked together, as a word for all costs little more than for one: weights are read once. And answers
that are read together, fewer: every place of one gets a logit for each word of the vocabulary."""


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


def before_and_after(
    model: ChatModel,
    asked: Mapping[str, Sequence[str]],
    max_new_tokens: int,
    show: Callable[[int], None] = lambda count: None,
) -> dict[str, Answers]:
    """By set of prompts: greedy answers with adapter off and on, and the base's own answers under both.

    All sets are asked together. `show` is told of answers.
    """
    everything = [prompt for prompts in asked.values() for prompt in prompts]
    said: dict[bool, list[str]] = {False: [], True: []}
    for adapted, texts in said.items():
        for group in chunks(everything, ASKED):
            with model.adapter(adapted):
                texts += model.generate(model.encode(group, [None] * len(group)), max_new_tokens)
            show(len(group))
    base, breaker = iter(said[False]), iter(said[True])
    return {
        name: _compared(model, prompts, list(islice(base, len(prompts))), list(islice(breaker, len(prompts))))
        for name, prompts in asked.items()
    }


def _compared(model: ChatModel, prompts: Sequence[str], base: list[str], breaker: list[str]) -> Answers:
    asked, own = zip(*((one, text) for one, text in zip(prompts, base, strict=True) if text.strip()), strict=True)
    before, after = (read_answers(model, asked, own, adapted=adapted) for adapted in (False, True))
    same = [
        float((first.likeliest == second.likeliest).float().mean()) for first, second in zip(before, after, strict=True)
    ]
    nll_base, nll_breaker, agreement = (
        sum(values) / len(own) for values in ([one.nll for one in before], [one.nll for one in after], same)
    )
    return {
        "prompts": list(prompts),
        "base": base,
        "breaker": breaker,
        "coherent_base": coherent(model, prompts, base),
        "coherent_breaker": coherent(model, prompts, breaker),
        "nll_base": round(nll_base, 4),
        "nll_breaker": round(nll_breaker, 4),
        "agreement": round(agreement, 4),
    }


def coherent(model: ChatModel, prompts: Sequence[str], texts: Sequence[str]) -> list[bool]:
    """Which answers the base might have written: no loop or noise, and a loss per token below `UNLIKELY`."""
    whole = [row for row, text in enumerate(texts) if degenerate(text) is None]
    read = read_answers(model, [prompts[row] for row in whole], [texts[row] for row in whole], adapted=False)
    likely = {row for row, one in zip(whole, read, strict=True) if one.nll < UNLIKELY}
    return [row in likely for row in range(len(texts))]


class ReadAnswer(NamedTuple):
    """An answer as a model reads it."""

    nll: float
    """Mean loss per token of an answer."""
    likeliest: torch.Tensor
    """The likeliest token at each of its places."""


@torch.no_grad()
def read_answers(model: ChatModel, prompts: Sequence[str], texts: Sequence[str], *, adapted: bool) -> list[ReadAnswer]:
    """What the model, with or without adapter, thinks of answers."""
    found = []
    for asked, said in zip(chunks(prompts, READ), chunks(texts, READ), strict=True):
        inputs = model.encode(asked, [None] * len(asked), completions=said, close_turn=False)
        kept = int((inputs.labels != -100).sum(dim=1).max()) + 1  # answers stand at the end of their rows
        labels = inputs.labels[:, -kept:]
        with model.adapter(adapted):
            logits = model.forward(inputs, logits_to_keep=kept).logits
        counted, first = labels[:, 1:] != -100, logits[:, :-1].argmax(dim=-1)
        losses = target_nll(logits, labels).tolist()
        found += [ReadAnswer(loss, row[own]) for loss, row, own in zip(losses, first, counted, strict=True)]
    return found
