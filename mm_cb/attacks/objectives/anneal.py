"""The adapter's scale on the way of an attack: from the base to the breaker, by the steps or by each row's loss.

A finished breaker gives an attack little to follow: where its states are turned away the gradient leads nowhere. Its
base gives much, and between the two lies a line of models ``W0 + s (W1 - W0)``. A picture that is found at s = 0 is led
along it. Whatever an attack minimises can be annealed; it ends at s = 1, where alone pictures are selected and judged.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mm_cb.attacks.entry import SETTLES, Anneal
from mm_cb.attacks.objectives.moving import HANDICAP, Moving
from mm_cb.attacks.objectives.target import Objective
from mm_cb.models import ChatModel

RAISED = SETTLES["steps"]
"""By steps: share of them over which the scale rises from 0 to 1; the rest is spent at 1."""
ALLOWED = 0.5
"""By loss: a row whose loss lies below this, per token where the loss is a text's, may go on. Like the two
below tried out on 18 of the demo's 48 requests, in runs of 300 and of 900 steps."""
PACE = 3.0
"""By loss: a row that may always go on is at 1 after 1 / 3 of the steps."""
FORCED = (0.8, SETTLES["loss"])
"""By loss: shares of the steps between which a row that may not go on is pulled along, from 0 to 1."""


class Annealed:
    """An objective at a scale of the adapter that changes from step to step.

    The scales follow from the losses that `saw` was told of, so that a run that goes on is at the scale it was at.
    """

    def __init__(self, objective: Objective, model: ChatModel, by: Anneal, rows: int) -> None:
        """Hold what is to be annealed.

        Args:
            objective: What is minimised, of ``model``; it may change from step to step itself.
            model: With an adapter, or a base to compare with.
            by: ``"steps"`` or ``"loss"``.
            rows: Pictures of the batch.
        """
        self.objective, self.model, self.by, self._rows = objective, model, by, rows
        self._inner = objective if isinstance(objective, Moving) else None
        self.begin(0)

    def begin(self, steps: int) -> None:
        """Stand at the base, of a search of so many updates."""
        self.steps = steps
        self.scales = [torch.full((self._rows,), 0.0 if steps else 1.0)]
        if self._inner is not None:
            self._inner.begin(steps)

    def __call__(self, pixels: Tensor) -> Tensor:
        """Losses ``(B,)`` at this step's scale, with the handicap on top where it is not 1."""
        with self.model.adapter_scaled(self.scales[-1]):
            losses = self.objective(pixels)
        return losses + self._own(len(self.scales) - 1).to(losses)

    def handicap(self, step: int) -> Tensor:
        """What the losses of a step have on top, ``(B,)``: `HANDICAP` below a scale of 1, and the objective's own."""
        return self._own(step) + (0.0 if self._inner is None else self._inner.handicap(step))

    def _own(self, step: int) -> Tensor:
        return HANDICAP * (self.scales[step] < 1).float()

    def saw(self, losses: Tensor) -> None:
        """Go on to the next step's scale, from the losses that this one's call gave."""
        bare = losses.detach().cpu() - self.handicap(len(self.scales) - 1)
        self.scales.append(scale_after(self.by, self.scales[-1], bare, len(self.scales), self.steps))
        if self._inner is not None:
            self._inner.saw(losses)

    def rest(self) -> None:
        """Leave the objective as it is meant; scales are in force within calls alone."""
        if self._inner is not None:
            self._inner.rest()


def scale_after(by: Anneal, scale: Tensor, losses: Tensor, step: int, steps: int) -> Tensor:
    """The scale of every row at a step from 1 on: never lower than before, and 1 in the last part of the run.

    Args:
        by: ``"steps"``, or ``"loss"``: of the row, at the scale before.
        scale: The scale before, ``(B,)``.
        losses: The losses there, ``(B,)``.
        step: Which step.
        steps: Updates of the run.
    """
    if step >= steps:
        return torch.ones_like(scale)
    if by == "steps":
        return torch.full_like(scale, min(1.0, step / max(1.0, RAISED * steps)))
    begin, end = FORCED
    pulled = max(0.0, (step / steps - begin) / (end - begin))
    return torch.where(losses < ALLOWED, scale + PACE / steps, scale).clamp(min=min(1.0, pulled), max=1.0)
