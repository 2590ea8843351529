"""``mm-cb attack check``: the sanity battery on a model and its base, into one run directory."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from mm_cb.attacks.run import refuse_placeholders, refuse_unsayable, weights_of
from mm_cb.attacks.sanity.bed import make_bed
from mm_cb.attacks.sanity.checks import ADAPTIVE, check, checks_of
from mm_cb.attacks.sanity.measure import Filed, Measured, Sizes, add_transfer, measure_bed
from mm_cb.attacks.sanity.planted import planted_check
from mm_cb.attacks.sanity.plots import draw
from mm_cb.attacks.sanity.store import measured_once, plain
from mm_cb.attacks.search import OPTIMIZERS
from mm_cb.core.embedded import is_fiction
from mm_cb.core.errors import UserError
from mm_cb.core.hub import keep_to
from mm_cb.core.progress import Progress, Task, console
from mm_cb.core.runs import RunDirectory, write_json, write_jsonl
from mm_cb.core.settings import with_overrides
from mm_cb.data.behaviors_file import Behavior, grey_canvas, open_picture, read_behaviors, refuse_too_large
from mm_cb.inference.subjects import Subject
from mm_cb.metrics.results import measure, write_results
from mm_cb.models import load_model

_ARMS = (
    *("clean", "noise", "random_search", "single_step", "pgd", "any_of_k", "double_steps", "double_runs", "apgd"),
    *("transfer", *ADAPTIVE),
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What ``key=value`` can set."""

    steps: int = 100
    iterates: int = 5
    behaviors: int = 12
    """The first so many behaviours of one picture size."""
    sweep: str = "0,1,2,4,8,16,32,64,128,255"
    """Values of epsilon, in 255ths."""
    optimizer: str = "adam"
    """How every search by PGD steps, as `mm-cb attack` has it: adam, sign, momentum."""
    image_backend: str = "pil"
    """Image processor: pil or torchvision."""
    validation: str = ""
    """Behaviours file on which settings were chosen, for S13; empty = nothing was chosen."""

    def sizes(self, epsilon: int) -> Sizes:
        """What the battery runs.

        Raises:
            UserError: If a value is out of range.
        """
        try:
            sweep = tuple(sorted({int(text) for text in self.sweep.split(",")}))
        except ValueError as error:
            raise UserError(f"`sweep` must be whole numbers with commas between, got `{self.sweep}`.") from error
        if min(sweep) < 0 or max(sweep) > 255 or min(self.steps, self.behaviors) < 1 or self.iterates < 0:
            raise UserError(
                "`sweep` must lie in 0..255, `steps` and `behaviors` at 1 or above, `iterates` at 0 or above."
            )
        for name, known in (("optimizer", tuple(OPTIMIZERS)), ("image_backend", ("pil", "torchvision"))):
            if getattr(self, name) not in known:
                raise UserError(f"`{name}` must be one of {', '.join(known)}, got `{getattr(self, name)}`.")
        return Sizes(epsilon, self.steps, self.iterates, sweep, self.optimizer)


def run_battery(
    *,
    model: str,
    adapter: str | None,
    behaviors: Path,
    out: Path,
    epsilon: int,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    overrides: Sequence[str] = (),
    system: str | None = None,
) -> list[dict[str, Any]]:
    """Run S1 to S13, write ``checks.json``, ``battery.json``, plots and every judged picture, print the table.

    A failed check is a result, not an error: the report of the run claims nothing.

    Returns:
        The checks.
    """
    keep_to(out)
    settings = with_overrides(Settings(), overrides)
    sizes = settings.sizes(epsilon)
    asked = read_behaviors(behaviors)
    recipe: dict[str, Any] = {"model": model, "adapter": adapter, "system": system}
    recipe |= {"epsilon": epsilon, "device": device, "dtype": dtype}
    recipe |= {"options": dataclasses.asdict(settings), "fiction": is_fiction(model)}
    # What is wrong with the file is said before the long run.
    validation = read_behaviors(Path(settings.validation)) if settings.validation else None
    inputs = [behaviors, *(b.image for b in asked if b.image is not None), *weights_of(model, adapter)]
    with RunDirectory(out, "attack check", recipe, seed, inputs=inputs) as run, Progress() as progress:
        if run.finished:
            progress.say("finished before, nothing was measured again")
            checks = json.loads((run.path / "checks.json").read_bytes())
            _show(checks, run.path)
            return checks
        loaded = load_model(model, adapter=adapter, device=device, dtype=dtype, image_backend=settings.image_backend)
        group, pictures = _one_size(asked, loaded.canvas, settings.behaviors)
        refuse_placeholders(group, loaded.processor.image_token)
        refuse_unsayable(group, loaded)
        refuse_too_large(group, len(group))
        task = progress.task("sanity battery", total=7 + 5 * (adapter is not None))
        stored = run.stage("parts")
        bed = make_bed(Subject("base", loaded, system=system), group, pictures, run.path)
        base = found = measured_once(
            stored / "base.safetensors", lambda: measure_bed(bed, sizes, seed, _say(task, "base"))
        )
        if adapter is not None:
            bed = make_bed(Subject("rr", loaded, adapted=True, system=system), group, pictures, run.path)
            found = measured_once(stored / "rr.safetensors", lambda: measure_bed(bed, sizes, seed, _say(task, "rr")))
            if "pgd" in base.images:
                add_transfer(found, bed, base.images["pgd"])
        task.advance(note="planted models")
        checks = [
            *checks_of(found, sizes, base if adapter is not None else None),
            planted_check(),
            _held_out(validation, settings, group),
        ]
        checks.sort(key=lambda c: int(c["name"].partition(" ")[0][1:]))
        measured = {"base": base} | ({"rr": found} if adapter is not None else {})
        _write(run.path, measured, checks, group)
        run.finish()
        shutil.rmtree(stored)
    _show(checks, run.path)
    return checks


def _say(task: Task, name: str) -> Callable[[str], None]:
    return lambda text: task.advance(note=f"{name}: {text}")


def _one_size(asked: Sequence[Behavior], canvas: tuple[int, int], count: int) -> tuple[list[Behavior], list[Any]]:
    """The first behaviours whose pictures have the most frequent size: one batch."""
    pictures = [grey_canvas(canvas) if b.image is None else open_picture(b.image) for b in asked]
    sizes = [picture.size for picture in pictures]
    common = max(dict.fromkeys(sizes), key=sizes.count)
    rows = [i for i, size in enumerate(sizes) if size == common][:count]
    return [asked[i] for i in rows], [pictures[i] for i in rows]


def _held_out(
    validation: Sequence[Behavior] | None, settings: Settings, reported: Sequence[Behavior]
) -> dict[str, Any]:
    """S13: nothing was tuned, or it was tuned on other behaviours than those that the battery reports.

    More steps than the default's are patience, whoever chose them: they make no attack weaker.
    """
    name, expected = "S13 settings were chosen elsewhere", "defaults, more steps, or others in `validation=`"
    why = "settings that are tuned on the reported behaviours flatter the attack or the defence"
    if validation is None:
        default = Settings()
        tuned = settings.steps < default.steps or settings.iterates != default.iterates
        tuned |= settings.optimizer != default.optimizer
        value = f"steps={settings.steps}, iterates={settings.iterates}, optimizer={settings.optimizer}"
        return check(name, not tuned, value, expected, why)
    texts = {(b.prompt, b.target) for b in reported}
    shared = sum((b.prompt, b.target) in texts for b in validation)
    value = f"{len(validation)} validation behaviours, {shared} of them reported too"
    return check(name, not shared, value, expected, why)


def _write(
    folder: Path, measured: dict[str, Measured], checks: list[dict[str, Any]], group: Sequence[Behavior]
) -> None:
    items = [
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
            "score": float(found.emitted[arm][i]),
            "seed": 0,
            "image": _shown(found, arm, i),
            "clean_image": _shown(found, "clean", i),
        }
        for subject, found in measured.items()
        for arm in _ARMS
        if arm in found.emitted
        for i, behavior in enumerate(group)
    ]
    write_json(folder / "battery.json", {subject: plain(found) for subject, found in measured.items()})
    write_json(folder / "checks.json", checks)
    write_jsonl(folder / "items.jsonl", items)
    write_results(folder / "results.json", measure(items, pairs=[("rr", "base")] if "rr" in measured else []))
    draw(folder / "plots", measured)


def _shown(found: Measured, arm: str, row: int) -> str | None:
    """The file behind an item; of an arm of several pictures the one that counts: answered to, then of lowest loss."""
    several = {"noise": ("noise",), "any_of_k": ("pgd", "iterate"), "double_runs": ("pgd", "second_run")}
    parts = several.get(arm, (arm,))
    tried = [files for name, files in found.files.items() if name.partition(" ")[0] in parts and files.names]

    def rank(files: Filed) -> tuple[bool, float]:
        return not files.emitted[row], float(files.losses[row])

    return min(tried, key=rank).names[row] if tried else None


def _show(checks: Sequence[dict[str, Any]], folder: Path) -> None:
    from rich.table import Table

    table = Table("check", "", "found", "expected")
    for entry in checks:
        table.add_row(entry["name"], "pass" if entry["passed"] else "FAIL", entry["value"], entry["expected"])
    console().print(table)
    failed = sum(not entry["passed"] for entry in checks)
    verdict = "all checks pass" if not failed else f"{failed} checks fail: a report of this attack claims nothing"
    console().print(f"{verdict}; {folder / 'checks.json'}, plots in {folder / 'plots'}")
