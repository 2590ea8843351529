"""What the battery found of one model as JSON: a file to go on from, and the numbers of battery.json."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_cb.attacks.sanity.measure import Filed, Measured
from mm_cb.inference.cached_chunks import once


def measured_once(path: Path, measure: Callable[[], Measured]) -> Measured:
    """The measurements in ``path``; made and written in one step if they are not there yet."""
    held = once(path, lambda: as_json(measure()))
    files = {
        arm: Filed(f["names"], *(_tensor(f[k]) for k in ("losses", "emitted", "distances")))
        for arm, f in held.pop("files").items()
    }
    return Measured(**{key: _read(value) for key, value in held.items()}, files=files)


def as_json(found: Measured, digits: int | None = None) -> dict[str, Any]:
    """Every number, to ``digits`` significant ones (None = all); what is no number, as an overflow leaves, is None."""
    return {field.name: _plain(getattr(found, field.name), digits) for field in fields(Measured)}


def _plain(value: Any, digits: int | None) -> Any:
    if isinstance(value, Filed):
        return {field.name: _plain(getattr(value, field.name), digits) for field in fields(Filed)}
    if isinstance(value, dict):
        return {key: _plain(one, digits) for key, one in value.items()}
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, list):
        return [_plain(one, digits) for one in value]
    if isinstance(value, float):
        if not math.isfinite(value):
            return None
        return value if digits is None else float(f"{value:.{digits}g}")
    return value


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _read(one) for key, one in value.items()}
    return _tensor(value) if isinstance(value, list) else value


def _tensor(values: list[Any]) -> Tensor:
    """A list of numbers, or of lists of them; None is NaN."""
    if values and isinstance(values[0], list):
        return torch.stack([_tensor(row) for row in values])
    return torch.tensor([float("nan") if value is None else value for value in values])
