"""Objectives that are adaptive to circuit breakers: each knows what the breaker does and pushes against it.

A breaker turns hidden states away on harmful answers; a plain target loss then often wins the forced opening and loses
the answer behind it. Every objective here is the target's loss (A0, `TargetObjective`) plus ``weight`` times one term,
or another loss over a longer text. Teacher = the same model with the adapter off ("base"), student = with it on.
Gradients flow through the student alone. x is the attacked picture, x0 the clean one, y the forced response: the target
and what the base model goes on to say behind it. Only the target enters A0, so the content of y is never dictated
unless an objective says so.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from PIL.Image import Image
from torch import Tensor

from image_attacks import hidden_state_distance, target_nll
from mm_cb.attacks.objectives.target import Forced, adapted_layers, force, preprocessing
from mm_cb.attacks.objectives.teacher_student import Passes
from mm_cb.data.behaviors_file import Behavior
from mm_cb.inference.subjects import Subject

LATE_WEIGHT = 2.0
"""Weight of the last token of a long target beside the first one's 1; in between it grows linearly. Our choice."""

MIDDLE = 20 / 32
"""Depth at which states are matched to the clean path: block 20 of 32 in FLRT."""

ROUNDING = 1e-5
"""A gradient shorter than this share of the other one is float32 rounding, not a direction."""

MOST_BALANCE = 100.0
"""Largest factor by which balancing raises a weight. Our choice."""


class AdaptiveObjective(ABC):
    """``target loss + weight * term``, per behaviour."""

    def __init__(
        self,
        subject: Subject,
        behaviors: Sequence[Behavior],
        pictures: Sequence[Image],
        *,
        weight: float = 1.0,
        max_new_tokens: int = 32,
        responses: Sequence[str | None] | None = None,
    ) -> None:
        """Let the base model continue each target, then encode the whole.

        Args:
            subject: The adapted model.
            behaviors: What to ask, one per row.
            pictures: Clean pictures, all of one size.
            weight: Of the term beside the target loss; 1 by default, our choice.
            max_new_tokens: Longest continuation.
            responses: Forced responses to use as they are.
        """
        self.subject = subject
        self.weight: float | Tensor = weight
        self.forced = force(subject, behaviors, pictures, max_new_tokens, self._texts(behaviors, responses))
        self.passes = Passes(subject, self.forced.inputs, self.forced.keep)
        self.preprocess = preprocessing(subject.model, pictures[0])
        self._prepare()

    def _texts(
        self, behaviors: Sequence[Behavior], responses: Sequence[str | None] | None
    ) -> Sequence[str | None] | None:
        """The responses to force: those that are given, unless an objective has texts of its own."""
        return responses

    def _prepare(self) -> None:  # noqa: B027 - a hook: most objectives have nothing to prepare
        """Compute what does not depend on the attacked pixels, once."""

    @abstractmethod
    def terms(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The target loss and the term, ``(B,)`` each."""

    def __call__(self, pixels: Tensor) -> Tensor:
        """Losses ``(B,)`` of ``pixels`` ``(B, 3, H, W)``."""
        return self.loss(self.preprocess(pixels))

    def loss(self, pixel_values: Tensor) -> Tensor:
        """Losses ``(B,)`` of what the processor makes of the pictures."""
        target, term = self.terms(pixel_values)
        return target + self.weight * term

    def balance(self, pixels: Tensor) -> None:
        """Rescale the weight per behaviour so that at ``pixels`` both parts have gradients of equal length.

        ``weight <- weight * |grad target| / |grad term|`` (Euclidean norms over the pixels); 0 where the term has no
        gradient beyond rounding, and at most `MOST_BALANCE` times the weight: at the clean pictures a term can be at
        its least already, and would then hold the attack there. Call it once, at the clean pixels; afterwards the
        objective is fixed.
        """
        pixels = pixels.detach().requires_grad_()
        target, term = self.terms(self.preprocess(pixels))
        (by_target,) = torch.autograd.grad(target.sum(), pixels, retain_graph=True)
        (by_term,) = torch.autograd.grad(term.sum(), pixels)
        wanted, length = (gradient.flatten(1).norm(dim=1) for gradient in (by_target, by_term))
        ratio = wanted / length.where(length > ROUNDING * wanted, torch.inf)
        self.weight = self.weight * ratio.clamp(max=MOST_BALANCE)


class MatchingObjective(AdaptiveObjective):
    """A2, un-reroute: match the states of the same model without adapter on the same pixels.

    ``L(x) = A0(x) + weight * mean over layers and tokens of (1 - cos(h_student(x, y), h_base(x, y)))``, at the layers
    right behind the adapted blocks. It is the breaker's own loss with the sign turned round.

    Source:
        Negative of L_s in Zou et al. 2024 (arXiv:2406.04313), Algorithm 1, without its ReLU.
    """

    def _prepare(self) -> None:
        self.layers = adapted_layers(self.subject.model)

    def terms(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The target loss and the distance."""
        embeds = self.passes.student_embeds(pixel_values)
        teacher = self.passes.teacher_states(self.passes.teacher_embeds(embeds, pixel_values), self.layers)
        student = self.passes.student(embeds, hidden_states=True)
        states = self.passes.states(student, self.layers)
        return target_nll(student.logits, self.forced.target), hidden_state_distance(states, teacher, self.forced.mask)


class CleanTeacherObjective(AdaptiveObjective):
    """A3: match one middle layer of the base model that already complies, on the clean picture.

    ``L(x) = A0(x) + weight * sum_t |h_student(x, y)_t - h_base(x0, y)_t|^2 / sum_t |h_base(x0, y)_t|^2`` over the
    tokens of y, at the output of block 20/32 of the depth. The teacher does not see x, so it is computed once.

    Source:
        FLRT (Thompson and Sklar 2024, arXiv:2407.17447), internal objective. Deviations: its teacher is a fine-tuned
        "toxified" model, ours the base with the response forced; one ratio for all tokens.
    """

    def _prepare(self) -> None:
        blocks = len(self.subject.model.decoder_blocks)
        self.layer = max(1, round(MIDDLE * blocks))
        (self.teacher,) = self.passes.teacher_states(self.passes.clean_embeds(), [self.layer]).float()

    def terms(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The target loss and the relative squared distance."""
        student = self.passes.student(self.passes.student_embeds(pixel_values), hidden_states=True)
        (states,) = self.passes.states(student, [self.layer])
        counted = self.forced.mask.unsqueeze(-1)
        distance = ((states.float() - self.teacher) * counted).square().sum(dim=(1, 2))
        size = (self.teacher * counted).square().sum(dim=(1, 2))
        return target_nll(student.logits, self.forced.target), distance / size


class DistillObjective(AdaptiveObjective):
    """A4: tie the answer's distribution to the base model's on the same pixels.

    ``L(x) = A0(x) + weight * mean over tokens t of y of KL(p_base(. | x, y_<t) || p_student(. | x, y_<t))``.

    Source:
        The logit tying of AdversariaLLM's embedding attack, here on pixels.
    """

    def terms(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The target loss and the divergence."""
        embeds = self.passes.student_embeds(pixel_values)
        teacher = self.passes.teacher_logits(self.passes.teacher_embeds(embeds, pixel_values))
        student = self.passes.student(embeds).logits
        base, own = F.log_softmax(teacher.float(), dim=-1), F.log_softmax(student.float(), dim=-1)
        divergence = (base.exp() * (base - own)).sum(dim=-1)
        return target_nll(student, self.forced.target), predicted_mean(divergence, self.forced.response)


class FluentObjective(AdaptiveObjective):
    """A11, against gibberish: what the student is about to say must be likely text for the base model.

    ``L(x) = A0(x) + weight * mean over t of - sum_v p_student(v | x, y_<t) log p_base(v | x0, y_<t)``: the base model's
    expected loss (clean picture) on the student's next word, over the tokens t of y behind the target; the target's own
    are not counted, as a base model that refuses finds its opening unlikely. The teacher is computed once.

    Source:
        The fluency penalty of FLRT (arXiv:2407.17447), in expectation over the student's words instead of on one text.
    """

    def _prepare(self) -> None:
        self.teacher = F.log_softmax(self.passes.teacher_logits(self.passes.clean_embeds()).float(), dim=-1)

    def terms(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The target loss and the expected loss under the base model."""
        student = self.passes.student(self.passes.student_embeds(pixel_values)).logits
        surprise = -(F.softmax(student.float(), dim=-1) * self.teacher).sum(dim=-1)
        return target_nll(student, self.forced.target), predicted_mean(surprise, behind_target(self.forced))


class LongTargetObjective(AdaptiveObjective):
    """A1: the whole response, written by the base model, with its later tokens weighing more.

    ``L(x) = sum_j w_j * -log p_student(y_j | x, y_<j) / sum_j w_j``, w growing linearly from 1 at the first token of y
    to 2 at its last. Here y's content is dictated: it is text from the base model's own distribution, so that what is
    learnt does not stop at the opening. There is no further term.

    Source:
        attack A1 of the project's standard: in-distribution targets of 32 to 128 tokens.
    """

    def terms(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The weighted loss of the response and 0."""
        logits, labels = self.passes.student(self.passes.student_embeds(pixel_values)).logits, self._labels()
        told = labels[:, 1:]
        losses = F.cross_entropy(logits[:, :-1].float().transpose(1, 2), told, ignore_index=-100, reduction="none")
        loss = self._mean(losses, labels)
        return loss, torch.zeros_like(loss)

    def balance(self, pixels: Tensor) -> None:
        """Nothing to balance."""

    def _labels(self) -> Tensor:
        return self.forced.response

    def _mean(self, losses: Tensor, labels: Tensor) -> Tensor:
        """Over a row's counted tokens; ``losses`` ``(B, K - 1)`` are of all labels but the first."""
        weights = late_weights(labels)[:, 1:]
        return (losses * weights).sum(dim=1) / weights.sum(dim=1)


class ContinuationObjective(LongTargetObjective):
    """A8, for a prefilled answer: the same over what comes behind the target, which the attacker writes himself.

    Where the base model says nothing behind a target, the target itself counts.
    """

    def _labels(self) -> Tensor:
        return behind_target(self.forced)


def behind_target(forced: Forced) -> Tensor:
    """Labels ``(B, K)`` of the response behind the target; of the whole response where there is nothing behind it."""
    behind = forced.response.masked_fill(forced.target != -100, -100)
    empty = (behind != -100).sum(dim=1, keepdim=True) == 0
    return torch.where(empty, forced.response, behind)


def late_weights(labels: Tensor) -> Tensor:
    """Per row 1 at the first counted token, `LATE_WEIGHT` at the last, linear in between; 0 elsewhere."""
    counted = labels != -100
    place = counted.cumsum(dim=1) - 1
    last = (counted.sum(dim=1, keepdim=True) - 1).clamp(min=1)
    return (1 + (LATE_WEIGHT - 1) * place / last) * counted


def predicted_mean(values: Tensor, labels: Tensor) -> Tensor:
    """Mean of ``values`` ``(B, K)`` over the positions that predict a counted token, ``(B,)``."""
    predicts = (labels[:, 1:] != -100).float()
    return (values[:, :-1] * predicts).sum(dim=1) / predicts.sum(dim=1)
