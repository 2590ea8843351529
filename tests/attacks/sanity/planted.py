"""Models that are broken on purpose, small and with known answers. The battery must flag each of them.

A battery that passes these would pass anything. They are toys on 8 x 8 pictures and cost a second in all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.sanity.measure import Filed, Setup
from mm_cb.attacks.threats import Threat

CONFIG = AttackConfig(threat=Threat(levels=48), steps=12, iterates=2)
_ROWS, _SIDE, _CLASSES = 3, 8, 4


def setup(transform: Callable[[Tensor], Tensor], deployed: Callable[[Tensor], Tensor] | None = None) -> Setup:
    """A small smooth classifier that looks at ``transform(pixels)``; targets are classes it does not see at first.

    Users' pictures go through ``deployed`` instead, if that is another function.
    """
    generator = torch.Generator().manual_seed(0)
    clean = torch.randint(64, 192, (_ROWS, 3, _SIDE, _SIDE), generator=generator).float() / 255
    weights = torch.randn(3 * _SIDE * _SIDE, _CLASSES, generator=generator)

    def logits(pixels: Tensor) -> Tensor:
        return 4 * torch.tanh((pixels - 0.5).flatten(1) @ weights / 4)

    target = logits(clean).argmin(dim=1)

    def loss(pixels: Tensor) -> Tensor:
        return F.cross_entropy(logits(transform(pixels)), target, reduction="none")

    def judge(arm: str, pixels: Tensor) -> Filed:
        saved = (pixels.detach() * 255).round() / 255
        losses = F.cross_entropy(logits((deployed or transform)(saved)), target, reduction="none")
        emitted = logits(transform(saved)).argmax(dim=1) == target
        distances = ((saved - clean) * 255).round().abs().flatten(1).amax(dim=1).int()
        return Filed([arm] * _ROWS, losses, emitted, distances)

    return Setup(loss, loss, clean, judge, "white box; goal: a class; a toy on 8 x 8 pixels")


def planted() -> dict[str, Setup]:
    """The broken models, by what is wrong with them; ``sound`` is the one with nothing wrong."""
    noise = torch.Generator().manual_seed(1)

    def noisy(pixels: Tensor) -> Tensor:
        return pixels + 0.2 * torch.randn(pixels.shape, generator=noise)

    return {
        "sound": setup(lambda pixels: pixels),
        "detached gradient": setup(lambda pixels: pixels.detach() + 0 * pixels),
        "no gradient": setup(lambda pixels: pixels.detach()),
        "quantised input": setup(lambda pixels: (pixels * 8).round() / 8),
        "wrong gradient": setup(lambda pixels: (2 * pixels).detach() - pixels),
        "noise in the model": setup(noisy),
        "another path for users": setup(lambda pixels: pixels, deployed=lambda pixels: pixels.roll(1, dims=3)),
    }
