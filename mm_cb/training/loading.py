"""Batches made ahead of the steps that take them, in worker processes where there are any: the same by any number.

A step's pictures are decoded, resized and cut into tiles on the CPU: seconds a step that a GPU would wait for. Workers
are forked, so that they share rows and processor with the run, and hold neither its lock nor a device.
"""

import os
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from torch import Tensor
from torch.utils.data import DataLoader, get_worker_info

from mm_cb.core.environment import launched
from mm_cb.core.errors import UserError
from mm_cb.data.examples import SETS, Example, PictureError
from mm_cb.models import ChatModel, VisionModel
from mm_cb.training.batches import Batch, Batches, PairCollator, PairedExamples

ENOUGH = 4
"""Workers of each process where nobody says how many and the model is on a GPU."""
ROOM = 2 * 2**30
"""Bytes of shared memory that they may take: two batches each, of 16 + 16 rows of five tiles of 336 pixels."""
_SHARED = "/dev/shm"
_FEWER = "set `training.dataloader_num_workers` lower (0 = no such processes)"
LOST = "DataLoader worker"
"""How torch begins what it says of a worker that died."""


class Prepared(NamedTuple):
    """What a worker hands over: errors too, which torch would wrap into a traceback."""

    batch: Batch | None
    """None where it could not be made."""
    error: Exception | None
    """Why not."""
    unreadable: list[tuple[Example, PictureError]]
    """Rows that others stand in for; without their pictures."""


class Preparer:
    """Makes the batch of some places of a run."""

    def __init__(self, rows: PairedExamples, collator: PairCollator) -> None:
        """Take the run's rows in order, and what encodes them."""
        self._rows, self._collator = rows, collator

    def __call__(self, places: Sequence[int]) -> Prepared:
        """The batch of these rows, its tensors in shared memory if this is a worker."""
        left_out: list[tuple[Example, PictureError]] = []
        apart = get_worker_info() is not None
        if apart and self._rows.on_unreadable is not None:  # whoever is told is told in the run's own process
            self._rows.on_unreadable = lambda example, error: left_out.append((replace(example, images=()), error))
        try:
            batch = self._collator([self._rows[place] for place in places])
            return Prepared(_shared(batch) if apart else batch, None, left_out)
        except (UserError, ValueError, TypeError, OSError) as error:
            return Prepared(None, error, left_out)


def batches_ahead(
    rows: PairedExamples, collator: PairCollator, size: int, *, workers: int = 0, pin: bool = False
) -> DataLoader[int]:
    """The batches of a run in their order, as `Prepared`.

    Args:
        rows: Its rows.
        collator: Encodes them, on the CPU.
        size: Rows of each set in a batch.
        workers: Processes that make two batches ahead each; 0 = made when asked for, in this process.
        pin: Whether batches come in memory from which a GPU copies while it works.
    """
    return DataLoader(
        range(len(rows)),  # type: ignore[arg-type]  # has all that is needed of a data set
        batch_size=size,
        collate_fn=Preparer(rows, collator),
        num_workers=workers,
        pin_memory=pin,
        multiprocessing_context="fork" if workers else None,
    )


def refuse_cache(folder: Path, model: ChatModel, batches: Batches) -> None:
    """Refuse to keep prepared pictures where no row has any, in what cannot be a folder, or of a user's own family.

    Raises:
        UserError: If so.
    """
    place = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    if not place.is_dir():
        raise UserError(f"`training.picture_cache` must be a folder, `{place}` is a file.")
    if batches == "text" or not isinstance(model, VisionModel):
        raise UserError("`training.picture_cache` is for rows with pictures, which this run has none of; leave it out.")
    model.refuse_own_code()


def number_of_workers(wanted: int | None, device: str) -> int:
    """How many a process of the run gets.

    Args:
        wanted: What the user says; None = none on a CPU, which has its hands full; else `ENOUGH`, or what the cores
            leave, or none where there is no `ROOM`.
        device: Of the model.

    Raises:
        UserError: If processes cannot be forked here.
    """
    if wanted and not hasattr(os, "fork"):
        raise UserError(f"processes that prepare pictures must be forked, which this system cannot; {_FEWER}.")
    if wanted is not None:
        return wanted
    cores = len(os.sched_getaffinity(0)) // launched("LOCAL_WORLD_SIZE", 1) if _free() >= ROOM else 0
    return 0 if device == "cpu" else max(0, min(ENOUGH, cores - 1))


def _free() -> int:
    return shutil.disk_usage(_SHARED).free if os.path.isdir(_SHARED) else 0


def worker_lost(error: RuntimeError) -> UserError | None:
    """What to tell a user of torch's error where it is about a worker that died; None where it is about another."""
    if not str(error).startswith(LOST):
        return None
    return UserError(f"a process that prepares pictures was ended, perhaps for want of memory ({error}); {_FEWER}.")


def _shared(batch: Batch) -> Batch:
    """The batch in shared memory now, where a lack of it can be told: torch's own thread would only print it."""
    try:
        for name in SETS:
            rows = batch[name]
            rows["inputs"] = rows["inputs"].each(Tensor.share_memory_)
            rows["mask"] = rows["mask"].share_memory_()
    except RuntimeError as error:
        raise UserError(
            f"a batch of pictures must fit into shared memory (`{_SHARED}`), of which {_free() / 2**20:.0f} MiB are "
            f"free; {_FEWER}, or make it larger (docker: --shm-size)."
        ) from error
    return batch
