"""Fold an adapter into its model: a plain checkpoint for engines that know nothing of adapters."""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer

from mm_cb.core.errors import UserError
from mm_cb.core.files import file_errors
from mm_cb.core.places import refuse_inside_run
from mm_cb.models.families import load_processor
from mm_cb.models.loading import load_plain, put_adapter, quiet_libraries


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
        UserError: If ``out`` holds anything, the adapter is another model's, or the disk is full.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"`--out` must be new or an empty directory, `{out}` is there already.")
    refuse_inside_run(out)
    part = out.with_name(f".{out.name}.part")
    base = load_plain(model, dtype=dtype)
    with quiet_libraries():
        merged = fold(put_adapter(base, adapter, str(model)))
        processor = load_processor(model, merged.config)
        with file_errors(out):
            shutil.rmtree(part, ignore_errors=True)
            part.mkdir(parents=True)
            merged.save_pretrained(part)
            processor.save_pretrained(part)
            _sync(part)
            os.replace(part, out)
    return out


@torch.no_grad()
def fold(model: Any) -> Any:
    """Add every LoRA of a ``PeftModel`` to the weight below it, in float32; returns the plain model."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, LoraLayer)]
    for module in layers:
        weight = module.get_base_layer().weight
        change = sum(module.get_delta_weight(name).float() for name in module.active_adapters)
        weight.copy_((weight.float() + change).to(weight.dtype))
    return model.unload()


def _sync(folder: Path) -> None:
    """Have every file of a folder on the disk before its name says that it is complete."""
    for file in folder.iterdir():
        with file.open("rb") as opened:
            os.fsync(opened.fileno())
