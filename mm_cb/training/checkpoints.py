"""Checkpoints of a run: the newest complete one, kept until the next is complete, of one base model."""

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainingArguments

from mm_cb.core.errors import UserError
from mm_cb.core.files import write_text
from mm_cb.core.reading import read_text

logger = logging.getLogger(__name__)

_COMPLETE = "complete"
"""In a checkpoint's folder once all its files are written; holds the fingerprint of the base's weights."""


def last_checkpoint(folder: Path, base_weights: str, *, remove_torn: bool) -> Path | None:
    """The newest checkpoint that was written to its end.

    Args:
        folder: Where the checkpoints of a run are.
        base_weights: `mm_cb.models.fingerprint.fingerprint` of the model to go on with.
        remove_torn: Whether to remove those that were not.

    Raises:
        UserError: If it was trained on other weights, or does not say on which.
    """
    complete: dict[int, Path] = {}
    for path in folder.glob("checkpoint-*"):
        if (path / _COMPLETE).exists() and re.fullmatch(r"checkpoint-\d+", path.name):
            complete[int(path.name.rpartition("-")[2])] = path
        elif remove_torn:
            logger.warning("The checkpoint `%s` was not written to its end: it is removed and not gone on from.", path)
            shutil.rmtree(path, ignore_errors=True)
    if not complete:
        return None
    newest = complete[max(complete)]
    held = read_text(newest / _COMPLETE, "mark of a checkpoint")
    if held and base_weights and held != base_weights:
        raise UserError(
            f"the checkpoint `{newest}` was trained on other weights than the model has now; give another `--out`, or "
            "the model as it was."
        )
    return newest


def step_of(checkpoint: Path) -> int:
    """The step after which a checkpoint was written.

    Raises:
        UserError: If it is no checkpoint's folder.
    """
    named = re.fullmatch(r"checkpoint-(\d+)", checkpoint.name)
    if named is None or not (checkpoint / "trainer_state.json").is_file():
        raise UserError(
            f"`resume_from_checkpoint` must be a folder `checkpoint-STEP` of a training, got `{checkpoint}`."
        )
    return int(named[1])


class KeepLastComplete(TrainerCallback):
    """Marks a checkpoint as complete once all its files are written, and only then removes the older ones."""

    def __init__(self, folder: Path, base_weights: str) -> None:
        self._folder = folder
        self._base_weights = base_weights

    def on_save(self, args: TrainingArguments, state: Any, control: Any, **kwargs: Any) -> None:
        """Seal the checkpoint that was just written."""
        PartialState().wait_for_everyone()  # every process writes a part of it
        if not state.is_world_process_zero:
            return
        newest = self._folder / f"checkpoint-{state.global_step}"
        write_text(newest / _COMPLETE, self._base_weights)
        for older in self._folder.glob("checkpoint-*"):
            if older != newest:
                shutil.rmtree(older, ignore_errors=True)
