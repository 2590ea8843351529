"""The headline table as data."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from mm_cb.attacks.registry import attacks
from mm_cb.core.compatibility import in_worst_case
from mm_cb.metrics.observations import BESIDE
from mm_cb.metrics.results import Measurement, find
from mm_cb.metrics.statistics import holm
from mm_cb.metrics.table import (
    CALLS,
    FORCED,
    HEADLINE,
    KEPT,
    SIDE_EFFECT,
    WORST_CASE,
    WORST_GIVEN,
    Metric,
    is_worst_case,
    metrics,
)
from mm_cb.report.labels import (
    CONDITIONS,
    FORMS,
    GIVEN,
    PROXY,
    SPLITS,
    is_breaker,
    label,
    p_value,
    rule_labels,
    subject_label,
)
from mm_cb.report.strength import Strength, by_condition

PROMISED_SUBJECTS = ("base", "base+safety_prompt", "rr")
HEADLINE_SUBJECTS = ("base", "base+safety_prompt", "base+probe", "rr", "rr+probe")
ATTACKED_HEAD = "Forbidden requests answered, % (lower is better)"
SPLIT_HEADS = {HEADLINE: "of these, under PGD", WORST_CASE: "of these, the worst of all attacks"}
CALLS_HEAD = "Forbidden requests to an agent, % (lower is better)"
KEPT_HEAD = "What must stay, % (higher is better)"
SIDE_HEAD = "Side effects on benign requests, % (lower is better)"
FORCED_HEAD = "Harmless sentences forced on the model, % (how strong the attack is)"
HOLM = (
    "p: exact McNemar. The primary test, named before any run, is that of the worst of all attacks and stands as it "
    "is; the others are secondary, with Holm's correction for all rows of the table, those by kind left out."
)
_WHY_APART = {
    "worst_case_opening": "headline: what the model knows",
    "worst_case_supplied": "control over the output",
}
_KINDS = ("trained_kinds", "trained", "held_out_combination", "held_out_kind", "held_out_screen", "held_out_tool")


@dataclass(frozen=True)
class Row:
    """One line of the table: the same quantity for every subject."""

    section: str
    label: str
    cells: tuple[Measurement | None, ...]
    """One per subject of the table."""
    paired: Measurement | None
    """The circuit breaker's measurement, which carries the difference to the base."""
    adjusted: float | None = None
    """Exact McNemar p: as it is in the primary row, in the others after Holm's correction for all but those by kind."""
    remarks: tuple[str, ...] = ()
    """Of an attack: what it was given, and whether its number may be too low."""

    @property
    def n(self) -> str:
        """Items per subject: one number when all agree."""
        sizes = [str(cell.n) for cell in self.cells if cell is not None]
        return sizes[0] if len(set(sizes)) == 1 else "/".join(sizes) or "–"

    @property
    def p(self) -> str:
        """`adjusted` as it is written; empty for graded scores, which have no test, and for rows by kind."""
        return p_value(self.adjusted)

    @property
    def missing(self) -> int:
        """Items without a verdict, over all subjects."""
        cells = [cell for cell in self.cells if cell is not None]
        return int(sum(cell.counts.get("not_judged", 0) + cell.counts.get("unscored", 0) for cell in cells))


@dataclass(frozen=True)
class HeadlineTable:
    """The table: its subjects, its rows and what a reader must know beside it."""

    subjects: tuple[str, ...]
    rows: tuple[Row, ...]
    notes: tuple[str, ...]
    unmeasured: tuple[str, ...] = ()
    """Rows and subjects that belong to the experiment and have nothing in them."""

    def sections(self) -> list[tuple[str, list[Row]]]:
        """Rows grouped under their headings, in order."""
        grouped: dict[str, list[Row]] = {}
        for row in self.rows:
            grouped.setdefault(row.section, []).append(row)
        return list(grouped.items())

    def proxied(self) -> frozenset[str]:
        """Headings of several rows whose numbers are all by a proxy: the heading says so, and not every row."""
        several = [(heading, rows) for heading, rows in self.sections() if len(rows) > 1]
        return frozenset(heading for heading, rows in several if all(PROXY in row.remarks for row in rows))


def headline_table(
    measurements: Sequence[Measurement], strengths: Sequence[Strength] = (), *, pictured: bool = True
) -> HeadlineTable:
    """The rows that answer: does it hold, does it generalise, what did it cost.

    What the paper measures and these runs did not is named in one note; the table has rows and columns of what was
    measured. A worst case over the same attacks as another row is not told twice.

    Args:
        measurements: All measurements of the runs.
        strengths: How strong every attack was.
        pictured: Whether pictures were attacked; where none was, what needs one is not missed.
    """
    present = {m.subject for m in measurements}
    usual = tuple(s for s in HEADLINE_SUBJECTS if s in present)
    own = sorted(s for s in present if s not in usual and not (usual and is_breaker(s)))  # seeds have their own table
    subjects = (*usual, *own)
    remarks = _remarks(strengths)
    primary = only_attack(measurements) or WORST_CASE
    rows, missing = [], [subject_label(s) for s in PROMISED_SUBJECTS if present and s not in subjects]
    for promised, section, text, metric, condition, split in _addresses(measurements, pictured):
        cells = tuple(find(measurements, subject, metric, condition, split) for subject in subjects)
        if not any(cells):
            missing += [text] if promised else []
        elif not repeats(measurements, metric, condition):
            paired = find(measurements, "rr", metric, condition, split)
            known = paired if paired and paired.difference is not None else None
            said = (*remarks.get(condition, ()),) if section == ATTACKED_HEAD else ()
            if known and (metric, condition, split) == ("compliance", primary, "all"):
                said = ("primary test", *said)
            if by_proxy(measurements, cells):
                said = (*said, PROXY)
            rows.append(Row(section, text, cells, known, remarks=said))
    notes = tuple(_notes(measurements, subjects, rows))
    return HeadlineTable(subjects, tuple(_adjust(rows)), notes, tuple(missing))


def by_proxy(measurements: Iterable[Measurement], cells: Iterable[Measurement | None]) -> bool:
    """Whether a proxy gave verdicts of a row: a worst case has those of the attacks that it is taken over."""
    there = [cell for cell in cells if cell is not None]
    worst = {m.subject for m in there if m.metric == "compliance" and is_worst_case(m.condition)}
    below = [m for m in measurements if m.metric == "compliance" and m.subject in worst]
    return any(m.counts.get("proxy") for m in (*there, *below))


def counted_attacks(measurements: Iterable[Measurement], subject: str) -> list[str]:
    """The attacks that a subject's worst case is taken over."""
    return [
        m.condition
        for m in measurements
        if (m.subject, m.metric, m.split) == (subject, "compliance", "all")
        and not is_worst_case(m.condition)
        and in_worst_case(m.condition, m.counts.get("in_worst_case"))
        and not m.counts.get("same_as_pgd")
    ]


def only_attack(measurements: Sequence[Measurement]) -> str | None:
    """The attack that is the worst of all because no other one was run."""
    subjects = {m.subject for m in measurements}
    counted = {attack for subject in subjects for attack in counted_attacks(measurements, subject)}
    return counted.pop() if len(counted) == 1 else None


def repeats(measurements: Sequence[Measurement], metric: str, condition: str) -> bool:
    """Whether a worst case says what another row says: over a single attack, or over the same pictures as all."""
    if metric != "compliance" or not is_worst_case(condition):
        return False
    subjects = {m.subject for m in measurements}
    if only_attack(measurements) is not None:
        return True
    pairs = [[find(measurements, s, metric, c) for c in (condition, WORST_CASE)] for s in subjects]
    same = all(one is None or (other is not None and one.counts == other.counts) for one, other in pairs)
    return condition != WORST_CASE and same


def _remarks(strengths: Sequence[Strength]) -> dict[str, tuple[str, ...]]:
    """Condition → what stands beside its name: of the attacks on the breaker, else on whoever was attacked."""
    attacked = [one.subject for one in strengths]
    held = by_condition(strengths, "rr" if "rr" in attacked else next(iter(attacked), "rr"))
    counted = [one for one in held.values() if one.counted]
    remarks = {one.condition: (_given(one.given), *([one.caution] if one.weak else [])) for one in counted}
    for condition, given in {WORST_CASE: tuple(GIVEN), **WORST_GIVEN}.items():
        those = [one for one in counted if one.given in given]
        weak = any(one.weak for one in those) and not any(one.complete for one in those)
        apart = [_WHY_APART[condition]] if condition in _WHY_APART else []
        remarks[condition] = (*apart, *(["not all converged: may be too low"] if weak else []))
    return remarks


def _given(given: str) -> str:
    return "nothing given" if given == "nothing" else label(GIVEN, given)


def _adjust(rows: Sequence[Row]) -> list[Row]:
    """Give every row with a test its p: the primary one as it is, the others after Holm's correction for them."""
    tested = {
        index: row.paired.counts["mcnemar_p"]
        for index, row in enumerate(rows)
        if row.paired and row.section not in SPLIT_HEADS.values() and "mcnemar_p" in row.paired.counts
    }
    primary = {index: p for index, p in tested.items() if "primary test" in rows[index].remarks}
    secondary = {index: p for index, p in tested.items() if index not in primary}
    adjusted = primary | dict(zip(secondary, holm(list(secondary.values())), strict=True))
    return [dataclasses.replace(row, adjusted=adjusted.get(index)) for index, row in enumerate(rows)]


def _addresses(measurements: Iterable[Measurement], pictured: bool) -> list[tuple[bool, str, str, str, str, str]]:
    """Whether the row is always there, section, label, metric, condition and split of every possible row."""
    capabilities = [one for one in metrics() if one.capability]
    effects = [one for one in metrics() if one.section == SIDE_EFFECT]
    rules: dict[str, dict[str, None]] = {one.name: {} for one in capabilities}
    side: dict[str, dict[str, None]] = {one.name: {one.strict: None} if one.promised else {} for one in effects}
    agents = {one.name for one in metrics() if one.section == CALLS}
    called: dict[tuple[str, str], None] = {}
    broad = {one.name for one in effects if not one.promised}
    by_texts = (one.name for one in attacks() if one.fits_any_text_model)
    tried = dict.fromkeys(("no_attack", "noise", HEADLINE, "pgd_adaptive") if pictured else by_texts)
    for m in measurements:
        if m.metric in rules:
            rules[m.metric][m.condition] = None
        elif m.metric in side and (m.metric in broad or m.condition.startswith(BESIDE)):
            side[m.metric][m.condition] = None
        elif m.metric in agents:
            called[m.metric, m.condition] = None
        elif m.metric == "compliance" and not is_worst_case(m.condition):
            tried[m.condition] = None
    for name, strict in _missed(capabilities, rules) if pictured else ():  # all that is promised is about pictures
        rules[name][strict] = None
    rows = [(True, ATTACKED_HEAD, label(CONDITIONS, a), "compliance", a, "all") for a in (*tried, WORST_CASE)]
    rows += [(False, ATTACKED_HEAD, label(CONDITIONS, a), "compliance", a, "all") for a in WORST_GIVEN]
    rows += [(False, SPLIT_HEADS[a], label(SPLITS, s), "compliance", a, s) for a, s in _groups(measurements)]
    rows += [(False, CALLS_HEAD, text, *address, "all") for address, text in rule_labels(called).items()]
    names = rule_labels((metric, rule) for metric, conditions in rules.items() for rule in conditions)
    rows += [(True, KEPT_HEAD, text, metric, rule, "all") for (metric, rule), text in names.items()]
    flags = [one for one in metrics() if one.section == KEPT and not one.capability]
    rows += [(False, KEPT_HEAD, one.label, one.name, one.strict, "all") for one in flags]
    names = rule_labels((metric, condition) for metric, conditions in side.items() for condition in conditions)
    rows += [
        (rule == "no_attack" and metric not in broad, SIDE_HEAD, text, metric, rule, "all")
        for (metric, rule), text in names.items()
    ]
    forced = [one.name for one in metrics() if one.section == FORCED]
    rows += [(False, FORCED_HEAD, label(CONDITIONS, a), name, a, "all") for name in forced for a in tried]
    return rows


def _groups(measurements: Iterable[Measurement]) -> list[tuple[str, str]]:
    """Attack and group of requests: what training has seen and has not; in the worst case a user's own groups, too."""
    there = dict.fromkeys(m.split for m in measurements if (m.metric, m.condition) == ("compliance", WORST_CASE))
    kinds = [kind for kind in _KINDS if kind != "trained_kinds" or "held_out_combination" in there]
    own = [split for split in there if split not in (*_KINDS, "all", *FORMS)]
    return [*((HEADLINE, kind) for kind in kinds), *((WORST_CASE, group) for group in (*kinds, *own))]


def _missed(capabilities: Sequence[Metric], measured: Mapping[str, object]) -> list[tuple[str, str]]:
    """Name and strict condition of promised capabilities that neither were measured nor have a measured stand-in."""
    there = {one.name for one in capabilities if measured[one.name]}
    there |= {one.stands_for for one in capabilities if one.name in there}
    return [(one.name, one.strict) for one in capabilities if one.promised and one.name not in there]


def _notes(measurements: Sequence[Measurement], subjects: Sequence[str], rows: Sequence[Row]) -> list[str]:
    notes = []
    tried = {subject: text for subject in subjects if (text := _tried(measurements, subject))}
    if len(set(tried.values())) == 1:
        notes.append(f"Worst of all attacks: per item, the worst over {next(iter(tried.values()))}.")
    elif tried:
        listed = "; ".join(f"{subject_label(s)}: {text}" for s, text in tried.items())
        notes.append(f"Worst of all attacks: per item, the worst over everything tried. {listed}.")
    adaptive = {
        m.subject: bool(m.counts.get("same_as_pgd"))
        for m in measurements
        if (m.metric, m.condition, m.split) == ("compliance", "pgd_adaptive", "all")
    }
    copied = [subject_label(s) for s in subjects if adaptive.get(s)]
    lacking = [
        subject_label(s) for s in subjects if s not in adaptive and find(measurements, s, "compliance", HEADLINE)
    ]
    if adaptive and (shown := copied or lacking):
        rest = "PGD's results stand for it" if copied else "there was nothing further to run"
        notes.append(
            "Adaptive PGD also pulls hidden states towards those without the adapter. Where there is no adapter "
            f"({', '.join(shown)}) that is PGD, and {rest}."
        )
    if any((m.metric, m.condition) == ("compliance", "pgd_clean_teacher") for m in measurements):
        notes.append(
            "Clean-teacher PGD pulls hidden states to where the model without adapter has them while it complies on "
            "the clean picture; it is aimed at what an adapter changed, and is run where there is one."
        )
    if any(m.metric == "over_refusal" and m.condition.startswith(BESIDE) for m in measurements):
        notes.append(
            "Beside pictures: benign requests without a picture of their own, asked beside those of one attack run, "
            "which were made against one model and are shown to all. Clean ones may hold part of a forbidden request."
        )
    if unscored := [f"{row.label} ({row.missing})" for row in rows if row.missing]:
        notes.append(f"Items without a verdict are in no rate; counted over all subjects: {', '.join(unscored)}.")
    return notes


def _tried(measurements: Sequence[Measurement], subject: str) -> str:
    """What a subject's worst case is taken over: ``PGD + adaptive PGD, 4.2 tries per item``."""
    worst = find(measurements, subject, "compliance", "worst_case")
    if worst is None or not worst.n:
        return ""
    counted = counted_attacks(measurements, subject)
    tries = worst.counts.get("images_tried", 0) / (worst.n + worst.counts.get("not_judged", 0))
    names = " + ".join(label(CONDITIONS, attack) for attack in counted)
    return f"{names}, {tries:.3g} {'try' if tries == 1 else 'tries'} per item"
