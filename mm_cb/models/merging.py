"""Fold an adapter into its model: a plain checkpoint for engines that know nothing of adapters."""

import contextlib
import fcntl
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from transformers.conversion_mapping import get_model_conversion_mapping

from mm_cb.core.errors import UserError
from mm_cb.core.files import file_errors, give_usual_modes
from mm_cb.core.places import refuse_inside_run
from mm_cb.core.runs import being_written
from mm_cb.models.adapters import put_adapter, refuse_not_finite
from mm_cb.models.cache import model_folder
from mm_cb.models.decoding import FILE
from mm_cb.models.families import load_processor
from mm_cb.models.loading import load_plain, quiet_libraries
from mm_cb.models.registry import family_of
from mm_cb.models.vision import VisionModel


def merge(model: str | Path, adapter: Path, out: Path, *, dtype: str | None = None) -> Path:
    """Write a checkpoint whose output is that of the model with the adapter on.

    The folder appears under its name only once everything is in it. Each weight is merged in float32 and rounded once,
    so that a bfloat16 checkpoint loses no more of a small change than it must.

    Args:
        model: An embedded model's name, a local folder, or a hub id.
        adapter: Folder of the adapter.
        out: A folder that is not there yet, or empty.
        dtype: Of the weights; None = as the model's checkpoint has them.

    Returns:
        ``out``.

    Raises:
        UserError: If ``out`` holds anything or is being written, the adapter is another model's, or the disk is full.
    """
    _refuse_taken(out)
    refuse_inside_run(out)
    with _claimed(out) as part:
        _write(model, adapter, out, part, dtype)
    return out


def _refuse_taken(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"`--out` must be new or an empty directory, `{out}` is there already.")


@contextlib.contextmanager
def _claimed(out: Path) -> Iterator[Path]:
    """An empty folder beside ``out`` that no other process writes into; gone at the end, unless it is ``out`` by then.

    Raises:
        UserError: If another one has it, or it cannot be made.
    """
    part = out.with_name(f".{out.name}.part")
    with file_errors(out):
        part.mkdir(parents=True, exist_ok=True)
        held = os.open(part, os.O_RDONLY)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise being_written(out) from error
        except OSError:  # a disk without locks
            pass
        if not (part.is_dir() and os.path.samestat(os.fstat(held), part.stat())):
            raise being_written(out)  # by one that was quicker
        try:
            _refuse_taken(out)
            _empty(part)
            yield part
        finally:
            if part.is_dir():
                shutil.rmtree(part, ignore_errors=True)
    finally:
        os.close(held)


def _empty(folder: Path) -> None:
    """Remove what a merge that was killed has left."""
    for left in folder.iterdir():
        shutil.rmtree(left) if left.is_dir() else left.unlink()


def _write(model: str | Path, adapter: Path, out: Path, part: Path, dtype: str | None) -> None:
    """Merge, and write into ``part``, which becomes ``out``."""
    base = load_plain(model, dtype=dtype)
    with quiet_libraries():
        merged, changed = fold(put_adapter(base, adapter, str(model)))
        refuse_not_finite(merged.named_parameters(), f"{model} merged with {adapter}")
        with torch.no_grad():
            logits = merged(input_ids=torch.zeros(1, 2, dtype=torch.long)).logits
        if not bool(torch.isfinite(logits).all()):
            raise UserError(
                f"`{model}` merged with `{adapter}` must give finite logits in {logits.dtype}, got NaN or infinity; "
                "look at `lora_alpha` of its adapter_config.json, or train the adapter again."
            )
        if not changed:
            warnings.warn(
                f"the adapter in `{adapter}` changes no weight of `{model}`: `{out}` is the base model, no breaker.",
                stacklevel=2,
            )
        processor = load_processor(model, merged.config)
        with file_errors(out):
            _write_published_names(merged, part)
            processor.save_pretrained(part)
            if (decoding := model_folder(model) / FILE).is_file():  # of which we read the end tokens alone
                shutil.copyfile(decoding, part / FILE)
            _sync(part)
            os.replace(part, out)


@torch.no_grad()
def fold(model: Any) -> tuple[Any, int]:
    """Add every LoRA of a ``PeftModel`` to the weight below it, in float32.

    Returns:
        The plain model, and how many of its weights are others than before.
    """
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    changed = 0
    for module in layers:
        weight = module.get_base_layer().weight
        change = sum(module.get_delta_weight(name).float() for name in module.active_adapters)
        merged = (weight.float() + change).to(weight.dtype)
        changed += not torch.equal(merged, weight)
        weight.copy_(merged)
    return model.unload(), changed


def _write_published_names(model: Any, folder: Path) -> None:
    """Save a model; one that sees, with all renamings of its type turned back, and not only those that its file needed.

    Of text models transformers' table also holds names of larger models that they are parts of, which nobody publishes.
    """
    if issubclass(family_of(model.config), VisionModel):
        model._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    model.save_pretrained(folder)
    give_usual_modes(folder)


def _sync(folder: Path) -> None:
    """Have every file of a folder on the disk before its name says that it is complete."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
