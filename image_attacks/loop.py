"""The loop under every iterative attack: evaluate the batch, keep the best, ask a rule for the next iterate."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol, TypedDict, Unpack

import torch
from torch import Tensor

from .arguments import whole
from .errors import NonFiniteError, ObjectiveShapeError, ZeroGradientError
from .noise import Generators
from .state import AttackState, fingerprint
from .threat_models import ThreatModel, check_threat_model

Objective = Callable[[Tensor], Tensor]
Stop = Callable[[Tensor, Tensor], Tensor]
Checkpoint = Callable[[AttackState], None]
Callback = Callable[[int, Tensor, Tensor], None]


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
    """The objective at every iterate, shape ``(R, steps + 1, B)``; the last value repeated once all have stopped."""
    per_restart: RestartResults
    gradient_norms: Tensor
    """Euclidean norm of every example's gradient at every step, shape ``(R, steps, B)``; NaN where none was computed
    (a gradient-free search, steps behind the one at which all had stopped)."""
    stopped: Tensor
    """True where ``stop`` ended the example, shape ``(B,)``; its image is the one that made it stop."""

    @property
    def zero_gradients(self) -> Tensor:
        """True where an example's gradient was exactly zero, shape ``(R, steps, B)``: such a step did nothing."""
        return self.gradient_norms == 0


@dataclass(frozen=True)
class Iterate:
    """What a rule sees of the point that was just evaluated."""

    step: int
    clean: Tensor
    pixels: Tensor
    losses: Tensor
    gradient: Tensor
    better: Tensor
    """True where this is the best point of its run so far, shape ``(B,)``."""
    best_pixels: Tensor
    best_losses: Tensor


class Rule(Protocol):
    """How an attack goes from one iterate to the next.

    A rule holds settings only; what changes during a run stands in ``memory``, which is empty when a run starts and is
    saved with the state.
    """

    @property
    def uses_gradient(self) -> bool:
        """Whether the loop computes gradients; without, ``Iterate.gradient`` is zero."""

    def next(self, at: Iterate, memory: dict[str, Tensor], generator: Generators) -> Tensor:
        """Return the next point to evaluate, inside the threat model."""


@dataclass(frozen=True)
class Budget:
    """What a run of the loop does, apart from the rule."""

    threat_model: ThreatModel
    steps: int
    restarts: int = 1
    random_start: bool = False
    keep: Literal["best", "last"] = "best"

    def __post_init__(self) -> None:
        check_threat_model("threat_model", self.threat_model)
        for name in ("steps", "restarts"):
            object.__setattr__(self, name, whole(name, getattr(self, name)))
        if self.steps < 0 or self.restarts < 1:
            raise ValueError(
                f"`steps` must be at least 0 and `restarts` at least 1, got {self.steps} and {self.restarts}."
            )
        if self.random_start not in (True, False):
            raise ValueError(f"`random_start` must be True or False, got {self.random_start!r:.60}.")
        if self.keep not in ("best", "last"):
            raise ValueError(f"`keep` must be 'best' or 'last', got {self.keep!r}.")


class Running(TypedDict, total=False):
    """Arguments that every attack hands over as they are; :func:`~image_attacks.pgd` says what they mean."""

    generator: Generators | None
    callback: Callback | None
    stop: Stop | None
    checkpoint: Checkpoint | None
    resume: dict[str, Tensor] | None


def run_attack(
    objective: Objective, images: Tensor, rule: Rule, budget: Budget, **running: Unpack[Running]
) -> AttackResult:
    """Run a rule ``restarts`` times and keep the best of every example; :func:`~image_attacks.pgd` has the details."""
    unknown = running.keys() - Running.__annotations__.keys()
    if unknown:
        raise TypeError(f"Unknown arguments {sorted(unknown)}; further ones are {sorted(Running.__annotations__)}.")
    check_images(images)
    clean, generator = images.detach().clone(), running.get("generator") or torch.Generator().manual_seed(0)
    state = AttackState.empty(clean, generator, fingerprint(rule, budget))
    if (resume := running.get("resume")) is not None:
        state.load_state_dict(resume)
    for restart in range(state.restart, budget.restarts):
        if state.step == 0:
            first = budget.threat_model.start(clean)
            random = restart > 0 or budget.random_start
            start = budget.threat_model.random_start(clean, generator) if random else first
            if restart > 0:
                start = budget.threat_model.project(_far_side(start, first, state.images[-1]), clean)
            state.begin_run(restart, start)
        _run(objective, rule, budget, state, running)
    return _result(state)


def _far_side(start: Tensor, first: Tensor, found: Tensor) -> Tensor:
    """Mirror a random start, value by value, to the other side of the first start than the last run's best point.

    A run that starts near another one tends to end where that one did. Where there is no other side, in white and
    black, a value stays where it was drawn.
    """
    mirrored = 2 * first - start
    same_side = (start - first) * (found - first) > 0
    return torch.where(same_side & (mirrored >= 0) & (mirrored <= 1), mirrored, start)


def _run(objective: Objective, rule: Rule, budget: Budget, state: AttackState, running: Running) -> None:
    """Finish the run that ``state`` is in."""
    callback, stop, checkpoint = (running.get("callback"), running.get("stop"), running.get("checkpoint"))
    for step in range(state.step, budget.steps + 1):
        last = step == budget.steps
        losses, gradient = evaluate(objective, state.pixels, step, with_gradient=rule.uses_gradient and not last)
        state.curves[-1].append(losses)
        if callback is not None:
            callback(state.restart * (budget.steps + 1) + step + 1, losses.clone(), state.pixels.clone())
        ends = None if stop is None else _checked_stop(stop(state.pixels.clone(), losses.clone()), losses)
        better = state.keep(step, losses, ends, budget.keep)
        if last:
            break
        norms = _norms(gradient) if rule.uses_gradient else torch.full_like(losses, torch.nan)
        state.norms[-1].append(norms)
        if step == 0 and bool((norms == 0).all()):
            raise ZeroGradientError(
                "The gradient of the objective is exactly zero for every image at the start of a run. Look for a "
                "detached or rounded value between pixels and loss, or start elsewhere with random_start=True."
            )
        if bool(state.stopped.all()):
            state.fill_run(budget.steps)
            break
        at = Iterate(step, state.clean, state.pixels, losses, gradient, better, state.images[-1], state.losses[-1])
        following = rule.next(at, state.memory, state.generator).detach()
        state.pixels = torch.where(state.stopped.view(-1, 1, 1, 1), state.pixels, following)
        state.step = step + 1
        if checkpoint is not None:
            checkpoint(state)
    state.step = 0


def _result(state: AttackState) -> AttackResult:
    found = RestartResults(*(torch.stack(column) for column in (state.images, state.losses, state.kept_steps)))
    stopped = torch.stack(state.stopped_runs)
    rows = torch.arange(len(state.clean), device=state.clean.device)
    winner = torch.where(stopped.any(dim=0), stopped.int().argmax(dim=0), found.losses.argmin(dim=0))
    return AttackResult(
        images=found.images[winner, rows],
        losses=found.losses[winner, rows],
        curves=torch.stack([torch.stack(curve) for curve in state.curves]),
        per_restart=found,
        gradient_norms=torch.stack([_stacked(norms, state.losses[0]) for norms in state.norms]),
        stopped=state.stopped,
    )


def _stacked(rows: list[Tensor], like: Tensor) -> Tensor:
    return torch.stack(rows) if rows else like.new_zeros((0, len(like)))


def _norms(gradient: Tensor) -> Tensor:
    """Norms ``(B,)``, of values scaled first: a tiny gradient's square must not vanish, 0 is to mean no gradient."""
    flat = gradient.flatten(1).float()
    largest = flat.abs().amax(dim=1)
    return largest * torch.linalg.vector_norm(flat / torch.where(largest > 0, largest, 1).unsqueeze(1), dim=1)


def evaluate(objective: Objective, pixels: Tensor, step: int, with_gradient: bool) -> tuple[Tensor, Tensor]:
    """Return the losses (B,) at a copy of ``pixels`` and their gradient, zero if not asked for; both checked."""
    with torch.set_grad_enabled(with_gradient):
        pixels = pixels.detach().clone().requires_grad_(with_gradient)  # an objective may write into what it is shown
        losses = objective(pixels)
    if not isinstance(losses, Tensor) or losses.shape != pixels.shape[:1]:
        got = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ObjectiveShapeError(
            f"The objective must return one value per image, shape ({len(pixels)},), got {got}: sum "
            "over everything but the first dimension, for instance with reduction='none'."
        )
    _check_finite("objective", losses.detach().view(-1, 1), step)
    gradient = None if with_gradient else pixels.new_zeros(()).expand_as(pixels)
    if with_gradient:
        if losses.requires_grad:
            with torch.enable_grad():  # a caller may have it off: the sum would then lead nowhere
                (gradient,) = torch.autograd.grad(losses.sum(), pixels, allow_unused=True)
        if gradient is None:
            raise ZeroGradientError(
                "The objective has no gradient with respect to the pixels: something detaches it. Look for "
                "`no_grad`, an argmax, or a detour through numpy or Pillow between pixels and loss."
            )
        _check_finite("gradient of the objective", gradient.flatten(1), step)
    assert gradient is not None
    losses = losses.detach().clone().to(pixels.device)
    return (losses if losses.dtype == torch.float64 else losses.float()), gradient


def _check_finite(what: str, values: Tensor, step: int) -> None:
    rows = (~values.isfinite()).any(dim=1)
    if rows.any():
        raise NonFiniteError(
            f"The {what} is NaN or infinite at step {step} for images "
            f"{rows.nonzero().flatten().tolist()}. Compute it in float32, and away from points like sqrt(0) and log(0)."
        )


def _checked_stop(ends: Tensor, losses: Tensor) -> Tensor:
    if not isinstance(ends, Tensor) or ends.shape != losses.shape or ends.dtype != torch.bool:
        got = f"{ends.dtype} {tuple(ends.shape)}" if isinstance(ends, Tensor) else type(ends).__name__
        raise ObjectiveShapeError(f"`stop` must return one boolean per image, shape ({len(losses)},), got {got}.")
    return ends.to(losses.device)


def _why_not(dtype: object) -> str:
    """What to do about pixels of another type."""
    if dtype in (torch.float16, torch.bfloat16):
        return ": half precision cannot hold one 8-bit step. Attack float32 pixels and cast inside the objective"
    if dtype == torch.uint8:
        return ". Divide levels by 255"
    return ". Pass images.float()" if isinstance(dtype, torch.dtype) else ""


def check_images(images: Tensor) -> None:
    """Refuse what no attack can work on."""
    if not isinstance(images, Tensor) or images.dtype != torch.float32:
        got = images.dtype if isinstance(images, Tensor) else type(images).__name__
        raise TypeError(f"`images` must be a float32 tensor, got {got}{_why_not(got)}.")
    if images.ndim != 4 or images.numel() == 0:
        raise ValueError(f"`images` must have shape (B, C, H, W), got {tuple(images.shape)}.")
    low, high = images.min().item(), images.max().item()
    if not (low >= 0 and high <= 1):
        raise ValueError(f"`images` must lie in [0, 1], got {low} to {high}. Pass pixels, not pixel_values.")
