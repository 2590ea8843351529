"""``mm-cb attack transfer``: pictures made on one model, judged on another, both ways: the 2 x 2 matrix.

White-box pictures that break the defended model less often than pictures made on its base mean that the white-box
attack fails, not that the defence works.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mm_cb.attacks.judged_files import Judge, clean_name, judge_files, read_pictures
from mm_cb.attacks.objectives.target import TargetObjective
from mm_cb.attacks.registry import KINDS, Attack
from mm_cb.attacks.run import judge_of
from mm_cb.core.errors import UserError
from mm_cb.core.paths import safe_id
from mm_cb.core.progress import Progress, console
from mm_cb.core.runs import RunDirectory, file_sha256, read_jsonl, read_run, write_bytes, write_json, write_jsonl
from mm_cb.data.behaviors_file import Behavior, read_behaviors
from mm_cb.inference.cached_chunks import chunks, once
from mm_cb.inference.subjects import Subject
from mm_cb.metrics.results import Measurement, find, measure, write_results
from mm_cb.models import load_model

_BUDGET = (
    *("attack", "epsilon", "steps", "restarts", "seed", "iterates", "samples", "chain", "optimizer"),
    *("early_stop", "temperature", "train", "max_new_tokens", "image_backend", "dtype", "threat_model"),
)
"""What both runs must have had alike: it decides which pictures were tried, of which the worst is transferred, and how
they are judged. Adaptive attacks aim at an adapter, so that a run on one may have them beside the other run's."""


@dataclass(frozen=True)
class Made:
    """A finished attack run: who was attacked, and the selected picture of every behaviour."""

    folder: Path
    run: dict[str, Any]
    items: dict[str, dict[str, Any]]
    name: str
    """The subject that was attacked: as the run calls it, until `told_apart`."""

    @property
    def recipe(self) -> dict[str, Any]:
        """How it was attacked."""
        return self.run["recipe"]

    @property
    def budget(self) -> dict[str, Any]:
        """Its values of `_BUDGET`, attacks without the adaptive ones; None for what it did not set."""
        given = {"seed": self.run["seed"], **self.recipe, **self.recipe["options"]}
        names = self.recipe["attack"].split(",")
        given["attack"] = ",".join(name for name in names if name not in KINDS or not KINDS[name].adaptive)
        return {key: given.get(key) for key in _BUDGET}

    @property
    def subject(self) -> tuple[Any, ...]:
        """Who was attacked, whatever the folders are called: the content of the weights, and the text in front."""
        inputs = self.run["inputs"].items()
        weights = sorted(v for k, v in inputs if k.endswith(".safetensors") or k.startswith("models/"))
        return self.recipe["system"], *weights

    def picture(self, behavior: str) -> Path:
        """The selected worst case, as ``keep_worst`` left it."""
        return self.folder / "images" / f"{safe_id(behavior)}.png"


def read_made(folder: Path) -> Made:
    """Read a finished run of ``mm-cb attack``."""
    run = read_run(folder)
    if run.get("command") != "attack" or not run.get("ended"):
        raise UserError(f"`{folder}` must be a finished `mm-cb attack` run.")
    items: dict[str, dict[str, Any]] = {}
    for item in read_jsonl(folder / "items.jsonl"):
        items.setdefault(item["id"], item)
    if not items:
        raise UserError(f"`{folder}` must hold attacked behaviours, its items.jsonl is empty.")
    made = Made(folder, run, items, next(iter(items.values()))["subject"])
    lacking = [behavior for behavior in items if not made.picture(behavior).is_file()]
    if lacking:
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
    made = told_apart(read_made(first), read_made(second))
    _refuse_other_budget(*made)
    asked = read_behaviors(behaviors)
    for m in made:
        _refuse_other_behaviors(m, asked, behaviors)
    _refuse_other_pictures(made, asked)
    recipe = {"runs": [m.recipe for m in made], "device": device, "fiction": made[0].recipe["fiction"]}
    inputs = [behaviors, *(m.folder / "items.jsonl" for m in made)]
    with RunDirectory(out, "attack transfer", recipe, 0, inputs=inputs) as run, Progress() as progress:
        items = []
        for judged in made:
            items += _judge_on(judged, made, asked, run.path, device, progress)
        write_jsonl(run.path / "items.jsonl", items)
        write_json(run.path / "checks.json", [])
        measurements = measure(items, pairs=[])
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


def _refuse_other_budget(first: Made, second: Made) -> None:
    for key, value in first.budget.items():
        if second.budget[key] != value:
            raise UserError(
                f"both runs must have one budget, but `{key}` is {_text(value)} in `{first.folder}` and "
                f"{_text(second.budget[key])} in `{second.folder}`; repeat one of them as the other was made."
            )


def _refuse_other_behaviors(made: Made, asked: Sequence[Behavior], path: Path) -> None:
    if made.items.keys() != {b.id for b in asked}:
        raise UserError(f"`{made.folder}` must have attacked the behaviours of `{path}`, it attacked others.")
    for behavior in asked:
        for key, got in (("prompt", behavior.prompt), ("target", behavior.target)):
            if made.items[behavior.id][key] != got:
                raise UserError(
                    f"`{path}` must be what the runs were made with: the {key} of `{behavior.id}` is "
                    f"{_text(made.items[behavior.id][key])} in `{made.folder}`, got {_text(got)}; give that file."
                )


def _refuse_other_pictures(made: Sequence[Made], behaviors: Sequence[Behavior]) -> None:
    for behavior in behaviors:
        files = [m.folder / clean_name(behavior) for m in made]
        if not all(file.is_file() for file in files) or len({file_sha256(file) for file in files}) > 1:
            raise UserError(
                f"both runs must have begun at the same clean pictures, but that of `{behavior.id}` is another file in "
                f"`{made[1].folder}` than in `{made[0].folder}`, or missing; attack one behaviours file in both."
            )


def _text(value: Any) -> str:
    return "not set" if value is None else f"{value!r:.80}"


def _show(made: Sequence[Made], measurements: Sequence[Measurement]) -> None:
    console().print("compliance in %, pictures made on (row) judged on (column)")
    for maker in made:
        shown = []
        for judged in made:
            cell = find(measurements, judged.name, "compliance", f"from_{maker.name}")
            known = cell is not None and cell.value is not None
            shown.append(f"{judged.name}: " + (f"{cell.value:.1f} (n={cell.n})" if cell and known else "not judged"))
        console().print(f"  {maker.name:>6} -> {', '.join(shown)}; made by {maker.recipe['attack']}")


def _judge_on(
    judged: Made,
    makers: Sequence[Made],
    behaviors: Sequence[Behavior],
    folder: Path,
    device: str,
    progress: Progress,
) -> list[dict[str, Any]]:
    """One column of the matrix."""
    recipe, options = judged.recipe, judged.recipe["options"]
    model = load_model(
        recipe["model"],
        adapter=recipe["adapter"],
        device=device,
        dtype=recipe["dtype"],
        image_backend=options["image_backend"],
    )
    subject = Subject(judged.name, model, adapted=recipe["adapter"] is not None, system=recipe["system"])
    attack = Attack("no_attack", recipe["epsilon"], batch=options["batch"], max_new_tokens=options["max_new_tokens"])
    judge = judge_of(recipe["model"])
    items = []
    for maker in makers:
        task = progress.task(f"made on {maker.name}, judged on {judged.name}", total=len(behaviors))
        for number, batch in enumerate(chunks(behaviors, attack.batch)):
            path = folder / "parts" / f"{safe_id(maker.name)}-on-{safe_id(judged.name)}-{number:04d}.json"
            items += once(path, partial(_batch, subject, maker, batch, attack, folder, judge))
            task.advance(len(batch))
    return items


def _batch(
    subject: Subject, maker: Made, batch: Sequence[Behavior], attack: Attack, folder: Path, judge: Judge
) -> list[dict[str, Any]]:
    """Judge one batch; pictures of one size go together."""
    records: dict[str, dict[str, Any]] = {}
    sizes: dict[tuple[int, int], list[Behavior]] = {}
    for behavior in batch:
        name = _name(maker, behavior)
        write_bytes(folder / name, maker.picture(behavior.id).read_bytes())
        write_bytes(folder / clean_name(behavior), (maker.folder / clean_name(behavior)).read_bytes())
        sizes.setdefault(read_pictures([name], folder)[0].size, []).append(behavior)
    for group in sizes.values():
        target = TargetObjective(subject, group, read_pictures([clean_name(b) for b in group], folder))
        names = [_name(maker, behavior) for behavior in group]
        judged = judge_files(subject, group, names, target, target, attack, folder, judge)
        records |= {b.id: _item(subject, maker, b, record) for b, record in zip(group, judged, strict=True)}
    return [records[behavior.id] for behavior in batch]


def _item(subject: Subject, maker: Made, behavior: Behavior, record: dict[str, Any]) -> dict[str, Any]:
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
        "clean_image": clean_name(behavior),
        **record,
    }


def _name(maker: Made, behavior: Behavior) -> str:
    return f"images/{safe_id(behavior.id)}/from-{safe_id(maker.name)}.png"
