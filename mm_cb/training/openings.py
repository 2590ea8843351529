"""How rows of the two sets begin alike: what stands at such tokens cannot be rerouted and retained at once."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from os.path import commonprefix

import torch
from torch import Tensor

from mm_cb.core.errors import UserError
from mm_cb.data.examples import Example
from mm_cb.models import ChatModel, ModelInputs, TokenRole
from mm_cb.models.chat import render_chat

_BYTES = 4


class Openings:
    """How the retain rows of a run begin.

    A hidden state depends on its token and on those in front of it. Where a circuit-breaker row and a retain row have
    the same tokens from the first one on, their states are the same: the template's opening, and often the first words
    of a request. Behind a picture nothing counts as the same.
    """

    def __init__(self, rows: Iterable[Sequence[int]]) -> None:
        """Take the token ids of every row, up to its first picture."""
        self._rows = sorted({_key(ids) for ids in rows})

    @classmethod
    def of(cls, model: ChatModel, examples: Iterable[Example]) -> "Openings":
        """Those of the retain rows among ``examples``, as the model's template writes them."""
        return cls(_beginning(model, example) for example in examples if example.set == "retain")

    def shared(self, ids: Sequence[int]) -> int:
        """How many tokens of a row, from the first one on, some retain row begins with, too."""
        key = _key(ids)
        place = bisect_left(self._rows, key)  # the longest common beginning is a neighbour's
        return max((_common_length(key, other) for other in self._rows[max(place - 1, 0) : place + 1]), default=0)

    def leave_out(self, inputs: ModelInputs, mask: Tensor) -> Tensor:
        """The mask of circuit-breaker rows without the tokens that a retain row begins with, too.

        A row that is the beginning of a retain row as a whole keeps the last token that counted.

        Args:
            inputs: The rows, padded on the right.
            mask: 1 for tokens that count, ``(B, T)``.

        Returns:
            The mask, int64.
        """
        left = mask.clone()
        for row, (ids, roles, real) in enumerate(
            zip(inputs.input_ids, inputs.roles, inputs.attention_mask, strict=True)
        ):
            seen = int((roles == TokenRole.IMAGE).long().argmax()) if TokenRole.IMAGE in roles else int(real.sum())
            last = int(mask[row].nonzero()[-1])
            left[row, : min(self.shared(ids[:seen].tolist()), last)] = 0
        return left


def _beginning(model: ChatModel, example: Example) -> list[int]:
    """Token ids of a row up to its first picture; none of one that cannot be encoded, which the collator refuses."""
    try:
        ids, roles = model._tokenise(render_chat(model.processor, example.messages, dialect=model.dialect))
    except (UserError, ValueError):
        return []
    return ids[: roles.index(TokenRole.IMAGE)] if TokenRole.IMAGE in roles else ids


def _key(ids: Sequence[int]) -> bytes:
    """Token ids as bytes that sort as they do: a run has millions of them."""
    return torch.tensor(ids, dtype=torch.int64).numpy().astype(">u4").tobytes()


def _common_length(one: bytes, other: bytes) -> int:
    """Tokens at the beginning of both."""
    return len(commonprefix([one, other])) // _BYTES
