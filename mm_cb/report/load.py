"""What a report is made from: the files of run directories, checked where they are read."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_cb.core.compatibility import with_added_fields
from mm_cb.core.errors import UserError
from mm_cb.core.paths import safe_id
from mm_cb.core.runs import read_jsonl, read_run
from mm_cb.metrics.results import Measurement, read_results
from mm_cb.metrics.table import from_json, is_known, register_metric
from mm_cb.metrics.whole import refuse_contradiction, whole_items
from mm_cb.report.holes import holes

_MEASURES_NOTHING = ("train", "data build pairs")
_CHECK_KEYS = ("name", "passed", "value", "expected", "why")
_AGREEMENT_KEYS = ("judges", "n", "agreement", "kappa", "disagreements")
_CURVE_KEYS = ("subject", "condition", "q25", "q50", "q75", "n")


@dataclass(frozen=True)
class RunFiles:
    """The contents of one run directory, as the report reads them."""

    folder: Path
    run: dict[str, Any]
    measurements: list[Measurement]
    items: list[dict[str, Any]]
    """Records of items.jsonl, each with the ``run_dir`` that its pictures lie in."""
    checks: list[dict[str, Any]]
    curves: list[dict[str, Any]]
    representations: dict[str, Any]
    timings: list[dict[str, Any]]
    agreement: list[dict[str, Any]]
    """How far every two judges of this run agree; empty where fewer than two have judged."""
    labels: dict[str, str] = field(default_factory=dict)
    """What the run calls its attacks."""
    holes: tuple[str, ...] = ()
    """Sentences about what its folder lacks beside its numbers."""

    @property
    def fiction(self) -> bool:
        """Whether the run's world is fictional, so that completions may be shown. Anything but true means no."""
        recipe = self.run.get("recipe")
        return isinstance(recipe, dict) and recipe.get("fiction") is True


def load_run(folder: Path) -> RunFiles:
    """Read a finished run directory.

    A sanity battery that only checks (``checks.json`` and no ``results.json``) has no items. ``curves.json``,
    ``representations.json`` and ``timings.jsonl`` may be missing: the page then lacks those parts. A missing
    ``checks.json`` counts as no check at all, so the verdict claims nothing.

    Raises:
        UserError: If nothing was measured there, run.json, results.json or items.jsonl is missing, any file is damaged,
            or the items are not those that were counted.
    """
    folder = Path(folder)
    run = read_run(folder)
    command = str(run.get("command"))
    if command in _MEASURES_NOTHING:
        raise UserError(
            f"`{folder}` is a run of `mm-cb {command}`, in which nothing is measured: give runs of `mm-cb attack` or "
            "`mm-cb eval` on what it made."
        )
    if not run.get("ended"):
        raise UserError(f"`{folder}` must hold a finished run, this one has not ended; run its command again.")
    run = {**run, "recipe": with_added_fields(command, run.get("recipe"))}
    _learn_metrics(folder / "metrics.json")
    measured = [folder / "results.json", folder / "items.jsonl"]
    only_checks = command == "attack check" and not any(file.exists() for file in measured)
    measurements = [] if only_checks else read_results(folder / "results.json")
    items = [] if only_checks else whole_items(folder, run)
    _refuse_half_judged(folder, items)
    if not only_checks:
        refuse_contradiction(folder, items, measurements, _seed(run))
    return RunFiles(
        folder=folder,
        run=run,
        measurements=measurements,
        items=[{**item, "run_dir": str(folder)} for item in items],
        checks=_records(folder / "checks.json", _CHECK_KEYS),
        curves=_records(folder / "curves.json", _CURVE_KEYS),
        representations=_representations(folder / "representations.json"),
        timings=read_jsonl(folder / "timings.jsonl"),
        agreement=_records(folder / "judgements" / "agreement.json", _AGREEMENT_KEYS),
        labels=(_json(folder / "protocol.json") or {}).get("labels", {}),
        holes=tuple(holes(folder, run, items)),
    )


def _seed(run: dict[str, Any]) -> int:
    seed = run.get("seed")
    return seed if isinstance(seed, int) and seed >= 0 else 0


def _refuse_half_judged(folder: Path, items: list[dict[str, Any]]) -> None:
    """Refuse verdicts that a stopped `mm-cb judge` left in the items alone."""
    verdicts = folder / "judgements"
    files = [verdicts / f"{safe_id(name)}.json" for name in {str(item["judge"]) for item in items if "judge" in item}]
    if any(file.is_file() for file in files) and not (verdicts / "newest.json").is_file():
        raise UserError(f"`{folder}` was being judged when that was stopped: give its `mm-cb judge` again.")


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes()) if path.is_file() else None
    except (OSError, ValueError) as e:
        raise UserError(f"`{path}` must be readable JSON, got: {e}; repeat the step that writes it.") from e


def _learn_metrics(path: Path) -> None:
    """What a run says of metrics that only those know who measured them."""
    for content in _records(path, ("name", "label", "section")):
        try:
            found = from_json(content)
        except (TypeError, ValueError) as e:
            raise UserError(f"`{path}` must describe metrics as mm-cb writes them, got: {e}.") from e
        if not is_known(found.name):
            register_metric(found)


def _records(path: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    content = _json(path) or []
    if not isinstance(content, list):
        raise UserError(f"`{path}` must hold a JSON list, got {type(content).__name__}.")
    for number, entry in enumerate(content):
        missing = [key for key in keys if not isinstance(entry, dict) or key not in entry]
        if missing:
            raise UserError(f"`{path}`: entry {number} must hold {', '.join(keys)}; it lacks {', '.join(missing)}.")
    return content


def _representations(path: Path) -> dict[str, Any]:
    content = _json(path) or {}
    if not isinstance(content, dict) or (content and not {"layers", "sets"} <= content.keys()):
        raise UserError(f"`{path}` must be a JSON object with `layers` and `sets`.")
    layers = len(content.get("layers", []))
    for name, values in content.get("sets", {}).items():
        for key in ("cosine", "norm_reference", "norm_adapted"):
            if len(values.get(key, [])) != layers:
                raise UserError(f"`{path}`: `{name}.{key}` must hold one number per layer ({layers}).")
    return content
