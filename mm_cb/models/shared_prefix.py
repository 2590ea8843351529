"""One picture against many targets: what the chats share runs once.

The same numbers as the whole model gives for each chat, for less work: tokens that all chats begin with (nearly all, as
the picture is among them) go through the model a single time, and logits are made at target positions only.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from image_attacks import predicted_nll
from mm_cb.models.base import ChatModel
from mm_cb.models.cache_name import CACHE
from mm_cb.models.inputs import ModelInputs
from mm_cb.models.last_positions import only_last_positions

_IGNORED = -100


class SharedPrefixTargets:
    """Mean negative log-likelihood of each chat's target, as a function of one picture's ``pixel_values``."""

    def __init__(self, model: ChatModel, inputs: ModelInputs) -> None:
        """Split the chats into what they share and what is their own.

        Args:
            model: In evaluation mode; an adapter in it is used as it is switched when the loss is asked for.
            inputs: M chats about one picture, each with its target as an open completion. Up to the end of the picture
                they must agree.

        Raises:
            ValueError: If the rows do not fit together, a target is empty, or the model is in training mode.
        """
        if model.base.training:
            raise ValueError("`model` must be in evaluation mode (dropout off), call `model.eval()`.")
        real = [mask.nonzero()[:, 0] for mask in inputs.attention_mask]
        targets = inputs.completion_mask.sum(dim=1).tolist()
        if min(targets) == 0:
            raise ValueError("Every chat must end in a target of at least one token.")
        ids = [row[at] for row, at in zip(inputs.input_ids, real, strict=True)]
        ends = [len(row) - target for row, target in zip(ids, targets, strict=True)]
        shared = _shared_length([row[:end] for row, end in zip(ids, ends, strict=True)])
        behind = [row[at[shared:]].any() for row, at in zip(inputs.image_mask, real, strict=True)]
        if any(behind) or not bool(inputs.image_mask.any()):
            raise ValueError("The chats must agree up to the end of the picture's tokens, and each must hold one.")
        self._model, start = model, int(real[0][0])
        self._context = inputs.rows(0, 1).columns(start, start + shared)
        self._tails = _padded([row[shared:-1] for row in ids])
        positions = model.positions(inputs)
        self._positions = _padded([positions[..., i, at[shared:-1]].movedim(-1, 0) for i, at in enumerate(real)])
        self.labels = _padded([row[end:] for row, end in zip(ids, ends, strict=True)], _IGNORED)
        """Target tokens, -100 behind a row's last, shape ``(M, K)``."""
        first = torch.tensor([end - shared - 1 for end in ends]).view(-1, 1)
        places = first + torch.arange(self.labels.shape[1])
        self._places = places.clamp(max=self._tails.shape[1] - 1).to(model.device)

    def __call__(self, pixel_values: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """The losses ``(M,)``, float32, of one picture as the model takes it; of these ``rows`` alone, if any."""
        return predicted_nll(self.logits(pixel_values, rows), self.labels if rows is None else self.labels[rows])

    def logits(self, pixel_values: Tensor, rows: Sequence[int] | None = None) -> Tensor:
        """The logits that predict `labels`, shape ``(M, K, V)``; of these ``rows`` alone, if any."""
        expected = self._context.pixel_values
        assert expected is not None
        if pixel_values.shape != expected.shape:
            raise ValueError(
                f"`pixel_values` must be one picture's, of shape {tuple(expected.shape)}, got "
                f"{tuple(pixel_values.shape)}."
            )
        base = self._model.base
        # A new cache at every call: a cache that is handed over twice grows.
        cache = self._model.cache()
        begun = self._model.embed(self._context, pixel_values)
        del begun["attention_mask"]  # one row without padding
        with only_last_positions(base, 0):
            base.model(**begun, **{CACHE: cache}, use_cache=True)
        tails, positions, places = self._tails, self._positions, self._places
        if rows is not None:
            tails, positions, places = tails[rows], positions[rows], places[rows]
        cache.batch_repeat_interleave(len(tails))
        positions = positions.movedim(-1, 0) if positions.ndim == 3 else positions
        states = base.model(input_ids=tails, position_ids=positions, **{CACHE: cache}, use_cache=True).last_hidden_state
        wanted = states.gather(1, places.unsqueeze(-1).expand(-1, -1, states.shape[-1]))
        return self._model.logits(wanted)


def _padded(rows: Sequence[Tensor], value: int = 0) -> Tensor:
    """Rows of different lengths, padded on the right, one behind the other along a new first axis."""
    return nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=value)


def _shared_length(heads: Sequence[Tensor]) -> int:
    """How many tokens all chats begin with, at most up to the last of each before its target, which predicts."""
    shortest = min(len(row) for row in heads)
    same = torch.stack([row[:shortest] for row in heads])
    differs = (same != same[0]).any(dim=0).nonzero()
    return min(int(differs[0]) if len(differs) else shortest, shortest - 1)
