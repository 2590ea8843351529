"""``mm-cb attack transfer``: pictures made on one model, judged on another, both ways: the 2 x 2 matrix.

White-box pictures that break the defended model less often than pictures made on its base mean that the white-box
attack fails, not that the defence works.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, get_args

from mm_cb.attacks.calls import spoken
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.config_files import AttackRecipe, from_recipe, read_recipe
from mm_cb.attacks.entry import Given
from mm_cb.attacks.judged_files import Asked, OutcomeOf, judge_files
from mm_cb.attacks.objectives.target import TargetObjective
from mm_cb.attacks.records import Answer, Artefact, attacked, make_item
from mm_cb.attacks.run import judge_of
from mm_cb.attacks.saved import by_size, clean_name, images, read
from mm_cb.core.checked import read_record
from mm_cb.core.errors import UserError
from mm_cb.core.folders import but_is
from mm_cb.core.paths import safe_id
from mm_cb.core.progress import Progress, console
from mm_cb.core.records import Item, Run
from mm_cb.core.runs import RunDirectory, file_sha256, read_run, write_bytes, write_json, write_jsonl
from mm_cb.data.behaviors_file import Behavior, asked_once, read_behaviors
from mm_cb.inference.cached_chunks import chunks, once
from mm_cb.inference.source import source_again
from mm_cb.inference.subjects import Subject, load_subject
from mm_cb.metrics.holes import refuse_swapped
from mm_cb.metrics.observations import worst_pictures
from mm_cb.metrics.results import Measurement, find, measure, write_results
from mm_cb.metrics.whole import unchanged_items

_OWN = ("batch", "hijacks", "anneal", "term_weight", "balance")
"""Settings that two runs with one budget need not share."""


@dataclass(frozen=True)
class Made:
    """A finished attack run: who was attacked, how, and the worst picture of every behaviour."""

    folder: Path
    run: Run
    recipe: AttackRecipe
    """How it was attacked."""
    asked: Mapping[str, tuple[str | None, str]]
    """Behaviour id → prompt and target."""
    pictures: Mapping[str, str]
    """Behaviour id → its picture in the folder."""
    name: str
    """The subject that was attacked, told apart from the other run's."""

    @property
    def configs(self) -> dict[str, AttackConfig]:
        """Its attacks."""
        return from_recipe(self.recipe, self.run["seed"])

    @property
    def budget(self) -> dict[str, object]:
        """What the other run must share: its attacks, but not those aimed at a defence, and what only they read."""
        found: dict[str, object] = {"dtype": self.recipe.get("dtype", "float32")}
        for name, one in self.configs.items():
            if not one.entry.aimed:
                told = {key: value for key, value in vars(one).items() if key not in (*_OWN, "name", "threat")}
                told["threat"] = f"{one.threat.text} of {one.threat.levels}/255"
                found |= {name: "yes"} | {f"{name} {key}": value for key, value in told.items()}
        return found

    @property
    def subject(self) -> tuple[Any, ...]:
        """Who was attacked, whatever the folders are called: the content of the weights, and the text in front."""
        inputs = self.run["inputs"].items()
        weights = sorted(v for k, v in inputs if k.endswith(".safetensors") or k.startswith("models/"))
        return self.recipe["system"], self.recipe["adapter"] is None, *weights

    def sent(self, behavior: Behavior) -> Behavior:
        """With the prompt that was sent beside its picture, where that is another one."""
        told = (self.folder / self.pictures[behavior.id]).with_suffix(".json")
        return (
            replace(behavior, prompt=read_record(told, Artefact).get("sent", behavior.prompt))
            if told.is_file()
            else behavior
        )


def read_made(folder: Path) -> Made:
    """Read a finished run of ``mm-cb attack``."""
    run = read_run(folder)
    if run.get("command") != "attack" or not run.get("ended"):
        raise UserError(f"`{folder}` must be a finished `mm-cb attack` run{but_is(folder)}.")
    recipe, items = read_recipe(run, folder), attacked(unchanged_items(folder, run), folder)
    refuse_swapped(folder, items)
    asked = {item["id"]: (item.get("prompt"), item["target"]) for item in items}
    pictures = worst_pictures(item for item in items if item.get("image") is not None)
    if lacking := [behavior for behavior in asked if not os.path.isfile(folder / pictures.get(behavior, ""))]:
        raise UserError(
            f"`{folder}` must hold an attacked picture of every behaviour, there is none for `{lacking[0]}`; "
            "attacks on embeddings and by texts leave none."
        )
    return Made(folder, run, recipe, asked, pictures, items[0]["subject"])


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
    made = told_apart(read_made(first), read_made(second))
    read = read_behaviors(behaviors)
    once = read if made[0].asked.keys() == {b.id for b in read} else asked_once(read)  # earlier versions asked all
    asked = spoken(once, made[0].recipe["model"])
    _refuse_other_budget(*made)
    _refuse_other_behaviors(made, asked, behaviors)
    recipe = {"runs": [m.recipe for m in made], "device": device, "fiction": all(m.recipe.get("fiction") for m in made)}
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
    parts = [(m.recipe["model"], m.recipe["adapter"]) for m in both]
    differ = [place for place, (one, other) in enumerate(zip(*parts, strict=True)) if one and other and one != other]
    shown = [f" ({', '.join(str(part[place]) for place in differ)})" if differ else "" for part in parts]
    named = [replace(m, name=m.name + more) for m, more in zip(both, shown, strict=True)]
    if named[0].name == named[1].name or first.subject == second.subject:
        raise UserError(
            f"transfer needs runs on two models, but `{first.folder}` and `{second.folder}` both attacked "
            f"`{first.name}`; give a run on another model or adapter."
        )
    return named


def _refuse_other_budget(first: Made, second: Made) -> None:
    one, other = first.budget, second.budget
    if differ := [key for key in {**one, **other} if one.get(key, "no") != other.get(key, "no")]:
        told = [f"{differ[0]}={budget.get(differ[0], 'no')}" for budget in (one, other)]
        raise UserError(
            f"both runs must have one budget, but `{first.folder}` has {told[0]} and `{second.folder}` {told[1]}; "
            "repeat one of them as the other was made."
        )


def _refuse_other_behaviors(made: Sequence[Made], asked: Sequence[Behavior], path: Path) -> None:
    for run in made:
        if run.asked != {b.id: (b.prompt, b.target) for b in asked}:
            raise UserError(f"`{run.folder}` must have attacked the behaviours of `{path}`, it attacked others.")
    for behavior in asked:
        clean = [run.folder / clean_name(behavior.id) for run in made]
        if not all(file.is_file() for file in clean) or len({file_sha256(file) for file in clean}) > 1:
            raise UserError(
                f"both runs must have begun at the same clean pictures, but that of `{behavior.id}` is another file in "
                f"`{made[1].folder}` than in `{made[0].folder}`, or missing; attack one behaviours file in both."
            )


def _judge_on(
    judged: Made, makers: Sequence[Made], behaviors: Sequence[Behavior], folder: Path, device: str, progress: Progress
) -> list[Item]:
    """One column of the matrix."""
    recipe, first = judged.recipe, next(iter(judged.configs.values()))
    source = source_again(judged.folder, judged.run, "put it there, or beside the run", device)
    subject, judge = load_subject(source, judged.name, first.image_backend), judge_of(recipe["model"])
    config, items = replace(first, name="no_attack", seed=0, early_stop=False, artefacts=False), list[Item]()
    for maker in makers:
        task = progress.task(f"made on {maker.name}, judged on {judged.name}", total=len(behaviors))
        for number, batch in enumerate(chunks(behaviors, config.batch)):
            path = folder / "parts" / f"{safe_id(maker.name)}-on-{safe_id(judged.name)}-{number:04d}.json"
            items += once(path, partial(_batch, subject, maker, batch, config, folder, judge))
            task.advance(len(batch))
    return items


def _batch(
    subject: Subject, maker: Made, batch: Sequence[Behavior], config: AttackConfig, folder: Path, judge: OutcomeOf
) -> list[Item]:
    """Judge one batch; pictures of one size go together."""
    names = [f"images/{safe_id(b.id)}/from-{safe_id(maker.name)}.png" for b in batch]
    for b, name in zip(batch, names, strict=True):
        write_bytes(folder / name, (maker.folder / maker.pictures[b.id]).read_bytes())
        write_bytes(folder / clean_name(b.id), (maker.folder / clean_name(b.id)).read_bytes())
    saved, clean = [read(folder, name) for name in names], [read(folder, clean_name(b.id)) for b in batch]
    for b, one, its in zip(batch, saved, clean, strict=True):
        if one.image.size != its.image.size:
            raise UserError(
                f"`{maker.folder / maker.pictures[b.id]}` must be a changed copy of the clean picture of `{b.id}`, it "
                f"has another size, {one.image.size} and not {its.image.size}; repeat that run."
            )
    found: dict[str, Item] = {}
    for rows in by_size(images(clean)):
        group = [batch[i] for i in rows]
        asked = Asked(subject, group, [maker.sent(b) for b in group], [clean[i] for i in rows])
        target = TargetObjective(subject, asked.prompts, images(asked.clean))
        answers = judge_files(asked, [saved[i] for i in rows], target, target, config, judge)
        for b, answer in zip(group, answers, strict=True):
            item = make_item(subject.name, config, b, [answer], target_outcome=judge(b, b.target))
            found[b.id] = _item(item, subject, maker, answer)
    return [found[b.id] for b in batch]


def _item(item: Item, subject: Subject, maker: Made, answer: Answer) -> Item:
    del item["candidates"], item["loss_clean"]
    item |= {"condition": f"from_{maker.name}", "worst_case": True, "given": _given(subject, maker)}
    item |= {"epsilon": answer.linf, "objective_file": answer.objective_file, "made_by": maker.recipe["attack"]}
    if answer.distance is not None:
        item["distance"] = answer.distance
    return item


def _given(subject: Subject, maker: Made) -> Given:
    """Another model's pictures, or what the attacks that made this model's own were given at most."""
    if maker.name != subject.name:
        return "base's pictures"
    return max((config.entry.given for config in maker.configs.values()), key=get_args(Given).index)


def _show(made: Sequence[Made], measurements: Sequence[Measurement]) -> None:
    console().print("compliance in %, pictures made on (row) judged on (column)")
    for maker in made:
        shown = []
        for judged in made:
            cell = find(measurements, judged.name, "compliance", f"from_{maker.name}")
            known = cell is not None and cell.value is not None
            shown.append(f"{judged.name}: " + (f"{cell.value:.1f} (n={cell.n})" if cell and known else "not judged"))
        console().print(f"  {maker.name:>6} -> {', '.join(shown)}; made by {maker.recipe['attack']}")
