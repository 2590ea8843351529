"""Projected gradient descent on the pixels of a batch of images."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .noise import Generators
from .threat_models import Linf

Objective = Callable[[Tensor], Tensor]
StepSchedule = Literal["geometric", "linear", "constant"]

FINAL_STEP = 1 / 255
"""A decaying step ends here: one 8-bit level, the smallest move that survives in a file."""


class AttackError(ValueError):
    """The objective cannot be attacked as it is; the message says why and what to do."""


class ObjectiveShapeError(AttackError):
    """The objective did not return one value per image."""


class NonFiniteError(AttackError):
    """The objective or its gradient is NaN or infinite."""


class ZeroGradientError(AttackError):
    """No pixel of any image changes the objective, so that every step would stand still."""


@dataclass(frozen=True)
class RestartResults:
    """The selected iterate of every run, R = ``restarts``; judge all of them, not only the lowest loss."""

    images: Tensor
    """Shape ``(R, B, C, H, W)``."""
    losses: Tensor
    """The objective at these images, shape ``(R, B)``."""
    steps: Tensor
    """Which iterate each one is, 0 = the run's start, shape ``(R, B)``."""


@dataclass(frozen=True)
class AttackResult:
    """What an attack found, per example the best run."""

    images: Tensor
    """Pixels in [0, 1], shape ``(B, C, H, W)``, detached."""
    losses: Tensor
    """The objective at ``images``, shape ``(B,)``."""
    curves: Tensor
    """The objective at every iterate, shape ``(R, steps + 1, B)``."""
    per_restart: RestartResults
    zero_gradients: Tensor
    """True where an example's gradient was exactly zero, shape ``(R, steps, B)``: such a step did nothing."""


def pgd(
    objective: Objective,
    images: Tensor,
    *,
    threat_model: Linf,
    steps: int = 40,
    restarts: int = 1,
    generator: Generators | None = None,
    random_start: bool = False,
    step_size: float | None = None,
    step_schedule: StepSchedule | None = None,
    momentum: float = 0.0,
    keep: Literal["best", "last"] = "best",
    callback: Callable[[int, Tensor], None] | None = None,
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
        restarts: Runs in all. The first starts at the image, the others at random points of the allowed set.
        generator: Source of the random starts, or one per example; None is a fresh one with seed 0. The global random
            state stays untouched.
        random_start: Start the first run at random as well.
        step_size: First step in [0, 1] units; None is twice epsilon.
        step_schedule: How the step goes from ``step_size`` to 1/255: "geometric", "linear", or "constant" for no
            change. None is "geometric" for the default step size and "constant" for a given one.
        momentum: Decay of the accumulated gradient (Dong et al. 2018, arXiv:1710.06081), 0 for none.
        keep: "best" iterate of each run per example, or the "last", as textbooks do. Over runs the best one wins.
        callback: Called with (number of evaluated iterates so far, over all runs; their losses ``(B,)``).

    Returns:
        The best images found; with ``keep="best"`` never worse than the start.

    Raises:
        AttackError: If the objective has the wrong shape, is not finite, or gives no gradient at a run's start.
        ValueError: If an argument is out of range.
        TypeError: If ``images`` is not float32.

    Source:
        Madry et al. 2018 (arXiv:1706.06083). Deviations: decaying step and best iterate by default;
        ``step_size=epsilon, keep="last", steps=1`` is FGSM.
    """
    _check_arguments(images, steps, restarts, momentum, keep)
    sizes = _step_sizes(threat_model.epsilon, steps, step_size, step_schedule)
    clean, generator = images.detach().clone(), generator or torch.Generator().manual_seed(0)
    curves, kept, zeros = [], [], []
    for restart in range(restarts):
        start = threat_model.random_start(clean, generator) if restart or random_start else clean
        report = _counted(callback, restart * (steps + 1))
        run = _run(objective, clean, start, threat_model, sizes, momentum, keep, report)
        curves.append(run.curve)
        kept.append((run.images, run.losses, run.steps))
        zeros.append(run.zero_gradients)
    found = RestartResults(*(torch.stack(column) for column in zip(*kept, strict=True)))
    rows = torch.arange(len(clean), device=clean.device)
    winner = found.losses.argmin(dim=0)
    return AttackResult(
        images=found.images[winner, rows],
        losses=found.losses[winner, rows],
        curves=torch.stack(curves),
        per_restart=found,
        zero_gradients=torch.stack(zeros),
    )


@dataclass(frozen=True)
class _Run:
    images: Tensor
    losses: Tensor
    steps: Tensor
    curve: Tensor
    zero_gradients: Tensor


def _run(
    objective: Objective,
    clean: Tensor,
    start: Tensor,
    threat_model: Linf,
    sizes: list[float],
    momentum: float,
    keep: str,
    report: Callable[[int, Tensor], None],
) -> _Run:
    pixels = kept_images = start
    velocity = torch.zeros_like(start)
    kept_losses = torch.full((len(clean),), torch.inf, device=clean.device)
    kept_steps = torch.zeros(len(clean), dtype=torch.long, device=clean.device)
    zeros = torch.zeros(len(sizes), len(clean), dtype=torch.bool, device=clean.device)
    curve = []
    for step in range(len(sizes) + 1):
        losses, gradient = _evaluate(objective, pixels, step, with_gradient=step < len(sizes))
        curve.append(losses)
        report(step, losses)
        better = losses < kept_losses if keep == "best" else torch.ones_like(losses, dtype=torch.bool)
        kept_images = torch.where(better.view(-1, 1, 1, 1), pixels, kept_images)
        kept_losses = torch.where(better, losses, kept_losses)
        kept_steps = torch.where(better, step, kept_steps)
        if gradient is None:
            break
        zeros[step] = gradient.flatten(1).abs().amax(dim=1) == 0
        if step == 0 and zeros[0].all():
            raise ZeroGradientError(
                "The gradient of the objective is exactly zero for every image at the start of a run. Look for a "
                "detached or rounded value between pixels and loss, or start elsewhere with random_start=True."
            )
        velocity = momentum * velocity + _unit_mean(gradient) if momentum else gradient
        pixels = threat_model.project(pixels + sizes[step] * threat_model.descent_direction(velocity), clean)
    return _Run(kept_images, kept_losses, kept_steps, torch.stack(curve), zeros)


def _evaluate(objective: Objective, pixels: Tensor, step: int, with_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Return the losses (B,) at ``pixels`` and, if asked for, their gradient; both checked."""
    with torch.set_grad_enabled(with_gradient):
        pixels = pixels.detach().requires_grad_(with_gradient)
        losses = objective(pixels)
    if not isinstance(losses, Tensor) or losses.shape != pixels.shape[:1]:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ObjectiveShapeError(f"The objective must return one value per image, shape ({len(pixels)},), got {got}.")
    _check_finite("objective", losses.detach().view(-1, 1), step)
    gradient = None
    if with_gradient:
        if losses.requires_grad:
            (gradient,) = torch.autograd.grad(losses.sum(), pixels, allow_unused=True)
        if gradient is None:
            raise ZeroGradientError("The objective has no gradient with respect to the pixels: something detaches it.")
        _check_finite("gradient of the objective", gradient.flatten(1), step)
    losses = losses.detach().clone().to(pixels.device)
    return (losses if losses.dtype == torch.float64 else losses.float()), gradient


def _check_finite(what: str, values: Tensor, step: int) -> None:
    rows = (~values.isfinite()).any(dim=1)
    if rows.any():
        raise NonFiniteError(
            f"The {what} is NaN or infinite at step {step} for images {rows.nonzero().flatten().tolist()}."
        )


def _unit_mean(gradient: Tensor) -> Tensor:
    """Scale each example's gradient to mean absolute value 1; a zero gradient stays zero."""
    mean = gradient.abs().mean(dim=(1, 2, 3), keepdim=True)
    return gradient / mean.where(mean > 0, 1.0)


def _step_sizes(epsilon: float, steps: int, step_size: float | None, schedule: StepSchedule | None) -> list[float]:
    first = 2 * epsilon if step_size is None else step_size
    if not first >= 0:
        raise ValueError(f"`step_size` must not be negative, got {step_size}.")
    chosen = schedule or ("geometric" if step_size is None else "constant")
    last = min(FINAL_STEP, first)
    progress = [step / max(steps - 1, 1) for step in range(steps)]
    if chosen == "constant" or first == 0:
        return [first] * steps
    if chosen == "linear":
        return [first + (last - first) * p for p in progress]
    if chosen == "geometric":
        return [first * (last / first) ** p for p in progress]
    raise ValueError(f"`step_schedule` must be 'geometric', 'linear' or 'constant', got {schedule!r}.")


def _check_arguments(images: Tensor, steps: int, restarts: int, momentum: float, keep: str) -> None:
    if not isinstance(images, Tensor) or images.dtype != torch.float32:
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"`images` must be a float32 tensor (half precision cannot hold one 8-bit step), got {got}.")
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"`images` must have shape (B, C, H, W), got {tuple(images.shape)}.")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"`images` must lie in [0, 1], got {low} to {high}. Pass pixels, not pixel_values.")
    if steps < 0 or restarts < 1:
        raise ValueError(f"`steps` must be at least 0 and `restarts` at least 1, got {steps} and {restarts}.")
    if not 0 <= momentum <= 1:
        raise ValueError(f"`momentum` must lie in [0, 1], got {momentum}.")
    if keep not in ("best", "last"):
        raise ValueError(f"`keep` must be 'best' or 'last', got {keep!r}.")


def _counted(callback: Callable[[int, Tensor], None] | None, before: int) -> Callable[[int, Tensor], None]:
    """Number the iterates over all runs, from 1."""

    def report(step: int, losses: Tensor) -> None:
        if callback is not None:
            callback(before + step + 1, losses)

    return report
