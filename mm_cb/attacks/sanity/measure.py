"""The sanity battery: is a low success rate the model's strength, or is the attack broken?

Works on any differentiable objective. `measure_bed` runs every arm once; `mm_cb.attacks.sanity.checks` turns the
numbers into pass or fail. Nothing here is a rate of harm: success is "the answer begins with the target", which needs
no judge. Losses, answers and distances are those of 8-bit pictures, read back from their files where `Bed.keep` writes
any; what an attack computed in memory is only held against them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from image_attacks import AttackError, AttackResult, Linf, apgd, gradient_health, pgd, random_search, sign_noise
from mm_cb.attacks.checkpoint import Watch
from mm_cb.attacks.config import IMAGE_BACKENDS
from mm_cb.attacks.search import OPTIMIZERS, Started
from mm_cb.core.errors import UserError
from mm_cb.core.limits import LIMITS
from mm_cb.inference.tolerance import TOLERANCE, tolerance

DIRECTIONS = 5
DIFFERENCE_STEP = 1e-4
"""Half the distance of a finite difference, in [0, 1] per value. All values move at once, so curvature shows early: on
the embedded model the ratio is off by 20 % at 1e-3, 3 % at 3e-4 and 0.4 % here, as the square of the step."""
NUDGES, NUDGE = 10, 4
"""Random steps around the clean picture, of at most so many levels, whose losses are compared with its own."""


def in_memory(arm: str, pixels: Tensor) -> tuple[list[str], Tensor]:
    """No files: the pictures as 8 bits would hold them."""
    return [], _rounded_to_8_bits(pixels)


@dataclass(frozen=True)
class Bed:
    """One model with its behaviours, as the battery sees it. B behaviours."""

    name: str
    objective: Callable[[Tensor], Tensor]
    """Target losses ``(B,)`` of pixels ``(B, 3, H, W)``: what the attack minimises."""
    smooth: Callable[[Tensor], Tensor]
    """The same through the smooth surrogate of the preprocessing, for finite differences."""
    emitted: Callable[[Tensor], list[bool]]
    """Whether the answers to these pictures begin with their targets."""
    clean: Tensor
    filed: Callable[[Tensor], Tensor]
    """Losses of 8-bit pictures on the path that users take, through the model's real processor."""
    about: str
    """Who attacks what, and how: goal, knowledge, where the change is made, processor."""
    adaptive: Mapping[str, Callable[[Tensor], Tensor]] = field(default_factory=dict)
    """Attack -> its loss, of those that aim at what an adapter changed; files are judged like all others."""
    dtype: str = "float32"
    """Of the model: how exactly a loss computed by another pass can agree."""
    keep: Callable[[str, Tensor], tuple[list[str], Tensor]] = in_memory
    """Writes the pictures of an arm; their names, and the pictures as read back."""


@dataclass(frozen=True)
class BatteryConfig:
    """How much of everything; checked when it is made."""

    epsilon: int = 32
    """Largest change of a value, in 255ths."""
    steps: int = 100
    """Steps per run of every search."""
    iterates: int = 5
    """Further pictures judged of the white-box arm; the placebo gets as many draws."""
    optimizer: str = "adam"
    """How a search by PGD steps, as ``mm-cb attack`` has it: adam, sign, momentum."""
    behaviors: int = 12
    """The first so many behaviours of one picture size."""
    image_backend: str = "pil"
    """Image processor: pil or torchvision."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: If one is out of range.
        """
        if isinstance(self.epsilon, bool) or not isinstance(self.epsilon, int) or not 0 <= self.epsilon <= 255:
            raise UserError(f"`epsilon` must be a whole number in 0..255, got {self.epsilon}.")
        for key, value in (("steps", self.steps), ("iterates", self.iterates), ("count", self.behaviors)):
            LIMITS[key].refuse(key, value)
        known = {"optimizer": tuple(OPTIMIZERS), "image_backend": IMAGE_BACKENDS}
        for key, names in known.items():
            if getattr(self, key) not in names:
                flag = f"--{key.replace('_', '-')}"
                raise UserError(f"`{flag}` must be one of {', '.join(names)}, got `{getattr(self, key)}`.")

    @property
    def ball(self) -> Linf:
        """What an attack may change, where its arm is not about another budget."""
        return Linf(self.epsilon / 255)

    def search(self, objective: Callable[[Tensor], Tensor], images: Tensor, **settings: Any) -> AttackResult:
        """Run PGD with these steps in this ball, where the settings name no others."""
        settings = {"threat_model": self.ball, "steps": self.steps} | settings
        return OPTIMIZERS[self.optimizer](objective, images, **settings)


@dataclass(frozen=True)
class Filed:
    """What the saved pictures of one arm do, each tensor ``(B,)``."""

    names: list[str]
    """Files, relative to the run directory; empty where none are written."""
    losses: Tensor
    emitted: Tensor
    distances: Tensor
    """Largest change of a value from the clean picture, in 255ths."""


@dataclass
class Measured:
    """What the arms found: losses and successes per behaviour, curves, and what went wrong."""

    clean: Tensor
    losses: dict[str, Tensor] = field(default_factory=dict)
    emitted: dict[str, Tensor] = field(default_factory=dict)
    files: dict[str, Filed] = field(default_factory=dict)
    """Every picture that was judged, by arm; one arm per draw (``noise 0``) and iterate."""
    curves: dict[str, Tensor] = field(default_factory=dict)
    norms: dict[str, Tensor] = field(default_factory=dict)
    """Norms of the gradients that an arm followed, ``(steps, B)``."""
    silent: int = 0
    """Behaviours that an iterate broke and the picture with the lowest loss did not."""
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


def measure_bed(
    bed: Bed, config: BatteryConfig, seed: int = 0, say: Callable[[str], None] = lambda text: None
) -> Measured:
    """Run every arm; an objective that cannot be attacked leaves its reason in ``error``."""
    with torch.no_grad():
        clean, again = bed.objective(bed.clean), bed.objective(bed.clean)
    found = Measured(clean.detach(), about=bed.about)
    found.repeat_gap = float((clean - again).abs().max())
    _keep(found, bed, "clean", bed.clean)
    try:
        say("placebo")
        _placebo(found, bed, config, seed)
        say("gradient-free search")
        searched = random_search(
            bed.objective, bed.clean, threat_model=config.ball, steps=config.steps, generator=_generator(seed)
        )
        _keep(found, bed, "random_search", searched.images)
        say("gradients")
        generator = _generator(seed)
        health = gradient_health(
            bed.smooth, bed.clean, step=DIFFERENCE_STEP, directions=DIRECTIONS, generator=generator
        )
        found.zero_share, found.ratios, found.suspicious = health.zero_share, health.ratios, health.suspicious()
        found.unsteady = _unsteady(bed, found.clean, generator)
        say("white box")
        _gradient_arms(found, bed, config, seed)
    except AttackError as error:
        found.error = str(error)
    return found


def _generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def _keep(found: Measured, bed: Bed, arm: str, images: Tensor) -> None:
    _judge(found, bed, arm, images)
    found.losses[arm], found.emitted[arm] = found.files[arm].losses, found.files[arm].emitted


@torch.no_grad()
def _judge(found: Measured, bed: Bed, arm: str, images: Tensor) -> Tensor:
    """Save the pictures of an arm and judge what was saved, which is returned."""
    names, saved = bed.keep(arm, images)
    losses = bed.filed(saved)
    _compare(found, bed, _rounded_to_8_bits(images), losses)
    distances = ((saved - bed.clean) * 255).round().abs().flatten(1).amax(dim=1).int()
    found.files[arm] = Filed(names, losses.cpu(), torch.tensor(bed.emitted(saved)), distances.cpu())
    return saved


def _compare(found: Measured, bed: Bed, held: Tensor, filed: Tensor) -> None:
    """Note how far the losses of pictures that an attack held lie from those of their files, if further than before."""
    gaps = (bed.objective(held) - filed).abs()
    allowed = torch.tensor([tolerance(loss, bed.dtype) for loss in filed.tolist()]).to(gaps)
    worst = int((gaps / allowed).argmax())
    gap, limit = float(gaps[worst]), float(allowed[worst])
    if math.isnan(gap) or gap / limit > found.path_gap / found.path_allowed:  # none is further off than a NaN
        found.path_gap, found.path_allowed = gap, limit


def _rounded_to_8_bits(pixels: Tensor) -> Tensor:
    return (pixels.detach() * 255).round() / 255


def _placebo(found: Measured, bed: Bed, config: BatteryConfig, seed: int) -> None:
    """As many noisy pictures as the attack has pictures judged; success = any of them."""
    generator, draws = _generator(seed), 1 + config.iterates
    for draw in range(draws):
        _judge(found, bed, f"noise {draw}", sign_noise(bed.clean, config.epsilon / 255, generator))
    drawn = [found.files[f"noise {draw}"] for draw in range(draws)]
    found.losses["noise"] = torch.stack([files.losses for files in drawn]).amin(dim=0)
    found.emitted["noise"] = torch.stack([files.emitted for files in drawn]).any(dim=0)


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


def _gradient_arms(found: Measured, bed: Bed, config: BatteryConfig, seed: int) -> None:
    """One step; the attack with its iterates judged; twice its steps, twice its runs; APGD; adaptive; no bound."""
    ball = config.ball
    single = pgd(bed.objective, bed.clean, threat_model=ball, steps=1, step_size=ball.epsilon, keep="last")
    _keep(found, bed, "single_step", single.images)
    moments = sorted({round(config.steps * (i + 1) / config.iterates) for i in range(config.iterates)})
    watch = Watch(moments)
    white = config.search(bed.objective, bed.clean, stop=watch.stop)
    _keep(found, bed, "pgd", white.images)
    for step, pixels in watch.kept.items():
        _judge(found, bed, f"iterate {step}", pixels.to(bed.clean))
    by_iterate = [found.files[f"iterate {step}"].emitted for step in watch.kept]
    found.silent = int((torch.stack(by_iterate).any(dim=0) & ~found.emitted["pgd"]).sum()) if by_iterate else 0
    found.emitted["any_of_k"] = torch.stack([found.emitted["pgd"], *by_iterate]).any(dim=0)
    _log(found, "pgd", white)
    double = config.search(bed.objective, bed.clean, steps=2 * config.steps)
    _keep(found, bed, "double_steps", double.images)
    _log(found, "double_steps", double)
    second = config.search(bed.objective, bed.clean, random_start=True, generator=_generator(seed))
    _judge(found, bed, "second_run", second.images)
    runs = found.files["pgd"], found.files["second_run"]
    found.losses["double_runs"] = torch.minimum(runs[0].losses, runs[1].losses)
    found.emitted["double_runs"] = runs[0].emitted | runs[1].emitted
    _keep(found, bed, "apgd", apgd(bed.objective, bed.clean, threat_model=ball, steps=config.steps).images)
    for name, loss in bed.adaptive.items():
        aimed = config.search(loss, bed.clean)
        _keep(found, bed, name, aimed.images)
        _log(found, name, aimed)
    grey = Started(Linf(1.0), torch.full_like(bed.clean, 0.5))
    _keep(found, bed, "unbounded", config.search(bed.objective, bed.clean, threat_model=grey).images)


def _log(found: Measured, arm: str, result: AttackResult) -> None:
    found.curves[arm], found.norms[arm] = result.curves[0].cpu(), result.gradient_norms[0].cpu()


def add_transfer(found: Measured, bed: Bed, images: Tensor) -> None:
    """Pictures made on another model, judged on this one."""
    _keep(found, bed, "transfer", images.to(bed.clean))
