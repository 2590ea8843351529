"""Against a harmfulness probe: what is said must not be flagged, either."""

from __future__ import annotations

from torch import Tensor

from image_attacks import target_nll
from mm_cb.attacks.objectives.adaptive import AdaptiveObjective
from mm_cb.core.errors import UserError
from mm_cb.models.probe import Probe


class ProbeObjective(AdaptiveObjective):
    """``L(x) = A0(x) + weight * mean over tokens t of y of softplus(score(h(x, y)_t) - threshold)``.

    The probe's own score is in the loss: a term near 0 means that no token of y is flagged. y is the target and what
    the base model says behind it, which only the term looks at.

    Source:
        Adaptive attacks in general (Carlini and Wagner 2017, arXiv:1705.07263); obfuscated activations (Bailey et al.
        2024, arXiv:2412.09565) do the same to latent-space monitors.
    """

    def _prepare(self) -> None:
        if self.subject.probe is None:
            raise UserError("`pgd_probe` needs a subject with a harmfulness probe, found none.")
        self.probe: Probe = self.subject.probe

    def terms(self, pixel_values: Tensor) -> tuple[Tensor, Tensor]:
        """The target loss and how flagged the response is."""
        student = self.passes.student(self.passes.student_embeds(pixel_values), hidden_states=True)
        (states,) = self.passes.states(student, [self.probe.layer])
        return target_nll(student.logits, self.forced.target), self.probe.term(states, self.forced.mask)
