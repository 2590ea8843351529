"""The loss of a long answer, floored per token: what `pgd_homotopy` minimises while the adapter is dialled up."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_cb.attacks.objectives.adaptive import AdaptiveObjective

FLOOR = 0.05
"""A token's loss below this is good enough: nothing is gained by going on, and other tokens need the budget."""


class HomotopyObjective(AdaptiveObjective):
    """Mean loss of the whole forced response, floored per token.

    ``L(x) = mean over tokens of y of max(-log p(y_j | x, y_<j), FLOOR)``. The adapter's scale is the attack's, see
    `mm_cb.attacks.objectives.anneal`.

    Source:
        Ours; homotopy (continuation) methods in general. The response is the base model's own text, or what a hijack of
        the base said: the attacker supplies it, so that success shows control over the output.
    """

    def terms(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The floored loss of the response, and 0."""
        logits = self.passes.student(self.passes.student_embeds(pixel_values)).logits
        labels = self.forced.response[:, 1:]
        losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), labels, ignore_index=-100, reduction="none")
        counted = (labels != -100).float()
        loss = (losses.clamp(min=FLOOR) * counted).sum(dim=1) / counted.sum(dim=1)
        return loss, torch.zeros_like(loss)

    def balance(self, pixels: Tensor) -> None:
        """Nothing to balance."""
