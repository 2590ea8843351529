"""``mm-cb attack transfer``: pictures made on one model, judged on another, both ways: the 2 x 2 matrix.

White-box pictures that break the defended model less often than pictures made on its base mean that the white-box
attack fails, not that the defence works.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from mm_cb.attacks import saved as files
from mm_cb.attacks.config import AttackConfig, from_recipe
from mm_cb.attacks.judged_files import Asked, Judge, judge_files
from mm_cb.attacks.objectives.target import TargetObjective
from mm_cb.attacks.records import AnswerRecord, flags
from mm_cb.attacks.run import judge_of
from mm_cb.attacks.saved import clean_name
from mm_cb.core.checked import read_records
from mm_cb.core.errors import UserError
from mm_cb.core.paths import safe_id
from mm_cb.core.progress import Progress, console
from mm_cb.core.records import Candidate, Item, Recipe, Run
from mm_cb.core.runs import RunDirectory, file_sha256, read_run, write_bytes, write_json, write_jsonl
from mm_cb.data.behaviors_file import Behavior, read_behaviors
from mm_cb.inference.cached_chunks import chunks, once
from mm_cb.inference.subjects import Subject
from mm_cb.metrics.observations import worst_pictures
from mm_cb.metrics.results import Measurement, find, measure, write_results
from mm_cb.models import load_model


@dataclass(frozen=True)
class Made:
    """A finished attack run: who was attacked, how, and where the selected picture of every behaviour lies."""

    folder: Path
    run: Run
    items: dict[str, Item]
    name: str
    """The subject that was attacked, told apart from the other run's."""
    sent: Mapping[str, str]
    """Behaviour id → prompt, where the attack that made its selected picture sends another than the behaviour's."""

    @property
    def recipe(self) -> Recipe:
        """How it was attacked."""
        return self.run["recipe"]

    @property
    def budget(self) -> dict[str, AttackConfig]:
        """Its attacks but those that aim at an adapter, which the other run cannot have."""
        configs = from_recipe(self.recipe, self.run["seed"])
        plain = {key: one for key, one in configs.items() if not one.entry.needs_adapter}
        return {key: replace(one, batch=1, hijacks=None, term_weight=1.0, balance=False) for key, one in plain.items()}

    @property
    def subject(self) -> tuple[Any, ...]:
        """Who was attacked, whatever the folders are called: the content of the weights, and the text in front."""
        inputs = self.run["inputs"].items()
        weights = sorted(v for k, v in inputs if k.endswith(".safetensors") or k.startswith("models/"))
        return self.recipe["system"], *weights

    def picture(self, behavior: str) -> Path:
        """The selected worst case."""
        return self.folder / "images" / f"{safe_id(behavior)}.png"


def read_made(folder: Path) -> Made:
    """Read a finished run of ``mm-cb attack``."""
    run = read_run(folder)
    if run.get("command") != "attack" or not run.get("ended"):
        raise UserError(f"`{folder}` must be a finished `mm-cb attack` run.")
    rows = read_records(folder / "items.jsonl", Item)
    items = {item["id"]: item for item in rows}
    if not items:
        raise UserError(f"`{folder}` must hold attacked behaviours, its items.jsonl is empty.")
    worst = worst_pictures(rows)
    told = {behavior: (folder / image).with_suffix(".json") for behavior, image in worst.items()}
    artefacts = {behavior: json.loads(path.read_bytes()) for behavior, path in told.items() if path.is_file()}
    sent = {behavior: artefact["sent"] for behavior, artefact in artefacts.items() if "sent" in artefact}
    made = Made(folder, run, items, next(iter(items.values()))["subject"], sent)
    if lacking := [behavior for behavior in items if not made.picture(behavior).is_file()]:
        raise UserError(
            f"`{folder}` must hold an attacked picture of every behaviour, there is none for `{lacking[0]}`; "
            "an attack on embeddings leaves none."
        )
    return made


def run_transfer(first: Path, second: Path, behaviors: Path, out: Path, *, device: str = "cpu") -> None:
    """Judge the pictures of two runs on the models of both; writes items.jsonl and results.json and prints the matrix.

    Args:
        first: A finished run of ``mm-cb attack``.
        second: Another, on another model, with the same behaviours and budget.
        behaviors: Their behaviours file.
        out: Run directory of the matrix.
        device: Torch device.

    Raises:
        UserError: If the runs attacked one and the same subject, or other behaviours than the file's (by id, prompt
            and target), on other clean pictures than each other's, or with another budget.
    """
    made, asked = told_apart(read_made(first), read_made(second)), read_behaviors(behaviors)
    _refuse_other(made, asked, behaviors)
    recipe = {"runs": [m.recipe for m in made], "device": device, "fiction": made[0].recipe["fiction"]}
    inputs = [behaviors, *(m.folder / "items.jsonl" for m in made)]
    with RunDirectory(out, "attack transfer", recipe, 0, inputs=inputs) as run, Progress() as progress:
        items = [item for judged in made for item in _judge_on(judged, made, asked, run.path, device, progress)]
        measurements = measure(items, pairs=[])
        write_jsonl(run.path / "items.jsonl", items)
        write_json(run.path / "checks.json", [])
        write_results(run.path / "results.json", measurements)
        run.finish()
    _show(made, measurements)


def told_apart(first: Made, second: Made) -> list[Made]:
    """Both runs under names that tell who was attacked: with the model or the adapter where theirs differ.

    Raises:
        UserError: If both attacked one and the same subject.
    """
    both = [first, second]
    keys = [k for k in ("model", "adapter") if all(m.recipe[k] for m in both) and first.recipe[k] != second.recipe[k]]
    shown = [f" ({', '.join(m.recipe[key] for key in keys)})" if keys else "" for m in both]
    named = [replace(m, name=m.name + more) for m, more in zip(both, shown, strict=True)]
    if named[0].name == named[1].name or first.subject == second.subject:
        raise UserError(
            f"transfer needs runs on two models, but `{first.folder}` and `{second.folder}` both attacked "
            f"`{first.name}`; give a run on another model or adapter."
        )
    return named


def _refuse_other(made: Sequence[Made], asked: Sequence[Behavior], path: Path) -> None:
    """Refuse runs with another budget, other behaviours, or other clean pictures."""
    first, second = made
    if (first.budget, first.recipe["dtype"]) != (second.budget, second.recipe["dtype"]):
        pairs = ((first.budget.get(name), second.budget.get(name)) for name in {**first.budget, **second.budget})
        differing = next(((a, b) for a, b in pairs if a != b), (first.recipe["dtype"], second.recipe["dtype"]))
        raise UserError(
            f"both runs must have one budget, but `{first.folder}` has {_told(*differing)} and `{second.folder}` "
            f"{_told(*reversed(differing))}; repeat one of them as the other was made."
        )
    for run in made:
        held = {key: (item["prompt"], item["target"]) for key, item in run.items.items()}
        if held != {b.id: (b.prompt, b.target) for b in asked}:
            raise UserError(f"`{run.folder}` must have attacked the behaviours of `{path}`, it attacked others.")
    for behavior in asked:
        clean = [run.folder / clean_name(behavior.id) for run in made]
        if not all(file.is_file() for file in clean) or len({file_sha256(file) for file in clean}) > 1:
            raise UserError(
                f"both runs must have begun at the same clean pictures, but that of `{behavior.id}` is another file in "
                f"`{second.folder}` than in `{first.folder}`, or missing; attack one behaviours file in both."
            )


def _told(one: Any, other: Any) -> str:
    """The settings of one that the other has not."""
    if not (isinstance(one, AttackConfig) and isinstance(other, AttackConfig)):
        return one.name if isinstance(one, AttackConfig) else "no such attack" if one is None else str(one)
    told = {k: v for k, v in vars(one).items() if v != vars(other)[k]}
    return ", ".join(f"{v.text} of {v.levels}/255" if k == "threat" else f"{k}={v}" for k, v in told.items())


def _judge_on(
    judged: Made, makers: Sequence[Made], behaviors: Sequence[Behavior], folder: Path, device: str, progress: Progress
) -> list[Item]:
    """One column of the matrix."""
    recipe, first = judged.recipe, next(iter(from_recipe(judged.recipe, 0).values()))
    model = load_model(
        recipe["model"],
        adapter=recipe["adapter"],
        device=device,
        dtype=recipe["dtype"],
        image_backend=first.image_backend,
    )
    subject = Subject(judged.name, model, adapted=recipe["adapter"] is not None, system=recipe["system"])
    config, judge, items = replace(first, name="no_attack"), judge_of(recipe["model"]), list[Item]()
    for maker in makers:
        task = progress.task(f"made on {maker.name}, judged on {judged.name}", total=len(behaviors))
        for number, batch in enumerate(chunks(behaviors, config.batch)):
            path = folder / "parts" / f"{safe_id(maker.name)}-on-{safe_id(judged.name)}-{number:04d}.json"
            items += once(path, partial(_batch, subject, maker, batch, config, folder, judge))
            task.advance(len(batch))
    return items


def _batch(
    subject: Subject, maker: Made, batch: Sequence[Behavior], config: AttackConfig, folder: Path, judge: Judge
) -> list[Item]:
    """Judge one batch; pictures of one size go together."""
    groups: dict[tuple[int, int], list[Behavior]] = {}
    pictures: dict[str, tuple[files.SavedPicture, files.SavedPicture]] = {}
    for b in batch:
        name = f"images/{safe_id(b.id)}/from-{safe_id(maker.name)}.png"
        write_bytes(folder / name, maker.picture(b.id).read_bytes())
        write_bytes(folder / clean_name(b.id), (maker.folder / clean_name(b.id)).read_bytes())
        pictures[b.id] = files.read(folder, name), files.read(folder, clean_name(b.id))
        groups.setdefault(pictures[b.id][0].image.size, []).append(b)
    found: dict[str, Item] = {}
    for group in groups.values():
        prompts = [replace(b, prompt=maker.sent.get(b.id, b.prompt)) for b in group]
        asked = Asked(subject, group, prompts, [pictures[b.id][1] for b in group])
        target = TargetObjective(subject, prompts, files.images(asked.clean))
        answers = judge_files(asked, [pictures[b.id][0] for b in group], target, target, config, judge)
        for b, answer in zip(group, answers, strict=True):
            found[b.id] = _item(subject, maker, b, answer.as_json(), config)
    return [found[b.id] for b in batch]


def _item(subject: Subject, maker: Made, behavior: Behavior, record: AnswerRecord, config: AttackConfig) -> Item:
    shown = ("image", "epsilon", "distance", "loss", "objective_file", "completion", "outcome")
    found = cast("Candidate", {key: value for key, value in record.items() if key in shown})
    return {
        "id": behavior.id,
        "metric": "compliance",
        "subject": subject.name,
        "condition": f"from_{maker.name}",
        "split": behavior.split,
        "category": behavior.category,
        "prompt": behavior.prompt,
        "target": behavior.target,
        "score": None,
        "gibberish": record["outcome"] == "gibberish",
        "seed": 0,
        "made_by": maker.recipe["attack"],
        "clean_image": clean_name(behavior.id),
        **found,
        "prefix_emitted": record["prefix_emitted"],
        **flags(config),
        "worst_case": True,
    }


def _show(made: Sequence[Made], measurements: Sequence[Measurement]) -> None:
    console().print("compliance in %, pictures made on (row) judged on (column)")
    for maker in made:
        shown = []
        for judged in made:
            cell = find(measurements, judged.name, "compliance", f"from_{maker.name}")
            known = cell is not None and cell.value is not None
            shown.append(f"{judged.name}: " + (f"{cell.value:.1f} (n={cell.n})" if cell and known else "not judged"))
        console().print(f"  {maker.name:>6} -> {', '.join(shown)}; made by {maker.recipe['attack']}")
