"""Objectives an attack minimises: pure functions on tensors, one value per example.

They see logits and hidden states, never a model; the caller closes over the model and hands
``lambda pixels: target_nll(model(preprocess(pixels)), labels)`` to the attack.
"""

import torch.nn.functional as F
from torch import Tensor

IGNORED_LABEL = -100


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
        ValueError: If the shapes disagree, an example has no target token, or its first position is one (nothing
            predicts it).
    """
    if logits.ndim != 3 or labels.shape != logits.shape[:2]:
        raise ValueError(
            f"`logits` (B, T, V) and `labels` (B, T) must agree, got {tuple(logits.shape)} and {tuple(labels.shape)}."
        )
    if (labels[:, 0] != IGNORED_LABEL).any():
        raise ValueError("`labels` must be -100 at the first position: no logit predicts it. Keep one more position.")
    targets = labels[:, 1:]
    counts = (targets != IGNORED_LABEL).sum(dim=1)
    if (counts == 0).any():
        empty = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"`labels` must hold at least one target token per example, got none in rows {empty}.")
    losses = F.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), targets.flatten(), ignore_index=IGNORED_LABEL, reduction="none"
    )
    return losses.view(targets.shape).sum(dim=1) / counts


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
    weights = mask.to(student.device).float()
    counts = weights.sum(dim=1)
    if (counts == 0).any():
        empty = (counts == 0).nonzero().flatten().tolist()
        raise ValueError(f"`mask` must select at least one token per example, got none in rows {empty}.")
    distance = 1 - F.cosine_similarity(student.float(), teacher.detach().float(), dim=-1)
    return (distance.mean(dim=0) * weights).sum(dim=1) / counts
