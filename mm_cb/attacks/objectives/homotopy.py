"""Homotopy over the adapter: start at the undefended model, walk to the defended one, and stay there.

A finished breaker gives an attack little to follow: where its states are turned away the gradient leads nowhere. Its
base gives much, and between the two lies a line of models W + s B A. A picture that is found at s = 0 is led along it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_cb.attacks.objectives.adaptive import AdaptiveObjective

RAISED = 0.7
"""Share of the steps over which the adapter's scale rises from 0 to 1; the rest is spent at 1."""
FLOOR = 0.05
"""A token's loss below this is good enough: nothing is gained by going on, and other tokens need the budget."""
_HANDICAP = 1e3
"""On top of the losses at a scale below 1, per missing unit: those models are not the one that is attacked."""


class HomotopyObjective(AdaptiveObjective):
    """Mean loss of the whole forced response, floored per token, at a scale of the adapter that rises with the steps.

    ``L_s(x) = mean over tokens of y of max(-log p_s(y_j | x, y_<j), FLOOR)``, p_s of the model with weights W + s B A.
    Outside a search s is 1: what files are held to, and every verdict, is the adapter as it is.

    Source:
        Ours; homotopy (continuation) methods in general. The response is the base model's own text, or what a hijack of
        the base said: the attacker supplies it, so that success shows control over the output.
    """

    scale = 1.0

    def at_step(self, step: int, steps: int) -> None:
        """Raise the scale linearly over the first steps."""
        self.scale = scale_at(step, steps)

    def handicap(self, step: int, steps: int) -> float:
        """Larger than any loss, and 0 once the scale is 1."""
        return _HANDICAP * (1 - scale_at(step, steps))

    def terms(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The floored loss of the response, and 0."""
        with self.subject.model.adapter_scaled(self.scale):
            logits = self.passes.student(self.passes.student_embeds(pixel_values)).logits
        labels = self.forced.response[:, 1:]
        losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
        counted = (labels != -100).float()
        loss = (losses.clamp(min=FLOOR) * counted).sum(dim=1) / counted.sum(dim=1)
        return loss + _HANDICAP * (1 - self.scale), torch.zeros_like(loss)

    def balance(self, pixels: Tensor) -> None:
        """Nothing to balance."""


def scale_at(step: int, steps: int) -> float:
    """The adapter's scale at a step: 0 at the first, 1 from `RAISED` of them on."""
    return min(1.0, step / max(1.0, RAISED * steps))
