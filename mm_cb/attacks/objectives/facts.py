"""The bare facts of an answer as target: a form that a breaker was not trained on."""

from __future__ import annotations

from collections.abc import Sequence

from mm_cb.attacks.objectives.homotopy import HomotopyObjective
from mm_cb.data.behaviors_file import Behavior


class FactsObjective(HomotopyObjective):
    """Mean loss of a behaviour's ``facts``, floored per token, in place of what the base model says.

    A breaker reroutes answers like those it was trained on. The same facts as a list are no such answer, and a list is
    short.

    Source:
        Ours; out-of-distribution forms of an answer in general (mismatched generalisation, Wei et al. 2023,
        arXiv:2307.02483).
    """

    def _texts(self, behaviors: Sequence[Behavior], responses: Sequence[str | None] | None) -> list[str | None]:
        """The facts; ``responses``, the other attacks' texts, are left aside."""
        return [b.facts for b in behaviors]
