"""The form of an answer as target, with gaps for what it says: which words belong into them nobody is told."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from image_attacks import hidden_state_distance
from mm_cb.attacks.objectives.adaptive import MatchingObjective
from mm_cb.attacks.objectives.homotopy import FLOOR
from mm_cb.attacks.objectives.target import encode
from mm_cb.attacks.objectives.teacher_student import Passes
from mm_cb.core.errors import UserError
from mm_cb.data.behaviors_file import Behavior
from mm_cb.inference.subjects import Subject

NO_WORD = -1
"""In place of a token id, where a gap has fewer words than another one."""


class FormObjective(MatchingObjective):
    """Say the form, any of the words in its gaps, and be led back to the base model's states.

    ``L(x) = mean over tokens of y of max(l_j, FLOOR) + weight * mean over layers and tokens of
    (1 - cos(h_student(x, y), h_base(x, y)))``. y is target and form; in its gaps stand the words that the student
    itself finds likeliest at x, filled from left to right, so that the loss is a function of x alone.
    ``l_j = -log p(y_j)`` for tokens of the form, ``-log sum over words of p(word)`` for those of a gap. The attacker
    tells no word apart: what comes out true, the model knew.

    Costs, beside a step of `MatchingObjective`, a forward for every fill until none changes, at most one a gap. Fills
    begin with the words of the call before, which changes nothing but their number: where none changes all are right.

    Source:
        Ours. The states are those of `MatchingObjective`.
    """

    def _texts(self, behaviors: Sequence[Behavior], responses: Sequence[str | None] | None) -> list[str]:
        """Each form behind its opening; ``responses``, the other attacks' texts, are left aside.

        Raises:
            UserError: If the words of a behaviour are none to the model, see `filled_tokens`.
        """
        self._ids = [filled_tokens(self.subject, behavior) for behavior in behaviors]
        self._forms = [f"{b.target} {b.form.text}" for b in behaviors if b.form is not None]
        return [f"{b.target} {b.form.filled(b.form.words[0])}" for b in behaviors if b.form is not None]

    def _prepare(self) -> None:
        super()._prepare()
        self.forced = replace(self.forced, texts=self._forms)
        told = self.forced.response[:, 1:]
        rows, width = told.shape
        self.pool = torch.full((rows, width, max(map(len, self._ids))), NO_WORD, device=told.device)
        for row, ids in enumerate(self._ids):
            for place in (ids != ids[0]).any(dim=0).nonzero().flatten().tolist():
                own = ids[:, place].unique().to(told.device)
                self.pool[row, width - ids.shape[1] + place, : len(own)] = own
        self.gaps = (self.pool != NO_WORD).any(dim=-1)
        self._last = self.forced.inputs

    def terms(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The loss of form and words, and the distance from the base's states."""
        passes = self._passes(pixel_values)
        embeds = passes.student_embeds(pixel_values)
        teacher = passes.teacher_states(passes.teacher_embeds(embeds, pixel_values), self.layers)
        student = passes.student(embeds, hidden_states=True)
        said, counted = F.log_softmax(student.logits[:, :-1].float(), dim=-1), self.forced.response[:, 1:] != -100
        form = -said.gather(-1, self.forced.response[:, 1:].clamp(min=0).unsqueeze(-1)).squeeze(-1)
        losses = torch.where(self.gaps, -self._of_words(said).logsumexp(dim=-1), form).clamp(min=FLOOR)
        loss = (losses * counted).sum(dim=1) / counted.sum(dim=1)
        return loss, hidden_state_distance(passes.states(student, self.layers), teacher, self.forced.mask)

    def _of_words(self, scores: Tensor) -> Tensor:
        """``scores`` ``(B, K - 1, V)`` of the words of every place, ``(B, K - 1, P)``; very low where it has none."""
        own = scores.gather(-1, self.pool.clamp(min=0))
        lowest = torch.finfo(own.dtype).min  # no infinity: outside gaps there is no word, and its gradient no number
        return own.masked_fill(self.pool == NO_WORD, lowest)

    @torch.no_grad()
    def _passes(self, pixel_values: Tensor) -> Passes:
        """Passes over the batch with its gaps filled, from left to right, by the student's likeliest words."""
        inputs, width = self._last, self.gaps.shape[1]
        for _ in range(int(self.gaps.sum(dim=1).max())):
            passes = Passes(self.subject, inputs, self.forced.keep)
            logits = passes.student(passes.student_embeds(pixel_values)).logits[:, :-1]
            likeliest = self.pool.gather(-1, self._of_words(logits).argmax(dim=-1, keepdim=True)).squeeze(-1)
            told = torch.where(self.gaps, likeliest, inputs.input_ids[:, -width:])
            if told.equal(inputs.input_ids[:, -width:]):
                break
            inputs = replace(inputs, input_ids=torch.cat([inputs.input_ids[:, :-width], told], dim=1))
        self._last = inputs
        return Passes(self.subject, inputs, self.forced.keep)


def filled_tokens(subject: Subject, behavior: Behavior) -> Tensor:
    """Tokens of target and form ``(words, tokens)``, every gap filled with one word after the other.

    Raises:
        UserError: If they are not equally many, or the same for two words.
    """
    form = behavior.form
    assert form is not None
    texts = [f"{behavior.target} {form.filled(word)}" for word in form.words]
    inputs = encode(subject, [behavior] * len(texts), [None] * len(texts), texts)
    counts = inputs.completion_mask.sum(dim=1)
    if (odd := (counts != counts[0]).nonzero().flatten()).numel():
        raise UserError(
            f"{behavior.named}: the `words` of its form must be equally many tokens of the model: with "
            f"`{form.words[0]}` in its gaps it has {int(counts[0])}, with `{form.words[int(odd[0])]}` "
            f"{int(counts[odd[0]])}; leave out those of another length."
        )
    ids = inputs.input_ids[:, -int(counts[0]) :]
    first: dict[tuple[int, ...], str] = {}
    for word, row in zip(form.words, ids.tolist(), strict=True):
        if (same := first.setdefault(tuple(row), word)) != word:
            raise UserError(
                f"{behavior.named}: `{same}` and `{word}` of the `words` of its form are the same tokens to "
                f"`{subject.model.name}`; leave one of them out."
            )
    return ids
