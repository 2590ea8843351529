"""Part of ``mm-cb attack verify``: everything that a run counts, made again from its items and its pictures' JSON."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import zip_longest
from pathlib import Path
from typing import Any

from mm_cb.attacks.options import Options
from mm_cb.attacks.outputs import curve_quartiles, quartiles, summaries
from mm_cb.attacks.records import facts, stopped_early
from mm_cb.attacks.registry import OPTIMISED, Attack, Protocol
from mm_cb.core.errors import UserError
from mm_cb.core.paths import safe_id
from mm_cb.core.runs import read_jsonl
from mm_cb.inference.source import subject_name

_NOTHING = "nothing"


def check_outputs(folder: Path, artefacts: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> None:
    """Settings are those of run.json; results, checks, curves and k what the functions that wrote them make again.

    Raises:
        UserError: Naming the file and the first key that differs.
    """
    try:
        recipe = run["recipe"]
        attacks, options = attacks_of(run)
        protocol = options.protocol()
        _check_settings(folder, artefacts, recipe, attacks, options)
        items, told = list(read_jsonl(folder / "items.jsonl")), {a["image"]: a for a in artefacts}
        for item in items:
            attack = attacks[item["condition"]]
            said = [_facts(item, attack, protocol, recipe, told.get(one["image"], item)) for one in item["candidates"]]
            for made in (*said, _shown(item, attack, protocol, told.get(item["image"], item))):
                stated = {key: item.get(key, _NOTHING) for key in made}
                compare(folder / "items.jsonl", stated, made, f"{item['id']}, {item['condition']}")
        drawn = [entry for name in attacks for entry in _curves(folder, artefacts, name)]
        k = {name: facts(attack, protocol)["k"] for name, attack in attacks.items()}
        dtype, threat_model = recipe.get("dtype", "float32"), options.threat_model
        again = summaries(items, drawn, epsilon=recipe["epsilon"], k=k, threat_model=threat_model, dtype=dtype)
        if _by_proxy(folder, items):
            for row in again["results.json"]["measurements"]:
                row["counts"] |= {"proxy": row["n"]} if row["metric"] == "compliance" else {}
        for name, made in again.items():
            compare(folder / name, json.loads((folder / name).read_bytes()), json.loads(json.dumps(made)))
    except (OSError, KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"`{folder}` must be as `mm-cb attack` wrote it: {type(error).__name__}, {error}.") from error


def attacks_of(run: Mapping[str, Any]) -> tuple[dict[str, Attack], Options]:
    """The attacks that a run.json states, by name, but for their canvas; and the finer settings."""
    recipe = run["recipe"]
    options = Options(**recipe.get("options", {}))
    budget = recipe["epsilon"], recipe["steps"], recipe["restarts"], run["seed"]
    return {name: options.attack(name, *budget, (1, 1)) for name in recipe["attack"].split(",")}, options


def _check_settings(
    folder: Path,
    artefacts: Sequence[Mapping[str, Any]],
    recipe: Mapping[str, Any],
    attacks: Mapping[str, Attack],
    options: Options,
) -> None:
    """Every picture was made and judged as run.json states: whatever its JSON says of that, run.json decides."""
    system, adapter = recipe.get("system"), recipe.get("adapter")
    subject = {"name": subject_name(adapter, system), "adapted": adapter is not None, "system": system}
    protocol = {key: value for key, value in asdict(options.protocol()).items() if key != "checkpoint_seconds"}
    searched = [name for name, attack in attacks.items() if attack.kind.searches_pixels]
    for artefact in artefacts:
        attack = attacks[artefact["attack"]["name"]]
        stated = {
            "attack": asdict(attack) | {"canvas": artefact["attack"]["canvas"]},
            "protocol": protocol,
            "subject": subject,
            "dtype": recipe.get("dtype", "float32"),
            "device": recipe["device"],
            "chain": options.chain and attack.name in searched[1:] and artefact["restart"] == 0,
        }
        held = {key: artefact[key] for key in ("attack", "protocol", "subject", "dtype")}
        held["attack"] = {"threat_model": "linf"} | held["attack"]  # the only one that earlier runs had
        held |= {"device": artefact["device"].partition(":")[0], "chain": artefact.get("start") is not None}
        found = _first_difference(stated, held, "")
        if found is not None:
            raise UserError(
                f"`{folder / 'run.json'}` states {found[0].rpartition('.')[2]} {found[1]!s:.60}, the JSON beside "
                f"`{artefact['image']}` {found[2]!s:.60}. Do not use the run's numbers; run the attack again."
            )


def _facts(
    item: Mapping[str, Any], attack: Attack, protocol: Protocol, recipe: Mapping[str, Any], artefact: Mapping[str, Any]
) -> dict[str, Any]:
    """What an item must say of the attack on it and of each of its pictures."""
    made = facts(attack, protocol) | {key: artefact[key] for key in ("id", "prompt", "target", "clean_image")}
    made["condition"] = artefact.get("attack", {"name": item["condition"]})["name"]
    return made | {"seed": attack.seed, "subject": subject_name(recipe.get("adapter"), recipe.get("system"))}


def _shown(item: Mapping[str, Any], attack: Attack, protocol: Protocol, artefact: Mapping[str, Any]) -> dict[str, Any]:
    """What an item must say of the picture it shows, while that is the worst by the run's own verdict."""
    if "judge" in item:
        return {}
    made = {"stopped_early": stopped_early(item["candidates"], attack.steps)} if protocol.early_stop else {}
    return made | {"loss_clean": artefact["loss_clean"]}


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


def compare(path: Path, stated: Any, made: Any, where: str = "") -> None:
    """Refuse a file that states another JSON value than the one made again.

    Raises:
        UserError: Naming the first key that differs.
    """
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
