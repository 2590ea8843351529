"""Objectives for attacks on image classifiers: pure functions of logits ``(B, K)``, minimised, one value per image.

With ``labels`` alone they are untargeted (leave the true class); with ``targets`` they pull towards that class. Shapes,
types and, on the CPU, values are checked: ValueError names the argument.
"""

import math

import torch
from torch import Tensor

from .arguments import refuse_other_types, refuse_outside

SURE = 60.0
"""Lead of a class, in nats, from which its cross-entropy is as good as nought."""


def cross_entropy(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Minus the cross-entropy of the true class, or the cross-entropy of the target class, in float32.

    Written as the softplus of the other classes' lead, whose gradient keeps its direction where the class is sure: from
    a lead of about 17 on, 1 minus its probability is nought in float32. Where the class leads by more than `SURE`, it
    goes on as a straight line: there it is below 1e-26, and its own slope would soon be nought.
    """
    _check(logits, labels, targets, classes=2)
    classes = labels if targets is None else targets
    others = logits.float().scatter(1, classes.view(-1, 1), -torch.inf).logsumexp(dim=1)
    lead = others - _at(logits.float(), classes)
    curved = lead.clamp(min=-SURE)
    found = torch.logaddexp(curved, torch.zeros_like(lead))  # `softplus` overflows above 88, or is a line from 20 on
    found = found + math.exp(-SURE) * (lead + SURE).clamp(max=0)
    return -found if targets is None else found


def margin(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Lead of the class to leave over the best other one, or of the best other one over the target; < 0 = success.

    Source:
        Carlini & Wagner 2017 (arXiv:1608.04644), f6 without its clamp at ``-kappa``.
    """
    _check(logits, labels, targets, classes=2)
    if targets is not None:
        return _best_other(logits, targets) - _at(logits, targets)
    return _at(logits, labels) - _best_other(logits, labels)


def dlr(logits: Tensor, labels: Tensor, targets: Tensor | None = None) -> Tensor:
    """Difference-of-logits ratio: the margin over a distance between top logits, free of the logits' scale.

    Raises:
        ValueError: With fewer than 3 classes, or fewer than 4 with targets.

    Source:
        Croce & Hein 2020 (arXiv:2003.01690), equations 6 and 7, with the sign for minimising.
    """
    _check(logits, labels, targets, classes=3 if targets is None else 4)
    top = logits.topk(3 if targets is None else 4, dim=1).values
    if targets is None:
        lead, spread = _at(logits, labels) - _best_other(logits, labels), top[:, 0] - top[:, 2]
    else:
        lead = _at(logits, labels) - _at(logits, targets)
        spread = top[:, 0] - (top[:, 2] + top[:, 3]) / 2
    return lead / (spread + 1e-12)


def _at(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.gather(1, classes.view(-1, 1)).squeeze(1)


def _best_other(logits: Tensor, classes: Tensor) -> Tensor:
    return logits.scatter(1, classes.view(-1, 1), -torch.inf).amax(dim=1)


def _check(logits: Tensor, labels: Tensor, targets: Tensor | None, classes: int) -> None:
    if logits.ndim != 2 or logits.shape[1] < classes:
        raise ValueError(f"`logits` must have shape (B, K) with K >= {classes}, got {tuple(logits.shape)}.")
    for name, ids in (("labels", labels), ("targets", targets)):
        if ids is None:
            continue
        refuse_other_types(name, ids)
        if ids.shape != logits.shape[:1]:
            raise ValueError(f"`{name}` must have shape ({len(logits)},), got {tuple(ids.shape)}.")
        if ids.device.type == "cpu":  # elsewhere every step would wait for this look
            refuse_outside(name, ids, (ids < 0) | (ids >= logits.shape[1]), logits.shape[1])
