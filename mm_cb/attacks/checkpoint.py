"""What is looked at while an attack runs: iterates kept for judging, a judged success, the state to go on from."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from mm_cb.core.files import write_bytes

_KEPT = "kept."
_ATTACK = "attack."
_STEP = "watch.step"
_NAMES = re.compile(rf"{re.escape(_KEPT)}\d{{1,9}}|{re.escape(_ATTACK)}.+")


class Watch:
    """The ``stop`` and the ``checkpoint`` of an attack: keeps iterates, judges them if asked to, saves the whole state.

    Attributes:
        kept: Step -> pixels ``(B, 3, H, W)`` of the iterates at ``moments``, rounded to 8 bits.
    """

    def __init__(
        self,
        moments: Sequence[int],
        *,
        broken: Callable[[Tensor], list[bool]] | None = None,
        path: Path | None = None,
        seconds: float | None = None,
    ) -> None:
        """Watch one run.

        Args:
            moments: Steps whose iterates are kept; 0 is the start.
            broken: Which pictures of a batch a judge calls a success; None = never stop early.
            path: File of the saved state.
            seconds: Least time between two saves; None = never save.
        """
        self.moments, self._broken, self._path, self._seconds = frozenset(moments), broken, path, seconds
        self.kept: dict[int, Tensor] = {}
        self._step = 0
        self._saved_at = time.monotonic()

    @property
    def step(self) -> int:
        """The step whose iterate is looked at next."""
        return self._step

    def resume(self) -> dict[str, Tensor] | None:
        """The attack's own state from the file, if there is one that can be read; goes on from there."""
        if self._path is None or self._seconds is None or not self._path.is_file():
            return None
        try:
            saved = load_safetensors(self._path.read_bytes())
        except (SafetensorError, OSError):
            return None  # nothing that `checkpoint` wrote: start again
        step = saved.pop(_STEP, None)
        if step is None or step.shape or step.is_floating_point() or not all(map(_NAMES.fullmatch, saved)):
            return None
        self.kept = {int(k.removeprefix(_KEPT)): v for k, v in saved.items() if k.startswith(_KEPT)}
        self._step = int(step)
        return {k.removeprefix(_ATTACK): v for k, v in saved.items() if k.startswith(_ATTACK)}

    def stop(self, pixels: Tensor, losses: Tensor) -> Tensor:
        """Look at an iterate; True for the behaviours that a judge says are broken by it."""
        step, self._step = self._step, self._step + 1
        done = torch.zeros(len(losses), dtype=torch.bool, device=losses.device)
        if step in self.moments:
            self.kept[step] = ((pixels.detach() * 255).round() / 255).cpu()
            if self._broken is not None:
                done = torch.tensor(self._broken(self.kept[step]), device=losses.device)
        return done

    def checkpoint(self, state: Any) -> None:
        """Save everything that is needed to go on, in one step, at most every few seconds."""
        if self._path is None or self._seconds is None or time.monotonic() - self._saved_at < self._seconds:
            return
        flat = {f"{_ATTACK}{name}": value.cpu() for name, value in state.state_dict().items()}
        flat |= {f"{_KEPT}{step}": value for step, value in self.kept.items()}
        flat[_STEP] = torch.tensor(self._step)
        write_bytes(self._path, save_safetensors({name: value.contiguous() for name, value in flat.items()}))
        self._saved_at = time.monotonic()

    def finish(self) -> None:
        """Forget the saved state: its run has been written."""
        if self._path is not None:
            self._path.unlink(missing_ok=True)
