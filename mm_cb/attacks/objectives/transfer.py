"""Transfer from the base to a breaker that is never seen: the base stands in, changed at random at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.objectives.stochastic import StochasticTarget
from mm_cb.inference.subjects import Subject
from mm_cb.models.low_rank import LowRankChange, changed, changes_of, linear_layers, norm_of, random_changes


class TransferObjective(StochasticTarget):
    """The target's loss under the base with weights ``W + s B A``, s and (unless an adapter is given) B A drawn anew.

    A picture that holds for many models around the base may hold for the breaker, which is one of them. The adapter
    under attack takes no part: it is off in every pass. Files are held to the loss of the base as it is.

    Source:
        Ours; transfer over an ensemble (Liu et al. 2017, arXiv:1611.02770) of weights around one model, as in
        "ghost networks" (Li et al. 2018, arXiv:1812.03413), with low-rank noise, which is what a breaker's adapter is.
    """

    def __init__(self, subject: Subject, *given: Any, **settings: Any) -> None:
        """Look at the base alone, whoever is judged."""
        super().__init__(replace(subject, adapted=False), *given, **settings)

    def _prepare(self, subject: Subject, pictures: Sequence[Image], config: AttackConfig) -> bool:
        self._scale, self._folder, self._model = config.surrogate_scale, config.surrogate, subject.model
        return config.surrogate_scale > 0

    def _drawn(self, pixels: Tensor, random: torch.Generator) -> Tensor:
        scale = self._scale * float(torch.rand((), generator=random))
        with changed(self._changes(random), scale):
            return self.target(pixels)

    @cached_property
    def _changes(self) -> Callable[[torch.Generator], list[LowRankChange]]:
        """A step's; what they are made from is looked up once, and not where only files are looked at."""
        if self._folder is not None:
            given = changes_of(self._model, self._folder)
            return lambda _: given
        layers = linear_layers(self._model)
        norms = [norm_of(layer) for layer in layers]
        return lambda random: random_changes(layers, norms, random)
