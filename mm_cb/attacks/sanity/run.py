"""``mm-cb attack check``: the sanity battery on a model and its base, into one run directory."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path

import torch
from PIL.Image import Image

from mm_cb.attacks import saved as files
from mm_cb.attacks.run import refuse_placeholders, refuse_unsayable
from mm_cb.attacks.sanity.bed import make_bed
from mm_cb.attacks.sanity.checks import ADAPTIVE, checks_of, notes_of
from mm_cb.attacks.sanity.measure import BatteryConfig, Filed, Measured, add_transfer, measure_bed
from mm_cb.attacks.sanity.store import as_json, measured_once
from mm_cb.core.checked import read_list
from mm_cb.core.embedded import is_fiction
from mm_cb.core.hub import keep_to
from mm_cb.core.progress import Progress, console
from mm_cb.core.records import Check, Item
from mm_cb.core.runs import RunDirectory, write_json, write_jsonl
from mm_cb.data.behaviors_file import Behavior, grey_canvas, open_picture, read_behaviors, refuse_too_large
from mm_cb.inference.source import ModelSource
from mm_cb.inference.subjects import Subject
from mm_cb.metrics.results import measure, write_results
from mm_cb.models import ChatModel, load_model

_ARMS = (
    *("clean", "noise", "random_search", "single_step", "pgd", "any_of_k", "double_steps", "double_runs", "apgd"),
    *("transfer", *ADAPTIVE),
)
_DIGITS = 5
"""Significant digits in battery.json."""


def run_battery(
    source: ModelSource, behaviors: Path, out: Path, config: BatteryConfig, *, seed: int = 0
) -> list[Check]:
    """Run every arm and check, write ``checks.json``, ``battery.json`` and every judged picture, print the table.

    A failed check is a result, not an error: the report of the run claims nothing.

    Returns:
        The checks.
    """
    keep_to(out)
    asked = read_behaviors(behaviors)
    recipe: dict[str, object] = {"model": source.model, "adapter": source.adapter, "system": source.system}
    recipe |= {"epsilon": config.epsilon, "device": source.device, "dtype": source.dtype}
    recipe |= {"options": {k: v for k, v in asdict(config).items() if k != "epsilon"}}
    recipe |= {"fiction": is_fiction(source.model)}
    inputs = [behaviors, *(b.image for b in asked if b.image is not None), *source.weights()]
    with RunDirectory(out, "attack check", recipe, seed, inputs=inputs) as run, Progress() as progress:
        if not run.finished:
            loaded = load_model(
                source.model,
                adapter=source.adapter,
                device=source.device,
                dtype=source.dtype,
                image_backend=config.image_backend,
            )
            group, pictures = _one_size(asked, loaded.canvas, config.behaviors)
            refuse_placeholders(group, loaded.processor.image_token)
            refuse_unsayable(group, loaded)
            refuse_too_large(group, len(group))
            stored = run.stage("parts")
            measured = _measure(source, loaded, group, pictures, config, seed, run.path, stored, progress)
            _write(run.path, measured, config, group)
            run.finish()
            shutil.rmtree(stored)
        else:
            progress.say("finished before, nothing was measured again")
    return _show(out)


def _measure(
    source: ModelSource,
    loaded: ChatModel,
    group: Sequence[Behavior],
    pictures: Sequence[Image],
    config: BatteryConfig,
    seed: int,
    folder: Path,
    stored: Path,
    progress: Progress,
) -> dict[str, Measured]:
    """Every arm on the base and, where there is one, on the adapted model, which is shown the base's pictures too."""
    names = ["base"] + ["rr"] * (source.adapter is not None)
    task, measured = progress.task("sanity battery", total=5 * len(names)), dict[str, Measured]()
    for name in names:
        subject = Subject(name, loaded, adapted=name == "rr", system=source.system)
        bed = make_bed(subject, group, pictures, folder)

        def say(text: str, name: str = name) -> None:
            task.advance(note=f"{name}: {text}")

        found = measured_once(stored / f"{name}.json", partial(measure_bed, bed, config, seed, say))
        if name == "rr" and "pgd" in measured["base"].files:
            made = [files.read(folder, picture).pixels for picture in measured["base"].files["pgd"].names]
            add_transfer(found, bed, torch.stack(made))
        measured[name] = found
    return measured


def _one_size(asked: Sequence[Behavior], canvas: tuple[int, int], count: int) -> tuple[list[Behavior], list[Image]]:
    """The first behaviours whose pictures have the most frequent size: one batch."""
    pictures = [grey_canvas(canvas) if b.image is None else open_picture(b.image) for b in asked]
    sizes = [picture.size for picture in pictures]
    common = max(dict.fromkeys(sizes), key=sizes.count)
    rows = [i for i, size in enumerate(sizes) if size == common][:count]
    return [asked[i] for i in rows], [pictures[i] for i in rows]


def _write(folder: Path, measured: dict[str, Measured], config: BatteryConfig, group: Sequence[Behavior]) -> None:
    found, base = measured[list(measured)[-1]], measured["base"] if "rr" in measured else None
    items: list[Item] = [
        {
            "id": behavior.id,
            "metric": "target_prefix",
            "subject": subject,
            "condition": arm,
            "split": behavior.split,
            "category": behavior.category,
            "prompt": behavior.prompt,
            "target": behavior.target,
            "completion": "",
            "outcome": None,
            "score": float(of.emitted[arm][i]),
            "seed": 0,
            "image": _shown(of, arm, i),
            "clean_image": _shown(of, "clean", i),
        }
        for subject, of in measured.items()
        for arm in _ARMS
        if arm in of.emitted
        for i, behavior in enumerate(group)
    ]
    numbers = {subject: as_json(of, _DIGITS) for subject, of in measured.items()}
    write_json(folder / "battery.json", {**numbers, "notes": notes_of(found, config)})
    write_json(folder / "checks.json", checks_of(found, config, base))
    write_jsonl(folder / "items.jsonl", items)
    write_results(folder / "results.json", measure(items, pairs=[("rr", "base")] if base is not None else []))


def _shown(found: Measured, arm: str, row: int) -> str | None:
    """The file behind an item; of an arm of several pictures the one that counts: answered to, then of lowest loss."""
    several = {"noise": ("noise",), "any_of_k": ("pgd", "iterate"), "double_runs": ("pgd", "second_run")}
    parts = several.get(arm, (arm,))
    tried = [one for name, one in found.files.items() if name.partition(" ")[0] in parts and one.names]

    def rank(one: Filed) -> tuple[bool, float]:
        return not one.emitted[row], float(one.losses[row])

    return min(tried, key=rank).names[row] if tried else None


def _show(folder: Path) -> list[Check]:
    """Print a finished battery's table; returns its checks."""
    from rich.table import Table

    checks = read_list(folder / "checks.json", Check)
    table = Table("check", "", "found", "expected")
    for entry in checks:
        table.add_row(entry["name"], "pass" if entry["passed"] else "FAIL", entry["value"], entry["expected"])
    console().print(table)
    for note in json.loads((folder / "battery.json").read_bytes()).get("notes", []):
        console().print(f"note: {note}")
    failed = sum(not entry["passed"] for entry in checks)
    verdict = "all checks pass" if not failed else f"{failed} checks fail: a report of this attack claims nothing"
    console().print(f"{verdict}; {folder / 'checks.json'}, every number in {folder / 'battery.json'}")
    return checks
