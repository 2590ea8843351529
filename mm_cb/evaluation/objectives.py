"""What the attacks on a model minimise: functions from pixels to one loss per behaviour.

Pixels are those of the picture a user would upload. They go through the model's own image processor (forward value
exact, gradient through a smooth surrogate, see `image_attacks.preprocessing`) into the model, in front of the same chat
that `generate` will see.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from PIL.Image import Image
from torch import Tensor

from image_attacks import hidden_state_distance, target_nll
from mm_cb.errors import UserError
from mm_cb.evaluation.behaviors import Behavior
from mm_cb.evaluation.subjects import Subject
from mm_cb.models import LlavaNextModel, ModelInputs


class TargetObjective:
    """A0: mean negative log-likelihood of each behaviour's target text."""

    def __init__(self, subject: Subject, behaviors: Sequence[Behavior], pictures: Sequence[Image]) -> None:
        """Encode the chats once; ``pictures`` all have one size."""
        self.subject = subject
        self.inputs = encode(subject, behaviors, pictures, [b.target for b in behaviors])
        # Rows are padded on the left, so that all targets end at the last token and few logits are needed.
        self.keep = _longest(self.inputs) + 1
        self.labels = self.inputs.labels[:, -self.keep :]
        width, height = pictures[0].size
        self.preprocess = subject.model.preprocessing((height, width))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Losses ``(B,)`` of ``pixels`` ``(B, 3, H, W)``."""
        return self.loss(self.preprocess(pixels))

    def loss(self, pixel_values: Tensor) -> Tensor:
        """Losses ``(B,)`` of what the processor makes of the pictures."""
        with self.subject.active() as model:
            output = model.forward(self.inputs, pixel_values=pixel_values, logits_to_keep=self.keep)
        return target_nll(output.logits, self.labels)


class MatchingObjective:
    """A2: the target loss, plus the distance of the adapted hidden states to those of the same model without adapter.

    The breaker turns hidden states away from the base model's; this attack turns them back. Teacher and student see the
    same pixels and the same forced response: the target and, behind it, what the base model itself goes on to say. Only
    the target enters the cross-entropy, so the response's content is never dictated, only the states on the way to it.
    """

    def __init__(
        self,
        subject: Subject,
        behaviors: Sequence[Behavior],
        pictures: Sequence[Image],
        *,
        weight: float = 1.0,
        max_new_tokens: int = 32,
    ) -> None:
        """Let the base model continue each target, then encode the whole.

        Args:
            subject: The adapted model.
            behaviors: What to ask, one per row.
            pictures: Clean pictures, all of one size.
            weight: Of the distance beside the target loss; 1 by default, our choice.
            max_new_tokens: Longest continuation.
        """
        self.subject, self.layers, self.weight = subject, adapted_layers(subject.model), weight
        targets = [b.target for b in behaviors]
        opened = encode(subject, behaviors, pictures, targets)
        with subject.model.adapter(False):
            continued = subject.model.generate(opened, max_new_tokens)
        responses = [f"{target} {more}".strip() for target, more in zip(targets, continued, strict=True)]
        self.inputs = encode(subject, behaviors, pictures, responses)
        self.keep = _longest(self.inputs) + 1
        self.mask = self.inputs.completion_mask[:, -self.keep :]
        position = self.mask.cumsum(dim=1)
        within_target = position <= opened.completion_mask.sum(dim=1, keepdim=True)
        self.labels = self.inputs.labels[:, -self.keep :].masked_fill(~within_target, -100)
        width, height = pictures[0].size
        self.preprocess = subject.model.preprocessing((height, width))

    def __call__(self, pixels: Tensor) -> Tensor:
        """Losses ``(B,)`` of ``pixels`` ``(B, 3, H, W)``."""
        return self.loss(self.preprocess(pixels))

    def loss(self, pixel_values: Tensor) -> Tensor:
        """Losses ``(B,)`` of what the processor makes of the pictures."""
        model = self.subject.model
        with torch.no_grad(), model.adapter(False):
            teacher = model.forward(self.inputs, pixel_values=pixel_values, logits_to_keep=1, hidden_states=True)
        with self.subject.active():
            student = model.forward(
                self.inputs, pixel_values=pixel_values, logits_to_keep=self.keep, hidden_states=True
            )
        distance = hidden_state_distance(self._states(student), self._states(teacher), self.mask)
        return target_nll(student.logits, self.labels) + self.weight * distance

    def _states(self, output: object) -> Tensor:
        states = output.hidden_states  # type: ignore[attr-defined]
        return torch.stack([states[layer][:, -self.keep :] for layer in self.layers])


def encode(
    subject: Subject, behaviors: Sequence[Behavior], pictures: Sequence[Image], responses: Sequence[str] | None
) -> ModelInputs:
    """The subject's chats, padded on the left, with open responses behind them (none: ready to generate)."""
    return subject.model.encode(
        [b.prompt for b in behaviors],
        list(pictures),
        completions=None if responses is None else list(responses),
        systems=subject.systems(len(behaviors)),
        close_turn=False,
    )


def _longest(inputs: ModelInputs) -> int:
    return int(inputs.completion_mask.sum(dim=1).max())


def adapted_layers(model: LlavaNextModel) -> list[int]:
    """``hidden_states`` indices right behind the decoder blocks that carry adapter weights.

    Raises:
        UserError: If no block carries any: there is nothing to undo.
    """
    layers = [
        index + 1
        for index, block in enumerate(model.decoder_blocks)
        if any("lora_" in name for name, _ in block.named_parameters())
    ]
    if not layers:
        raise UserError("`pgd_adaptive` needs a model whose decoder blocks carry a LoRA adapter, found none.")
    return layers
