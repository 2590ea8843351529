"""Objectives that are drawn anew at every step: by seed and step alone, and at rest once the search is over."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from PIL.Image import Image
from torch import Tensor

from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.objectives.moving import HANDICAP
from mm_cb.attacks.objectives.target import TargetObjective
from mm_cb.data.behaviors_file import Behavior
from mm_cb.inference.subjects import Subject


class Stochastic:
    """What changes with every step; the last iterate is the one that is kept, and at it the objective is at rest.

    The draws of a step follow from the seed and the step: a run that was cut off goes on to the same bits, and a
    behaviour's draws do not depend on its batch.

    Attributes:
        step: The step whose draws are in force; None = at rest.
    """

    def __init__(self, seed: Sequence[int], *, varies: bool) -> None:
        """Be at rest.

        Args:
            seed: Numbers of the run and of the restart.
            varies: Whether anything is drawn; if not, this is an objective as any other, whose best iterate counts.
        """
        self._seed, self._varies = tuple(seed), varies
        self._seen = self._steps = 0
        self.step: int | None = None

    def begin(self, steps: int) -> None:
        """Stand at the first step of a search of so many updates."""
        self._steps = steps
        self._stand_at(0)

    def saw(self, losses: Tensor) -> None:
        """Go on to the next step's draws; the losses decide nothing."""
        self._stand_at(self._seen + 1)

    def rest(self) -> None:
        """Draw nothing any more."""
        self.step = None

    def _stand_at(self, step: int) -> None:
        """At the last step the objective is at rest."""
        self._seen, self.step = step, step if self._varies and step < self._steps else None

    def handicap(self, step: int) -> float:
        """Larger than any loss, and 0 at the last step: no lucky draw is to have the best picture."""
        return HANDICAP if self._varies and step < self._steps else 0.0

    @property
    def on_top(self) -> float:
        """The handicap of the draws in force."""
        return 0.0 if self.step is None else HANDICAP

    def random(self, *more: int) -> torch.Generator:
        """A random stream of the numbers given, the same for all behaviours."""
        entropy = np.random.SeedSequence([*self._seed, *more])
        return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))


class StochasticTarget(Stochastic):
    """The target's loss under draws of every step; files are held to the target's loss as it is."""

    def __init__(
        self,
        subject: Subject,
        behaviors: Sequence[Behavior],
        pictures: Sequence[Image],
        *,
        config: AttackConfig,
        restart: int,
        **settings: Any,
    ) -> None:
        """Encode the chats once.

        Args:
            subject: The model that is looked at.
            behaviors: What to ask, one per row.
            pictures: Clean pictures, all of one size.
            config: Reads ``seed``, and what the draws are of.
            restart: Which run this is.
            settings: Not read.
        """
        super().__init__((config.seed, restart), varies=self._prepare(subject, pictures, config))
        self.target = TargetObjective(subject, behaviors, pictures)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Losses ``(B,)`` of ``pixels`` ``(B, 3, H, W)`` at the step's draws."""
        if self.step is None:
            return self.target(pixels)
        return self._drawn(pixels, self.random(self.step)) + self.on_top

    def loss(self, pixel_values: Tensor) -> Tensor:
        """Losses ``(B,)`` of what the processor makes of the pictures, with nothing drawn."""
        return self.target.loss(pixel_values)

    @abstractmethod
    def _prepare(self, subject: Subject, pictures: Sequence[Image], config: AttackConfig) -> bool:
        """Keep what the draws are made from; whether there is anything to draw."""

    @abstractmethod
    def _drawn(self, pixels: Tensor, random: torch.Generator) -> Tensor:
        """The losses under one step's draws."""
