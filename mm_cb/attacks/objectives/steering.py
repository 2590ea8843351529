"""The attack on hidden states: moved along the way from what a model says by itself to the opening. A relaxation."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from PIL.Image import Image
from torch import Tensor

from image_attacks import target_nll
from mm_cb.attacks.objectives.target import TargetLoss, encode
from mm_cb.data.behaviors_file import Behavior
from mm_cb.inference.subjects import Subject
from mm_cb.models.last_positions import only_last_positions

DEPTH = (12 / 32, 22 / 32)
"""Blocks whose outputs are moved: layers -20 to -11 of 32 in Zou et al. 2024, at the model's own depth."""
RADIUS = 1.0
"""Farthest that a block's states are moved, in lengths of the state behind the opening there. Our choice."""


class SteeringObjective(TargetLoss):
    """The target's loss as a function of how far hidden states are moved, block by block.

    The variable u has shape ``(B, 1, L, 1)`` (L moved blocks) and lies in [0, 1], so that the search is the same as on
    pixels; every state that block l puts out moves by ``RADIUS * |h_l| * (2 u_l - 1) * d_l / |d_l|``. ``d_l`` leads
    from the last token of the model's own answer, as long as the opening, to that of the opening; h_l is the latter.

    Source:
        Representation engineering (Zou et al. 2023, arXiv:2310.01405) as the attack of Zou et al. 2024
        (arXiv:2406.04313), Table 1. Deviations: every request has a direction of its own (the first principal component
        of one pair is its difference), and how far to go is searched instead of fixed.
    """

    def __init__(self, subject: Subject, behaviors: Sequence[Behavior], pictures: Sequence[Image | None]) -> None:
        """Find the directions of the clean chats once."""
        super().__init__(subject, behaviors, pictures)
        self._asked = behaviors, pictures
        blocks = subject.model.decoder_blocks
        begin, end = (int(part * len(blocks)) for part in DEPTH)
        self._blocks = range(begin, max(begin + 1, end))
        self._reach = self._directions()

    def start(self) -> Tensor:
        """The variable where nothing is moved."""
        return torch.full((len(self.labels), 1, len(self._blocks), 1), 0.5, device=self.labels.device)

    def __call__(self, variable: Tensor) -> Tensor:
        """Losses ``(B,)`` with the states moved as far as ``variable`` says."""
        with self.subject.active() as model, only_last_positions(model.base, self.keep), self._moved(variable):
            logits = model.forward(self.inputs, logits_to_keep=self.keep).logits
        return target_nll(logits, self.labels)

    @torch.no_grad()
    def answers(self, variable: Tensor, max_new_tokens: int) -> list[str]:
        """Greedy completions at a variable, one per behaviour."""
        inputs = encode(self.subject, *self._asked, None)
        with self.subject.active() as model, self._moved(variable):
            return model.generate(inputs, max_new_tokens)

    @torch.no_grad()
    def _directions(self) -> Tensor:
        """The longest way of every moved block, ``(L, B, 1, H)``; none where the own answer is the opening."""
        with self.subject.active() as model:
            asked, lengths = encode(self.subject, *self._asked, None), self.inputs.completion_mask.sum(dim=1).tolist()
            own = [model.generate(asked.rows(i, i + 1), length)[0] for i, length in enumerate(lengths)]
            said = encode(self.subject, *self._asked, own)
            opened, refused = (
                self._last(model.forward(one, hidden_states=True, logits_to_keep=1)) for one in (self.inputs, said)
            )
        way = opened - refused
        length = way.norm(dim=-1, keepdim=True)
        return RADIUS * opened.norm(dim=-1, keepdim=True) * way / length.where(length > 0, torch.inf)

    def _last(self, output: Any) -> Tensor:
        """What the moved blocks put out at the last token, ``(L, B, 1, H)``."""
        return torch.stack([output.hidden_states[block + 1][:, -1:] for block in self._blocks]).float()

    @contextmanager
    def _moved(self, variable: Tensor) -> Iterator[None]:
        """Within it, the blocks' outputs are moved."""
        hooks = []
        for place, block in enumerate(self._blocks):
            shift = (2 * variable[:, 0, place, :, None] - 1) * self._reach[place]

            def move(module: Any, arguments: Any, output: Any, shift: Tensor = shift) -> Any:
                if isinstance(output, tuple):
                    return (output[0] + shift.to(output[0].dtype), *output[1:])
                return output + shift.to(output.dtype)

            hooks.append(self.subject.model.decoder_blocks[block].register_forward_hook(move))
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def steering_objective(
    subject: Subject, behaviors: Sequence[Behavior], pictures: Sequence[Image | None], **settings: Any
) -> SteeringObjective:
    """The objective on hidden states; no settings are read."""
    return SteeringObjective(subject, behaviors, pictures)
