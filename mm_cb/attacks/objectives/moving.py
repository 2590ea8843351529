"""Objectives that change from step to step of a search: only what they are at its end selects pictures."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

HANDICAP = 1e3
"""On top of a loss on the way: that is another objective than the one that is meant, and no picture wins there."""


@runtime_checkable
class Moving(Protocol):
    """An objective that is told of every step; what it is at a step follows from the steps and losses before."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Losses ``(B,)`` at this step, with the handicap on top."""
        ...

    def begin(self, steps: int) -> None:
        """Stand at the first step of a search of so many updates."""
        ...

    def saw(self, losses: Tensor) -> None:
        """Go on to the next step, from the losses ``(B,)`` that this one's call gave."""
        ...

    def handicap(self, step: int) -> Tensor | float:
        """What the losses of a step that was called have on top, one number or ``(B,)``."""
        ...

    def rest(self) -> None:
        """Be what is meant: the search is over."""
        ...


def without_handicap(moving: Moving, curves: Tensor, seen: int) -> Tensor:
    """Curves ``(1, steps + 1, B)`` of a run as the objective had them; behind the steps seen losses stand still."""
    on_top = torch.zeros_like(curves)
    for step in range(curves.shape[1]):
        on_top[:, step] = torch.as_tensor(moving.handicap(min(step, seen - 1)))
    return curves - on_top
