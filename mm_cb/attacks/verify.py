"""``mm-cb attack verify``: the numbers of a run again, from its pictures, their JSON and the model.

Of every picture: the file (hash), its distance from the clean one, its losses and the greedy answer. Of the run: the
verdicts, by the exact judge where the model has one, and everything that is counted over items. A run that somebody
rewrote consistently, pictures, JSON and items together, is an honest run of what it then states.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from image_attacks import ImageFileError
from mm_cb.attacks.config import AttackConfig, from_artefact, from_recipe
from mm_cb.attacks.judged_files import Asked, base_nll, complete
from mm_cb.attacks.objectives.adaptive import AdaptiveObjective
from mm_cb.attacks.objectives.target import Objective, TargetObjective, encode
from mm_cb.attacks.outputs import summaries
from mm_cb.attacks.records import facts, flags
from mm_cb.attacks.run import judge_of
from mm_cb.attacks.saved import SavedPicture, images, read
from mm_cb.attacks.search import make_objective
from mm_cb.attacks.shards import Shard
from mm_cb.core.checked import read_records
from mm_cb.core.embedded import embedded
from mm_cb.core.errors import UserError
from mm_cb.core.paths import safe_id
from mm_cb.core.progress import Progress, console
from mm_cb.core.records import Item, Run
from mm_cb.core.runs import read_jsonl, read_run
from mm_cb.data.behaviors_file import KEPT_AS, Behavior, kept_behaviors
from mm_cb.inference.cached_chunks import chunks
from mm_cb.inference.subjects import Subject
from mm_cb.inference.tolerance import TOLERANCE, dtype_of, tolerance
from mm_cb.judges.rejudge import AS_RUN, FOLDER, by_proxy
from mm_cb.metrics.agreement import completions_of, key_of
from mm_cb.metrics.observations import rank, worst_pictures
from mm_cb.models import load_model

Artefact = dict[str, Any]
"""The JSON beside a picture."""
_NUMBERS = ("loss", "objective_file", "loss_clean", "nll_base")
_SHARED = ("epsilon", "distance", "loss", "objective_file", "objective_logged")
"""What items.jsonl repeats of a picture's JSON."""
_AGAIN = "Do not use the run's numbers; run the attack again."


@dataclass(frozen=True)
class Row:
    """One picture: what was recorded, what was found, and what disagrees (empty = nothing)."""

    image: str
    epsilon: int
    loss_recorded: float
    loss_found: float
    disagreements: tuple[str, ...]
    other_answer: bool
    """The greedy answer, generated again, is another one. A disagreement only where arithmetic is the run's."""


def verify_run(
    folder: str | Path, *, model: str | None = None, adapter: str | None = None, device: str = "cpu"
) -> list[Row]:
    """Verify a run and print a table.

    Args:
        folder: A finished run of ``mm-cb attack``.
        model: Where its model lies here; None = where the run found it.
        adapter: Where its adapter lies here.
        device: Torch device.

    Raises:
        UserError: If something disagrees (the first is named), or the folder holds nothing to verify.
    """
    folder = Path(folder)
    run = read_run(folder)
    recipe = run["recipe"]
    if not isinstance(recipe.get("model"), str) or "attack" not in recipe:
        raise UserError(f"`{folder}` must be a run of `mm-cb attack`; its run.json names no attacked model.")
    try:
        configs, artefacts, items = from_recipe(recipe, run["seed"]), read_artefacts(folder), _items(folder)
        _check_items(folder, items, artefacts, configs, run)
        verdicts = _check_verdicts(folder, items, recipe["model"])
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"`{folder}` must be as `mm-cb attack` wrote it: {type(error).__name__}, {error}.") from error
    dtype = recipe.get("dtype", "float32")
    first = next(iter(configs.values()))
    loaded = load_model(
        model or recipe["model"],
        adapter=adapter or recipe.get("adapter"),
        device=device,
        dtype=dtype,
        image_backend=first.image_backend,
    )
    same_arithmetic = (recipe.get("device"), dtype) == (device.partition(":")[0], "float32")
    rows: list[Row] = []
    with Progress() as progress:
        task = progress.task("verify", total=len(artefacts))
        for group in _groups(folder, artefacts, first.batch):
            subject = Subject(str(group[0]["subject"]["name"]), loaded, bool(recipe.get("adapter")), recipe["system"])
            rows += _verify_group(subject, group, folder, configs, same_arithmetic)
            task.advance(len(group))
    _show(rows, verdicts, same_arithmetic, dtype_of(loaded))
    if wrong := [row for row in rows if row.disagreements]:
        raise UserError(
            f"`{folder / wrong[0].image}` does not hold what the run recorded: {'; '.join(wrong[0].disagreements)} "
            f"({len(wrong)} of {len(rows)} pictures disagree). {_AGAIN}"
        )
    _check_selected(folder, items)
    _check_counts(folder, items, first, dtype)
    return rows


def read_artefacts(folder: Path) -> list[Artefact]:
    """The JSON beside every attacked picture, in order; pictures without one and broken ones are an error."""
    pictures = sorted((folder / "images").glob("*/**/*.png"))
    if not pictures:
        raise UserError(f"`{folder}` must hold attacked pictures under images/, there are none to verify.")
    artefacts = []
    for picture in pictures:
        path = picture.with_suffix(".json")
        try:
            content = json.loads(path.read_bytes())
            own = (folder / content["image"]).resolve() == picture.resolve()
            inside = (folder / content["clean_image"]).resolve().is_relative_to((folder / "images").resolve())
            from_artefact(content)
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(
                f"`{path}` must be the JSON of the picture beside it, but cannot be read: {error}"
            ) from error
        if not own or not inside:
            raise UserError(f"`{path}` must be about the picture beside it and a clean one of the run, it is not.")
        artefacts.append(content)
    return artefacts


def _items(folder: Path) -> list[Item]:
    return read_records(folder / "items.jsonl", Item)


def _check_items(
    folder: Path,
    items: Sequence[Item],
    artefacts: Sequence[Artefact],
    configs: Mapping[str, AttackConfig],
    run: Run,
) -> None:
    """Every behaviour under every attack, each with its worst answer; items and pictures tell the same story."""
    path, known, named = folder / "items.jsonl", {a["image"]: a for a in artefacts}, set()
    if strange := sorted({a["attack"]["name"] for a in artefacts} - configs.keys()):
        raise UserError(f"`{folder}` holds pictures of `{strange[0]}`, which its run.json does not name. {_AGAIN}")
    if (folder / KEPT_AS).is_file():
        asked, shard = kept_behaviors(folder), run["recipe"].get("shard")
        asked = asked if shard is None else Shard.parse(shard).part(asked)
        wanted = {(name, b.id) for name in configs for b in asked}
        if absent := sorted(wanted - {(item["condition"], item["id"]) for item in items}):
            raise UserError(f"`{path}` must hold every behaviour under every attack, it lacks {absent[0]}. {_AGAIN}")
    for item in items:
        worst = min(item["candidates"] or (), key=rank)
        if any(item.get(key) != worst.get(key) for key in ("outcome", "image", "loss", "completion")):
            raise UserError(f"`{path}`: {_who(item)} is not the worst of its candidates. {_AGAIN}")
        stated = {**flags(configs[item["condition"]]), **facts(configs[item["condition"]])}
        if wrong := [key for key, value in stated.items() if item.get(key, value) != value]:
            raise UserError(f"`{path}`: {_who(item)} states another {wrong[0]} than run.json gives. {_AGAIN}")
        for one in item["candidates"] or ():
            if one.get("image") is None:
                continue  # a relaxation, which leaves no picture
            named.add(one["image"])
            artefact = known.get(one["image"])
            if artefact is None:
                raise UserError(f"`{path}` names `{one['image']}`, which is not in the run.")
            hashes: dict[Any, str] = {None: artefact["completion_sha256"]}
            hashes |= dict(enumerate(artefact["samples_sha256"], start=1))
            wrong = [key for key in _SHARED if one.get(key) != artefact.get(key)]
            wrong += [key for key in ("prompt", "target") if item.get(key) != artefact.get(key)]
            wrong += ["completion"] if hashes.get(one.get("sample")) != _sha256(str(one["completion"])) else []
            if wrong:
                raise UserError(
                    f"`{path}` and the JSON beside `{one['image']}` disagree in {', '.join(wrong)}. {_AGAIN}"
                )
    if unnamed := sorted(known.keys() - named):
        raise UserError(f"`{path}` must name every attacked picture, it lacks `{unnamed[0]}`.")


def _check_selected(folder: Path, items: Sequence[Item]) -> None:
    """The picture that a page shows of a behaviour, and that is tried on other models, is its worst one."""
    for behavior, image in worst_pictures(items).items():
        shown = folder / "images" / f"{safe_id(behavior)}.png"
        if not shown.is_file() or shown.read_bytes() != (folder / image).read_bytes():
            raise UserError(f"`{shown}` must be the picture `{image}`, it is missing or another one. {_AGAIN}")


def _check_verdicts(folder: Path, items: Sequence[Item], model: str) -> str:
    """Hold the run's own verdicts to the exact judge, and another judge's to its file; one line that says which."""
    told = ""
    as_run: dict[str, Any] = {}
    for name in {item["judge"] for item in items if "judge" in item}:
        as_run, given = _given(folder, AS_RUN), _given(folder, name)
        for item in (item for item in items if item.get("judge") == name):
            for one in completions_of(item):
                if one.get("outcome") != given.get(key_of(item, one)):
                    raise UserError(
                        f"`{folder / 'items.jsonl'}` holds another verdict on `{one.get('image')}` ({_who(item)}) than "
                        f"{FOLDER}/{safe_id(name)}.jsonl. Judge the run again."
                    )
        told = f"verdicts are those of {name}; of the run's own: "
    if embedded(model) is None:
        return f"{told}there is no exact judge for `{model}`"
    if not (folder / KEPT_AS).is_file():
        return f"{told}without {KEPT_AS} the exact judge does not know what was asked"
    judge, asked, again, total = judge_of(model), {b.id: b for b in kept_behaviors(folder)}, 0, 0
    for item in items:
        for one in completions_of(item):
            said = as_run.get(key_of(item, one), one.get("outcome"))
            found, total = judge(asked[item["id"]], one["completion"]), total + 1
            if "not_judged" in (found, said):
                continue
            again += 1
            if found != said:
                raise UserError(
                    f"`{folder / 'items.jsonl'}` calls the answer to `{one.get('image')}` ({_who(item)}) {said}, "
                    f"judged again it is {found}. Do not use the run's numbers."
                )
    return f"{told}{again} of {total} verdicts judged again, the same"


def _given(folder: Path, name: str) -> dict[str, Any]:
    """A judge's verdicts as its file holds them, by the key of the answer."""
    return {record["key"]: record["outcome"] for record in read_jsonl(folder / FOLDER / f"{safe_id(name)}.jsonl")}


def _groups(folder: Path, artefacts: Sequence[Artefact], batch: int) -> list[list[Artefact]]:
    """Artefacts that one objective can take together: one attack, one picture size."""
    groups: dict[tuple[Any, ...], list[Artefact]] = defaultdict(list)
    for artefact in artefacts:
        try:
            size = read(folder, artefact["clean_image"]).image.size
        except ImageFileError as error:
            raise UserError(str(error)) from error
        groups[artefact["attack"]["name"], *size].append(artefact)
    return [chunk for group in groups.values() for chunk in chunks(group, batch)]


def _verify_group(
    subject: Subject,
    group: Sequence[Artefact],
    folder: Path,
    configs: Mapping[str, AttackConfig],
    same_arithmetic: bool,
) -> list[Row]:
    """Everything again for artefacts of one attack and one picture size."""
    saved, clean, problems = [], [], []
    for artefact in group:
        try:
            files = read(folder, artefact["image"]), read(folder, artefact["clean_image"])
            problems.append(_files(artefact, *files, configs[artefact["attack"]["name"]]))
        except ImageFileError as error:
            raise UserError(f"`{folder / artefact['image']}` cannot be verified: {error} {_AGAIN}") from error
        saved.append(files[0])
        clean.append(files[1])
    numbers, said = _again(subject, group, saved, clean)
    rows = []
    for i, artefact in enumerate(group):
        other = _sha256(said[i]) != artefact["completion_sha256"]
        found = problems[i] + _differences(artefact, numbers[i], other, dtype_of(subject.model))
        if other and same_arithmetic:
            found.append("the model's answer is another one than the run stored")
        told = artefact["image"], artefact["epsilon"], artefact["loss"]
        rows.append(Row(*told, numbers[i]["loss"] or 0.0, tuple(found), other))
    return rows


def _files(artefact: Artefact, saved: SavedPicture, clean: SavedPicture, config: AttackConfig) -> list[str]:
    """What disagrees between an artefact, its two files and the run's settings, without the model."""
    problems, moved = [], saved.levels_from(clean)
    linf, away = int(moved.abs().max()), config.threat.distance(moved)
    if linf != artefact["epsilon"]:
        problems.append(f"epsilon {artefact['epsilon']}/255 recorded, {linf}/255 found")
    if config.entry.stays_in_threat and not (linf <= config.threat.levels and config.threat.holds(away)):
        problems.append(f"the picture is outside {config.threat.text} of {config.threat.levels}/255")
    for name, picture, key in (("picture", saved, "sha256"), ("clean picture", clean, "clean_sha256")):
        if picture.sha256 != artefact[key]:
            problems.append(f"the {name} is another file than the one that was judged (SHA-256)")
    stated = replace(from_artefact(artefact), hijacks=None)
    run_wide = {key: getattr(config, key) for key in ("hijacks", "chain", "image_backend", "checkpoint_seconds")}
    if replace(stated, **run_wide) != config:
        problems.append("its JSON states other settings than run.json")
    return problems


def _again(
    subject: Subject, group: Sequence[Artefact], saved: Sequence[SavedPicture], clean: Sequence[SavedPicture]
) -> tuple[list[dict[str, float | None]], list[str]]:
    """Losses by their names in the JSON, and greedy answers."""
    config = from_artefact(group[0])
    behaviors = [Behavior(a["id"], a["prompt"], a["target"], None) for a in group]
    prompts = [replace(b, prompt=a.get("sent", b.prompt)) for a, b in zip(group, behaviors, strict=True)]
    asked = Asked(subject, behaviors, prompts, clean)
    target = TargetObjective(subject, prompts, images(clean))
    objective: Objective = target
    if config.entry.optimises and group[0]["objective"] != TargetObjective.__name__:
        objective = make_objective(subject, prompts, images(clean), config, [a["response"] for a in group])
        if isinstance(objective, AdaptiveObjective):
            objective.weight = torch.tensor([a["weight"] for a in group], device=subject.model.device)
    inputs = encode(subject, prompts, images(saved), None)
    assert inputs.pixel_values is not None
    pixels = torch.stack([one.pixels for one in clean]).to(subject.model.device)
    with torch.no_grad():
        losses = target.loss(inputs.pixel_values), objective.loss(inputs.pixel_values), target(pixels)
    said = complete(asked, images(saved), config, encoded=inputs)
    columns = [*([round(value, 5) for value in loss.tolist()] for loss in losses), base_nll(asked, said)]
    return [dict(zip(_NUMBERS, row, strict=True)) for row in zip(*columns, strict=True)], said


def _differences(artefact: Artefact, found: Mapping[str, float | None], other: bool, dtype: str) -> list[str]:
    """One phrase per number that is not the recorded one; of another answer the base's loss is not known."""
    wrong = []
    for key, now in found.items():
        told = artefact.get(key)
        if (key == "nll_base" and (other or key not in artefact)) or told is now is None:
            continue
        allowed = tolerance(max(abs(now or 0), 1) if key == "nll_base" else now or 0, dtype)
        if told is None or now is None or not round(abs(now - told), 6) <= allowed:
            wrong.append(f"{key} {told} recorded, {now} found")
    return wrong


def _check_counts(folder: Path, items: list[Item], config: AttackConfig, dtype: str) -> None:
    """results.json and checks.json are what the items give."""
    made = summaries(items, [], config, {}, dtype)
    if by_proxy(folder, items):
        for row in made["results.json"]["measurements"]:
            row["counts"] |= {"proxy": row["n"]} if row["metric"] == "compliance" else {}
    for name in ("results.json", "checks.json"):
        stated, again = json.loads((folder / name).read_bytes()), json.loads(json.dumps(made[name]))
        if stated != again:
            raise UserError(f"`{folder / name}` must say what the run's items hold; made again it differs. {_AGAIN}")


def _who(item: Item) -> str:
    return f"`{item.get('id')}` under {item.get('condition')}"


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _show(rows: Sequence[Row], verdicts: str, same_arithmetic: bool, dtype: str) -> None:
    from rich.table import Table

    table = Table("picture", "epsilon", "loss recorded", "loss found", "verdict")
    for row in rows:
        verdict = "; ".join(row.disagreements) or "agrees"
        table.add_row(row.image, f"{row.epsilon}/255", f"{row.loss_recorded:.5f}", f"{row.loss_found:.5f}", verdict)
    console().print(table)
    agree = sum(not row.disagreements for row in rows)
    share = "" if dtype == "float32" else f" or {tolerance(100, dtype):.2g} %, whichever is more"
    console().print(f"{agree} of {len(rows)} pictures agree ({dtype} losses to {TOLERANCE:g}{share}; epsilon exactly)")
    others = sum(row.other_answer for row in rows)
    note = "" if same_arithmetic else " (another device, or not float32: no disagreement)"
    console().print(f"{others} of {len(rows)} greedy answers differ when generated again{note}; {verdicts}")
