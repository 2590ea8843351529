"""Losses of later papers, which compare the tokens of a pass with each other.

Conventions are those of `mm_cb.training.losses`, but for one: what one pass holds decides what a token is compared
with. Parts of a step therefore add up to the mean over its passes, and not to the loss of one pass with all tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional

from mm_cb.training.losses import check_states, mean_of_tokens


def triplet_loss(
    adapted: Tensor, reference: Tensor, mask: Tensor, *, count: Tensor | None = None, margin: float
) -> Tensor:
    """Gather adapted hidden states around their own mean, and away from where the reference ones were.

    Mean of ReLU(d(h, mu) - d(h, h_base) + margin) over the target layers and all tokens with ``mask == 1``, where mu is
    the mean of the counted adapted states of a layer and d = 1 - cos. Where h is still h_base, the slope is that of
    d(h, mu) alone, and no zero.

    Args:
        adapted: Hidden states h of the target layers with the adapter on, shape ``(L, ..., H)``.
        reference: Hidden states with the adapter off, same shape, no gradient.
        mask: 1 for tokens that count, shape ``(...)``.
        count: Counted tokens of the whole optimiser step; those of ``mask`` if left out.
        margin: How much nearer the mean must be; above 2 nothing is ever near enough.

    Returns:
        Scalar >= 0, float32. At most ``margin + 2``.

    Raises:
        ValueError: If the shapes disagree or ``mask`` selects no token.

    Source:
        Simko et al. 2025 (arXiv:2506.11938), the harmful triplet, read in a re-implementation. Deviations: the retain
        loss stands for its benign triplet and its KL term, and the schedule for its weights; mu is the mean over the
        tokens of one pass, so that passes of other sizes make another loss.
    """
    check_states(adapted, reference, mask)
    counted = mask.bool()
    h, h_base = adapted[:, counted].float(), reference[:, counted].float()
    to_mean = 1 - torch.cosine_similarity(h, h.mean(1, keepdim=True), dim=-1)
    to_base = 1 - torch.cosine_similarity(h, h_base, dim=-1)
    return mean_of_tokens((to_mean - to_base + margin).relu(), mask, count)


def repbend_loss(
    adapted: Tensor, reference: Tensor, mask: Tensor, *, count: Tensor | None = None, away: float, alike: float
) -> Tensor:
    """Push adapted hidden states away from the reference ones, all of them into one direction.

    Mean of -away * ||h - h_base||_2 + alike * (1 - mean cos(h, h')) over the target layers and all tokens with
    ``mask == 1``, where the inner mean is over all pairs of different tokens of a layer. Unlike a cosine's, the slope
    of the distance is the same however near h still is to h_base, short of equal.

    Args:
        adapted: Hidden states h of the target layers with the adapter on, shape ``(L, ..., H)``.
        reference: Hidden states with the adapter off, same shape, no gradient.
        mask: 1 for tokens that count, shape ``(...)``.
        count: Counted tokens of the whole optimiser step; those of ``mask`` if left out.
        away: Weight of the distance.
        alike: Weight of the directions.

    Returns:
        Scalar, float32, with no lower bound.

    Raises:
        ValueError: If the shapes disagree or ``mask`` selects no token.

    Source:
        RepBend (arXiv:2504.01550), its terms on unsafe rows. Deviations: the retain loss stands for those on safe rows
        (distance and KL), the schedule for a constant weight; pairs are of tokens of one pass, so that passes of other
        sizes make another loss.
    """
    check_states(adapted, reference, mask)
    counted = mask.bool()
    h, h_base = adapted[:, counted].float(), reference[:, counted].float()
    total, tokens = functional.normalize(h, dim=-1).sum(1), h.shape[1]
    # |sum|^2 is that of all pairs, of which each with itself gives 1
    cosine = (total.square().sum(-1) - tokens) / max(1, tokens * (tokens - 1))
    distance = torch.linalg.vector_norm(h - h_base, dim=-1)
    return mean_of_tokens(alike * (1 - cosine)[:, None] - away * distance, mask, count)
