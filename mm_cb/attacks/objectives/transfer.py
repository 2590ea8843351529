"""Transfer from the base to a breaker that is never seen: the base stands in, changed at random at every step."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.objectives.stochastic import Stochastic
from mm_cb.attacks.objectives.target import TargetObjective
from mm_cb.data.behaviors_file import Behavior
from mm_cb.inference.subjects import Subject
from mm_cb.models.low_rank import Change, changed, changes_of, linear_layers, norm_of, random_changes


class TransferObjective(Stochastic):
    """The target's loss under the base with weights ``W + s B A``, s and (unless an adapter is given) B A drawn anew.

    A picture that holds for many models around the base may hold for the breaker, which is one of them. The adapter
    under attack takes no part: it is off in every pass. Files are held to the loss of the base as it is.

    Source:
        Ours; transfer over an ensemble (Liu et al. 2017, arXiv:1611.02770) of weights around one model, as in
        "ghost networks" (Li et al. 2018, arXiv:1812.03413), with low-rank noise, which is what a breaker's adapter is.
    """

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
            subject: Whoever is judged; its base is what is attacked.
            behaviors: What to ask, one per row.
            pictures: Clean pictures, all of one size.
            config: Reads ``seed``, ``surrogate`` and ``surrogate_scale``.
            restart: Which run this is.
            settings: Not read.
        """
        super().__init__((config.seed, restart), varies=config.surrogate_scale > 0)
        self.target = TargetObjective(replace(subject, adapted=False), behaviors, pictures)
        self._scale, self._folder, self._model = config.surrogate_scale, config.surrogate, subject.model
        self._drawn: Callable[[torch.Generator], list[Change]] | None = None

    def __call__(self, pixels: Tensor) -> Tensor:
        """Losses ``(B,)`` of ``pixels`` ``(B, 3, H, W)`` at the step's draws."""
        if self.step is None:
            return self.target(pixels)
        random = self.random(self.step)
        scale = self._scale * float(torch.rand((), generator=random))
        with changed(self._changes(random), scale):
            return self.target(pixels) + self.on_top

    def loss(self, pixel_values: Tensor) -> Tensor:
        """The base's own losses ``(B,)`` of what the processor makes of the pictures."""
        return self.target.loss(pixel_values)

    def _changes(self, random: torch.Generator) -> list[Change]:
        """The step's; what they are made from is looked up once, and not where only files are looked at."""
        if self._drawn is None:
            if self._folder is not None:
                given = changes_of(self._model, self._folder)
                self._drawn = lambda _: given
            else:
                layers = linear_layers(self._model)
                norms = [norm_of(layer) for layer in layers]
                self._drawn = lambda generator: random_changes(layers, norms, generator)
        return self._drawn(random)
