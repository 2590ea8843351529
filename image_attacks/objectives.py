"""Objectives an attack minimises: pure functions on tensors, one value per example.

They see logits and hidden states, never a model; the caller closes over the model and hands
``lambda pixels: target_nll(model(preprocess(pixels)), labels)`` to the attack.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from .arguments import number, refuse_other_types, refuse_outside

IGNORED_LABEL = -100
_OR_IGNORED = f", or be {IGNORED_LABEL} where no token is a target"


def target_nll(logits: Tensor, labels: Tensor) -> Tensor:
    """Mean negative log-likelihood of the target tokens, per example.

    ``logits[:, t]`` predicts ``labels[:, t + 1]``: pass both for the same token positions, unshifted, as Hugging
    Face models do. With ``logits_to_keep=K`` the labels are the last K ones.

    Args:
        logits: Shape ``(B, T, V)``, any float type; the cross-entropy is computed in float32.
        labels: Token ids of the target, -100 everywhere else, shape ``(B, T)``.

    Returns:
        Shape ``(B,)``, float32, at least 0; near 0 when greedy decoding would emit the target.

    Raises:
        ValueError: If the shapes disagree, an example has no target token, its first position is one (nothing predicts
            it), or a label is no token id of the logits.
    """
    losses, counts = _token_losses(*_shifted(logits, labels))
    return losses.sum(dim=1) / counts


def predicted_nll(logits: Tensor, targets: Tensor) -> Tensor:
    """Mean negative log-likelihood per example where ``logits[:, t]`` predicts ``targets[:, t]``.

    Args:
        logits: Shape ``(B, K, V)``, any float type; the cross-entropy is computed in float32.
        targets: Token ids, -100 where nothing counts, shape ``(B, K)``.

    Returns:
        Shape ``(B,)``, float32.

    Raises:
        ValueError: If the shapes disagree, an example has no target token, or a target is no token id of the logits.
    """
    losses, counts = _token_losses(logits, targets, "targets")
    return losses.sum(dim=1) / counts


def _token_losses(logits: Tensor, targets: Tensor, name: str = "labels") -> tuple[Tensor, Tensor]:
    """Return the loss of every token, 0 where it is no target, ``(B, K)``, and the number of targets ``(B,)``."""
    refuse_other_types(name, targets)
    if logits.ndim != 3 or targets.shape != logits.shape[:2]:
        raise ValueError(
            f"`logits` (B, K, V) and `{name}` (B, K) must agree, got {tuple(logits.shape)} and {tuple(targets.shape)}."
        )
    counts, outside = (targets != IGNORED_LABEL).sum(dim=1), _outside(logits, targets)
    if ((counts == 0).unsqueeze(1) | outside).any():  # one look, as each waits for a GPU
        refuse_outside(name, targets, outside, logits.shape[2], _OR_IGNORED)
        empty = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"`{name}` must hold at least one target token per example, got none in rows {empty}.")
    losses = F.cross_entropy(
        logits.float().flatten(0, 1), targets.long().flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses.view(targets.shape), counts


def _outside(logits: Tensor, ids: Tensor) -> Tensor:
    """Where token ids are none of the logits'."""
    return (ids != IGNORED_LABEL) & ((ids < 0) | (ids >= logits.shape[2]))


def _shifted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits that predict something and what they predict, both ``(B, T - 1, ...)``; checks both."""
    refuse_other_types("labels", labels)
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"`logits` (B, T, V) and `labels` (B, T) must agree, got {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    outside = _outside(logits, labels)
    if ((labels[:, :1] != IGNORED_LABEL) | outside).any():
        refuse_outside("labels", labels, outside, logits.shape[2], _OR_IGNORED)
        raise ValueError("`labels` must be -100 at the first position: no logit predicts it. Keep one more position.")
    return logits[:, :-1], labels[:, 1:]


def hidden_state_distance(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Cosine distance between the attacked model's hidden states and a teacher's, per example.

    Minimising it undoes a rerouting defence whose teacher is the undefended model: it pulls the states back to
    where the defence pushed them from.

    Args:
        student: Hidden states the pixels can change, shape ``(L, B, T, D)``.
        teacher: Hidden states to imitate, same shape; no gradient flows into them.
        mask: 1 for tokens that count, shape ``(B, T)``.

    Returns:
        Mean of 1 - cos over the layers and the masked tokens, shape ``(B,)``, float32, in [0, 2].

    Raises:
        ValueError: If the shapes disagree or the mask selects no token of an example.
    """
    if student.ndim != 4 or student.shape != teacher.shape or mask.shape != student.shape[1:3]:
        raise ValueError(
            "`student` and `teacher` (L, B, T, D) and `mask` (B, T) must agree, got "
            f"{tuple(student.shape)}, {tuple(teacher.shape)} and {tuple(mask.shape)}."
        )
    weights, counts = _weights(mask, student)
    distance = 1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=-1)
    return (distance.mean(dim=0) * weights).sum(dim=1) / counts


def _weights(mask: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    weights = mask.to(like.device).float()
    counts = weights.sum(dim=1)
    if (counts == 0).any():
        empty = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"`mask` must select at least one token per example, got none in rows {empty}.")
    return weights, counts


def prefix_hinge(logits: Tensor, labels: Tensor, probability: float = 0.6) -> Tensor:
    """Mean over the target tokens of how far each lies below ``probability``, per example.

    Stops pushing a token that greedy decoding emits anyway, and so leaves the image's strength to the others.

    Args:
        logits: Shape ``(B, T, V)``, as for :func:`target_nll`.
        labels: Token ids of the target, -100 everywhere else, shape ``(B, T)``.
        probability: A token counts as forced from here on; above 0.5 it is the most likely one.

    Returns:
        Mean of ``max(0, nll + log(probability))``, shape ``(B,)``, float32; exactly 0 when all are forced.

    Raises:
        ValueError: As `target_nll`, or if the probability is not in (0, 1].

    Source:
        Thompson & Sklar 2024 (FLRT, arXiv:2407.17447), which clamps the tokens' loss.
    """
    probability = number("probability", probability)
    if not 0 < probability <= 1:
        raise ValueError(f"`probability` must lie in (0, 1], got {probability}.")
    losses, counts = _token_losses(*_shifted(logits, labels))
    return (losses + math.log(probability)).relu().sum(dim=1) / counts


def target_reached(logits: Tensor, labels: Tensor) -> Tensor:
    """Tell where greedy decoding would emit the whole target: no judge needed, so a stop rule for harmless targets.

    Args:
        logits: Shape ``(B, T, V)``, as for :func:`target_nll`.
        labels: Token ids of the target, -100 everywhere else, shape ``(B, T)``.

    Returns:
        Boolean, shape ``(B,)``: every target token has the largest logit under teacher forcing.
    """
    logits, targets = _shifted(logits, labels)
    return ((logits.argmax(dim=-1) == targets) | (targets == IGNORED_LABEL)).all(dim=1)


def logit_distillation(student: Tensor, teacher: Tensor, mask: Tensor) -> Tensor:
    """Kullback-Leibler divergence KL(teacher || student) of next-token distributions, mean over tokens, per example.

    Args:
        student: Logits that the pixels can change, shape ``(B, T, V)``.
        teacher: Logits to imitate, same shape; no gradient flows into them.
        mask: 1 for positions that count, shape ``(B, T)``; a position counts with its own logits, unshifted.

    Returns:
        Shape ``(B,)``, float32, at least 0.

    Raises:
        ValueError: If the shapes disagree or the mask selects no token of an example.
    """
    if student.ndim != 3 or student.shape != teacher.shape or mask.shape != student.shape[:2]:
        raise ValueError(
            "`student` and `teacher` (B, T, V) and `mask` (B, T) must agree, got "
            f"{tuple(student.shape)}, {tuple(teacher.shape)} and {tuple(mask.shape)}."
        )
    weights, counts = _weights(mask, student)
    theirs, ours = teacher.detach().float().log_softmax(dim=-1), student.float().log_softmax(dim=-1)
    divergence = (theirs.exp() * (theirs - ours)).sum(dim=-1)
    return (divergence * weights).sum(dim=1) / counts


def cosine_distance(features: Tensor, goal: Tensor) -> Tensor:
    """Return 1 - cos between features and a goal, per example: for image embeddings, in [0, 2].

    Args:
        features: What the pixels can change, shape ``(B, D)``.
        goal: Shape ``(B, D)`` or ``(1, D)``; no gradient flows into it.

    Raises:
        ValueError: If the shapes disagree.
    """
    if (
        features.ndim != 2
        or goal.ndim != 2
        or goal.shape[1] != features.shape[1]
        or len(goal) not in (1, len(features))
    ):
        raise ValueError(
            f"`features` (B, D) and `goal` (B, D) must agree, got {tuple(features.shape)} and {tuple(goal.shape)}."
        )
    return 1 - F.cosine_similarity(features.float(), goal.detach().float(), dim=-1)
