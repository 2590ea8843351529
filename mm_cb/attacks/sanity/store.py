"""What the battery found of one model, as a file to go on from (no finished model is measured again) and as JSON."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from mm_cb.attacks.sanity.measure import Filed, Measured
from mm_cb.core.files import write_bytes

_ARMS = ("losses", "emitted", "curves", "norms", "images")
_SINGLE = ("clean", "zero_share", "ratios", "suspicious", "unsteady")
_FILED = ("losses", "emitted", "distances")
_PLAIN = ("silent", "about", "path_gap", "path_allowed", "repeat_gap", "error")


def measured_once(path: Path, measure: Callable[[], Measured]) -> Measured:
    """The measurements in ``path``; made and written in one step if they are not there yet."""
    if path.is_file():
        try:
            return _unpacked(load_safetensors(path.read_bytes()))
        except (SafetensorError, KeyError, ValueError, TypeError):
            pass  # written by no version of this; measure again
    found = measure()
    path.parent.mkdir(parents=True, exist_ok=True)
    write_bytes(path, save_safetensors(_packed(found)))
    return found


def _packed(found: Measured) -> dict[str, Tensor]:
    """Of the pictures only the white-box ones, which the other model is shown."""
    flat = {f"{field}/{arm}": value for field in _ARMS[:-1] for arm, value in getattr(found, field).items()}
    flat |= {f"images/{arm}": value for arm, value in found.images.items() if arm == "pgd"}
    flat |= {name: getattr(found, name) for name in _SINGLE if getattr(found, name) is not None}
    for epsilon, (losses, emitted) in found.sweep.items():
        flat |= {f"sweep/{epsilon}/losses": losses, f"sweep/{epsilon}/emitted": emitted}
    for arm, files in found.files.items():
        flat |= {f"files/{arm}/{name}": getattr(files, name) for name in _FILED}
    rest = {name: getattr(found, name) for name in _PLAIN} | {"sweep": list(found.sweep), "order": list(flat)}
    rest["files"] = {arm: files.names for arm, files in found.files.items()}
    flat["plain"] = torch.frombuffer(bytearray(json.dumps(rest).encode()), dtype=torch.uint8)
    return {name: value.detach().cpu().clone().contiguous() for name, value in flat.items()}


def _unpacked(flat: dict[str, Tensor]) -> Measured:
    plain = json.loads(bytes(flat.pop("plain").tolist()))
    flat = {name: flat[name] for name in plain.pop("order")}  # the file sorts them; battery.json keeps their order
    sweep = {e: (flat[f"sweep/{e}/losses"], flat[f"sweep/{e}/emitted"]) for e in plain.pop("sweep")}
    files = {
        arm: Filed(names, **{name: flat[f"files/{arm}/{name}"] for name in _FILED})
        for arm, names in plain.pop("files").items()
    }
    fields: dict[str, Any] = {
        field: {name.partition("/")[2]: value for name, value in flat.items() if name.startswith(f"{field}/")}
        for field in _ARMS
    }
    fields |= {name: flat.get(name) for name in _SINGLE}
    return Measured(**fields, sweep=sweep, files=files, **plain)


def plain(found: Measured) -> Mapping[str, Any]:
    """The numbers as JSON values; what is no number, as an overflow leaves behind, is None."""
    return {
        "losses": {arm: _rounded(values) for arm, values in found.losses.items()},
        "emitted": {arm: values.tolist() for arm, values in found.emitted.items()},
        "sweep": [
            {"epsilon": epsilon, "losses": _rounded(losses), "emitted": emitted.tolist()}
            for epsilon, (losses, emitted) in found.sweep.items()
        ],
        "files": {arm: _lines(files) for arm, files in found.files.items()},
        "curves": {arm: [_rounded(row) for row in curve.T] for arm, curve in found.curves.items()},
        "gradient_norms": {arm: [_significant(row) for row in norms.T] for arm, norms in found.norms.items()},
        "silent": found.silent,
        "path_gap": _finite(found.path_gap),
        "repeat_gap": _finite(found.repeat_gap),
        "unsteady": None if found.unsteady is None else _rounded(found.unsteady),
        "zero_share": None if found.zero_share is None else _rounded(found.zero_share),
        "ratios": None if found.ratios is None else [_rounded(row.nan_to_num(0)) for row in found.ratios],
        "error": found.error,
    }


def _lines(files: Filed) -> list[dict[str, Any]]:
    judged = zip(files.losses.tolist(), files.emitted.tolist(), files.distances.tolist(), strict=True)
    names: list[str | None] = [*files.names] or [None] * len(files.losses)
    return [
        {"image": name, "loss": _finite(loss, 5), "emitted": emitted, "distance": distance}
        for name, (loss, emitted, distance) in zip(names, judged, strict=True)
    ]


def _finite(value: float, digits: int | None = None) -> float | None:
    if not math.isfinite(value):
        return None
    return value if digits is None else round(value, digits)


def _rounded(values: Tensor) -> list[float | None]:
    return [_finite(value, 4) for value in values.tolist()]


def _significant(values: Tensor) -> list[float | None]:
    return [None if not math.isfinite(value) else float(f"{value:.3g}") for value in values.tolist()]
