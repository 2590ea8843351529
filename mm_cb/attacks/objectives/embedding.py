"""The attack on embeddings, of the picture or of the prompt. A relaxation: no user can send what it finds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from image_attacks import target_nll
from mm_cb.attacks.objectives.target import TargetLoss, encode
from mm_cb.data.behaviors_file import Behavior
from mm_cb.inference.subjects import Subject
from mm_cb.models import ModelInputs, TokenRole, VisionModel
from mm_cb.models.decoding import decode
from mm_cb.models.inputs import Arguments
from mm_cb.models.last_positions import only_last_positions
from mm_cb.models.vision import joined, moved

RADIUS = 3.0
"""Half the side of the box around the clean embeddings, in their root mean square over what is moved. A wide choice."""


def embedding_objective(
    subject: Subject, behaviors: Sequence[Behavior], pictures: Sequence[Any], **settings: Any
) -> EmbeddingObjective:
    """The objective on the picture's embeddings, or on the prompt's for a model of text alone; no settings are read."""
    kind = EmbeddingObjective if isinstance(subject.model, VisionModel) else PromptEmbeddingObjective
    return kind(subject, behaviors, pictures)


class EmbeddingObjective(TargetLoss):
    """The target's loss as a function of the embeddings that stand for the picture.

    The variable u has shape ``(B, 1, N, H)`` (N image tokens, H hidden size) and lies in [0, 1], so that the search is
    the same as on pixels; it stands for ``e0 + RADIUS * rms(e0) * (2 u - 1)``, e0 = embeddings of the clean picture.

    Source:
        Schwinn and Geisler 2024 (arXiv:2407.15902): signed steps on embeddings, unconstrained, on text tokens.
        Deviations: image tokens only, a wide box, steps that decay.
    """

    def __init__(self, subject: Subject, behaviors: Sequence[Behavior], pictures: Sequence[Image | None]) -> None:
        """Embed the clean chats once."""
        super().__init__(subject, behaviors, pictures)
        self._asked = behaviors, pictures

    def start(self) -> Tensor:
        """The variable at the clean picture."""
        place = self.inputs.image_mask
        hidden = self.subject.model.base.get_input_embeddings().embedding_dim
        return torch.full((len(place), 1, int(place[0].sum()), hidden), 0.5, device=place.device)

    def __call__(self, variable: Tensor) -> Tensor:
        """Losses ``(B,)`` at the embeddings that ``variable`` stands for."""
        embeds = self.embeds(self.inputs, variable)
        with self.subject.active() as model, only_last_positions(model.base, self.keep):
            logits = model.model(**embeds, logits_to_keep=self.keep, use_cache=False).logits
        return target_nll(logits, self.labels)

    def embeds(self, inputs: ModelInputs, variable: Tensor) -> Arguments:
        """Keyword arguments of the model for ``inputs`` with the picture's embeddings moved."""
        with self.subject.active() as model:
            clean = model.image_features(inputs)
            pictures = joined(clean.pooler_output).view(len(variable), -1)
            radius = RADIUS * pictures.float().square().mean(dim=1).sqrt().view(-1, 1, 1)
            shift = (radius * (2 * variable.squeeze(1) - 1)).to(pictures.dtype)
            return model.embed(inputs, features=moved(clean, shift.flatten(0, 1)))

    def answers(self, variable: Tensor, max_new_tokens: int) -> list[str]:
        """Greedy completions at a variable, one per behaviour."""
        return self.generate(encode(self.subject, *self._asked, None), variable, max_new_tokens)

    @torch.no_grad()
    def generate(self, inputs: ModelInputs, variable: Tensor, max_new_tokens: int) -> list[str]:
        """Greedy completions behind left-padded prompts whose pictures' embeddings are moved."""
        embeds = self.embeds(inputs, variable)
        del embeds["position_ids"]  # `generate` counts them itself
        with self.subject.active() as model:
            return decode(model.model, model.processor.tokenizer, embeds, max_new_tokens, model.stops())


class PromptEmbeddingObjective(EmbeddingObjective):
    """The same of the embeddings of the user's text, for models of text alone.

    N is the number of tokens of the longest text; what stands for tokens that a shorter one lacks moves nothing.

    Source:
        As above. Deviations: the prompt's own tokens in place of added ones, a wide box, steps that decay.
    """

    def start(self) -> Tensor:
        """The variable at the clean prompt."""
        rows = _prompt(self.inputs)
        hidden = self.subject.model.base.get_input_embeddings().embedding_dim
        return torch.full((len(rows), 1, int(rows.sum(dim=1).max()), hidden), 0.5, device=rows.device)

    def embeds(self, inputs: ModelInputs, variable: Tensor) -> Arguments:
        """Keyword arguments of the model for ``inputs`` with the prompt's embeddings moved."""
        rows = _prompt(inputs)
        with self.subject.active() as model, torch.no_grad():
            clean = model.base.get_input_embeddings()(inputs.input_ids)
        squares = (clean.float().square().mean(dim=2) * rows).sum(dim=1) / rows.sum(dim=1).clamp(min=1)
        radius = RADIUS * squares.sqrt().view(-1, 1, 1)
        place = (rows.cumsum(dim=1) - 1).clamp(min=0, max=variable.shape[2] - 1)
        shift = radius * (2 * variable.squeeze(1) - 1)
        moved_by = shift.gather(1, place.unsqueeze(2).expand(-1, -1, shift.shape[2])) * rows.unsqueeze(2)
        return self.subject.model.start_from(inputs, clean + moved_by.to(clean.dtype))


def _prompt(inputs: ModelInputs) -> Tensor:
    """``(B, T)``: 1 = token of the user's text."""
    return (inputs.roles == TokenRole.USER).long()
