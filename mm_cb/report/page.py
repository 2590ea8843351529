"""report.html: one file that needs nothing else, built from one run directory or from several that fit together."""

import base64
import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from mm_cb.attacks.registry import attacks
from mm_cb.core.errors import UserError
from mm_cb.core.files import write_text
from mm_cb.core.pages import PAGE, TITLE, not_ours
from mm_cb.core.paths import named_path, safe_id
from mm_cb.core.records import Run, Timing
from mm_cb.core.runs import flatten
from mm_cb.metrics.results import Measurement, find
from mm_cb.metrics.table import is_worst_case, judged_as
from mm_cb.report import labels
from mm_cb.report.agents import agents, kind_labels, target_pieces
from mm_cb.report.charts import curve_charts, layer_charts, outcome_bars, refusal_bars
from mm_cb.report.combine import ReportData, combine
from mm_cb.report.comparisons import comparisons, loss_table, tries_table
from mm_cb.report.gallery import AMPLIFICATION, build_gallery
from mm_cb.report.header import facts_of, judges
from mm_cb.report.kept import ChangedItem, category_rows, changes
from mm_cb.report.load import RunFiles, load_run
from mm_cb.report.seeds import seed_table
from mm_cb.report.strength import Strength, by_condition
from mm_cb.report.table import HOLM, headline_table, repeats
from mm_cb.report.text import clean_text, code, shorten, shown_completion
from mm_cb.report.verdict import judge_report

_LISTED_CHANGES = 40
_FICTION = (
    "A small model in a fictional world with exact rules: the numbers show that the method and its measurement work, "
    "not how well they work on a large model."
)
_METHOD_KEYS = (
    "epsilon",
    "threat_model",
    "steps",
    "max_steps",
    "restarts",
    "step_size",
    "alpha",
    "target_layers",
    "layers_to_transform",
)


@dataclass(frozen=True)
class Script:
    """The page's one script: search and order of the gallery. Without it everything is there, in one order."""

    text: str
    sha256: str
    """As the page's policy names it, so that no other script runs."""

    @classmethod
    def read(cls) -> "Script":
        """From the template's folder."""
        text = files("mm_cb.report").joinpath("templates/page.js").read_text(encoding="utf-8")
        return cls(text, base64.b64encode(hashlib.sha256(text.encode()).digest()).decode())


_BEFORE_PERCENT = re.compile(r"(?<=\d) %")
"""A number and its percent sign stay on one line."""


def write_report(run_dirs: Sequence[str | Path], out: str | Path, *, show_completions: bool = False) -> ReportData:
    """Write the report of finished runs as one HTML file.

    The page makes no request and runs the one script whose hash its policy names. It withholds completions that were
    judged harmful, or not judged, unless the recipe of every run says ``fiction: true`` or ``show_completions`` is
    given.

    Args:
        run_dirs: Directories with run.json, results.json, items.jsonl and, where there are, checks.json, curves.json,
            representations.json and timings.jsonl; several are compared, paired by item id.
        out: The HTML file.
        show_completions: Show every completion. For your own eyes: the page is then no longer fit to pass on.

    Returns:
        What the page was made from.

    Raises:
        TypeError: If ``run_dirs`` is no list of paths, or ``out`` no path.
        UserError: If there is no run, a file is missing or damaged, runs do not fit together, or ``out`` cannot be
            written or is no page.
    """
    if isinstance(run_dirs, str | Path):
        raise TypeError(
            f"`run_dirs` must be a list of run directories, got {type(run_dirs).__name__}; give [{run_dirs!r}]."
        )
    if not run_dirs:
        raise UserError("a report needs at least one run directory, got none.")
    page = named_path("out", out, "the path of the page")
    folders = [named_path("run_dirs", one, "a list of paths of run directories") for one in run_dirs]
    refuse_no_page(page, "out")
    data = combine([load_run(folder) for folder in folders])
    write_text(page, render(data, show_completions=show_completions))
    return data


def refuse_no_page(target: Path, name: str) -> None:
    """Refuse a place for a page that can hold none, or holds something else; ``name`` is the setting that says it.

    Raises:
        UserError: If it is a folder, a link, a file that is no such page, or does not end in .html.
    """
    if target.is_dir():
        raise UserError(f"`{name}` must be a file such as `{target / PAGE}`, got a directory.")
    if target.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"the page is HTML: `{name}` must end in .html, got `{target}`.")
    if strange := not_ours(target):
        raise UserError(f"`{target}` is {strange} and is left alone; give another file as `{name}`.")


def render(data: ReportData, *, show_completions: bool = False) -> str:
    """The page as text."""
    show = data.fiction or show_completions
    with labels.conditions_called({name: text for run in data.runs for name, text in run.labels.items()}):
        text = _template(show).render(_context(data, show=show))
    return _BEFORE_PERCENT.sub("\N{NO-BREAK SPACE}%", text)


@cache
def _template(show: bool) -> Any:
    """The page's template, which shows every completion or not: compiled once."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mm_cb.report", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=lambda value: (
            clean_text(value) if isinstance(value, str) and not hasattr(value, "__html__") else value
        ),
    )
    environment.filters |= {
        "percent": labels.percent,
        "signed": labels.signed,
        "interval": labels.interval,
        "share": labels.share,
        "shorten": shorten,
        "code": code,
        "safe_id": safe_id,
    }
    environment.globals |= {
        "labels": labels,
        "label": labels.label,
        "subject_label": labels.subject_label,
        "completion": lambda item: shown_completion(item, show=show),
    }
    return environment.get_template("report.html.j2")


def _context(data: ReportData, *, show: bool) -> dict[str, object]:
    table = headline_table(data.measurements, data.strengths, pictured=not data.by_texts)
    told = [
        m
        for m in data.measurements
        if not (is_worst_case(m.condition) and repeats(data.measurements, m.metric, m.condition))
    ]
    broken, mended = changes(data.items)
    asked = {item["metric"] for item in data.items if judged_as(item["metric"]) != "compliance"}
    seeds, seed_columns = seed_table(data.measurements, data.items)
    return {
        "title": TITLE,
        "script": Script.read(),
        "about": facts_of(data.runs),
        "fiction": data.fiction,
        "verdict": judge_report(data),
        "extra_limits": [*([_FICTION] if any(run.fiction for run in data.runs) else []), *data.notes],
        "table": table,
        "holm": HOLM,
        "strengths": _strengths(data),
        "comparisons": comparisons(data.measurements),
        "losses": loss_table(data.items),
        "tries": tries_table(data.items),
        "judges": judges(data.runs),
        "agreement": [(run.folder.name, pair) for run in data.runs for pair in run.agreement if pair["n"]],
        "bars": outcome_bars(told, table.subjects),
        "refusal_bars": refusal_bars(data.measurements, table.subjects),
        "curves": curve_charts(data.curves),
        "layers": layer_charts(data.representations),
        "representations": data.representations,
        "gallery": build_gallery(data.items),
        "agents": agents(data.items, data.measurements, table.subjects, show=show),
        "kind_labels": kind_labels(),
        "target_pieces": target_pieces if show else lambda _: (),
        "amplification": AMPLIFICATION,
        "categories": category_rows(data.measurements),
        "changes": [
            ("Lost: worse than before", broken, _by_metric(broken)),
            ("Mended: better than before", mended, _by_metric(mended)),
        ]
        if any(m.difference is not None and m.metric in asked for m in data.measurements)
        else [],
        "listed_changes": _LISTED_CHANGES,
        "seeds": seeds,
        "seed_columns": seed_columns,
        "checks": data.checks,
        "method": _method(data.runs, pictured=not data.by_texts),
        "by_texts": data.by_texts,
        "runs": [_described(run) for run in data.runs],
        "timings": _timings(record for run in data.runs for record in run.timings),
    }


def _strengths(data: ReportData) -> list[tuple[Strength, Measurement | None]]:
    """Every attack on the circuit breaker, or on whoever was attacked where there is none, with its number."""
    attacked = list(dict.fromkeys(one.subject for one in data.strengths))
    subject = "rr" if "rr" in attacked else next(iter(attacked), "rr")
    found = by_condition(data.strengths, subject).values()
    return [(one, find(data.measurements, subject, "compliance", one.condition)) for one in found]


def _described(run: RunFiles) -> dict[str, object]:
    """One run as the provenance section shows it."""
    recipe = flatten(run.run["recipe"])
    subjects = dict.fromkeys(labels.subject_label(item["subject"], short=True) for item in run.items)
    return {
        "name": run.folder.name or str(run.folder),
        "what": " · ".join([run.run["command"], *subjects]),
        "facts": _provenance(run.run),
        "recipe": {key: _plain(value) for key, value in recipe.items() if key},
    }


def _by_metric(entries: list[ChangedItem]) -> str:
    """How many changes each benchmark and rule has: ``MMMU-like 3, over-refusal 1``."""
    counts = Counter(entry.name for entry in entries)
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _method(runs: Sequence[RunFiles], *, pictured: bool) -> dict[str, str]:
    """The recipe fields that decide how hard the attack and how long the training was; all values that occur."""
    decide = {*_METHOD_KEYS, *(key for entry in attacks() for key in entry.reads)}
    chosen: dict[str, dict[str, None]] = {}
    for key, value in (pair for run in runs for pair in flatten(run.run["recipe"]).items()):
        if key.rpartition(".")[2] in decide and (pictured or not key.endswith("epsilon")):
            chosen.setdefault(key, {})[_budget(value) if key.endswith("epsilon") else _plain(value)] = None
    told = {key: " / ".join(values) for key, values in chosen.items()}
    same = {key for key in told if key.startswith("attack.") and told[key] == told.get(key.removeprefix("attack."))}
    return {key: value for key, value in told.items() if key not in same}


def _budget(epsilon: object) -> str:
    """An image budget as a fraction of 255 where the recipe counts whole levels: 32 -> ``32/255``."""
    return f"{epsilon}/255" if isinstance(epsilon, int) and epsilon >= 1 else _plain(epsilon)


def _provenance(run: Run) -> dict[str, str]:
    """Everything of run.json beside the recipe, flat."""
    rest = {key: value for key, value in run.items() if key not in ("recipe", "schema")}
    return {
        key.replace(".", " · "): _plain(value) for key, value in flatten(rest).items() if value not in (None, {}, [])
    }


def _plain(value: object) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {_plain(entry)}" for key, entry in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(_plain(entry) for entry in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:g}" if isinstance(value, float) else shorten(value, 300)


def _timings(records: Iterable[Timing]) -> dict[str, str]:
    """Seconds per stage, summed."""
    totals: dict[str, float] = {}
    for record in records:
        totals[record["stage"]] = totals.get(record["stage"], 0.0) + record["seconds"]
    return {stage: f"{int(s) // 60}:{int(s) % 60:02d} min" for stage, s in totals.items()}
