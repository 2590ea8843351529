"""A suffix behind the prompt, searched token by token with the gradient's help: GCG, for models of text alone.

Source:
    Zou et al. 2023 (arXiv:2307.15043), Algorithm 1: a suffix of 20 tokens, candidates drawn from the 256 likeliest
    replacements of every place, the best one taken. Deviations: fewer candidates a step than its 512
    (``--candidates``); the best suffix of all steps is sent, not the last; one prompt at a time. With a harmfulness
    probe in the loss (ours), as `ProbeObjective` has it of pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import DynamicCache

from image_attacks import target_nll
from mm_cb.attacks.objectives.target import encode, force
from mm_cb.core.errors import UserError
from mm_cb.data.behaviors_file import Behavior
from mm_cb.inference.subjects import Subject
from mm_cb.models import ModelInputs
from mm_cb.models.cache_name import CACHE
from mm_cb.models.chat import control_token
from mm_cb.models.probe import states_at

LENGTH, LIKELIEST = 20, 256
"""Tokens of the suffix, and replacements of each of which candidates are drawn (paper)."""
_START = " ".join(["!"] * LENGTH)


@dataclass(frozen=True)
class ProbeTerm:
    """``weight * mean over tokens t of y of softplus(score(h_t) - threshold)`` beside the target's loss.

    y is the target and up to ``max_new_tokens`` of what the base model says behind it, which only this term looks at.
    """

    weight: float
    max_new_tokens: int


class Searched(NamedTuple):
    """What a search found."""

    ids: Tensor
    """``(K,)``: the best suffix of all steps."""
    curve: list[float]
    """Its loss and, after every step, that of the suffix taken."""


def search(
    start: Tensor,
    slope: Callable[[Tensor], Tensor],
    losses: Callable[[Tensor], Tensor],
    usable: Callable[[Tensor], Tensor],
    *,
    steps: int,
    candidates: int,
    generator: torch.Generator,
    likeliest: int = LIKELIEST,
    show: Callable[[int, float], None] = lambda step, loss: None,
) -> Searched:
    """Minimise a loss over K tokens of V, one of which changes at each step.

    Args:
        start: ``(K,)`` token ids.
        slope: Ids to ``(K, V)``: how the loss would change, to first order, with each token at each place; infinity
            where one must not stand.
        losses: ``(C, K)`` ids to losses ``(C,)``.
        usable: ``(C, K)`` ids to ``(C,)``: whether these tokens can be sent as text.
        steps: Steps.
        candidates: Drawn at each of them.
        generator: Draws them; on the CPU.
        likeliest: Of how many of the best replacements of a place.
        show: Told the step and its loss.
    """
    taken = best = start
    curve = losses(start[None]).tolist()
    for step in range(steps):
        table = slope(taken).float().cpu()
        replacements = table.topk(min(likeliest, table.shape[1]), largest=False).indices
        places = torch.randint(len(taken), (candidates,), generator=generator)
        picks = torch.randint(replacements.shape[1], (candidates,), generator=generator)
        drawn = taken.repeat(candidates, 1)
        drawn[range(candidates), places] = replacements[places, picks].to(drawn)
        allowed = torch.isfinite(table[places, replacements[places, picks]]) & usable(drawn)
        if bool(allowed.any()):
            drawn = drawn[allowed.to(drawn.device)]
            found = losses(drawn)
            taken = drawn[int(found.argmin())]
            curve.append(float(found.min()))
            if curve[-1] < min(curve[:-1]):
                best = taken
        else:
            curve.append(curve[-1])
        show(step, curve[-1])
    return Searched(best, curve)


@dataclass(frozen=True)
class Sent:
    """A prompt with the suffix found for it."""

    prompt: str
    curve: list[float]

    @property
    def step(self) -> int:
        """After how many steps it was found."""
        return self.curve.index(min(self.curve))


def find_suffix(
    subject: Subject,
    behavior: Behavior,
    *,
    steps: int,
    candidates: int,
    generator: torch.Generator,
    probe_term: ProbeTerm | None = None,
    show: Callable[[int, float], None] = lambda step, loss: None,
) -> Sent:
    """The behaviour's prompt with a suffix behind which its target is likelier, and less flagged if that is asked for.

    Raises:
        UserError: If the model's tokenizer cannot write a suffix of its own tokens.
    """
    row = _SuffixRow(subject, behavior, probe_term)
    found = search(
        row.start,
        row.slope,
        row.losses,
        row.usable,
        steps=steps,
        candidates=candidates,
        generator=generator,
        show=show,
    )
    return Sent(row.prompt(found.ids), found.curve)


class _SuffixRow:
    """One chat whose suffix changes: prompt, suffix, template and response as one row of tokens."""

    def __init__(self, subject: Subject, behavior: Behavior, probe_term: ProbeTerm | None = None) -> None:
        self._subject, self._behavior, self._term = subject, behavior, probe_term
        self._tokenizer = subject.model.processor.tokenizer
        self._responses = [behavior.target]
        if probe_term is not None:
            self._responses = force(subject, [behavior], [None], probe_term.max_new_tokens).texts
        started = replace(behavior, prompt=f"{behavior.prompt} {_START}")
        self._forced = force(subject, [started], [None], 0, self._responses)
        plain, self._inputs = self._encode(behavior.prompt), self._forced.inputs
        before, ids = (inputs.input_ids[0].tolist() for inputs in (plain, self._inputs))
        self._begin = _common_length(before, ids)
        self._end = len(ids) - min(_common_length(before[::-1], ids[::-1]), len(before) - self._begin)
        self.start = self._inputs.input_ids[0, self._begin : self._end]
        self._forbidden = self._unwritable()
        if not bool(self.usable(self.start[None])[0]):
            raise UserError(
                f"`--attack gcg` cannot write a suffix for `{subject.model.name}`: its tokenizer reads the text of "
                "tokens as other tokens; search with another tool and give what it finds to `--attack imported`."
            )

    def prompt(self, suffix: Tensor) -> str:
        """What is sent."""
        return f"{self._behavior.prompt} {self._tokenizer.decode(suffix.tolist()).strip()}"

    def usable(self, suffixes: Tensor) -> Tensor:
        """Whether a suffix, sent as text, is read as the same tokens."""
        rows = self._rows(suffixes).input_ids.tolist()
        return torch.tensor([self._reads(self.prompt(one), ids) for one, ids in zip(suffixes, rows, strict=True)])

    def _reads(self, prompt: str, ids: list[int]) -> bool:
        spelt = control_token(prompt, self._tokenizer) is not None
        return not spelt and self._encode(prompt).input_ids[0].tolist() == ids

    @torch.no_grad()
    def losses(self, suffixes: Tensor) -> Tensor:
        """The loss behind each suffix."""
        inputs = self._rows(suffixes)
        return self._behind(len(suffixes), input_ids=inputs.input_ids[:, self._begin :])

    def slope(self, suffix: Tensor) -> Tensor:
        """The gradient with respect to one-hot tokens, ``(K, V)``."""
        table = self._subject.model.base.get_input_embeddings()
        embeds = table(self._rows(suffix[None]).input_ids[:, self._begin :]).detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self._behind(1, inputs_embeds=embeds).sum(), embeds)
        slope = gradient[0, : self._end - self._begin] @ table.weight.detach().T
        slope[:, self._forbidden] = torch.inf
        return slope

    def _behind(self, count: int, **suffixes: Tensor) -> Tensor:
        """The loss behind ``count`` suffixes, ``(count,)``; what stands in front of them has run once."""
        cache, keep, model = deepcopy(self._front), self._forced.keep, self._subject.model
        cache.batch_repeat_interleave(count)
        probe = self._subject.probe
        watched: AbstractContextManager[list[Tensor]] = nullcontext([])
        if self._term is not None and probe is not None:
            watched = states_at(model, probe.layer)
        with self._subject.active(), watched as states:
            logits = model.model(**suffixes, **{CACHE: cache}, use_cache=True, logits_to_keep=keep).logits
        loss = target_nll(logits, self._forced.target.expand(count, -1))
        if self._term is None or probe is None:
            return loss
        return loss + self._term.weight * probe.term(states[-1][:, -keep:], self._forced.mask)

    @cached_property
    def _front(self) -> DynamicCache:
        """Keys and values of the tokens in front of the suffix."""
        with torch.no_grad(), self._subject.active() as model:
            cache = DynamicCache(config=model.tower.config)
            front = self._inputs.input_ids[:, : self._begin]
            model.model(input_ids=front, **{CACHE: cache}, use_cache=True, logits_to_keep=1)
        return cache

    def _encode(self, prompt: str) -> ModelInputs:
        return encode(self._subject, [replace(self._behavior, prompt=prompt)], [None], self._responses)

    def _rows(self, suffixes: Tensor) -> ModelInputs:
        count, inputs = len(suffixes), self._inputs
        ids = inputs.input_ids.repeat(count, 1)
        ids[:, self._begin : self._end] = suffixes
        return ModelInputs(ids, inputs.attention_mask.repeat(count, 1), inputs.roles.repeat(count, 1))

    def _unwritable(self) -> Tensor:
        """Ids of special tokens and of those that are no printable ASCII."""
        size = self._subject.model.base.get_input_embeddings().weight.shape[0]
        texts = self._tokenizer.batch_decode([[i] for i in range(len(self._tokenizer))])
        added = set(self._tokenizer.get_added_vocab().values()) | set(self._tokenizer.all_special_ids)
        good = {i for i, text in enumerate(texts) if i not in added and text.isascii() and text.strip().isprintable()}
        good = {i for i in good if texts[i].strip()}
        return torch.tensor(sorted(set(range(size)) - good))


def _common_length(one: Sequence[int], other: Sequence[int]) -> int:
    """How many entries both begin with."""
    differ = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differ, min(len(one), len(other)))
