"""Projected gradient descent on the pixels of a batch of images."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .arguments import number
from .loop import AttackResult, Budget, Checkpoint, Iterate, Objective, Stop, run_attack
from .noise import Generators
from .threat_models import ThreatModel

StepSchedule = Literal["geometric", "linear", "cosine", "constant"]


def pgd(
    objective: Objective,
    images: Tensor,
    *,
    threat_model: ThreatModel,
    steps: int = 40,
    restarts: int = 1,
    generator: Generators | None = None,
    random_start: bool = False,
    step_size: float | None = None,
    step_schedule: StepSchedule | None = None,
    momentum: float = 0.0,
    keep: Literal["best", "last"] = "best",
    callback: Callable[[int, Tensor, Tensor], None] | None = None,
    stop: Stop | None = None,
    checkpoint: Checkpoint | None = None,
    resume: dict[str, Tensor] | None = None,
) -> AttackResult:
    """Minimise ``objective`` over the images the threat model allows.

    Each example is attacked by itself: its result does not depend on the others in the batch (with random starts:
    if ``generator`` is a list of one generator per example). The model gets no parameter gradients.

    Args:
        objective: Maps pixels ``(B, C, H, W)`` to one value per image ``(B,)``; lower is better for the attacker. It
            always gets the full batch, in order.
        images: Clean pixels in [0, 1], float32, shape ``(B, C, H, W)``.
        threat_model: The allowed set around each image.
        steps: Updates per run; the iterate after the last update is evaluated too.
        restarts: Runs in all. The first starts at the image (or where the threat model says), the others at random
            points of the allowed set, each mirrored to the other side of the image than what the run before found.
        generator: Source of the random starts, or one per example; None is a fresh one with seed 0. The global random
            state stays untouched.
        random_start: Start the first run at random as well.
        step_size: First step in the threat model's unit ([0, 1] for l-inf); None is twice epsilon.
        step_schedule: How the step goes from ``step_size`` to the threat model's last (1/255 for l-inf): "geometric",
            "linear", "cosine", or "constant" for no change. None is "geometric" for the default step size and
            "constant" for a given one.
        momentum: Decay of the accumulated gradient (Dong et al. 2018, arXiv:1710.06081), 0 for none.
        keep: "best" iterate of each run per example, or the "last", as textbooks do. Over runs the best one wins.
        callback: Called with (number of evaluated iterates so far, over all runs; their losses ``(B,)``; their pixels
            ``(B, C, H, W)``); like ``objective`` and ``stop`` it is given copies.
        stop: Called with (pixels, losses) of every iterate, returns a boolean per image ``(B,)``. An image that is
            True is finished: it is returned as it was then and no run moves it again; the batch stays full.
        checkpoint: Called with the state after every update; save ``state.state_dict()`` as often as you like.
        resume: A saved ``state_dict``; the attack goes on there, with the same arguments and a generator whose state
            does not matter, to the same bits.

    Returns:
        The best images found; with ``keep="best"`` never worse than the start.

    Raises:
        AttackError: If the objective has the wrong shape, is not finite, or gives no gradient at a run's start, or
            ``resume`` belongs to another attack.
        ValueError: If an argument is out of range.
        TypeError: If ``images`` is not float32.

    Source:
        Madry et al. 2018 (arXiv:1706.06083). Deviations: decaying step and best iterate by default, later
        runs mirrored away from the run before; ``step_size=epsilon, keep="last", steps=1`` is FGSM.
    """
    momentum = number("momentum", momentum)
    if not 0 <= momentum <= 1:
        raise ValueError(f"`momentum` must lie in [0, 1], got {momentum}.")
    budget = Budget(threat_model, steps, restarts, random_start, keep)
    sizes = step_sizes(threat_model.step_range, budget.steps, step_size, step_schedule)
    return run_attack(
        objective,
        images,
        _SteepestDescent(threat_model, tuple(sizes), momentum),
        budget,
        generator=generator,
        callback=callback,
        stop=stop,
        checkpoint=checkpoint,
        resume=resume,
    )


@dataclass(frozen=True)
class _SteepestDescent:
    """One step down the (accumulated) gradient, then back into the allowed set."""

    threat_model: ThreatModel
    sizes: tuple[float, ...]
    momentum: float
    uses_gradient: bool = True

    def next(self, at: Iterate, memory: dict[str, Tensor], generator: Generators) -> Tensor:
        velocity = at.gradient
        if self.momentum:
            before = memory.get("velocity", torch.zeros_like(at.gradient))
            velocity = memory["velocity"] = self.momentum * before + unit_mean(at.gradient)
        moved = at.pixels + self.sizes[at.step] * self.threat_model.descent_direction(velocity)
        return self.threat_model.project(moved, at.clean)


def unit_mean(gradient: Tensor) -> Tensor:
    """Scale each example's gradient to mean absolute value 1; a zero gradient stays zero."""
    mean = gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
    return gradient / mean.where(mean > 0, 1.0)


def step_sizes(
    step_range: tuple[float, float], steps: int, step_size: float | None, schedule: StepSchedule | None
) -> list[float]:
    """Return the size of every step; :func:`pgd` has the details."""
    first = step_range[0] if step_size is None else number("step_size", step_size)
    if not 0 <= first < math.inf:
        raise ValueError(f"`step_size` must be finite and not negative, got {step_size}.")
    chosen = schedule or ("geometric" if step_size is None else "constant")
    last = min(step_range[1], first)
    progress = [step / max(steps - 1, 1) for step in range(steps)]
    if chosen == "constant" or first == 0:
        return [first] * steps
    if chosen == "linear":
        return [first + (last - first) * p for p in progress]
    if chosen == "geometric":
        return [first * (last / first) ** p for p in progress]
    if chosen == "cosine":
        return [last + (first - last) * (1 + math.cos(math.pi * p)) / 2 for p in progress]
    raise ValueError(f"`step_schedule` must be 'geometric', 'linear', 'cosine' or 'constant', got {schedule!r}.")
