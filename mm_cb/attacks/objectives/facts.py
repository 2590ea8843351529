"""The bare facts of an answer as target: a form that a breaker was not trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from PIL.Image import Image

from mm_cb.attacks.objectives.homotopy import HomotopyObjective
from mm_cb.data.behaviors_file import Behavior
from mm_cb.inference.subjects import Subject


class FactsObjective(HomotopyObjective):
    """Mean loss of a behaviour's ``facts``, floored per token, in place of what the base model says.

    A breaker reroutes answers like those it was trained on. The same facts as a list are no such answer, and a list is
    short.

    Source:
        Ours; out-of-distribution forms of an answer in general (mismatched generalisation, Wei et al. 2023,
        arXiv:2307.02483).
    """

    def __init__(
        self,
        subject: Subject,
        behaviors: Sequence[Behavior],
        pictures: Sequence[Image],
        *,
        responses: Sequence[str | None] | None = None,
        **settings: Any,
    ) -> None:
        """Force the facts; ``responses``, the other attacks' texts, are left aside."""
        super().__init__(subject, behaviors, pictures, responses=[b.facts for b in behaviors], **settings)
