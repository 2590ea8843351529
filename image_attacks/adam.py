"""PGD with Adam's steps: every value moves by its own signal-to-noise ratio instead of by a sign."""

from dataclasses import dataclass
from typing import Unpack

import torch
from torch import Tensor

from .arguments import number
from .loop import AttackResult, Budget, Iterate, Objective, Running, run_attack
from .noise import Generators
from .pgd import StepSchedule, step_sizes, unit_mean
from .threat_models import L2, Patch, ThreatModel

BETAS = (0.9, 0.99)
"""Decay of the mean and of the mean square of the gradients, per step."""


def adam_pgd(
    objective: Objective,
    images: Tensor,
    *,
    threat_model: ThreatModel,
    steps: int = 40,
    restarts: int = 1,
    random_start: bool = False,
    step_size: float | None = None,
    step_schedule: StepSchedule | None = None,
    betas: tuple[float, float] = BETAS,
    **running: Unpack[Running],
) -> AttackResult:
    """Minimise ``objective`` by projected steps of Adam.

    A step by the sign moves a value as far when its gradient only flickers as when it points one way all the time.
    Adam's step is the running mean of the gradient over the root of its running mean square: about one ``step_size``
    where the gradients agree, a fraction of it where they cancel out. On language models behind an image processor,
    whose gradients are noisy, this took a fraction of the steps of :func:`~image_attacks.pgd`.

    Args:
        objective: As for :func:`~image_attacks.pgd`, like all the arguments that are not named here.
        images: Clean pixels in [0, 1], float32, shape ``(B, C, H, W)``.
        threat_model: The allowed set around each image; no l-2 ball, whose steps have a norm: Adam's go value by
            value.
        steps: Updates per run.
        restarts: Runs in all.
        random_start: Start the first run at random as well.
        step_size: First step in [0, 1] units per value; None is the threat model's first, as for
            :func:`~image_attacks.pgd`.
        step_schedule: As for :func:`~image_attacks.pgd`.
        betas: Decay of the mean and of the mean square of the gradients.
        running: ``generator``, ``callback``, ``stop``, ``checkpoint``, ``resume``: as for :func:`~image_attacks.pgd`.

    Returns:
        The best images found, never worse than the start.

    Raises:
        AttackError: As :func:`~image_attacks.pgd` does.
        ValueError: If an argument is out of range, or the set is an l-2 ball.

    Source:
        Kingma & Ba 2015 (arXiv:1412.6980), Algorithm 1, with a projection behind every step. Deviations: gradients are
        scaled to mean absolute value 1 per image and step (as Dong et al. 2018 do, arXiv:1710.06081), so that the mean
        is over directions; the step decays; best iterate.
    """
    first, second = (number("betas", beta) for beta in betas)
    betas = (first, second)
    if not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"`betas` must lie in [0, 1), got {betas}.")
    inner = threat_model
    while isinstance(inner, Patch):
        inner = inner.within
    if isinstance(inner, L2):
        raise ValueError("`adam_pgd` steps value by value, which does not suit an l-2 ball: use `pgd` or `apgd`.")
    budget = Budget(threat_model, steps, restarts, random_start)
    sizes = step_sizes(threat_model.step_range, budget.steps, step_size, step_schedule)
    return run_attack(objective, images, _Adam(threat_model, tuple(sizes), betas), budget, **running)


@dataclass(frozen=True)
class _Adam:
    threat_model: ThreatModel
    sizes: tuple[float, ...]
    betas: tuple[float, float]
    uses_gradient: bool = True

    def next(self, at: Iterate, memory: dict[str, Tensor], generator: Generators) -> Tensor:
        gradient, (first, second) = unit_mean(at.gradient), self.betas
        nothing = torch.zeros_like(gradient)
        mean = memory["mean"] = first * memory.get("mean", nothing) + (1 - first) * gradient
        square = memory["square"] = second * memory.get("square", nothing) + (1 - second) * gradient.square()
        count = at.step + 1
        direction = (mean / (1 - first**count)) / ((square / (1 - second**count)).sqrt() + 1e-8)
        return self.threat_model.project(at.pixels - self.sizes[at.step] * direction, at.clean)
