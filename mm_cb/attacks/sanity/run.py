"""``mm-cb attack check``: the sanity battery on a model and its base, into one run directory."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import TypedDict

import torch
from PIL.Image import Image
from torch import Tensor

from mm_cb.attacks import saved as files
from mm_cb.attacks.calls import spoken
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.objectives.target import TargetObjective, encode
from mm_cb.attacks.refusals import refuse_unfit
from mm_cb.attacks.sanity.checks import checks_of, notes_of
from mm_cb.attacks.sanity.measure import (
    ADAPTIVE,
    Filed,
    Measured,
    Setup,
    add_transfer,
    as_json,
    measure_arms,
    measured_once,
)
from mm_cb.attacks.search import make_objective
from mm_cb.core.checked import read_list, read_record
from mm_cb.core.closing import say
from mm_cb.core.errors import UserError
from mm_cb.core.files import file_errors
from mm_cb.core.hub import keep_to
from mm_cb.core.limits import LIMITS
from mm_cb.core.paths import safe_id
from mm_cb.core.progress import CountedWork, Progress, print_whole
from mm_cb.core.records import Check, Item
from mm_cb.core.runs import RunDirectory, write_json, write_jsonl
from mm_cb.data.behaviors_file import Behavior, asked_once, grey_canvas, read_behaviors
from mm_cb.data.pictures import open_picture
from mm_cb.inference.source import ModelSource
from mm_cb.inference.subjects import Subject, load_subject
from mm_cb.inference.tolerance import dtype_of
from mm_cb.metrics.holes import refuse_absent_outputs
from mm_cb.metrics.observations import starts_with
from mm_cb.metrics.results import measure, write_results
from mm_cb.models.families import sees

_ARMS = (
    *("clean", "noise", "random_search", "single_step", "pgd", "any_of_k", "double_steps", "double_runs", "apgd"),
    *("transfer", *ADAPTIVE),
)
_SHORTER = "fewer --steps, --count or --iterates, or a GPU"


def run_battery(source: ModelSource, behaviors: Path, out: Path, config: AttackConfig, count: int) -> list[Check]:
    """Run every arm and check, write ``checks.json``, ``battery.json`` and every judged picture, print the table.

    A failed check is a result, not an error: the report of the run claims nothing.

    Args:
        source: The model; with an adapter its base is the control.
        behaviors: Behaviours file.
        out: Run directory.
        config: Of the search by PGD, in an l-inf ball; its iterates are as many as the placebo has further draws.
        count: The first so many behaviours of one picture size.

    Returns:
        The checks.
    """
    count = LIMITS["count"].number("count", count)
    if not config.threat.levels:
        raise UserError("`--epsilon` must be at least 1/255: at 0/255 no picture changes, so that nothing is checked.")
    keep_to(out)
    asked = asked_once(read_behaviors(behaviors))
    if not sees(source.model):
        raise UserError(
            f"`mm-cb attack check` tests a search for pictures, and `{source.model}` is a model of text alone; see "
            "what it says by `mm-cb attack --attack no_attack,prefill_only,embedding`."
        )
    asked = spoken(asked, source.model)
    recipe: dict[str, object] = {"model": source.model, "adapter": source.adapter, "system": source.system}
    recipe |= {"epsilon": config.threat.levels, "device": source.device, "dtype": source.dtype}
    options = {key: getattr(config, key) for key in ("steps", "iterates", "optimizer", "image_backend")}
    recipe |= {"options": options | {"behaviors": count}, "fiction": source.fiction}
    inputs = [behaviors, *(b.image for b in asked if b.image is not None), *source.weights()]
    with RunDirectory(out, "attack check", recipe, config.seed, inputs=inputs) as run, Progress() as progress:
        if run.finished:
            refuse_absent_outputs(run.path)
            progress.say("finished before, nothing was measured again")
        else:
            subject = load_subject(source, "rr" if source.adapter else "base", config.image_backend)
            group, pictures = _one_size(asked, subject.model.canvas, count)
            if len(group) < count:
                progress.say(f"`--count {count}`: only {len(group)} of {len(asked)} behaviours have one picture size")
            refuse_unfit(subject, group, replace(config, batch=len(group)))
            stored = run.stage("parts")
            subjects = [replace(subject, name="base", adapted=False), *([subject] if subject.adapted else [])]
            task, measured = progress.task("sanity battery", 5 * len(subjects), shorter=_SHORTER), dict[str, Measured]()
            for one in subjects:
                setup = make_setup(one, group, pictures, run.path)
                say = partial(_say, task, one.name)
                found = measured_once(stored / f"{one.name}.json", partial(measure_arms, setup, config, say))
                if one.adapted and "pgd" in measured["base"].arms:  # it is shown the base's pictures, too
                    made = [files.read(run.path, name).pixels for name in measured["base"].arms["pgd"].names]
                    add_transfer(found, setup, torch.stack(made))
                measured[one.name] = found
            _write(run.path, measured, config, group)
            run.finish()
            shutil.rmtree(stored)
    return _show(out)


def make_setup(subject: Subject, group: Sequence[Behavior], pictures: Sequence[Image], folder: Path) -> Setup:
    """Target losses through the deployed path and greedy answers, of files that lie in ``folder/images``."""
    objective = TargetObjective(subject, group, pictures)
    smooth = copy.copy(objective)  # the attack's own pass, so that S8 checks the gradient that is followed
    smooth.preprocess = getattr(objective.preprocess, "surrogate", objective.preprocess)
    longest = int(objective.inputs.completion_mask.sum(dim=1).max())

    clean = torch.stack([files.to_pixels(picture) for picture in pictures]).to(subject.model.device)

    def judge(arm: str, pixels: Tensor) -> Filed:
        names = [f"images/{subject.name}/{arm.replace(' ', '-')}/{safe_id(behavior.id)}.png" for behavior in group]
        with file_errors(folder / names[0]):
            saved = [files.save(folder, name, one) for name, one in zip(names, pixels, strict=True)]
        inputs = encode(subject, group, files.images(saved), None)
        assert inputs.pixel_values is not None
        losses = objective.loss(inputs.pixel_values)
        with subject.active() as model:
            said = model.generate(inputs, longest + 2)
        emitted = [starts_with(text, behavior.target) for text, behavior in zip(said, group, strict=True)]
        moved = (torch.stack([one.pixels for one in saved]) - clean.cpu()) * 255
        distances = moved.round().abs().flatten(1).amax(dim=1).int()
        return Filed(names, losses.cpu(), torch.tensor(emitted), distances)

    behind = "" if subject.system is None else f" behind the operator's of {len(subject.system)} characters"
    about = (
        f"white box; goal: the answer begins with a given text; pixels of the uploaded file of {pictures[0].width} x "
        f"{pictures[0].height} change, the user picks the text{behind}; "
        f"{type(subject.model.processor.image_processor).__name__}, {subject.model.base.dtype}; {len(group)} behaviours"
    )
    adaptive = {
        name: make_objective(subject, group, pictures, AttackConfig(name)) for name in ADAPTIVE if subject.adapted
    }
    return Setup(objective, smooth, clean, judge, about, adaptive, dtype_of(subject.model))


def _say(task: CountedWork, name: str, text: str) -> None:
    task.advance(note=f"{name}: {text}")


def _one_size(asked: Sequence[Behavior], canvas: tuple[int, int], count: int) -> tuple[list[Behavior], list[Image]]:
    """The first behaviours whose pictures have the most frequent size: one batch."""
    pictures = [grey_canvas(canvas) if b.image is None else open_picture(b.image) for b in asked]
    rows = max(files.by_size(pictures), key=lambda rows: (len(rows), -rows[0]))[:count]
    return [asked[i] for i in rows], [pictures[i] for i in rows]


def _write(folder: Path, measured: dict[str, Measured], config: AttackConfig, group: Sequence[Behavior]) -> None:
    found, base = measured[list(measured)[-1]], measured["base"] if "rr" in measured else None
    items: list[Item] = []
    for subject, of in measured.items():
        for arm, i in product((arm for arm in _ARMS if arm in of.arms), range(len(group))):
            b, filed = group[i], of.arms[arm]
            item: Item = {"id": b.id, "metric": "target_prefix", "subject": subject, "condition": arm}
            item |= {"split": b.split, "category": b.category, "prompt": b.prompt, "target": b.target}
            item |= {"completion": "", "outcome": None, "score": float(filed.emitted[i]), "seed": 0}
            items.append(item | {"image": filed.names[i], "clean_image": of.arms["clean"].names[i]})
    numbers = {subject: as_json(of) for subject, of in measured.items()}
    write_json(folder / "battery.json", {**numbers, "notes": notes_of(found, config)})
    write_json(folder / "checks.json", checks_of(found, config, base))
    write_jsonl(folder / "items.jsonl", items)
    write_results(folder / "results.json", measure(items, pairs=[("rr", "base")] if base is not None else []))


class _Battery(TypedDict, total=False):
    """battery.json, as far as it is shown."""

    notes: list[str]


def _show(folder: Path) -> list[Check]:
    """Print a finished battery's table; returns its checks."""
    from rich.table import Table

    checks = read_list(folder / "checks.json", Check)
    table = Table("check", "", "found", "expected", box=None, pad_edge=False)
    for entry in checks:
        table.add_row(entry["name"], "pass" if entry["passed"] else "FAIL", str(entry["value"]), str(entry["expected"]))
    print_whole(table)
    for note in read_record(folder / "battery.json", _Battery).get("notes", []):
        say(f"note: {note}")
    failed = sum(not entry["passed"] for entry in checks)
    verdict = "all checks pass" if not failed else f"{failed} checks fail: a report of this attack claims nothing"
    say(f"{verdict}; {folder / 'checks.json'}, every number in {folder / 'battery.json'}")
    return checks
