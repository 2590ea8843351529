"""Teacher and student passes over one batch: the image tower runs once, and nothing runs where nobody looks on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mm_cb.inference.subjects import Subject
from mm_cb.models import ChatModel, ModelInputs
from mm_cb.models.inputs import Arguments
from mm_cb.models.last_positions import only_last_positions
from mm_cb.models.vision import detached


class _Reached(Exception):
    """The teacher has computed all that is asked of it."""


class Passes:
    """What the adapted model (student) and the same model without adapter (teacher) make of the same pixels.

    The adapter sits in the language tower, so both start from the same embeddings: the image tower runs once per step
    instead of twice. Where an adapter reaches the image tower or the projector, each side runs its own.
    """

    def __init__(self, subject: Subject, inputs: ModelInputs, keep: int) -> None:
        """Passes over ``inputs``, of which the last ``keep`` positions are looked at."""
        self.subject, self.inputs, self.keep = subject, inputs, keep
        self.shared = adapter_in_language_tower(subject.model)

    def student_embeds(self, pixel_values: Tensor) -> Arguments:
        """The student's embeddings, with gradient to the pixels."""
        with self.subject.active() as model, only_last_positions(model.base, self.keep):
            return model.embed(self.inputs, pixel_values)

    def student(self, embeds: Arguments, *, hidden_states: bool = False) -> Any:
        """The student's transformers output, with the last ``keep`` logits."""
        with self.subject.active() as model, only_last_positions(model.base, self.keep):
            return model.model(**embeds, logits_to_keep=self.keep, output_hidden_states=hidden_states, use_cache=False)

    def teacher_embeds(self, embeds: Arguments, pixel_values: Tensor) -> Arguments:
        """The teacher's embeddings, without gradient: the student's where they are the same."""
        if self.shared:
            return detached(embeds)
        model = self.subject.model
        with torch.no_grad(), model.adapter(False), only_last_positions(model.base, self.keep):
            return model.embed(self.inputs, pixel_values)

    @torch.no_grad()
    def clean_embeds(self) -> Arguments:
        """The teacher's embeddings of the clean pictures."""
        clean = self.inputs.pixel_values
        assert clean is not None
        with self.subject.model.adapter(False):
            return self.subject.model.embed(self.inputs, clean)

    @torch.no_grad()
    def teacher_states(self, embeds: Arguments, layers: Sequence[int]) -> Tensor:
        """The teacher's ``hidden_states`` at ``layers``, shape ``(L, B, keep, H)``; no block behind the last one runs.

        Equal to what a whole pass gives.
        """
        model = self.subject.model
        places = {layer: _place(model, layer) for layer in layers}
        found: dict[int, Tensor] = {}
        hooks = []
        for layer, place in places.items():

            def catch(module: Any, arguments: Any, output: Any, layer: int = layer) -> None:
                found[layer] = output[0] if isinstance(output, tuple) else output
                if len(found) == len(places):
                    raise _Reached

            hooks.append(place.register_forward_hook(catch))
        try:
            with model.adapter(False):
                model.model(**embeds, logits_to_keep=self.keep, use_cache=False)
        except _Reached:
            pass
        finally:
            for hook in hooks:
                hook.remove()
        return torch.stack([found[layer][:, -self.keep :] for layer in layers])

    @torch.no_grad()
    def teacher_logits(self, embeds: Arguments) -> Tensor:
        """The teacher's logits at the last ``keep`` positions, ``(B, keep, V)``."""
        model = self.subject.model
        with model.adapter(False), only_last_positions(model.base, self.keep):
            return model.model(**embeds, logits_to_keep=self.keep, use_cache=False).logits

    def states(self, output: Any, layers: Sequence[int]) -> Tensor:
        """``hidden_states`` of an output at ``layers`` and the last ``keep`` positions, ``(L, B, keep, H)``."""
        return torch.stack([output.hidden_states[layer][:, -self.keep :] for layer in layers])


def _place(model: ChatModel, layer: int) -> Any:
    """The module whose output is ``hidden_states[layer]``, for layers from 1 on."""
    if layer < len(model.decoder_blocks):
        return model.decoder_blocks[layer - 1]
    return model.final_norm


def adapter_in_language_tower(model: ChatModel) -> bool:
    """Whether the adapter leaves alone everything in front of the decoder blocks."""
    inside, changed = f"{model.language_path}.", set(model.changed_modules())
    return all(inside in name for name, module in model.model.named_modules() if module in changed)
