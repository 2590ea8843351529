"""Part of ``mm-cb attack verify``: everything that a run counts, made again from its items and its pictures' JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mm_cb.errors import UserError
from mm_cb.evaluation.attack_options import Options
from mm_cb.evaluation.attacks import OPTIMISED, Attack, Protocol
from mm_cb.evaluation.outputs import curve_quartiles, quartiles, summaries
from mm_cb.evaluation.records import facts, stopped_early
from mm_cb.paths import safe_id
from mm_cb.runs import read_jsonl

_NOTHING = "nothing"


def check_outputs(folder: Path, artefacts: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any]) -> None:
    """Results, checks, curves and k are those that the functions which wrote them make again, key by key.

    Raises:
        UserError: Naming the file and the first key that differs.
    """
    try:
        options = Options(**recipe.get("options", {}))
        budget = recipe["epsilon"], recipe["steps"], recipe["restarts"]
        attacks = {name: options.attack(name, *budget, 0, (1, 1)) for name in recipe["attack"].split(",")}
        protocol = options.protocol()
        _check_budget(folder, artefacts, recipe, protocol)
        items, told = list(read_jsonl(folder / "items.jsonl")), {a["image"]: a for a in artefacts}
        for item in items:
            made = _facts(item, attacks[item["condition"]], protocol, told.get(item["image"], item))
            stated = {key: item.get(key, _NOTHING) for key in made}
            _compare(folder / "items.jsonl", stated, made, f"{item['id']}, {item['condition']}")
        drawn = [entry for name in attacks for entry in _curves(folder, artefacts, name)]
        k = {name: facts(attack, protocol)["k"] for name, attack in attacks.items()}
        again = summaries(items, drawn, epsilon=recipe["epsilon"], k=k, dtype=recipe.get("dtype", "float32"))
        if _by_proxy(folder, items):
            for row in again["results.json"]["measurements"]:
                row["counts"] |= {"proxy": row["n"]} if row["metric"] == "compliance" else {}
        for name, made in again.items():
            _compare(folder / name, json.loads((folder / name).read_bytes()), json.loads(json.dumps(made)))
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"`{folder}` must be as `mm-cb attack` wrote it: {type(error).__name__}, {error}.") from error


def _check_budget(
    folder: Path, artefacts: Sequence[Mapping[str, Any]], recipe: Mapping[str, Any], protocol: Protocol
) -> None:
    """Every picture was made and judged as run.json states."""
    stated = {key: recipe.get(key) for key in ("epsilon", "steps", "restarts", "dtype")} | asdict(protocol)
    for artefact in artefacts:
        for key, value in (artefact["protocol"] | artefact["attack"] | {"dtype": artefact["dtype"]}).items():
            if key in stated and value != stated[key]:
                raise UserError(
                    f"`{folder / 'run.json'}` states {key} {stated[key]}, the JSON beside `{artefact['image']}` "
                    f"{value}. Do not use the run's numbers; run the attack again."
                )


def _facts(item: Mapping[str, Any], attack: Attack, protocol: Protocol, artefact: Mapping[str, Any]) -> dict[str, Any]:
    """What an item must say of its attack and its picture; the last two only while it is shown at the run's verdict."""
    made = facts(attack, protocol) | {key: artefact[key] for key in ("id", "prompt", "target", "clean_image")}
    if "judge" not in item:
        made["loss_clean"] = artefact["loss_clean"]
        made |= {"stopped_early": stopped_early(item["candidates"], attack.steps)} if protocol.early_stop else {}
    return made


def _curves(folder: Path, artefacts: Sequence[Mapping[str, Any]], name: str) -> list[dict[str, Any]]:
    """An attack's entry of curves.json, from its pictures' JSON; a relaxation has none, its curves are its parts'."""
    own = [a for a in artefacts if a["attack"]["name"] == name]
    if name not in OPTIMISED or not own:
        return curve_quartiles(folder, artefacts[0]["subject"]["name"], name)
    losses = [a["curve"] for a in own if a["restart"] == 0 and a["curve"] is not None]
    return quartiles(losses, own[0]["subject"]["name"], name)


def _by_proxy(folder: Path, items: Sequence[Mapping[str, Any]]) -> bool:
    """Whether the verdicts are another judge's which only stands in for the real one: their rows say so."""
    judges = {item["judge"] for item in items if "judge" in item}
    files = [folder / "judgements" / f"{safe_id(judge)}.json" for judge in judges]
    return any(json.loads(file.read_bytes())["source"].get("proxy") for file in files)


def _compare(path: Path, stated: Any, made: Any, where: str = "") -> None:
    found = _first_difference(stated, made, where)
    if found is not None:
        raise UserError(
            f"`{path}` must say what the run's items and its pictures' JSON hold, but for `{found[0]}` it says "
            f"{found[1]!r:.60}, made again it is {found[2]!r:.60}. Do not use the run's numbers."
        )


def _first_difference(stated: Any, made: Any, where: str) -> tuple[str, Any, Any] | None:
    """Key, stated and made value of the first place in which two JSON values differ."""
    if isinstance(stated, dict) and isinstance(made, dict):
        keys = (*made, *sorted(stated.keys() - made.keys()))
        parts = [(stated.get(key, _NOTHING), made.get(key, _NOTHING), f"{where}.{key}".lstrip(".")) for key in keys]
    elif isinstance(stated, list) and isinstance(made, list):
        pairs = enumerate(zip_longest(stated, made, fillvalue=_NOTHING))
        parts = [(one, other, f"{where}[{_name(other) or _name(one) or i}]") for i, (one, other) in pairs]
    else:
        return None if stated == made else (where, stated, made)
    return next((found for part in parts if (found := _first_difference(*part))), None)


def _name(row: Any) -> str:
    """What a row of results.json, checks.json or curves.json is about."""
    keys = ("name", "metric", "condition", "subject", "split")
    return ", ".join(str(row[key]) for key in keys if key in row) if isinstance(row, dict) else ""
