"""The sanity battery: is a low success rate the model's strength, or is the attack broken?

Works on any differentiable objective. `measure_bed` runs every arm once; `mm_cb.attacks.sanity.checks` turns the
numbers into pass or fail. Nothing here is a rate of harm: success is "the answer begins with the target", which needs
no judge. Losses, answers and distances are those of files read back; what an attack computed in memory is only held
against them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from image_attacks import AttackError, AttackResult, Linf, apgd, gradient_health, pgd, random_search, sign_noise
from mm_cb.attacks.checkpoint import Watch
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.search import OPTIMIZERS, Started
from mm_cb.core.records import JsonObject
from mm_cb.inference.cached_chunks import once
from mm_cb.inference.tolerance import TOLERANCE, tolerance

DIRECTIONS = 5
DIFFERENCE_STEP = 1e-4
"""Half the distance of a finite difference, in [0, 1] per value. All values move at once, so curvature shows early: on
the embedded model the ratio is off by 20 % at 1e-3, 3 % at 3e-4 and 0.4 % here, as the square of the step."""
NUDGES, NUDGE = 10, 4
"""Random steps around the clean picture, of at most so many levels, whose losses are compared with its own."""


ADAPTIVE = ("pgd_adaptive", "pgd_clean_teacher")
"""Attacks of the battery that aim at what an adapter changed."""


@dataclass(frozen=True)
class Filed:
    """What saved pictures of one arm do, one per behaviour; each tensor ``(B,)``."""

    names: list[str]
    """Files, relative to the run directory."""
    losses: Tensor
    """On the path that users take, through the model's real processor."""
    emitted: Tensor
    """Whether the answer begins with the target."""
    distances: Tensor
    """Largest change of a value from the clean picture, in 255ths."""


def any_of(arms: Sequence[Filed]) -> Filed:
    """Several pictures of each behaviour as one arm, named by the one that counts: answered to, then of lowest loss."""

    def counts(row: int) -> str:
        return min(arms, key=lambda one: (not one.emitted[row], float(one.losses[row]))).names[row]

    losses, emitted, distances = (torch.stack([getattr(one, key) for one in arms]) for key in _TENSORS)
    names = [counts(row) for row in range(losses.shape[1])]
    return Filed(names, losses.amin(dim=0), emitted.any(dim=0), distances.amax(dim=0))


_TENSORS = ("losses", "emitted", "distances")


@dataclass(frozen=True)
class Bed:
    """One model with its behaviours, as the battery sees it. B behaviours."""

    objective: Callable[[Tensor], Tensor]
    """Target losses ``(B,)`` of pixels ``(B, 3, H, W)``: what the attack minimises."""
    smooth: Callable[[Tensor], Tensor]
    """The same through the smooth surrogate of the preprocessing, for finite differences."""
    clean: Tensor
    judge: Callable[[str, Tensor], Filed]
    """Saves the pictures of an arm and looks at what was saved."""
    about: str
    """Who attacks what, and how: goal, knowledge, where the change is made, processor."""
    adaptive: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """Attack -> its loss, of those that aim at what an adapter changed; files are judged like all others."""
    dtype: str = "float32"
    """Of the model: how exactly a loss computed by another pass can agree."""


@dataclass
class Measured:
    """What the arms found, and what went wrong."""

    arms: dict[str, Filed] = field(default_factory=dict)
    """Every picture that was judged, one arm per draw (``noise 0``) and iterate, and what several of them do."""
    curves: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    """Norms of the gradients that an arm followed, ``(steps, B)``."""
    about: str = ""
    path_gap: float = 0.0
    """Difference between a picture's loss in the attack and its file's on the path that users take, of the picture
    where it is largest against what its dtype allows."""
    path_allowed: float = TOLERANCE
    """What it allows there."""
    repeat_gap: float = float("nan")
    unsteady: Tensor | None = None
    """Mean change of the loss under tiny random steps, as a share of it, ``(B,)``."""
    zero_share: Tensor | None = None
    ratios: Tensor | None = None
    suspicious: Tensor | None = None
    error: str | None = None
    """Why the arms that follow a gradient could not run."""


def measure_bed(bed: Bed, config: AttackConfig, say: Callable[[str], None] = lambda text: None) -> Measured:
    """Run every arm; an objective that cannot be attacked leaves its reason in ``error``."""
    with torch.no_grad():
        clean, again = bed.objective(bed.clean), bed.objective(bed.clean)
    found = Measured(about=bed.about, repeat_gap=float((clean - again).abs().max()))
    _judge(found, bed, "clean", bed.clean)
    try:
        say("placebo")
        _placebo(found, bed, config)
        say("gradient-free search")
        searched = random_search(
            bed.objective, bed.clean, threat_model=_ball(config), steps=config.steps, generator=_generator(config)
        )
        _judge(found, bed, "random_search", searched.images)
        say("gradients")
        generator = _generator(config)
        health = gradient_health(
            bed.smooth, bed.clean, step=DIFFERENCE_STEP, directions=DIRECTIONS, generator=generator
        )
        found.zero_share, found.ratios, found.suspicious = health.zero_share, health.ratios, health.suspicious()
        found.unsteady = _unsteady(bed, clean, generator)
        say("white box")
        _gradient_arms(found, bed, config)
    except AttackError as error:
        found.error = str(error)
    return found


def _ball(config: AttackConfig) -> Linf:
    return Linf(config.threat.epsilon)


def _pgd(objective: Callable[[Tensor], Tensor], bed: Bed, config: AttackConfig, **settings: Any) -> AttackResult:
    """PGD with these steps in this ball, where the settings name no others."""
    settings = {"threat_model": _ball(config), "steps": config.steps} | settings
    return OPTIMIZERS[config.optimizer](objective, bed.clean, **settings)


def _generator(config: AttackConfig) -> torch.Generator:
    return torch.Generator().manual_seed(config.seed)


@torch.no_grad()
def _judge(found: Measured, bed: Bed, arm: str, images: Tensor) -> Filed:
    """Save and judge the pictures of an arm, and note how far the losses that the attack had lie from the files'."""
    filed = found.arms[arm] = bed.judge(arm, images)
    gaps = (bed.objective(_rounded_to_8_bits(images)).cpu() - filed.losses).abs()
    allowed = torch.tensor([tolerance(loss, bed.dtype) for loss in filed.losses.tolist()]).to(gaps)
    worst = int((gaps / allowed).argmax())
    gap, limit = float(gaps[worst]), float(allowed[worst])
    if math.isnan(gap) or gap / limit > found.path_gap / found.path_allowed:  # none is further off than a NaN
        found.path_gap, found.path_allowed = gap, limit
    return filed


def _rounded_to_8_bits(pixels: Tensor) -> Tensor:
    return (pixels.detach() * 255).round() / 255


def _placebo(found: Measured, bed: Bed, config: AttackConfig) -> None:
    """As many noisy pictures as the attack has pictures judged; success = any of them."""
    generator, drawn = _generator(config), []
    for draw in range(1 + config.iterates):
        drawn.append(_judge(found, bed, f"noise {draw}", sign_noise(bed.clean, config.threat.epsilon, generator)))
    found.arms["noise"] = any_of(drawn)


@torch.no_grad()
def _unsteady(bed: Bed, clean: Tensor, generator: torch.Generator) -> Tensor:
    """Relative changes ``(B,)`` of the loss when every value moves at random by up to `NUDGE` levels.

    Source:
        Pintor et al. 2022 (arXiv:2106.09947), unstable predictions. Deviation: 10 draws instead of 100, which would be
        an attack's worth of passes.
    """
    near = Linf(NUDGE / 255)
    changes = [(bed.objective(near.random_start(bed.clean, generator)) - clean).abs() for _ in range(NUDGES)]
    return torch.stack(changes).mean(dim=0) / clean.abs().clamp(min=torch.finfo(clean.dtype).tiny)


def _gradient_arms(found: Measured, bed: Bed, config: AttackConfig) -> None:
    """One step; the attack with its iterates judged; twice its steps, twice its runs; APGD; adaptive; no bound."""
    ball = _ball(config)
    single = pgd(bed.objective, bed.clean, threat_model=ball, steps=1, step_size=ball.epsilon, keep="last")
    _judge(found, bed, "single_step", single.images)
    watch = Watch(config.moments)
    white = _search(found, bed, config, "pgd", stop=watch.stop)
    iterates = [_judge(found, bed, f"iterate {step}", pixels.to(bed.clean)) for step, pixels in watch.kept.items()]
    found.arms["any_of_k"] = any_of([white, *iterates])
    _search(found, bed, config, "double_steps", steps=2 * config.steps)
    second = _pgd(bed.objective, bed, config, random_start=True, generator=_generator(config))
    found.arms["double_runs"] = any_of([white, _judge(found, bed, "second_run", second.images)])
    _judge(found, bed, "apgd", apgd(bed.objective, bed.clean, threat_model=ball, steps=config.steps).images)
    for name, loss in bed.adaptive.items():
        _search(found, bed, config, name, loss)
    grey = Started(Linf(1.0), torch.full_like(bed.clean, 0.5))
    _judge(found, bed, "unbounded", _pgd(bed.objective, bed, config, threat_model=grey).images)


def _search(
    found: Measured,
    bed: Bed,
    config: AttackConfig,
    arm: str,
    loss: Callable[[Tensor], Tensor] | None = None,
    **settings: Any,
) -> Filed:
    """An arm of which the losses and gradients on the way are kept, too."""
    result = _pgd(loss or bed.objective, bed, config, **settings)
    found.curves[arm], found.norms[arm] = result.curves[0].cpu(), result.gradient_norms[0].cpu()
    return _judge(found, bed, arm, result.images)


def add_transfer(found: Measured, bed: Bed, images: Tensor) -> None:
    """Pictures made on another model, judged on this one."""
    _judge(found, bed, "transfer", images.to(bed.clean))


def measured_once(path: Path, measure: Callable[[], Measured]) -> Measured:
    """The measurements in ``path``; made and written in one step if they are not there yet."""
    held = once(path, lambda: as_json(measure()))
    held |= {key: math.nan for key in ("path_gap", "path_allowed", "repeat_gap") if held[key] is None}
    arms = {arm: Filed(names=one.pop("names"), **_read(one)) for arm, one in held.pop("arms").items()}
    return Measured(arms=arms, **_read(held))


def as_json(found: Measured) -> JsonObject:
    """Every number; what is none, as an overflow leaves, is None."""
    return {key: _plain(value) for key, value in vars(found).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Filed | dict):
        held = value if isinstance(value, dict) else vars(value)
        return {key: _plain(one) for key, one in held.items()}
    if isinstance(value, Tensor | list):
        return [_plain(one) for one in (value.tolist() if isinstance(value, Tensor) else value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _read(one) for key, one in value.items()}
    return _tensor(value) if isinstance(value, list) else value


def _tensor(values: list[Any]) -> Tensor:
    """A list of numbers, or of lists of them; None is NaN."""
    if values and isinstance(values[0], list):
        return torch.stack([_tensor(row) for row in values])
    return torch.tensor([float("nan") if value is None else value for value in values])
