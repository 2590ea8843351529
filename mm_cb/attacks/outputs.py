"""What a finished attack run holds beside its pictures: items, curves, checks, results, the selected worst cases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from mm_cb.attacks.checks import file_loss, gradient_is_there, inside_ball, inside_threat
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.records import curves
from mm_cb.attacks.registry import attack_entry
from mm_cb.core.errors import UserError
from mm_cb.core.records import Curve, Item, JsonObject
from mm_cb.core.runs import keep_pictures, write_json, write_jsonl
from mm_cb.metrics.checks import adapter_acts
from mm_cb.metrics.observations import worst_pictures
from mm_cb.metrics.results import measure, results_content


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
        write_json(folder / name, content)


def summaries(
    items: list[Item], drawn: list[Curve], config: AttackConfig, k: Mapping[str, int], dtype: str
) -> JsonObject:
    """File name → content, for every file that is made from a run's items and curves alone; results.json last.

    Args:
        items: Of items.jsonl.
        drawn: Of curves.json.
        config: What all attacks of the run share: the threat.
        k: Attack → answers judged per behaviour at most.
        dtype: Of the model.
    """
    filed = [item for item in items if item.get("image") is not None]
    bounded = any(not item.get("outside_threat") for item in filed)
    checks = [inside_ball(filed, config.threat.levels), *inside_threat(filed, config.threat)] if bounded else []
    if any(candidate["objective_logged"] is not None for item in filed for candidate in item.get("candidates") or ()):
        checks.append(file_loss(filed, dtype))
    checks += [*gradient_is_there(items), *adapter_acts(items)]
    results = results_content(measure(items, pairs=[]))
    entries = {name: attack_entry(name) for name in k}
    protocol = {"k": dict(k), "labels": {name: entry.label for name, entry in entries.items()}}
    protocol["given"] = {name: entry.given for name, entry in entries.items()}
    protocol["settles"] = {name: entry.settles for name, entry in entries.items() if entry.settles}
    return {"curves.json": drawn, "checks.json": checks, "protocol.json": protocol, "results.json": results}


def best_pictures(items: Sequence[Item]) -> dict[str, str]:
    """Per behaviour the attacked picture that went worst for the model so far: harmful first, then the lowest loss."""
    return worst_pictures(item for item in items if attack_entry(item["condition"]).searches_pixels)


def curve_quartiles(folder: Path, subject: str, attack: str) -> list[Curve]:
    """Quartiles over behaviours of the loss at every step of the first run; empty for attacks that do not optimise."""
    return quartiles(curves(folder, attack), subject, attack) if attack_entry(attack).optimises else []


def quartiles(losses: Sequence[Sequence[float]], subject: str, attack: str) -> list[Curve]:
    """One entry of curves.json, from a curve per behaviour; their order does not matter."""
    if not losses:
        raise UserError(f"the run must hold what its curves are made from, but there is no loss curve of `{attack}`.")
    q25, q50, q75 = (np.round(np.quantile(np.array(losses), q, axis=0), 4).tolist() for q in (0.25, 0.5, 0.75))
    return [{"subject": subject, "condition": attack, "q25": q25, "q50": q50, "q75": q75, "n": len(losses)}]
