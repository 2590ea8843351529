"""The sanity battery: is a low success rate the model's strength, or is the attack broken?

Works on any differentiable objective. `measure_arms` runs every arm once; `mm_cb.attacks.sanity.checks` turns the
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
Loss = Callable[[Tensor], Tensor]
"""Pixels ``(B, 3, H, W)`` -> losses ``(B,)``."""


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

    keys = ("losses", "emitted", "distances")
    losses, emitted, distances = (torch.stack([getattr(one, key) for one in arms]) for key in keys)
    names = [counts(row) for row in range(losses.shape[1])]
    return Filed(names, losses.amin(dim=0), emitted.any(dim=0), distances.amax(dim=0))


@dataclass(frozen=True)
class Setup:
    """One model with its behaviours, as the battery sees it. B behaviours."""

    objective: Loss
    """Of the targets: what the attack minimises."""
    smooth: Loss
    """The same through the smooth surrogate of the preprocessing, for finite differences."""
    clean: Tensor
    judge: Callable[[str, Tensor], Filed]
    """Saves the pictures of an arm and looks at what was saved."""
    about: str
    """Who attacks what, and how: goal, knowledge, where the change is made, processor."""
    adaptive: Mapping[str, Loss] = field(default_factory=dict)
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


def measure_arms(setup: Setup, config: AttackConfig, say: Callable[[str], None] = lambda text: None) -> Measured:
    """Run every arm; an objective that cannot be attacked leaves its reason in ``error``."""
    with torch.no_grad():
        clean, again = setup.objective(setup.clean), setup.objective(setup.clean)
    found = Measured(about=setup.about, repeat_gap=float((clean - again).abs().max()))
    arms = _Arms(setup, config, found)
    arms.judge("clean", setup.clean)
    try:
        say("placebo")  # as many noisy pictures as the attack has pictures judged; success = any of them
        random, epsilon = arms.generator(), config.threat.epsilon
        draws = range(1 + config.iterates)
        noisy = [arms.judge(f"noise {draw}", sign_noise(setup.clean, epsilon, random)) for draw in draws]
        found.arms["noise"] = any_of(noisy)
        say("gradient-free search")
        random, threat = arms.generator(), arms.ball
        searched = random_search(
            setup.objective, setup.clean, threat_model=threat, steps=config.steps, generator=random
        )
        arms.judge("random_search", searched.images)
        say("gradients")
        random = arms.generator()
        health = gradient_health(
            setup.smooth, setup.clean, step=DIFFERENCE_STEP, directions=DIRECTIONS, generator=random
        )
        found.zero_share, found.ratios, found.suspicious = health.zero_share, health.ratios, health.suspicious()
        found.unsteady = _unsteady(setup, clean, random)
        say("white box")
        arms.follow_gradients()
    except AttackError as error:
        found.error = str(error)
    return found


@dataclass(frozen=True)
class _Arms:
    """What runs the arms of a setup, and notes what they found."""

    setup: Setup
    config: AttackConfig
    found: Measured

    @property
    def ball(self) -> Linf:
        """What may change in all arms but one."""
        return Linf(self.config.threat.epsilon)

    def generator(self) -> torch.Generator:
        """A random stream from its beginning."""
        return torch.Generator().manual_seed(self.config.seed)

    def judge(self, arm: str, images: Tensor) -> Filed:
        """Save and judge the pictures of an arm."""
        return _judge(self.found, self.setup, arm, images)

    def pgd(self, loss: Loss, **settings: Any) -> AttackResult:
        """PGD with these steps in this ball, where the settings name no others."""
        settings = {"threat_model": self.ball, "steps": self.config.steps} | settings
        return OPTIMIZERS[self.config.optimizer](loss, self.setup.clean, **settings)

    def search(self, arm: str, loss: Loss, **settings: Any) -> Filed:
        """An arm of which the losses and gradients on the way are kept, too."""
        result = self.pgd(loss, **settings)
        self.found.curves[arm], self.found.norms[arm] = result.curves[0].cpu(), result.gradient_norms[0].cpu()
        return self.judge(arm, result.images)

    def follow_gradients(self) -> None:
        """One step; the attack with its iterates; twice its steps, twice its runs; APGD; adaptive; no bound."""
        found, config, loss, clean = self.found, self.config, self.setup.objective, self.setup.clean
        single = pgd(loss, clean, threat_model=self.ball, steps=1, step_size=self.ball.epsilon, keep="last")
        self.judge("single_step", single.images)
        watch = Watch(config.moments)
        white = self.search("pgd", loss, stop=watch.stop)
        iterates = [self.judge(f"iterate {step}", pixels.to(clean)) for step, pixels in watch.kept.items()]
        found.arms["any_of_k"] = any_of([white, *iterates])
        self.search("double_steps", loss, steps=2 * config.steps)
        second = self.pgd(loss, random_start=True, generator=self.generator())
        found.arms["double_runs"] = any_of([white, self.judge("second_run", second.images)])
        self.judge("apgd", apgd(loss, clean, threat_model=self.ball, steps=config.steps).images)
        for name, adaptive in self.setup.adaptive.items():
            self.search(name, adaptive)
        grey = Started(Linf(1.0), torch.full_like(clean, 0.5))
        self.judge("unbounded", self.pgd(loss, threat_model=grey).images)


def add_transfer(found: Measured, setup: Setup, images: Tensor) -> None:
    """Pictures made on another model, judged on this one."""
    _judge(found, setup, "transfer", images.to(setup.clean))


@torch.no_grad()
def _judge(found: Measured, setup: Setup, arm: str, images: Tensor) -> Filed:
    """Save and judge the pictures of an arm, and note how far the losses that the attack had lie from the files'."""
    filed = found.arms[arm] = setup.judge(arm, images)
    gaps = (setup.objective((images.detach() * 255).round() / 255).cpu() - filed.losses).abs()
    allowed = torch.tensor([tolerance(loss, setup.dtype) for loss in filed.losses.tolist()]).to(gaps)
    worst = int((gaps / allowed).argmax())
    gap, limit = float(gaps[worst]), float(allowed[worst])
    if math.isnan(gap) or gap / limit > found.path_gap / found.path_allowed:  # none is further off than a NaN
        found.path_gap, found.path_allowed = gap, limit
    return filed


@torch.no_grad()
def _unsteady(setup: Setup, clean: Tensor, generator: torch.Generator) -> Tensor:
    """Relative changes ``(B,)`` of the loss when every value moves at random by up to `NUDGE` levels.

    Source:
        Pintor et al. 2022 (arXiv:2106.09947), unstable predictions. Deviation: 10 draws instead of 100, which would be
        an attack's worth of passes.
    """
    near = Linf(NUDGE / 255)
    changes = [(setup.objective(near.random_start(setup.clean, generator)) - clean).abs() for _ in range(NUDGES)]
    return torch.stack(changes).mean(dim=0) / clean.abs().clamp(min=torch.finfo(clean.dtype).tiny)


def measured_once(path: Path, measure: Callable[[], Measured]) -> Measured:
    """The measurements in ``path``; made and written in one step if they are not there yet."""
    return measured_from(once(path, lambda: as_json(measure())))


def measured_from(held: Any) -> Measured:
    """Measurements from what `as_json` made of them."""
    held |= {key: math.nan for key in ("path_gap", "path_allowed", "repeat_gap") if held[key] is None}
    arms = {arm: Filed(one.pop("names"), **_read(one)) for arm, one in held.pop("arms").items()}
    return Measured(arms, **_read(held))


def as_json(value: Any) -> Any:
    """Measurements as JSON holds them; what is no number, as an overflow leaves, is None."""
    if isinstance(value, Measured | Filed):
        value = vars(value)
    if isinstance(value, dict):
        return {key: as_json(one) for key, one in value.items()}
    if isinstance(value, Tensor | list):
        return [as_json(one) for one in (value.tolist() if isinstance(value, Tensor) else value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(value: Any) -> Any:
    """Lists of numbers, or of lists of them, as tensors; None among them is NaN."""
    if isinstance(value, dict):
        return {key: _read(one) for key, one in value.items()}
    if not isinstance(value, list):
        return value
    if value and isinstance(value[0], list):
        return torch.stack([_read(row) for row in value])
    return torch.tensor([math.nan if one is None else one for one in value])
