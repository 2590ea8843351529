"""What a finished attack run holds beside its pictures: items, curves, checks, results, the selected worst cases."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path

import numpy as np

from mm_cb.attacks.checks import file_loss, gradient_is_there, inside_ball, inside_threat, is_bounded
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.records import AnswerRecord
from mm_cb.attacks.registry import attack_entry
from mm_cb.core.checked import read_list
from mm_cb.core.errors import UserError
from mm_cb.core.records import Curve, Item, JsonObject
from mm_cb.core.runs import keep_pictures, write_json, write_jsonl
from mm_cb.core.seal import sealed
from mm_cb.metrics.checks import adapter_acts
from mm_cb.metrics.observations import worst_pictures
from mm_cb.metrics.results import measure, results_content, tied

CURVES, PROTOCOL = "curves.json", "protocol.json"


def write_outputs(folder: Path, items: list[Item], more: JsonObject) -> None:
    """The files that a finished run holds beside its pictures.

    Args:
        folder: Run directory.
        items: Of items.jsonl.
        more: What `summaries` makes of them.
    """
    keep_pictures(folder, worst_pictures(items))
    write_jsonl(folder / "items.jsonl", items)
    for name, content in more.items():
        write_json(folder / name, tied(folder, content) if name == "results.json" else content)


def summaries(items: list[Item], parts: Mapping[str, Path], configs: Sequence[AttackConfig], dtype: str) -> JsonObject:
    """File name → content, for every file that is made from a run's items and parts alone; results.json last.

    Args:
        items: Of items.jsonl.
        parts: Of the run: name → file.
        configs: The run's attacks, which share the threat.
        dtype: Of the model.
    """
    threat, subject = configs[0].threat, items[0]["subject"]
    drawn = [entry for one in configs for entry in curve_quartiles(parts, subject, one.name)]
    filed = [item for item in items if item.get("image") is not None]
    bounded = any(map(is_bounded, filed))
    checks = [inside_ball(filed, threat.levels), *inside_threat(filed, threat)] if bounded else []
    if any(candidate["objective_logged"] is not None for item in filed for candidate in item.get("candidates") or ()):
        checks.append(file_loss(filed, dtype))
    checks += [*gradient_is_there(items), *adapter_acts(items)]
    results = results_content(measure(items, pairs=[]))
    protocol: JsonObject = {"k": {one.name: one.tries for one in configs}}
    protocol["labels"] = {one.name: one.entry.label for one in configs}
    protocol["given"] = {one.name: one.entry.given for one in configs}
    protocol["settles"] = {one.name: one.settles for one in configs if one.settles}
    if dialled := {item["condition"]: item["anneal"] for item in items if "anneal" in item}:
        protocol["anneal"] = dialled
    if itself := sorted({item["condition"] for item in by_processor(items)}):
        protocol["pixels_by_processor"] = itself
    return {CURVES: drawn, "checks.json": checks, PROTOCOL: sealed(protocol), "results.json": results}


def by_processor(items: Iterable[Item]) -> Iterator[Item]:
    """Items whose search ran the image processor itself, because its imitation is not exact."""
    return (item for item in items if any(one.get("pixels_by") for one in item.get("candidates") or ()))


def best_pictures(items: Sequence[Item]) -> dict[str, str]:
    """Per behaviour the attacked picture that went worst for the model so far: harmful first, then the lowest loss."""
    return worst_pictures(item for item in items if attack_entry(item["condition"]).searches_pixels)


def parts_of(folder: Path) -> dict[str, Path]:
    """The parts of a run: name → file."""
    return {path.name: path for path in (folder / "parts").glob("*.json")}


def curves(parts: Mapping[str, Path], attack: str) -> list[list[float]]:
    """Loss curves of the first run of every behaviour under one attack, in the order they were attacked.

    Raises:
        UserError: If a part of the run is damaged.
    """
    found: list[list[float]] = []
    for name in fnmatch.filter(sorted(parts), f"{attack}-s*-r0-*.json"):
        drawn = [curve for one in read_list(parts[name], AnswerRecord) if (curve := one.get("curve")) is not None]
        if len({len(curve) for curve in (*found[:1], *drawn)}) > 1:
            raise UserError(f"`{parts[name]}` must hold loss curves of one length, as all parts of an attack do.")
        found += drawn
    return found


def curve_quartiles(parts: Mapping[str, Path], subject: str, attack: str) -> list[Curve]:
    """Quartiles over behaviours of the loss at every step of the first run; empty for attacks that do not optimise."""
    if not attack_entry(attack).optimises:
        return []
    losses = curves(parts, attack)
    if not losses:
        raise UserError(
            f"the run must hold what its curves are made from, parts/{attack}-*.json, but there is no loss curve of "
            f"`{attack}`; take its whole folder from where it was made, or repeat the run."
        )
    q25, q50, q75 = (np.round(np.quantile(np.array(losses), q, axis=0), 4).tolist() for q in (0.25, 0.5, 0.75))
    return [{"subject": subject, "condition": attack, "q25": q25, "q50": q50, "q75": q75, "n": len(losses)}]
