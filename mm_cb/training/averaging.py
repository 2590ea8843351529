"""The mean of an adapter's weights over the last steps of a run: where one step leads somewhere else than the next."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import TrainerCallback, TrainingArguments

_FILE = "average.safetensors"
_COUNT = "steps"


class AverageOfLast(TrainerCallback):
    """Puts the mean over the last steps in place of the trained weights, behind the last step.

    It is kept with every checkpoint, so that a run that was interrupted ends with the same bytes.

    Source:
        Stochastic weight averaging, Izmailov et al. 2018 (arXiv:1803.05407), here of every step and at the training's
        own learning rate. Not part of Zou et al. 2024.
    """

    def __init__(self, share: float, folder: Path) -> None:
        """Average over the last ``share`` of the steps; ``folder`` is where the run's checkpoints lie."""
        self._share, self._folder = share, folder
        self._mean: dict[str, Tensor] = {}
        self._steps = 0

    def on_train_begin(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Take up the mean of the checkpoint that the run goes on from."""
        held = self._folder / f"checkpoint-{state.global_step}" / _FILE
        self._mean = load_file(held, device=str(args.device)) if held.is_file() else {}
        self._steps = int(self._mean.pop(_COUNT, 0))

    @torch.no_grad()
    def on_step_end(
        self, args: TrainingArguments, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Count a step in; behind the last one the model gets the mean, and what is measured then is the mean's."""
        assert model is not None
        if state.global_step <= state.max_steps * (1 - self._share):
            return
        self._steps += 1
        for name, weight in _trained(model):
            mean = self._mean.setdefault(name, torch.zeros_like(weight, dtype=torch.float32))
            mean += (weight.float() - mean) / self._steps
        if state.global_step == state.max_steps:
            self._put(model)

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Keep the mean so far with the checkpoint."""
        if self._steps and state.is_world_process_zero:
            counted = self._mean | {_COUNT: torch.tensor(self._steps)}
            save_file(counted, self._folder / f"checkpoint-{state.global_step}" / _FILE)

    def on_train_end(
        self, args: TrainingArguments, state: Any, control: Any, model: nn.Module | None = None, **kwargs: Any
    ) -> None:
        """Put the mean of a run that was stopped early, too."""
        assert model is not None
        self._put(model)

    @torch.no_grad()
    def _put(self, model: nn.Module) -> None:
        for name, weight in _trained(model) if self._steps else ():
            weight.copy_(self._mean[name])


def _trained(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]
