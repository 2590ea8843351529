"""Checkpoints of a run: the newest complete one, kept until the next is complete, of one base model."""

import logging
import re
import shutil
from pathlib import Path
from typing import Any

from accelerate import PartialState
from transformers import TrainerCallback, TrainingArguments

from mm_cb.core.errors import UserError
from mm_cb.core.files import file_sha256, write_text
from mm_cb.core.reading import read_text

logger = logging.getLogger(__name__)

_COMPLETE = "complete"
"""In a checkpoint's folder once all its files are written; its first line is the fingerprint of the base's weights,
each further one the SHA-256 and the name of a file (there are none in checkpoints of earlier versions)."""


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
    held = _mark(newest)[0]
    if held and base_weights and held != base_weights:
        raise UserError(
            f"the checkpoint `{newest}` was trained on other weights than the model has now; give another `--out`, or "
            "the model as it was."
        )
    return newest


def refuse_changed(checkpoint: Path) -> None:
    """Refuse a checkpoint whose files are not as they were when it was complete.

    Raises:
        UserError: Naming the file.
    """
    if not (checkpoint / _COMPLETE).exists():  # of another trainer
        return
    for line in _mark(checkpoint)[1:]:
        digest, _, name = line.partition("  ")
        if not (checkpoint / name).is_file() or file_sha256(checkpoint / name) != digest:
            raise UserError(
                f"`{checkpoint / name}` is gone, damaged or was changed after it was written; delete the folder "
                f"`{checkpoint}`, and training begins again, or take it whole from where it was made."
            )


def _mark(checkpoint: Path) -> list[str]:
    return read_text(checkpoint / _COMPLETE, "mark of a checkpoint").split("\n")


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
        files = sorted(path for path in newest.iterdir() if path.is_file())
        write_text(
            newest / _COMPLETE,
            "\n".join([self._base_weights, *(f"{file_sha256(path)}  {path.name}" for path in files)]),
        )
        for older in self._folder.glob("checkpoint-*"):
            if older != newest:
                shutil.rmtree(older, ignore_errors=True)
