"""How far apart two computations of one loss may lie: of a picture in the attack, of its file, and of that again."""

from __future__ import annotations

import torch

from mm_cb.models import ChatModel

TOLERANCE = 1e-4
"""Largest difference between a recorded loss and the one computed again, in float32."""

ROUNDINGS = 4
"""The same in shorter types, in machine epsilons of the loss. Both computations round every logit, by up to half an
epsilon of it each; batches of other rows add up in another order and so round elsewhere. A logit is several times its
loss, but the errors of a target's tokens cancel in their mean: of 72 pictures of the embedded model in bfloat16, none was
off by more than 0.25. A loss forged by less cannot be told from an honest one in such a type."""


def tolerance(loss: float, dtype: str) -> float:
    """Largest difference to ``loss``, computed again in a torch dtype, at which the recorded one agrees."""
    if dtype == "float32":
        return TOLERANCE
    return max(TOLERANCE, ROUNDINGS * torch.finfo(getattr(torch, dtype)).eps * abs(loss))


def dtype_of(model: ChatModel) -> str:
    """As a recipe and a picture's JSON name it."""
    return str(model.base.dtype).removeprefix("torch.")
