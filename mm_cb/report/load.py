"""What a report is made from: the files of run directories, checked where they are read."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypedDict

from mm_cb.core.checked import checked, made, read_json, read_list, read_records
from mm_cb.core.compatibility import with_added_fields, with_attack_flags
from mm_cb.core.errors import UserError
from mm_cb.core.paths import safe_id
from mm_cb.core.records import Agreement, Check, Curve, Item, Representations, Run, Timing
from mm_cb.core.runs import UNSEALED, finished_run, read_run, unwritten
from mm_cb.core.seal import refuse_changed
from mm_cb.judges.stored_verdicts import refuse_other_verdicts
from mm_cb.metrics.at_limit import at_limit_notes
from mm_cb.metrics.holes import holes, read_curves
from mm_cb.metrics.results import Measurement, measure, read_results
from mm_cb.metrics.table import WORST_GIVEN, Metric, is_known, register_metric
from mm_cb.metrics.whole import refuse_contradiction, refuse_unmeasured, whole_items
from mm_cb.report.labels import answers_of, checks_called, conditions_called
from mm_cb.report.strength import Strength, strengths


class _ProtocolFile(TypedDict, total=False):
    """protocol.json, as far as a page reads it."""

    labels: dict[str, str]
    settles: dict[str, float]


@dataclass(frozen=True)
class RunFiles:
    """The contents of one run directory, as the report reads them."""

    folder: Path
    run: Run
    measurements: list[Measurement]
    items: list[Item]
    """Records of items.jsonl, each with the ``run_dir`` that its pictures lie in."""
    checks: list[Check]
    curves: list[Curve]
    representations: Representations | None
    timings: list[Timing]
    agreement: list[Agreement]
    """How far every two judges of this run agree; empty where fewer than two have judged."""
    labels: dict[str, str] = field(default_factory=dict)
    """What the run calls its attacks."""
    holes: tuple[str, ...] = ()
    """Sentences about what its folder lacks beside its numbers, and about answers that were cut."""
    strengths: tuple[Strength, ...] = ()
    """How strong its attacks were."""

    @property
    def fiction(self) -> bool:
        """Whether the run's world is fictional, so that completions may be shown. Anything but true means no."""
        return self.run["recipe"].get("fiction") is True


def load_run(folder: Path) -> RunFiles:
    """Read a finished run directory.

    A sanity battery that only checks (``checks.json`` and no ``results.json``) has no items. ``curves.json``,
    ``representations.json`` and ``timings.jsonl`` may be missing: the page then lacks those parts. A missing
    ``checks.json`` counts as no check at all, so the verdict claims nothing.

    Raises:
        UserError: If nothing was measured there, run.json, results.json or items.jsonl is missing, any file is damaged,
            the items are not those that were counted, or not what their judge said, or another command writes there.
    """
    folder = Path(folder)
    with unwritten(folder):
        return _loaded(folder)


def _loaded(folder: Path) -> RunFiles:
    refuse_unmeasured(folder, read_run(folder))
    run = finished_run(folder)
    command = run["command"]
    run["recipe"] = with_added_fields(command, run["recipe"])
    _learn_metrics(folder / "metrics.json")
    measured = [folder / "results.json", folder / "items.jsonl"]
    only_checks = command == "attack check" and not any(file.exists() for file in measured)
    measurements = [] if only_checks else read_results(folder / "results.json")
    items = [] if only_checks else whole_items(folder, run)
    _refuse_half_judged(folder, items)
    refuse_other_verdicts(folder, items)
    if not only_checks:
        refuse_contradiction(folder, items, measurements, run["seed"])
    items, unsaid = [with_attack_flags(item) for item in items], items
    if items != unsaid:
        measurements += _worst_by_given(items, measurements)
    protocol = _protocol(folder / "protocol.json", sealed=run.get("schema", UNSEALED) != UNSEALED)
    checks = read_list(folder / "checks.json", Check)
    if command == "attack check":
        from mm_cb.attacks.sanity.stored import refuse_other_checks

        refuse_other_checks(folder, run["recipe"], checks)
    return RunFiles(
        folder=folder,
        run=run,
        measurements=measurements,
        items=[{**item, "run_dir": str(folder)} for item in items],
        checks=checks_called(checks),
        curves=read_curves(folder / "curves.json"),
        representations=_representations(folder / "representations.json"),
        timings=read_records(folder / "timings.jsonl", Timing),
        agreement=read_list(folder / "judgements" / "agreement.json", Agreement),
        labels=protocol.get("labels", {}),
        holes=(*holes(folder, run, items), *_cut_answers(run, items, protocol.get("labels", {}))),
        strengths=strengths(folder, items, protocol.get("settles", {})) if command in ("attack", "demo") else (),
    )


def _cut_answers(run: Run, items: Sequence[Item], own: Mapping[str, str]) -> list[str]:
    with conditions_called(own):
        return at_limit_notes(run, items, answers_of)


def _worst_by_given(items: Sequence[Item], stored: Sequence[Measurement]) -> list[Measurement]:
    """The worst cases by what attacks were given, of a run whose items did not say that yet."""
    pairs = sorted({(m.subject, m.paired_with) for m in stored if m.paired_with is not None})
    attacked = (item for item in items if item["metric"] == "compliance")
    return [m for m in measure(attacked, pairs=pairs) if m.condition in WORST_GIVEN and m.metric == "compliance"]


def _refuse_half_judged(folder: Path, items: Sequence[Item]) -> None:
    """Refuse verdicts that a stopped `mm-cb judge` left in the items alone."""
    verdicts = folder / "judgements"
    files = [verdicts / f"{safe_id(name)}.json" for name in {item["judge"] for item in items if "judge" in item}]
    if any(file.is_file() for file in files) and not (verdicts / "newest.json").is_file():
        raise UserError(f"`{folder}` was being judged when that was stopped: give its `mm-cb judge` again.")


def _learn_metrics(path: Path) -> None:
    """What a run says of metrics that only those know who measured them."""
    for number, content in enumerate(read_list(path, Metric), start=1):
        try:
            found = made(content, Metric, f"`{path}`, entry {number}")
        except ValueError as e:
            raise UserError(f"`{path}`, entry {number}: {e}") from e
        if not is_known(found.name):
            register_metric(found)


def _protocol(path: Path, *, sealed: bool) -> _ProtocolFile:
    content = read_json(path)
    found = checked({} if content is None else content, _ProtocolFile, f"`{path}`")
    refuse_changed(found, f"`{path}`", needed=sealed and content is not None)
    return found


def _representations(path: Path) -> Representations | None:
    content = read_json(path)
    if content is None:
        return None
    found = checked(content, Representations, f"`{path}`")
    layers = len(found["layers"])
    for name, states in found["sets"].items():
        if not len(states["cosine"]) == len(states["norm_reference"]) == len(states["norm_adapted"]) == layers:
            raise UserError(f"`{path}`: the lists of `sets.{name}` must hold one number per layer ({layers}).")
    return found
