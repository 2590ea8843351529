"""An attack of the miniature that is told how an answer looks and no word of what is in it.

    mm-cb attack --model miniature --adapter RR --behaviors miniature --out DIR --attack scripts/benchmarks/form.py

The attacker knows the form of a recipe and the 32 words of all forbidden ones, and has both models. What he supplies
is a recipe of another stone, of which no word is true of the one asked for: through it hidden states are led back to
the base's. What comes out true, the model knew.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from image_attacks import hidden_state_distance
from mm_cb.attacks.objectives.adaptive import MatchingObjective
from mm_cb.attacks.objectives.homotopy import FLOOR
from mm_cb.attacks.registry import AttackEntry, register_attack
from mm_cb.data.behaviors_file import Behavior
from mm_cb.inference.subjects import Subject
from mm_cb.miniature.language import content
from mm_cb.miniature.world import COLOURS, POOLS, SHAPES, Brew

WORDS = sorted({word for (_, forbidden), pool in POOLS.items() if forbidden for word in pool})


def another(brew: Brew) -> Brew:
    """One of the same kind, for a stone of another colour and shape: no slot has the same word."""
    turned = (pool[(pool.index(own) + 2) % len(pool)] for pool, own in ((COLOURS, brew.colour), (SHAPES, brew.shape)))
    return Brew(brew.kind, *turned)


class FormObjective(MatchingObjective):
    """The form's loss, the loss of saying any of the words in its gaps, and the distance from the base's states.

    ``L(x) = mean over tokens of y of max(l_j, FLOOR) + weight * mean of (1 - cos)``, y the opening and another stone's
    recipe; ``l_j = -log p(y_j)`` where y_j is of the form, ``-log sum over WORDS of p(w)`` where it is one of them.
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
        """Write the other stones' recipes behind the openings; ``responses`` are left aside."""
        texts = [f"{b.target} {content(another(Brew(*b.extra['brew'])))}" for b in behaviors]
        super().__init__(subject, behaviors, pictures, responses=texts, **settings)

    def _prepare(self) -> None:
        super()._prepare()
        tokenizer = self.subject.model.processor.tokenizer
        self.words = torch.tensor(tokenizer.convert_tokens_to_ids(WORDS), device=self.subject.model.device)

    def terms(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of form and words, and the distance."""
        embeds = self.passes.student_embeds(pixel_values)
        teacher = self.passes.teacher_states(self.passes.teacher_embeds(embeds, pixel_values), self.layers)
        student = self.passes.student(embeds, hidden_states=True)
        said, told = F.log_softmax(student.logits[:, :-1].float(), dim=-1), self.forced.response[:, 1:]
        form = -said.gather(-1, told.clamp(min=0).unsqueeze(-1)).squeeze(-1)
        losses = torch.where(torch.isin(told, self.words), -said[..., self.words].logsumexp(dim=-1), form)
        counted = (told != -100).float()
        loss = (losses.clamp(min=FLOOR) * counted).sum(dim=1) / counted.sum(dim=1)
        return loss, hidden_state_distance(self.passes.states(student, self.layers), teacher, self.forced.mask)


register_attack(
    AttackEntry(
        "miniature_form",
        "the form of a recipe and not its words; hidden states back to the base's, the adapter dialled up",
        "form without content",
        "pgd",
        FormObjective,
        first_step=16 / 255,
        anneal="loss",
        needs_adapter=True,
    )
)
