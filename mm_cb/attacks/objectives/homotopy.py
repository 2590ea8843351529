"""The loss of a long answer, floored per token: what `pgd_homotopy` minimises while the adapter is dialled up."""

from __future__ import annotations

from torch import Tensor

from mm_cb.attacks.objectives.adaptive import LongTargetObjective

FLOOR = 0.05
"""A token's loss below this is good enough: nothing is gained by going on, and other tokens need the budget."""


class HomotopyObjective(LongTargetObjective):
    """Mean loss of the whole forced response, floored per token.

    ``L(x) = mean over tokens of y of max(-log p(y_j | x, y_<j), FLOOR)``. The adapter's scale is the attack's, see
    `mm_cb.attacks.objectives.anneal`.

    Source:
        Ours; homotopy (continuation) methods in general. The response is the base model's own text, or what a hijack of
        the base said: the attacker supplies it, so that success shows control over the output.
    """

    def _mean(self, losses: Tensor, labels: Tensor) -> Tensor:
        counted = (labels[:, 1:] != -100).float()
        return (losses.clamp(min=FLOOR) * counted).sum(dim=1) / counted.sum(dim=1)
