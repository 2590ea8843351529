"""Several run directories as one: what each measured, and what can only be seen across them."""

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from mm_cb.core.compatibility import counts_in_worst_case
from mm_cb.core.errors import UserError
from mm_cb.core.files import file_sha256, read_jsonl
from mm_cb.core.records import Check, Curve, Item, Representations
from mm_cb.metrics.results import Measurement, measure
from mm_cb.metrics.table import is_worst_case
from mm_cb.report.comparable import BATTERY, budget, refuse_unlike, who
from mm_cb.report.labels import subject_label
from mm_cb.report.load import RunFiles
from mm_cb.report.strength import Strength


@dataclass(frozen=True)
class ReportData:
    """What a page is made from: one run, or several that fit together."""

    runs: tuple[RunFiles, ...]
    measurements: list[Measurement]
    items: list[Item]
    checks: list[Check]
    curves: list[Curve]
    representations: Representations | None
    notes: tuple[str, ...] = ()
    """What a reader must know about how the runs fit together."""
    strengths: tuple[Strength, ...] = ()
    """How strong every attack was."""
    tested: bool = False
    """Whether the sanity battery was run on the attacked model at its budget."""

    @property
    def fiction(self) -> bool:
        """Whether every run's world is fictional."""
        return all(run.fiction for run in self.runs)

    @property
    def by_texts(self) -> bool:
        """Whether requests were attacked by texts alone."""
        return by_texts_alone(self.items)


def by_texts_alone(items: Iterable[Item]) -> bool:
    """Whether forbidden requests were attacked, and none of them says that it has a picture."""
    attacked = [item for item in items if item["metric"] == "compliance"]
    return bool(attacked) and all(item.get("clean_image", "") is None for item in attacked)


def combine(runs: Sequence[RunFiles]) -> ReportData:
    """Join runs: their items side by side, every other subject paired with the base by item id.

    One run is taken as it is. Of several, each measurement keeps the value that its own run gives; what can only be
    seen across runs (paired differences, the worst case over attacks) is measured here, from the items.

    Raises:
        UserError: If two runs measured the same thing, a subject is not one model throughout, or runs that would be
            compared differ in settings, seed, data or items.
    """
    if len(runs) == 1:
        run = runs[0]
        own = run.measurements, run.items, run.checks, run.curves, run.representations
        return ReportData((run,), *own, (*run.holes, *_untested([run])), run.strengths, _is_tested([run]))
    runs = [_checks_alone(run) for run in runs]
    refuse_unlike(runs)
    items = [item for run in runs for item in run.items]
    measurements = _measure(items, runs)
    return ReportData(
        runs=tuple(runs),
        measurements=measurements,
        items=items,
        checks=_checks(runs, items, measurements),
        curves=[curve for run in runs for curve in run.curves],
        representations=next((run.representations for run in runs if run.representations), None),
        notes=tuple(_notes(runs)),
        strengths=tuple(one for run in runs for one in run.strengths),
        tested=_is_tested(runs),
    )


def _checks_alone(run: RunFiles) -> RunFiles:
    """A sanity battery beside other runs speaks through its checks: its own small attacks measure nothing for them."""
    if run.run["command"] != BATTERY:
        return run
    return dataclasses.replace(run, items=[], measurements=[], curves=[], strengths=())


def _measure(items: list[Item], runs: Sequence[RunFiles]) -> list[Measurement]:
    subjects = sorted({item["subject"] for item in items})
    pairs = [(subject, "base") for subject in subjects if subject != "base" and "base" in subjects]
    try:
        joined = measure(items, pairs=pairs)
    except ValueError as e:
        raise UserError(f"these runs do not make one comparison: {e}") from e
    own: dict[tuple[str, ...], list[Measurement]] = defaultdict(list)
    for m in (m for run in runs for m in run.measurements):
        own[m.address].append(m)
    measured = [_settle(m, own.pop(m.address, [])) for m in joined]
    return measured + [m for rest in own.values() for m in rest]


def _settle(joined: Measurement, found: Sequence[Measurement]) -> Measurement:
    """The run's own number with the difference that was found across runs; of several (shards) the joined number."""
    if len(found) != 1 or is_worst_case(joined.condition) or joined.metric == "gibberish":
        return joined
    own = found[0]
    return dataclasses.replace(joined, value=own.value, ci95=own.ci95, counts={**joined.counts, **own.counts})


def _checks(runs: Sequence[RunFiles], items: list[Item], measurements: list[Measurement]) -> list[Check]:
    """The runs' own checks, and those that can only be made, or can be made again, over all of them."""
    files = [item for item in items if item["metric"] == "compliance" and item.get("image") and "same_as" not in item]
    made: list[Check] = []
    if any(item["condition"] != "no_attack" for item in files):
        from mm_cb.attacks import checks
        from mm_cb.inference.tolerance import tolerance
        from mm_cb.metrics.checks import attack_is_strong, placebo_is_weak

        epsilon = max(int(budget(run)["epsilon"] or 0) for run in runs)
        dtypes = {run.run["recipe"].get("dtype", "float32") for run in runs}  # each run's own check is the stricter one
        made = [
            attack_is_strong(measurements),
            placebo_is_weak(measurements),
            checks.inside_ball(files, epsilon),
            checks.file_loss(files, max(dtypes, key=partial(tolerance, 1.0))),
        ]
    again = {check["name"] for check in made}
    recorded = [(run, check) for run in runs for check in run.checks]
    for run, check in recorded:
        held = check["passed"] is True or check["passed"] is None  # what one run does not show, all together may
        if not held or check["name"] not in again:
            made.append({**check, "name": f"{check['name']} ({run.folder.name})"})
    return made


def _untested(runs: Sequence[RunFiles]) -> Iterable[str]:
    """The model of the page that was attacked by pictures, where no sanity battery at its budget is among the runs."""
    seen = [run for run in runs if any(item.get("clean_image", "") is not None for item in run.items)]
    batteries = [run for run in runs if run.run["command"] == BATTERY]
    tested = [(who(run) | budget(run) | _searched(run), _steps(run)) for run in batteries]
    for subject in ("rr", "base"):  # a battery on the circuit breaker has the base as its control
        attacked = [run for run in seen if run.run["command"] in ("attack", "demo") and _attacks(run, subject)]
        if not all(
            any(_as_attacked(run, subject) == like and steps <= _steps(run) for like, steps in tested)
            for run in attacked
        ):
            yield (
                f"The sanity battery was not run on the {subject_label(subject)} as it was attacked here, so a low "
                "number may be the attack's weakness: run `mm-cb attack check` and report its folder as well."
            )
        if attacked:
            return


def _is_tested(runs: Sequence[RunFiles]) -> bool:
    return any(run.run["command"] == BATTERY for run in runs) and not list(_untested(runs))


def _as_attacked(run: RunFiles, subject: str) -> dict[str, object]:
    """Which model was attacked, and how far; a demo trained its breaker itself, which its recipe does not name."""
    trained = run.folder / "adapters" / subject / "adapter_model.safetensors"
    own = {"adapter": "hashed", f"weights {trained.name}": file_sha256(trained)} if trained.is_file() else {}
    return who(run) | budget(run) | _searched(run) | own


def _searched(run: RunFiles) -> dict[str, object]:
    """How an attack stepped, through which image processor and in which dtype; the defaults are what demos have."""
    recipe = run.run["recipe"]
    options = recipe.get("options") or {}
    found = {"optimizer": options.get("optimizer", "adam"), "image_backend": options.get("image_backend", "pil")}
    return found | {"dtype": recipe.get("dtype") or (recipe.get("rerouting") or {}).get("dtype") or "float32"}


def _steps(run: RunFiles) -> int:
    """Steps per run of an attack; a battery vouches for as many as it had, and for more."""
    recipe = run.run["recipe"]
    return int((recipe.get("options") or {}).get("steps") or recipe.get("steps") or 0)


def _attacks(run: RunFiles, subject: str) -> bool:
    return any(item["subject"] == subject and counts_in_worst_case(item) for item in run.items)


def _did_not_take_hold(run: RunFiles) -> str | None:
    """What the training of a run's adapter said of its end, if it still lies where it was."""
    folder = Path(str(run.run["recipe"].get("adapter") or ""))
    weights = folder / "adapter_model.safetensors"
    try:
        if file_sha256(weights) not in run.run["inputs"].values():
            return None
        stuck = read_jsonl(folder / "metrics.jsonl")[-1].get("stuck")
    except (OSError, UserError, IndexError):
        return None
    return f"The training of the circuit breaker did not take hold: {stuck}." if stuck else None


def _notes(runs: Sequence[RunFiles]) -> Iterable[str]:
    yield from (hole for run in runs for hole in run.holes)
    yield from _untested(runs)
    yield from dict.fromkeys(told for run in runs if (told := _did_not_take_hold(run)))
    versions = {run.folder.name: run.run.get("versions") or {} for run in runs}
    names = sorted({name for held in versions.values() for name in held})
    changed = [name for name in names if len({held.get(name) for held in versions.values()}) > 1]
    if changed:
        named = ", ".join(changed)
        yield f"The runs were made with different versions of {named}: small differences may come from there."
    adapters = [run for run in runs if "rr" in {item["subject"] for item in run.items}]
    if adapters and not any(run.run["recipe"].get("adapter") for run in adapters):
        yield ("The circuit breaker was measured as a model of its own: that it is base plus adapter was not checked.")
