"""Everything an attack changes while it runs, as a flat dict of tensors that can be saved and loaded."""

import hashlib
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import ResumeError
from .noise import Generators


@dataclass
class AttackState:
    """Where an attack stands: hand :meth:`state_dict` back as ``resume=`` and it goes on as if never interrupted.

    Bit-exact on the CPU, if the objective is a function of the pixels alone or draws from the same generator as the
    attack (whose state is saved too).
    """

    clean: Tensor
    generator: Generators
    settings: Tensor
    """Fingerprint of the attack's settings, uint8."""
    pixels: Tensor
    """The iterate to evaluate next, ``(B, C, H, W)``."""
    stopped: Tensor
    """Examples that are finished, ``(B,)``."""
    restart: int = 0
    step: int = 0
    """Number of the iterate to evaluate next within its run."""
    memory: dict[str, Tensor] = field(default_factory=dict)
    images: list[Tensor] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    kept_steps: list[Tensor] = field(default_factory=list)
    stopped_runs: list[Tensor] = field(default_factory=list)
    curves: list[list[Tensor]] = field(default_factory=list)
    norms: list[list[Tensor]] = field(default_factory=list)

    @classmethod
    def empty(cls, clean: Tensor, generator: Generators, settings: Tensor) -> "AttackState":
        """Return the state before the first run."""
        return cls(clean, generator, settings, clean, torch.zeros(len(clean), dtype=torch.bool, device=clean.device))

    def begin_run(self, restart: int, start: Tensor) -> None:
        """Start a run; examples that have stopped stay where they stopped."""
        if self.images:
            start = torch.where(self.stopped.view(-1, 1, 1, 1), self.pixels, start)
        count, device = len(start), start.device
        self.restart, self.step, self.pixels, self.memory = restart, 0, start, {}
        self.images.append(start)
        self.losses.append(torch.full((count,), torch.inf, device=device))
        self.kept_steps.append(torch.zeros(count, dtype=torch.long, device=device))
        self.stopped_runs.append(self.stopped)
        self.curves.append([])
        self.norms.append([])

    def keep(self, step: int, losses: Tensor, ends: Tensor | None, which: str) -> Tensor:
        """Keep the current iterate where it is the best one (or any one, for ``which="last"``), or where it ends.

        Returns:
            Where it was kept, shape ``(B,)``.
        """
        better = losses < self.losses[-1] if which == "best" else torch.ones_like(losses, dtype=torch.bool)
        if ends is not None:
            # A stopped example keeps the image on which success was seen, whatever the loss of others was.
            better = (better | ends) & (~self.stopped | (step == 0))
            self.stopped = self.stopped | ends
            self.stopped_runs[-1] = self.stopped
        self.images[-1] = torch.where(better.view(-1, 1, 1, 1), self.pixels, self.images[-1])
        self.losses[-1] = torch.where(better, losses, self.losses[-1])
        self.kept_steps[-1] = torch.where(better, step, self.kept_steps[-1])
        return better

    def fill_run(self, steps: int) -> None:
        """Repeat the last losses for the steps that nobody needs any more."""
        missing = steps + 1 - len(self.curves[-1])
        self.curves[-1] += [self.curves[-1][-1]] * missing
        self.norms[-1] += [torch.full_like(self.norms[-1][-1], torch.nan)] * (steps - len(self.norms[-1]))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the state as a flat dict of tensors, fit for ``torch.save`` and safetensors."""
        flat = {
            "position": torch.tensor([self.restart, self.step]),
            "settings": self.settings,
            "clean": self.clean,
            "pixels": self.pixels,
            "stopped": self.stopped,
            "images": torch.stack(self.images),
            "losses": torch.stack(self.losses),
            "kept_steps": torch.stack(self.kept_steps),
            "stopped_runs": torch.stack(self.stopped_runs),
            "curves": torch.stack([row for curve in self.curves for row in curve]),
            "norms": torch.stack([row for run in self.norms for row in run]),
            "runs": torch.tensor([[len(curve), len(run)] for curve, run in zip(self.curves, self.norms, strict=True)]),
        }
        flat |= {f"generator.{i}": each.get_state() for i, each in enumerate(_as_list(self.generator))}
        flat |= {f"memory.{name}": value for name, value in self.memory.items()}
        return {name: value.detach().clone().contiguous() for name, value in flat.items()}

    def load_state_dict(self, saved: dict[str, Tensor]) -> None:
        """Continue where :meth:`state_dict` was taken; sets the generators too.

        Raises:
            ResumeError: If it was taken from an attack on other images or with other settings.
        """
        generators = _as_list(self.generator)
        missing = {"position", "settings", "clean", "norms", f"generator.{len(generators) - 1}"} - saved.keys()
        if missing:
            raise ResumeError(f"`resume` must come from `AttackState.state_dict`, it has no {sorted(missing)}.")
        moved = {name: value.to(self.clean.device) for name, value in saved.items()}
        if not torch.equal(moved["clean"], self.clean):
            raise ResumeError("`resume` was saved while attacking other images. Start this attack anew.")
        if not torch.equal(saved["settings"].cpu(), self.settings) or f"generator.{len(generators)}" in saved:
            raise ResumeError("`resume` was saved by an attack with other settings. Start this attack anew.")
        self.restart, self.step = saved["position"].tolist()
        self.pixels, self.stopped = moved["pixels"], moved["stopped"]
        self.images, self.losses = list(moved["images"]), list(moved["losses"])
        self.kept_steps, self.stopped_runs = list(moved["kept_steps"]), list(moved["stopped_runs"])
        curves, norms = (column.tolist() for column in saved["runs"].T)
        self.curves = [list(curve) for curve in moved["curves"].split(curves)]
        self.norms = [list(run) for run in moved["norms"].split(norms)]
        self.memory = {name.removeprefix("memory."): v for name, v in moved.items() if name.startswith("memory.")}
        for i, generator in enumerate(generators):
            generator.set_state(saved[f"generator.{i}"].cpu())


def fingerprint(*settings: Any) -> Tensor:
    """Return a hash of the settings' printed form, uint8 of length 32."""
    digest = hashlib.sha256("\0".join(repr(setting) for setting in settings).encode()).digest()
    return torch.tensor(list(digest), dtype=torch.uint8)


def _as_list(generator: Generators) -> list[torch.Generator]:
    return [generator] if isinstance(generator, torch.Generator) else list(generator)
