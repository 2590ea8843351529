"""Part of ``mm-cb attack verify``: whether a run holds every try that it states, on every behaviour it was given."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from statistics import fmean
from typing import Any

from mm_cb.attacks.objectives.universal import trained_on
from mm_cb.attacks.registry import Attack, Protocol, runs
from mm_cb.attacks.shards import Shard
from mm_cb.attacks.verify.answers import as_run, kept_behaviors
from mm_cb.attacks.verify.outputs import attacks_of, compare
from mm_cb.core.embedded import embedded
from mm_cb.core.errors import UserError
from mm_cb.core.paths import safe_id
from mm_cb.core.runs import file_sha256, read_jsonl
from mm_cb.data.behaviors_file import KEPT_AS, Behavior
from mm_cb.inference.tolerance import tolerance

Try = tuple[int, int | None, int | None]
"""Restart, iterate (None = the selected picture), sample (None = the greedy answer)."""


_ROUNDED = 0.5e-4 + 0.5e-5 + 1e-9
"""How far a loss that is written with five digits may lie from the same loss in a curve, which has four."""


def check_tries(folder: Path, artefacts: Sequence[Mapping[str, Any]], run: Mapping[str, Any]) -> None:
    """Every behaviour of the run's behaviours file under every attack, each with all its tries and no others.

    Raises:
        UserError: If the folder holds no copy of that file, or something is missing, added or named otherwise.
    """
    try:
        attacks, options = attacks_of(run)
        asked = _asked(folder, run)
        path = folder / "items.jsonl"
        items = as_run(folder, read_jsonl(path))
        found = [(item["condition"], item["id"]) for item in items]
        for one, wanted in zip_longest(found, [(name, b.id) for name in attacks for b in asked]):
            if one != wanted:
                raise UserError(
                    f"`{path}` must hold every behaviour of {KEPT_AS} under every attack, in order: expected {wanted}, "
                    f"got {one}. Do not use the run's numbers; run the attack again."
                )
        _check_curves(folder, artefacts, attacks, asked)
        curves = {(a["id"], a["attack"]["name"], a["restart"]): a for a in artefacts if a["curve"] is not None}
        for item, behavior in zip(items, asked * len(attacks), strict=True):
            attack = attacks[item["condition"]]
            made = _said(attack, asked, behavior)
            compare(path, {key: item.get(key) for key in made}, made, behavior.id)
            _check_item(path, item, attack, options.protocol(), curves, asked[0] if attack.universal else behavior)
            judged = {c["outcome"] for c in item["candidates"]} != {"not_judged"}
            if judged and embedded(run["recipe"]["model"]) is None:
                raise UserError(
                    f"`{path}`: only `mm-cb judge` gives verdicts on this model, `{behavior.id}` has others."
                )
    except (OSError, KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise UserError(f"`{folder}` must be as `mm-cb attack` wrote it: {type(error).__name__}, {error}.") from error


def _asked(folder: Path, run: Mapping[str, Any]) -> list[Behavior]:
    """The behaviours that this run, or this shard of one, attacked."""
    path = folder / KEPT_AS
    if not path.is_file() or file_sha256(path) not in run["inputs"].values():
        raise UserError(
            f"`{path}` must be the behaviours file whose SHA-256 is in run.json; without it nobody can tell whether a "
            "behaviour was left out. All else agrees. Earlier runs keep none: copy yours there."
        )
    asked = kept_behaviors(folder)
    shard = run["recipe"].get("shard")
    return asked if shard is None else Shard.parse(shard).part(asked)


def _check_curves(
    folder: Path, artefacts: Sequence[Mapping[str, Any]], attacks: Mapping[str, Attack], asked: Sequence[Behavior]
) -> None:
    """A run's one curve has its length, and its lowest, its iterates' and its first value are the pictures' losses."""
    searches: dict[tuple[Any, ...], list[Mapping[str, Any]]] = defaultdict(list)
    for a in artefacts:
        searches[a["attack"]["name"], a["restart"], attacks[a["attack"]["name"]].universal or a["id"]].append(a)
    for (name, restart, _), own in searches.items():
        attack = attacks[name]
        curves = [a["curve"] for a in own if a["curve"] is not None]
        made_for = [b.id for b in asked[: trained_on(attack, asked) if attack.universal else None]]
        by_step: dict[int | None, list[Mapping[str, Any]]] = defaultdict(list)
        for a in own:
            by_step[a.get("iterate")] += [a] if a["id"] in made_for else []
        wrong = [len(curve) for curve in curves] != ([attack.steps + 1] if attack.kind.loss else [])
        for step, of in by_step.items() if curves and not wrong else ():
            lowest = [min(curves[0]), *(curves[0][-1:] if of[0]["protocol"]["early_stop"] else [])]
            wrong |= not _near(of, "objective_logged", lowest if step is None else [curves[0][step]])
            from_clean = restart == 0 and "start" not in of[0] and attack.threat.name != "blank"
            if step is None and from_clean and of[0]["objective"] == "TargetObjective":
                wrong |= not _near(of, "loss_clean", [curves[0][0]])
        if wrong:
            raise UserError(
                f"`{folder / own[0]['image']}`: the loss curve of its run, in the JSON beside it or beside the run's "
                "selected picture, is not that of its pictures. Do not use the run's numbers; run the attack again."
            )
        _check_selected(folder, own, curves[0] if curves else [], attack, made_for)


def _check_selected(
    folder: Path,
    own: Sequence[Mapping[str, Any]],
    curve: Sequence[float],
    attack: Attack,
    made_for: Sequence[str],
) -> None:
    """Selected pictures say at which step of their run's one curve they were found; earlier runs do not say it."""
    said = [a for a in own if "selected_step" in a]
    if not said:
        return
    step, selected = said[0]["selected_step"], [a for a in own if a.get("iterate") is None]
    right = said == selected and all(a["selected_step"] == step for a in said)
    if right := right and type(step) is int and 0 <= step < len(curve):
        loss = fmean(a["objective_logged"] for a in selected if a["id"] in made_for)
        allowed = tolerance(loss, own[0]["dtype"]) if attack.universal else _ROUNDED
        right = abs(loss - curve[step]) <= allowed
    if not right:
        raise UserError(
            f"`{folder / said[0]['image']}`: the `selected_step` in the JSON beside it, {step!r:.60}, is not the step "
            "at which its run's curve has the selected picture's loss. Do not use the run's numbers; run the attack "
            "again."
        )


def _near(artefacts: Sequence[Mapping[str, Any]], key: str, values: Sequence[float]) -> bool:
    """Whether the mean of a recorded loss is one of a curve's values."""
    mean = fmean(a[key] for a in artefacts)
    return any(abs(mean - value) <= tolerance(mean, artefacts[0]["dtype"]) for value in values)


def _said(attack: Attack, asked: Sequence[Behavior], behavior: Behavior) -> dict[str, Any]:
    """What an item must say of its behaviour."""
    made = {key: getattr(behavior, key) for key in ("prompt", "target", "category", "split")}
    made["benign_target"] = behavior.extra.get("benign_target") and True
    if attack.universal:
        made_for = asked.index(behavior) < trained_on(attack, asked)
        made["part"] = "made_for" if made_for else "picture_held_out"
    return made


def _check_item(
    path: Path,
    item: Mapping[str, Any],
    attack: Attack,
    protocol: Protocol,
    curves: Mapping[tuple[str, str, int], Mapping[str, Any]],
    searched: Behavior,
) -> None:
    """All tries once, each at its picture; ``searched`` is the behaviour whose picture's JSON holds the curves."""
    found: list[Try] = [(c["restart"], c.get("iterate"), c.get("sample")) for c in item["candidates"]]
    wanted: list[Try] = []
    samples = () if attack.kind.relaxation else range(1, protocol.samples + 1)
    for restart in range(runs(attack, protocol)):
        steps: list[int | None] = [None]
        if attack.kind.searches_pixels:
            there = {step for run, step, _ in found if run == restart}
            steps += _kept(curves.get((searched.id, attack.name, restart)), attack, protocol, there)
        wanted += [(restart, step, sample) for step in steps for sample in (None, *samples)]
        if not attack.universal and any(
            c["restart"] == restart and c["outcome"] == "harmful" for c in item["candidates"]
        ):
            break  # broken, so it was not attacked again
    wrong = [one for one in (*wanted, *found) if found.count(one) != wanted.count(one)]
    if wrong:
        restart, step, sample = wrong[0]
        raise UserError(
            f"`{path}`: `{item['id']}` under {attack.name} must hold every try of the run once, not so: restart "
            f"{restart}, iterate {step}, sample {sample}. Do not use the run's numbers; run the attack again."
        )
    for one, (restart, step, _) in zip(item["candidates"], found, strict=True):
        name = f"{attack.name}-s{attack.seed}-r{restart}" + ("" if step is None else f"-i{step}")
        image = None if attack.kind.relaxation else f"images/{safe_id(item['id'])}/{name}.png"
        compare(path, one["image"], image, f"{item['id']}, {name}")


def _kept(artefact: Mapping[str, Any] | None, attack: Attack, protocol: Protocol, found: set[int | None]) -> list[int]:
    """The iterates of a run that must be there: one may be missing only where the loss says that nothing moved."""
    kept: list[int] = []
    for step in protocol.moments(attack.steps):
        still = False
        if artefact is not None and kept:
            now, before = artefact["curve"][step], artefact["curve"][kept[-1]]
            still = abs(now - before) <= tolerance(now, artefact["dtype"])
        if step in found or not still:
            kept.append(step)
    return kept
