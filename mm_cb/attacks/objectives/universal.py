"""One picture for many behaviours. It is made for the first of them and judged on all."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.objectives.target import encode, preprocessing
from mm_cb.core.errors import UserError
from mm_cb.data.behaviors_file import Behavior
from mm_cb.inference.subjects import Subject
from mm_cb.models.shared_prefix import SharedPrefixTargets


class UniversalObjective:
    """Mean target loss of the behaviours that a picture is made for, as a function of that picture.

    One picture against M targets: what the chats share (the image tower, all tokens up to the end of the image) runs
    once per step instead of M times.
    """

    def __init__(self, subject: Subject, behaviors: Sequence[Behavior], picture: Image, trained: int) -> None:
        """Encode all chats; the loss is that of the first ``trained`` ones."""
        self.subject = subject
        inputs = encode(subject, behaviors, [picture] * len(behaviors), [b.target for b in behaviors])
        self.mean_of = SharedPrefixTargets(subject.model, inputs.rows(0, trained))
        self.all = SharedPrefixTargets(subject.model, inputs)
        self.preprocess = preprocessing(subject.model, picture)

    def __call__(self, pixels: Tensor) -> Tensor:
        """The mean loss ``(1,)`` of one picture's ``pixels`` ``(1, 3, H, W)``."""
        return self.loss(self.preprocess(pixels))

    def loss(self, pixel_values: Tensor) -> Tensor:
        """The mean loss ``(1,)`` of what the processor makes of one picture."""
        with self.subject.active():
            return self.mean_of(pixel_values).mean(dim=0, keepdim=True)

    @torch.no_grad()
    def each(self, pixels: Tensor) -> list[float]:
        """The loss of every behaviour, those the picture was not made for included, at one picture."""
        with self.subject.active():
            return self.all(self.preprocess(pixels)).tolist()


def trained_on(config: AttackConfig, behaviors: Sequence[Behavior]) -> int:
    """How many behaviours, from the first on, a universal picture is made for.

    Raises:
        UserError: If there are fewer.
    """
    count = config.universal_train or (len(behaviors) + 1) // 2
    if count > len(behaviors):
        raise UserError(f"`--universal-train` must be at most the number of behaviours, {len(behaviors)}, got {count}.")
    return count
