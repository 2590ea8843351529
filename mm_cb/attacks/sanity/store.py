"""What the battery found of one model as JSON: a file to go on from, and the numbers of battery.json."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mm_cb.attacks.sanity.measure import Filed, Measured
from mm_cb.core.records import JsonObject
from mm_cb.inference.cached_chunks import once


def measured_once(path: Path, measure: Callable[[], Measured]) -> Measured:
    """The measurements in ``path``; made and written in one step if they are not there yet."""
    held = once(path, lambda: as_json(measure()))
    held |= {key: math.nan for key in ("path_gap", "path_allowed", "repeat_gap") if held[key] is None}
    arms = {arm: Filed(names=one.pop("names"), **_read(one)) for arm, one in held.pop("arms").items()}
    return Measured(arms=arms, **_read(held))


def as_json(found: Measured | Filed) -> JsonObject:
    """Every number; what is none, as an overflow leaves, is None."""
    return {key: _plain(value) for key, value in vars(found).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, Filed):
        return as_json(value)
    if isinstance(value, dict):
        return {key: _plain(one) for key, one in value.items()}
    if isinstance(value, Tensor | list):
        return [_plain(one) for one in (value.tolist() if isinstance(value, Tensor) else value)]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _read(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _read(one) for key, one in value.items()}
    return _tensor(value) if isinstance(value, list) else value


def _tensor(values: list[Any]) -> Tensor:
    """A list of numbers, or of lists of them; None is NaN."""
    if values and isinstance(values[0], list):
        return torch.stack([_tensor(row) for row in values])
    return torch.tensor([float("nan") if value is None else value for value in values])
