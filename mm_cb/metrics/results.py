"""results.json: every rate of a run with its interval, its paired difference and its counts."""

import dataclasses
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from mm_cb.core.checked import checked, made, read_json
from mm_cb.core.errors import UserError
from mm_cb.core.records import Item, Run
from mm_cb.core.runs import SCHEMA as SCHEMA_OF_RUN
from mm_cb.core.runs import UNSEALED, file_sha256, identity_of, write_json
from mm_cb.core.seal import changed
from mm_cb.metrics import table
from mm_cb.metrics.earned import is_earned, mostly_silent
from mm_cb.metrics.graded import graded_interval
from mm_cb.metrics.observations import Estimate, Observation, observe
from mm_cb.metrics.ratios import measure_ratio
from mm_cb.metrics.relative_score import measure_relative, too_many_failed
from mm_cb.metrics.statistics import Interval, mcnemar_exact, paired_rate_interval, wilson_interval
from mm_cb.metrics.table import HEADLINE, WORST_CASE, WORST_GIVEN

SCHEMA = 1
ITEMS = "items.jsonl"
_BESIDE = (("items", ITEMS), ("checks", "checks.json"))
_CONDITIONS = ("no_attack", "noise", HEADLINE, "pgd_adaptive", WORST_CASE, *WORST_GIVEN)
_SPLITS = ("all", "trained_kinds", "trained", "held_out_combination", "held_out_kind")
_NAMED_IDS = 5


@dataclass(frozen=True)
class Measurement:
    """One number of a run, as results.json holds it. Rates and differences are in percent or percentage points."""

    subject: str
    metric: str
    condition: str
    split: str
    value: float | None
    """None when not one item has a verdict."""
    n: int
    """Items with a verdict; those without are in ``counts`` as ``not_judged`` or ``unscored``."""
    ci95: tuple[float, float] | None = None
    paired_with: str | None = None
    difference: float | None = None
    """This subject minus ``paired_with``, over the items that have a verdict in both."""
    difference_ci95: tuple[float, float] | None = None
    counts: dict[str, float] = field(default_factory=dict)

    @property
    def address(self) -> tuple[str, str, str, str]:
        """Subject, metric, condition and split, which no other number of a run has."""
        return self.subject, self.metric, self.condition, self.split


class _Results(TypedDict):
    """results.json."""

    schema: Any
    measurements: list[Any]
    """Each a `Measurement`."""
    run: NotRequired[str]
    """Of `identity_of`: the run that these are of."""
    items: NotRequired[str]
    """SHA-256 of the items.jsonl that these were counted from."""
    checks: NotRequired[str]
    """SHA-256 of the checks.json beside them."""


Observations = dict[str, Observation]


def measure(items: Iterable[Item], *, pairs: Sequence[tuple[str, str]], seed: int = 0) -> list[Measurement]:
    """Measure every metric, condition, subject and split that the items hold, derived ones included.

    Intervals: Wilson for rates, Tango's score interval for paired rates, seeded percentile bootstrap for graded scores,
    which is never narrower than what items alike leave open (`no_narrower`). Items without a verdict
    enter no average and are counted. A mostly silent subject has no official value (`mostly_silent`).

    Args:
        items: Records of items.jsonl, in any order: it does not change the result.
        pairs: ``(subject, partner)``: report the subject's difference to the partner, paired by item id.
        seed: Seed of the bootstrap.

    Returns:
        Measurements in canonical order.

    Raises:
        ValueError: If a record is broken (see `observe`) or a subject has two partners.
        UserError: If a subject and its partner were not measured on the same items; the message names ids.
    """
    partners = dict(pairs)
    if len(partners) != len(pairs):
        raise ValueError(f"`pairs` must give each subject one partner, got {list(pairs)}.")
    observations = observe(items)
    silent = mostly_silent(items)
    graded = {o.metric for o in observations if o.value not in (None, 0.0, 1.0)}
    groups: dict[tuple[str, str, str, str], Observations] = defaultdict(dict)
    for o in observations:
        for split in ("all", *o.splits):
            groups[o.metric, o.condition, o.subject, split][o.id] = o
    measured = []
    for key in sorted(groups, key=_order):
        metric, condition, subject, split = key
        this = _sorted(groups[key])
        partner = partners.get(subject)
        other = None
        if partner is not None and (metric, condition, partner, "all") in groups:
            other = _sorted(groups.get((metric, condition, partner, split), {}))
            derived = metric == "gibberish" or condition in WORST_GIVEN
            if not derived:  # else paired on what both measured: the metric itself, or the attacks, have been checked
                _refuse_missing(this, other, f"{metric}, {condition}, {split}", subject, partner)
        measurement = _measurement(key, this, partner, other, graded=metric in graded, seed=seed)
        earned = is_earned(subject, metric, condition, silent)
        if not earned or too_many_failed(groups[metric, condition, subject, "all"].values()):
            measurement = _without_value(measurement)
        elif partner is not None and not is_earned(partner, metric, condition, silent):
            measurement = dataclasses.replace(measurement, difference=None, difference_ci95=None)
        measured.append(measurement)
    return measured


def write_results(path: Path, measurements: Iterable[Measurement]) -> None:
    """Write results.json in one step, behind run.json, items.jsonl and checks.json that lie beside it."""
    write_json(path, tied(path.parent, results_content(measurements)))


def _content(path: Path) -> _Results:
    content = read_json(Path(path))
    if content is None:
        raise UserError(f"`{path}` is not there, which the run's command wrote. {AGAIN}")
    return checked(content, _Results, f"`{path}`")


def tied(folder: Path, content: Mapping[str, object]) -> dict[str, object]:
    """What results.json holds, with the run that it is of and the hashes of what it is told beside."""
    run = read_json(folder / "run.json")
    held = {"run": identity_of(run)} if isinstance(run, dict) else {}
    return {
        **content,
        **held,
        **{key: file_sha256(folder / name) for key, name in _BESIDE if (folder / name).is_file()},
    }


def refuse_foreign(folder: Path) -> None:
    """Refuse results of another run, and items or checks that were changed since; earlier versions kept less of both.

    Raises:
        UserError: Naming the file.
    """
    path = folder / "results.json"
    results, run = _content(path), checked(read_json(folder / "run.json"), Run, f"`{folder / 'run.json'}`")
    must = run.get("schema", UNSEALED) >= SCHEMA_OF_RUN
    if (must or "run" in results) and results.get("run") != identity_of(run):
        raise UserError(f"`{path}` is of another run than `{folder / 'run.json'}`, and so are its items. {AGAIN}")
    for key, name in _BESIDE:
        there = file_sha256(folder / name) if (folder / name).is_file() else None
        if (must or key in results) and there is not None and results.get(key) != there:
            raise changed(f"`{folder / name}`")


def results_content(measurements: Iterable[Measurement]) -> dict[str, object]:
    """What results.json holds."""
    return {"schema": SCHEMA, "measurements": [dataclasses.asdict(m) for m in measurements]}


AGAIN = (
    "Do not use its numbers: take its whole folder from where it was made, or repeat the run: its command with another "
    "`--out`."
)
"""What to do about a run of which something is gone."""


def read_results(path: Path) -> list[Measurement]:
    """Read results.json.

    Raises:
        UserError: If the file is missing, damaged or of another schema.
    """
    held = _content(path)
    if held["schema"] != SCHEMA:
        raise UserError(f"`{path}` must have schema {SCHEMA}, got {held['schema']!r}; run the measurement again.")
    return [
        made(entry, Measurement, f"`{path}`, measurement {place}")
        for place, entry in enumerate(held["measurements"], start=1)
    ]


def find(
    measurements: Iterable[Measurement], subject: str, metric: str, condition: str, split: str = "all"
) -> Measurement | None:
    """The measurement with this address, or None."""
    wanted = (subject, metric, condition, split)
    return next((m for m in measurements if m.address == wanted), None)


def _order(key: tuple[str, str, str, str]) -> tuple[int | str, ...]:
    metric, condition, subject, split = key
    return (
        *(table.rank(metric), metric),
        *_rank(condition, _CONDITIONS),
        *_rank(subject, ("base", "base+safety_prompt", "rr")),
        *_rank(split, _SPLITS),
    )


def _rank(name: str, known: Sequence[str]) -> tuple[int, str]:
    return (known.index(name) if name in known else len(known), name)


def _sorted(group: Observations) -> Observations:
    return {id: group[id] for id in sorted(group)}


def _refuse_missing(this: Observations, other: Observations, where: str, subject: str, partner: str) -> None:
    for lacking, ids in ((partner, this.keys() - other.keys()), (subject, other.keys() - this.keys())):
        if ids:
            more = len(ids) - _NAMED_IDS
            named = ", ".join(sorted(ids)[:_NAMED_IDS]) + (f", and {more} more" if more > 0 else "")
            raise UserError(
                f"`{subject}` and `{partner}` must be measured on the same items ({where}), but `{lacking}` lacks "
                f"{named}; finish or repeat that run."
            )


def _measurement(
    key: tuple[str, str, str, str],
    this: Observations,
    partner: str | None,
    other: Observations | None,
    *,
    graded: bool,
    seed: int,
) -> Measurement:
    metric, condition, subject, split = key
    rng = np.random.default_rng([seed, zlib.crc32("|".join(key).encode())])
    counts: dict[str, float] = dict(_counts(metric, this))
    if (statistic := table.metric(metric).statistic) is not None:
        found = measure_ratio(this, other, counts, rng, statistic)
    elif any(o.reference is not None for o in this.values()):
        found = measure_relative(this, other, counts, rng, official=condition == "official")
    else:
        found = _measure_mean(this, other, counts, rng, graded=graded)
    paired_with = None if other is None else partner
    return Measurement(subject, metric, condition, split, **found._asdict(), paired_with=paired_with, counts=counts)


def _measure_mean(
    this: Observations, other: Observations | None, counts: dict[str, float], rng: np.random.Generator, *, graded: bool
) -> Estimate:
    """Mean, interval, difference to ``other`` and its interval; adds to ``counts``."""
    values = np.array([o.value for o in this.values() if o.value is not None])
    found = Estimate(None, 0, None)
    if values.size:
        interval = _percent(_mean_interval(values, rng, graded=graded))
        found = Estimate(100 * float(values.mean()), int(values.size), interval)
    if other is None:
        return found
    both = [(a.value, other[id].value) for id, a in this.items() if id in other]
    scored = np.array([(a, b) for a, b in both if a is not None and b is not None]).reshape(-1, 2)
    counts |= {"pairs": len(scored), "pairs_unscored": len(both) - len(scored)}
    if not len(scored):
        return found
    difference, spread = _paired(scored, counts, rng, graded=graded)
    return found._replace(difference=100 * difference, difference_ci95=_percent(spread))


def _counts(metric: str, group: Observations) -> dict[str, int]:
    found: Counter[str] = Counter()
    kind = table.metric(metric)
    for o in group.values():
        found.update(o.extras)
        if o.outcome is not None:
            found[o.outcome] += 1
        elif o.value is None:
            found["unscored"] += 1
    counts = {name: found.pop(name, 0) for name in kind.outcomes}
    if "not_judged" not in counts:
        counts["unscored"] = found.pop("unscored", 0)
    if not kind.outcomes and kind.statistic is None and all(o.value in (None, 0.0, 1.0) for o in group.values()):
        counts[kind.hits] = sum(o.value == 1 for o in group.values())
    return counts | dict(sorted(found.items()))


def _without_value(measurement: Measurement) -> Measurement:
    return dataclasses.replace(measurement, value=None, ci95=None, difference=None, difference_ci95=None)


def _mean_interval(values: np.ndarray, rng: np.random.Generator, *, graded: bool) -> Interval:
    if graded:
        return graded_interval(values, rng)
    return wilson_interval(float(values.sum()), values.size)


def _paired(
    scored: np.ndarray, counts: dict[str, float], rng: np.random.Generator, *, graded: bool
) -> tuple[float, Interval]:
    """Mean difference of the two columns and its interval; adds the paired counts to ``counts``."""
    differences = scored[:, 0] - scored[:, 1]
    this, partner = int((differences > 0).sum()), int((differences < 0).sum())
    if graded:
        counts |= {"higher_than_partner": this, "lower_than_partner": partner}
        return float(differences.mean()), graded_interval(differences, rng, lowest=-1.0)
    counts |= {"only_this": this, "only_partner": partner, "mcnemar_p": mcnemar_exact(this, partner)}
    return float(differences.mean()), paired_rate_interval(this, partner, len(scored))


def _percent(interval: Interval) -> tuple[float, float]:
    return (100 * interval.low, 100 * interval.high)
