"""The losses and the schedule of representation rerouting, as pure functions of tensors.

`reroute_loss` is the method's; `rand_p_loss`, `rand_c_loss` and `rmu_loss` stand in its place in the paper's ablation
(`mm_cb.training.registry` knows them by name). Random states come from a generator that the caller seeds.

Every loss can be split over the micro-batches of one optimiser step: give each the count of the whole step, and the
parts add up to the loss of the step.

Hidden states are ``(L, ..., H)`` and masks ``(...)``: layers, positions, features. Positions may be a padded batch
``(B, T)`` or tokens without padding ``(N,)``.
"""

from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

Retain = Literal["l2", "kl"]
RetainAverage = Literal["tokens", "official"]
RetainLayers = Literal["all", "targets"]
RetainScale = Literal["absolute", "relative"]

OFFICIAL_WIDTH = 1024
"""Positions that the released trainer pads every retain row to."""

RELATIVE_LENGTH = 4.0
"""The relative retain loss weighs as much as the absolute one of states of this length."""


def reroute_coeff(step: int, total_steps: int, alpha: float) -> float:
    """Weight of the reroute loss, ``alpha * (1 - t / 2T)``: from ``alpha`` down to ``alpha / 2``, where it stays.

    Args:
        step: Finished optimiser steps t, from 0 on.
        total_steps: Steps T of the schedule: the whole run's (paper), more for a slower one, or fewer, behind which
            both losses weigh the same.
        alpha: Sum of both weights, at every step.

    Returns:
        c_s(t).

    Source:
        Zou et al. 2024 (arXiv:2406.04313), Algorithm 1. The released trainer counts micro-batches, starts at 1 and
        divides by the literal 300; this is the paper's formula.
    """
    return alpha - retain_coeff(step, total_steps, alpha)


def retain_coeff(step: int, total_steps: int, alpha: float) -> float:
    """Weight of the retain loss, ``alpha * t / 2T``: from 0 up to ``alpha / 2``; see `reroute_coeff`."""
    if step < 0:
        raise ValueError(f"`step` must be 0 or more (finished steps before this one), got {step}.")
    return alpha * min(step, total_steps) / (2 * total_steps)


def reroute_loss(adapted: Tensor, reference: Tensor, mask: Tensor, *, count: Tensor | None = None) -> Tensor:
    """Penalise adapted hidden states that still point where the reference ones did.

    Mean of ReLU(cos(adapted, reference)) over the target layers and all tokens with ``mask == 1``.

    Args:
        adapted: Hidden states of the target layers with the adapter on, shape ``(L, ..., H)``.
        reference: Hidden states with the adapter off, same shape, no gradient.
        mask: 1 for tokens that count, shape ``(...)``.
        count: Counted tokens of the whole optimiser step; those of ``mask`` if left out.

    Returns:
        Scalar in [0, 1], float32. Equals 1 at initialisation, when both inputs are the same; there its gradient is
        zero up to rounding.

    Raises:
        ValueError: If the shapes disagree or ``mask`` selects no token.

    Source:
        Zou et al. 2024 (arXiv:2406.04313), Algorithm 1, L_s. Deviation: none.
    """
    check_states(adapted, reference, mask)
    counted = mask.bool()
    cosine = torch.cosine_similarity(adapted[:, counted].float(), reference[:, counted].float(), dim=-1)
    return mean_of_tokens(cosine.relu(), mask, count)


def rand_p_loss(
    adapted: Tensor, reference: Tensor, mask: Tensor, *, count: Tensor | None = None, generator: torch.Generator
) -> Tensor:
    """Pull the direction of adapted hidden states towards a random one of positive entries (RandP).

    Mean of ||h/|h| - r/|r|||_2 over the target layers and all tokens with ``mask == 1``. The entries of r are uniform
    in [0, 1): draws have a cosine of about 3/4 with each other and 0.87 with the vector of ones, so that the state has
    somewhere to go that no draw takes back.

    Args:
        adapted: Hidden states h of the target layers with the adapter on, shape ``(L, ..., H)``.
        reference: Hidden states with the adapter off, same shape; only their shape is looked at.
        mask: 1 for tokens that count, shape ``(...)``.
        count: Counted tokens of the whole optimiser step; those of ``mask`` if left out.
        generator: On the CPU. Draws one r for each target layer, which all tokens share.

    Returns:
        Scalar in [0, 2], float32; the length of h does not matter.

    Raises:
        ValueError: If the shapes disagree or ``mask`` selects no token.

    Source:
        Zou et al. 2024 (arXiv:2406.04313), Table 8, RandP. The distribution of r is not stated there, nor whether
        tokens share it: both are our choice.
    """
    return _distance_to_draw(adapted, reference, mask, count, draw_directions(adapted, generator))


def rand_c_loss(
    adapted: Tensor, reference: Tensor, mask: Tensor, *, count: Tensor | None = None, generator: torch.Generator
) -> Tensor:
    """Pull the direction of adapted hidden states towards a random one centred at 0 (RandC).

    As `rand_p_loss`, with entries of r uniform in [-1/2, 1/2): the directions of two steps are nearly at right angles,
    so that no state is near to all of them and the loss stays near sqrt(2).

    Source:
        Zou et al. 2024 (arXiv:2406.04313), Table 8, RandC, which did not converge there. The distribution of r is ours.
    """
    return _distance_to_draw(adapted, reference, mask, count, draw_directions(adapted, generator, centred=True))


def rmu_loss(
    adapted: Tensor,
    reference: Tensor,
    mask: Tensor,
    *,
    count: Tensor | None = None,
    generator: torch.Generator,
    scale: float,
) -> Tensor:
    """Pull adapted hidden states towards one fixed, long, random state.

    Mean of ||h - scale * u||_2 over the target layers and all tokens with ``mask == 1``, where u is a random direction
    of positive entries that stays the same during the whole run.

    Args:
        adapted: Hidden states h of the target layers with the adapter on, shape ``(L, ..., H)``.
        reference: Hidden states with the adapter off, same shape; only their shape is looked at.
        mask: 1 for tokens that count, shape ``(...)``.
        count: Counted tokens of the whole optimiser step; those of ``mask`` if left out.
        generator: On the CPU, seeded alike at every step. Draws one u for each target layer.
        scale: Length of the state to go to.

    Returns:
        Scalar >= 0, float32.

    Raises:
        ValueError: If the shapes disagree or ``mask`` selects no token.

    Source:
        Zou et al. 2024 (arXiv:2406.04313), Table 8: ||h - alpha r||_2. Deviation from RMU itself (Li et al. 2024,
        arXiv:2403.03218): the length of the difference, where they take its mean square. As in their code, r is uniform
        in [0, 1) and of length 1, so that alpha is the length of the state.
    """
    check_states(adapted, reference, mask)
    counted = adapted[:, mask.bool()].float()
    return mean_of_tokens(
        torch.linalg.vector_norm(counted - scale * draw_directions(adapted, generator), dim=-1), mask, count
    )


def draw_directions(states: Tensor, generator: torch.Generator, *, centred: bool = False) -> Tensor:
    """One random direction of length 1 for each layer of ``states`` ``(L, ..., H)``: ``(L, 1, H)``, on their device.

    Entries are uniform in [0, 1), or in [-1/2, 1/2) where they are centred, and then divided by their length.
    """
    entries = torch.rand(states.shape[0], 1, states.shape[-1], generator=generator) - 0.5 * centred
    return functional.normalize(entries, dim=-1).to(states.device)


def cosine_to_draw(adapted: Tensor, generator: torch.Generator, *, centred: bool = False) -> Tensor:
    """How far states ``(L, N, H)`` point where the generator's draw does, of every layer and token: ``(L, N)``."""
    return torch.cosine_similarity(adapted.float(), draw_directions(adapted, generator, centred=centred), dim=-1)


def length_loss(adapted: Tensor, reference: Tensor, mask: Tensor, *, count: Tensor | None = None) -> Tensor:
    """Penalise adapted hidden states that are longer or shorter than the reference ones.

    Mean of ln(|adapted| / |reference|)^2 over the target layers and all tokens with ``mask == 1``. The cosine does not
    see length: rerouting can end in states many times as long as before, whose cosine has hardly a slope, so that
    whoever follows it, an attacker or an adversary in training, goes blind.

    Args:
        adapted: Hidden states of the target layers with the adapter on, shape ``(L, ..., H)``.
        reference: Hidden states with the adapter off, same shape, no gradient.
        mask: 1 for tokens that count, shape ``(...)``.
        count: Counted tokens of the whole optimiser step; those of ``mask`` if left out.

    Returns:
        Scalar >= 0, float32. Equals 0, with zero gradient, when both inputs are the same.

    Raises:
        ValueError: If the shapes disagree or ``mask`` selects no token.

    Source:
        Ours, not in Zou et al. 2024.
    """
    check_states(adapted, reference, mask)
    counted = mask.bool()
    ratio = adapted[:, counted].float().norm(dim=-1).log() - reference[:, counted].float().norm(dim=-1).log()
    return mean_of_tokens(ratio.square(), mask, count)


def retain_loss(
    adapted: Tensor,
    reference: Tensor,
    mask: Tensor,
    *,
    average: RetainAverage = "tokens",
    scale: RetainScale = "absolute",
    count: Tensor | None = None,
) -> Tensor:
    """Penalise adapted hidden states that have moved away from the reference ones.

    Mean of ||adapted - reference||_2 over layers and positions; with ``relative``, of that over ||reference||_2 times
    `RELATIVE_LENGTH`. The slope of the cosine goes like 1 / ||reference||, that of the absolute distance does not know
    how long states are: the longer they are, the more it outweighs the rerouting.

    Args:
        adapted: Hidden states with the adapter on, shape ``(L, ..., H)``.
        reference: Hidden states with the adapter off, same shape, no gradient.
        mask: 1 for tokens that count, shape ``(...)``.
        average: What the sum is divided by, see `retain_positions`.
        scale: ``absolute`` (paper), or ``relative``: what it would be if all states were `RELATIVE_LENGTH` long.
        count: Positions of the whole optimiser step; those of ``mask`` if left out.

    Returns:
        Scalar >= 0, float32. Equals 0, with zero gradient, when both inputs are the same.

    Raises:
        ValueError: If the shapes disagree or ``mask`` selects no token.

    Source:
        Zou et al. 2024 (arXiv:2406.04313), Algorithm 1, L_r. Deviation: none with ``tokens`` and ``absolute``;
        ``relative`` is ours.
    """
    check_states(adapted, reference, mask)
    counted = mask.bool()
    distance = torch.linalg.vector_norm((adapted[:, counted] - reference[:, counted]).float(), dim=-1)
    if scale == "relative":
        lengths = torch.linalg.vector_norm(reference[:, counted].float(), dim=-1)
        distance = RELATIVE_LENGTH * distance / lengths.clamp_min(torch.finfo(lengths.dtype).tiny)
    return mean_of_tokens(distance, mask, retain_positions(mask, average) if count is None else count)


def kl_retain_loss(adapted: Tensor, reference: Tensor, mask: Tensor, *, count: Tensor | None = None) -> Tensor:
    """Penalise an adapted model that says other things than the reference one.

    Mean of KL(p_reference || p_adapted) over the positions with ``mask == 1``, of the token that follows each of them.
    Unlike `retain_loss` it lets states move where the head does not look.

    Args:
        adapted: Logits with the adapter on, shape ``(..., V)``.
        reference: Logits with the adapter off, same shape, no gradient.
        mask: 1 for tokens that count, shape ``(...)``.
        count: Positions of the whole optimiser step; those of ``mask`` if left out.

    Returns:
        Scalar >= 0, float32, in nats. Equals 0, with zero gradient, when both inputs are the same.

    Raises:
        ValueError: If the shapes disagree or ``mask`` selects no token.

    Source:
        The KL term that Simko et al. 2025 (arXiv:2506.11938) and RepBend (arXiv:2504.01550) have on benign rows.
        Deviation: at temperature 1 (RepBend: 2, times its square), and weighted by the schedule of Zou et al. 2024.
    """
    check_states(adapted[None], reference[None], mask)
    counted = mask.bool()
    ours, theirs = (logits[counted].float().log_softmax(-1) for logits in (adapted, reference))
    return mean_of_tokens((theirs.exp() * (theirs - ours)).sum(-1)[None], mask, count)


def retain_positions(mask: Tensor, average: RetainAverage) -> Tensor:
    """How many positions of a padded batch the retain loss is averaged over.

    ``tokens`` counts the tokens of ``mask``, as the paper's formula reads. ``official`` counts `OFFICIAL_WIDTH` for
    every row, as the released trainer does, which pads its retain rows to that: padding enters its mean as zeros, so
    the loss and its gradient shrink with the share of padding (about half of 1024 with its data, 15/16 with rows of 64
    tokens). How rows are split into batches, and what they are padded to here, does not matter.

    A second dilution comes from ``retain_layers: all``, with either average: the mean runs over the embeddings and
    every kept state, and the states below the first LoRA block never move. With LoRA on blocks 14-16, 15 of 18 states
    are exact zeros, which makes L_r six times smaller than its mean over the three that can move.

    Args:
        mask: 1 for tokens that count, shape ``(B, T)``.
        average: ``tokens`` or ``official``.

    Returns:
        Scalar, int64.
    """
    return mask.bool().sum() if average == "tokens" else torch.tensor(len(mask) * OFFICIAL_WIDTH, device=mask.device)


def _distance_to_draw(
    adapted: Tensor, reference: Tensor, mask: Tensor, count: Tensor | None, direction: Tensor
) -> Tensor:
    """Mean distance of the states' directions to one direction of each layer."""
    check_states(adapted, reference, mask)
    pointed = functional.normalize(adapted[:, mask.bool()].float(), dim=-1)
    return mean_of_tokens(torch.linalg.vector_norm(pointed - direction, dim=-1), mask, count)


def mean_of_tokens(values: Tensor, mask: Tensor, count: Tensor | None) -> Tensor:
    """Sum of ``(L, counted tokens)`` over layers times ``count``, which is that of ``mask`` if left out.

    Raises:
        ValueError: If there is no token: told by the shape, for which nobody waits for the device.
    """
    if not values.shape[-1]:
        raise ValueError("`mask` must select at least one token, it selects none.")
    return values.sum() / (len(values) * (mask.bool().sum() if count is None else count))


def check_states(adapted: Tensor, reference: Tensor, mask: Tensor) -> None:
    """Make sure that shapes agree.

    Raises:
        ValueError: If not.
    """
    if adapted.dim() < 3 or adapted.shape != reference.shape or adapted.shape[1:-1] != mask.shape:
        raise ValueError(
            "`adapted` and `reference` must both be (L, ..., H) and `mask` (...), got "
            f"{tuple(adapted.shape)}, {tuple(reference.shape)} and {tuple(mask.shape)}."
        )
