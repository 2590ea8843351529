"""One picture for many behaviours: made for some of them, or for a corpus of texts, and judged on all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.objectives.stochastic import Stochastic
from mm_cb.attacks.objectives.target import encode, preprocessing
from mm_cb.core.errors import UserError
from mm_cb.data.behaviors_file import Behavior
from mm_cb.data.corpus import read_corpus
from mm_cb.inference.cached_chunks import chunks
from mm_cb.inference.subjects import Subject
from mm_cb.models.shared_prefix import SharedPrefixTargets


class UniversalObjective(Stochastic):
    """Mean target loss of what a picture is made for, as a function of that picture.

    One picture against M targets: what the chats share (the image tower, all tokens up to the end of the image) runs
    once per step instead of M times. In minibatches each step has some of the targets, in a new order every time all
    have been seen; the last step has all of them, without a gradient.

    Source:
        Minibatches of a corpus: visual adversarial examples (Qi et al. 2023, arXiv:2306.13213). Deviation: the texts
        are the user's; none are shipped.
    """

    def __init__(
        self,
        subject: Subject,
        behaviors: Sequence[Behavior],
        picture: Image,
        learnt: Sequence[Behavior],
        *,
        minibatch: int = 0,
        seed: Sequence[int] = (0,),
    ) -> None:
        """Encode all chats.

        Args:
            subject: The model under attack.
            behaviors: What the picture is judged on.
            picture: Where it starts.
            learnt: What it is made for; the loss is theirs.
            minibatch: How many of them a step has; 0 = all.
            seed: Numbers of the run and of the restart.
        """
        super().__init__(seed, varies=0 < minibatch < len(learnt))
        self.subject, self.minibatch = subject, minibatch if self._varies else len(learnt)
        self.mean_of, self.all = (self._targets(part, picture) for part in (learnt, behaviors))
        self.places = range(len(learnt))
        self.preprocess = preprocessing(subject.model, picture)

    def __call__(self, pixels: Tensor) -> Tensor:
        """The mean loss ``(1,)`` of one picture's ``pixels`` ``(1, 3, H, W)``, of the step's minibatch."""
        if self.step is None:
            return self.loss(self.preprocess(pixels))
        with self.subject.active():
            losses = self.mean_of(self.preprocess(pixels), self.rows(self.step))
        return losses.mean(dim=0, keepdim=True) + self.on_top

    def rows(self, step: int) -> list[int]:
        """Which of the targets a step has."""
        turn, place = divmod(step, -(-len(self.places) // self.minibatch))
        order = torch.randperm(len(self.places), generator=self.random(turn)).tolist()
        return chunks(order, self.minibatch)[place]

    def loss(self, pixel_values: Tensor) -> Tensor:
        """The mean loss ``(1,)`` of what the processor makes of one picture, of all that it is made for."""
        parts = chunks(self.places, self.minibatch) if self._varies else [None]
        with self.subject.active():
            return torch.cat([self.mean_of(pixel_values, part) for part in parts]).mean(dim=0, keepdim=True)

    @torch.no_grad()
    def each(self, pixels: Tensor) -> list[float]:
        """The loss of every behaviour, those the picture was not made for included, at one picture."""
        with self.subject.active():
            return self.all(self.preprocess(pixels)).tolist()

    def _targets(self, behaviors: Sequence[Behavior], picture: Image) -> SharedPrefixTargets:
        inputs = encode(self.subject, behaviors, [picture] * len(behaviors), [b.target for b in behaviors])
        return SharedPrefixTargets(self.subject.model, inputs)


def made_for(config: AttackConfig, behaviors: Sequence[Behavior]) -> list[Behavior]:
    """What a universal picture is made for: the texts of a corpus, or the first behaviours.

    Raises:
        UserError: If the corpus cannot be read, or there are fewer behaviours.
    """
    if config.corpus is not None:
        return read_corpus(config.corpus)
    count = config.universal_train or (len(behaviors) + 1) // 2
    if count > len(behaviors):
        raise UserError(f"`--universal-train` must be at most the number of behaviours, {len(behaviors)}, got {count}.")
    return list(behaviors[:count])


def all_at_once(config: AttackConfig, behaviors: Sequence[Behavior]) -> str:
    """A line about a minibatch of more texts than there are; empty of any other."""
    there = len(made_for(config, behaviors))
    if config.minibatch <= there:
        return ""
    return f"`--minibatch {config.minibatch}`: there are only {there} texts to make the picture for; every step has all"


def seen(config: AttackConfig, behaviors: Sequence[Behavior]) -> set[str]:
    """The ids of behaviours that a picture is not held out from: of a corpus, those whose prompt or target is in it."""
    learnt = made_for(config, behaviors)
    if config.corpus is None:
        return {behavior.id for behavior in learnt}
    prompts, targets = {one.prompt for one in learnt} - {""}, {one.target.strip() for one in learnt}
    return {b.id for b in behaviors if b.prompt in prompts or b.target.strip() in targets}
