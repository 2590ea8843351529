"""Whether runs may stand side by side: the same items under the same settings, or a refusal that says what differs."""

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import TypedDict

from mm_cb.core.closing import typed
from mm_cb.core.compatibility import counts_in_worst_case
from mm_cb.core.errors import UserError
from mm_cb.core.paths import safe_id
from mm_cb.core.records import Item
from mm_cb.core.runs import flatten
from mm_cb.judges.stored_verdicts import FOLDER, source_of
from mm_cb.metrics.table import judged_as
from mm_cb.metrics.table import metric as metric_of
from mm_cb.report.load import RunFiles

WHO = ("model", "adapter", "base", "probe", "system", "subject")
"""Recipe fields that say who was measured: between subjects they differ, inside one they must not."""
FREE = ("batch", "device", "shard", "concurrency", "timeout", "attack")
"""Fields that decide how fast and where, and the list of a run's attacks, which the conditions of its items name."""
STORED = ("responses", "predictions", "reviews")
"""Fields that name stored answers of one subject: their content differs between subjects, as it should."""
_OF_IMPORTED = ("prompts", "prompts_each")
"""Options that imported prompts alone read."""
AS_RUN = "as run"
BATTERY = "attack check"
_NAMED = 4
_ABSENT = "absent"


def refuse_unlike(runs: Sequence[RunFiles]) -> None:
    """Refuse runs that make no comparison.

    Raises:
        UserError: If two runs measured the same thing, a subject is not one model throughout, or runs that would be
            compared differ in settings, seed or data.
    """
    _refuse_overlap(runs)
    _refuse_mixed_subjects(runs)
    _refuse_other_settings(runs)
    _refuse_other_rules(runs)


def _refuse_overlap(runs: Sequence[RunFiles]) -> None:
    seen: dict[tuple[str, ...], RunFiles] = {}
    for run in runs:
        for item in run.items:
            key = item["subject"], item["metric"], item["condition"], item["id"]
            if (other := seen.setdefault(key, run)) is not run:
                raise UserError(_overlap(other, run, *key))


def _overlap(one: RunFiles, other: RunFiles, subject: str, metric: str, condition: str, id: str) -> str:
    """What to say of two runs that hold the same item: what differs between them, and what can be done."""
    said = (
        f"`{one.folder}` and `{other.folder}` must not measure the same thing, but both hold `{subject}`, {metric}, "
        f"{condition}, item `{id}`"
    )
    differing = _differences(*(_settings(run, metric, condition) | who(run) for run in (one, other)))
    if not differing:
        return f"{said}, by the same settings; give one of them."
    named = all(run.run["command"] == "eval" for run in (one, other))
    apart = ", or name one of the models otherwise (`--subject NAME` of mm-cb eval and score)" if named else ""
    return f"{said}, and differ in {differing}: a page shows each once; report them apart{apart}."


def _refuse_mixed_subjects(runs: Sequence[RunFiles]) -> None:
    """One subject is one model with one adapter, by content where files were hashed, else by name."""
    first: dict[str, RunFiles] = {}
    for run in runs:
        for subject in sorted({item["subject"] for item in run.items}):
            other = first.setdefault(subject, run)
            if differing := _differences(who(other), who(run)):
                raise UserError(
                    f"`{subject}` must be one model in all runs, but `{other.folder}` and `{run.folder}` differ in "
                    f"{differing}; report them apart."
                )
    base = first.get("base")
    batteries = [(BATTERY, run) for run in runs if run.run["command"] == BATTERY]
    for subject, run in [*first.items(), *batteries]:
        if base is None or not run.run["recipe"].get("adapter"):
            continue
        below, above = ({k: v for k, v in who(r).items() if _of_base(k)} for r in (base, run))
        shared = below.keys() & above.keys()
        if differing := _differences({k: below[k] for k in shared}, {k: above[k] for k in shared}):
            raise UserError(
                f"`{subject}` must carry its adapter on the base that it is compared with, but `{base.folder}` and "
                f"`{run.folder}` differ in {differing}."
            )


def _of_base(key: str) -> bool:
    return key == "model" or (key.startswith("weights ") and not any(part in key for part in ("adapter", "probe")))


def who(run: RunFiles) -> dict[str, object]:
    """What says which model and which adapter was measured."""
    recipe = run.run["recipe"]
    weights = {f"weights {name}": digest for name, digest in run.run["inputs"].items() if _is_weights(name)}
    named = {key: recipe.get(key) for key in WHO if key != "subject"}  # which is the name that they share
    for part in ("adapter", "probe"):
        if any(part in key for key in weights):
            named[part] = "hashed"  # its path may be written in several ways, its content may not
    if any(_of_base(key) for key in weights):
        named.pop("model", None)
        named.pop("base", None)
    return named | weights


def _is_weights(name: str) -> bool:
    return name.endswith(".safetensors")


def _refuse_other_settings(runs: Sequence[RunFiles]) -> None:
    """Same settings, seed and data for every subject under one condition; same data and budget for all attacks."""
    by_condition: dict[tuple[str, str], list[RunFiles]] = defaultdict(list)
    attacks: list[RunFiles] = []
    for run in runs:
        for metric, condition in _conditions(run):
            by_condition[metric, condition].append(run)
            if metric == "compliance" and run not in attacks:
                attacks.append(run)
    for (metric, condition), found in sorted(by_condition.items()):
        judged = [
            {"judge": judges_of(i for i in run.items if (i["metric"], i["condition"]) == (metric, condition))}
            for run in found
        ]
        for run, judge in zip(found[1:], judged[1:], strict=True):
            first = _settings(found[0], metric, condition) | judged[0]
            second = _settings(run, metric, condition) | judge
            _refuse(f"{metric}, {condition}", found[0], run, first, second)
    for run in attacks[1:]:
        _refuse("compliance", attacks[0], run, _data(attacks[0]), _data(run))
    budgets = [run for run in attacks if any(_needs_budget(item) for item in run.items)]
    for run in budgets[1:]:
        _refuse("the placebo and the worst case", budgets[0], run, budget(budgets[0]), budget(run))


def _needs_budget(item: Item) -> bool:
    """Whether an item depends on the attack's budget; the placebo of another budget is no placebo."""
    return item["metric"] == "compliance" and (item["condition"] == "noise" or counts_in_worst_case(item))


def _refuse(
    what: str, first: RunFiles, second: RunFiles, held: Mapping[str, object], other: Mapping[str, object]
) -> None:
    if differing := _differences(held, other):
        if not _differences({**held, "judge": ""}, {**other, "judge": ""}):  # nothing has to be run again
            by = [" and ".join(map(str, of["judge"])) for of in (held, other) if isinstance(of["judge"], list)]
            raise UserError(
                f"runs that are compared must be judged by one judge ({what}), but `{first.folder}` is judged by "
                f"{by[0]} and `{second.folder}` by {by[1]}; give both to `mm-cb judge RUN --judge NAME`."
            )
        raise UserError(
            f"runs that are compared must have the same settings and data ({what}), but `{first.folder}` and "
            f"`{second.folder}` differ in {differing}; repeat one of them, or report them apart."
        )


def _settings(run: RunFiles, metric: str, condition: str) -> dict[str, object]:
    """Everything that decides a metric's number under a condition beside who is measured."""
    recipe = dict(run.run["recipe"])
    recipe["annealing"] = (recipe.get("annealing") or {}).get(condition)  # that of other attacks decides nothing here
    if condition != "imported":  # nor do prompts that only that one sends
        recipe["options"] = {k: v for k, v in (recipe.get("options") or {}).items() if k not in _OF_IMPORTED}
    recipe["endpoint"] = bool(recipe.get("endpoint"))  # the address says who, whether there is one says how
    flat = flatten({key: value for key, value in recipe.items() if key not in (*WHO, *STORED)})
    kept = {key: value for key, value in flat.items() if key.rpartition(".")[2] not in FREE}
    seed = {"seed": run.run["seed"]} if metric_of(metric).seeded else {}
    return {**kept, **seed, **(_files(run) if condition == "imported" else _data(run))}


def judges_of(items: Iterable[Item]) -> list[str]:
    """Who gave the verdicts: ``as run`` is the judge that the run itself had, if any."""
    return sorted({str(item.get("judge") or AS_RUN) for item in items})


def _refuse_other_rules(runs: Sequence[RunFiles]) -> None:
    """One judge is one rule throughout: its model, prompt, labels, pictures and file decide what a verdict means."""
    first: dict[tuple[str, str], tuple[RunFiles, Mapping[str, object]]] = {}
    looked: dict[tuple[str, str], tuple[RunFiles, object]] = {}
    for run in runs:
        for metric, name in sorted({(judged_as(item["metric"]), str(item.get("judge") or "")) for item in run.items}):
            found = source_of(run.folder, name) if name else None
            matched = None if found is None else found.get("matched")
            before, how = looked.setdefault((metric, name), (run, matched))
            if how != matched:
                older = run if matched is None else before
                raise UserError(
                    f"`{before.folder}` and `{run.folder}` must be judged by one rule ({metric}), but an earlier "
                    f"version judged `{older.folder}`, in which `{name}` found its phrases inside of words too; give "
                    f"`mm-cb judge {typed(older.folder)} --judge {_typed(name, found or {})}`, which first names what "
                    "of the old verdicts to delete, if they are in its way."
                )
            if found is None:
                continue
            held = {key: value for key, value in found.items() if key != "model" or "weights_sha256" not in found}
            other, source = first.setdefault((metric, name), (run, held))
            if differing := _differences(*(flatten(one) if one else {} for one in (source, held))):
                file = run.folder / FOLDER / f"{safe_id(name)}.json"
                raise UserError(
                    f"`{other.folder}` and `{run.folder}` must be judged by one rule ({metric}), but `{name}` judged "
                    f"them with other settings, {differing}; delete `{file}` and its .jsonl, then give `mm-cb judge "
                    f"{typed(run.folder)} --judge {_typed(name, found)}` with the settings of the other."
                )


def _typed(name: str, source: Mapping[str, object]) -> str:
    """What `--judge` is given for a judge of this name."""
    return "FILE.py" if "file_sha256" in source else name.partition(":")[0].removesuffix(" (proxy)")


def _data(run: RunFiles) -> dict[str, object]:
    """Hashes of the input files that are no weights, by the files' own names, without imported prompts."""
    prompts = str((run.run["recipe"].get("options") or {}).get("prompts") or "")
    return {name: found for name, found in _files(run).items() if name != f"file {_base(prompts)}"}


def _base(name: str) -> str:
    return name.replace("\\", "/").rpartition("/")[2]


def _files(run: RunFiles) -> dict[str, object]:
    """Hashes of the input files that are no weights, by the files' own names."""
    if any(key in run.run["recipe"] for key in STORED):
        return {}
    digests: dict[str, list[str]] = defaultdict(list)
    for name, digest in run.run["inputs"].items():
        if not _is_weights(name):
            digests[_base(name)].append(digest)
    return {f"file {name}": sorted(found) for name, found in digests.items()}


class PictureBudget(TypedDict):
    """How much of a picture an attack might change, and what of it."""

    epsilon: int | None
    threat_model: str


def budget(run: RunFiles) -> PictureBudget:
    """The budget that a run's recipe states."""
    options = run.run["recipe"].get("options") or {}
    return {"epsilon": run.run["recipe"].get("epsilon"), "threat_model": options.get("threat_model", "linf")}


def _differences(held: Mapping[str, object], other: Mapping[str, object]) -> str:
    """``steps (100 / 300), file behaviors.jsonl (other content)``; empty when there are none."""
    phrases = []
    for key in sorted(held.keys() | other.keys()):
        one, two = held.get(key, _ABSENT), other.get(key, _ABSENT)
        if one != two:
            hashes = (key.startswith(("file ", "weights ")) or "sha256" in key) and _ABSENT not in (one, two)
            phrases.append(f"{key} ({'other content' if hashes else f'{_shown(one)} / {_shown(two)}'})")
    more = f" and {len(phrases) - _NAMED} more" if len(phrases) > _NAMED else ""
    return ", ".join(phrases[:_NAMED]) + more


def _shown(value: object) -> str:
    if value == _ABSENT:
        return _ABSENT
    if isinstance(value, list) and value and all(isinstance(v, str) and len(v) == 64 for v in value):
        return "present"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 40 else text[:37] + "..."


def _conditions(run: RunFiles) -> dict[tuple[str, str], set[str]]:
    """Metric and condition -> the subjects that the run measured under it."""
    found: dict[tuple[str, str], set[str]] = defaultdict(set)
    for item in run.items:
        found[item["metric"], item["condition"]].add(item["subject"])
    return found
