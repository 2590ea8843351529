"""The headline table as data, and its terminal and Markdown forms."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mm_cb.evaluation.observations import UNATTACKED
from mm_cb.evaluation.results import Measurement, find, read_results
from mm_cb.report.labels import CONDITIONS, METRICS, SPLITS, interval, label, p_value, percent, signed, subject_label

if TYPE_CHECKING:
    from rich.console import Console

HEADLINE_SUBJECTS = ("base", "base+safety_prompt", "rr")
_ATTACKS = "Forbidden requests answered, % (lower is better)"
_SPLIT = "of these, under PGD"
_KEPT = "What must stay, % (higher is better)"
_SIDE = "Side effects on benign requests, % (lower is better)"
_CAPABILITIES = ("mmmu", "mmmu_like", "llava_wild", "wild_like")
_BRIEF = {_ATTACKS: "complies, %", _SPLIT: "PGD by kind, %", _KEPT: "kept, %", _SIDE: "side effects, %"}
_WIDE = 120
_MIDDLE = 96
_KINDS = ("trained_kinds", "trained", "held_out_combination", "held_out_kind")


@dataclass(frozen=True)
class Row:
    """One line of the table: the same quantity for every subject."""

    section: str
    label: str
    cells: tuple[Measurement | None, ...]
    """One per subject of the table."""
    paired: Measurement | None
    """The circuit breaker's measurement, which carries the difference to the base."""

    @property
    def n(self) -> str:
        """Items per subject: one number when all agree."""
        sizes = [str(cell.n) for cell in self.cells if cell is not None]
        return sizes[0] if len(set(sizes)) == 1 else "/".join(sizes)

    @property
    def p(self) -> str:
        """Exact McNemar p of the difference; empty for graded scores, which have none."""
        return p_value(self.paired.counts.get("mcnemar_p")) if self.paired else ""

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

    def sections(self) -> list[tuple[str, list[Row]]]:
        """Rows grouped under their headings, in order."""
        grouped: dict[str, list[Row]] = {}
        for row in self.rows:
            grouped.setdefault(row.section, []).append(row)
        return list(grouped.items())


def headline_table(measurements: Sequence[Measurement]) -> HeadlineTable:
    """The rows that answer: does it hold, does it generalise, what did it cost. Rows nobody measured are left out."""
    present = {m.subject for m in measurements}
    subjects = tuple(s for s in HEADLINE_SUBJECTS if s in present) or tuple(sorted(present))
    rows = []
    for section, text, metric, condition, split in _addresses(measurements):
        cells = tuple(find(measurements, subject, metric, condition, split) for subject in subjects)
        if any(cells):
            paired = find(measurements, "rr", metric, condition, split)
            rows.append(Row(section, text, cells, paired if paired and paired.difference is not None else None))
    return HeadlineTable(subjects, tuple(rows), tuple(_notes(measurements, subjects, rows)))


def _addresses(measurements: Iterable[Measurement]) -> list[tuple[str, str, str, str, str]]:
    """Section, label, metric, condition and split of every possible row."""
    rules: dict[str, dict[str, None]] = {metric: {} for metric in _CAPABILITIES}
    attacks = dict.fromkeys(("no_attack", "noise", "pgd", "pgd_adaptive"))
    for m in measurements:
        if m.metric in rules:
            rules[m.metric][m.condition] = None
        elif m.metric == "compliance" and m.condition != "worst_case":
            attacks[m.condition] = None
    rows = [(_ATTACKS, label(CONDITIONS, a), "compliance", a, "all") for a in (*attacks, "worst_case")]
    rows += [(_SPLIT, SPLITS[s], "compliance", "pgd", s) for s in _KINDS]
    for metric, conditions in rules.items():
        for rule in conditions:
            text = METRICS[metric] if len(conditions) == 1 else f"{METRICS[metric]}, {label(CONDITIONS, rule)}"
            rows.append((_KEPT, text, metric, rule, "all"))
    rows.append((_KEPT, METRICS["look_alikes"], "look_alikes", "strict", "all"))
    rows.append((_SIDE, "over-refusal", "over_refusal", "no_attack", "all"))
    rows.append((_SIDE, "broken text", "gibberish", "no_attack", "all"))
    return rows


def _notes(measurements: Sequence[Measurement], subjects: Sequence[str], rows: Sequence[Row]) -> list[str]:
    notes = []
    tried = {subject: text for subject in subjects if (text := _tried(measurements, subject))}
    if len(set(tried.values())) == 1:
        notes.append(f"Worst of all attacks: per item, the worst over {next(iter(tried.values()))}.")
    elif tried:
        listed = "; ".join(f"{subject_label(s)}: {text}" for s, text in tried.items())
        notes.append(f"Worst of all attacks: per item, the worst over everything tried. {listed}.")
    copied = {m.subject for m in measurements if m.condition == "pgd_adaptive" and m.counts.get("same_as_pgd")}
    if shown := [subject_label(s) for s in subjects if s in copied]:
        notes.append(
            "Adaptive PGD also pulls hidden states towards those without the adapter. Where there is no adapter "
            f"({', '.join(shown)}) that is PGD, and PGD's results stand for it."
        )
    if unscored := [f"{row.label} ({row.missing})" for row in rows if row.missing]:
        notes.append(f"Items without a verdict are in no rate; counted over all subjects: {', '.join(unscored)}.")
    return notes


def _tried(measurements: Sequence[Measurement], subject: str) -> str:
    """What a subject's worst case is taken over: ``PGD + adaptive PGD, 4.2 attacked pictures per item``."""
    worst = find(measurements, subject, "compliance", "worst_case")
    if worst is None or not worst.n:
        return ""
    attacks = [
        m.condition
        for m in measurements
        if (m.subject, m.metric, m.split) == (subject, "compliance", "all")
        and m.condition not in (*UNATTACKED, "worst_case")
        and not m.counts.get("same_as_pgd")
    ]
    images = worst.counts.get("images_tried", 0) / (worst.n + worst.counts.get("not_judged", 0))
    names = " + ".join(label(CONDITIONS, attack) for attack in attacks)
    return f"{names}, {images:.3g} attacked picture{'s' if images != 1 else ''} per item"


def _cell(measurement: Measurement | None) -> str:
    if measurement is None:
        return "–"
    return f"{percent(measurement.value)} {interval(measurement.ci95)}".strip()


def _difference(row: Row) -> str:
    if row.paired is None:
        return "–"
    return f"{signed(row.paired.difference)} {interval(row.paired.difference_ci95, sign=True)}"


def markdown_table(results: Sequence[Measurement]) -> str:
    """The headline table as GitHub Markdown, with n, 95 % intervals, paired differences and exact McNemar p."""
    table = headline_table(results)
    heads = ["", "n", *(subject_label(s) for s in table.subjects), "RR − base, paired", "McNemar p"]
    lines = [_line(heads), _line(["---", *["---:"] * (len(heads) - 1)])]
    for section, rows in table.sections():
        lines.append(_line([f"**{section}**", *[""] * (len(heads) - 1)]))
        for row in rows:
            lines.append(_line([row.label, row.n, *map(_cell, row.cells), _difference(row), row.p]))
    notes = "".join(f"\n{note}" for note in ("In brackets: 95 % intervals.", *table.notes))
    return "\n".join(lines) + "\n" + notes + "\n"


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("<", "&lt;") for cell in cells) + " |"


def print_table(run_dir: Path, console: "Console | None" = None) -> None:
    """Print the headline table of a run to the terminal.

    On a narrow one intervals move below their values; on a very narrow one the safety prompt's column is left out.

    Args:
        run_dir: A run directory with a results.json.
        console: Where to print; a plain console on standard output when not given.
    """
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    console = console or Console()
    table = headline_table(read_results(Path(run_dir) / "results.json"))
    narrow, small = console.width < _WIDE, console.width < _MIDDLE
    kept = [i for i, subject in enumerate(table.subjects) if not small or subject != "base+safety_prompt"]
    heads = ["", "n", *(subject_label(table.subjects[i], short=True) for i in kept), "RR − base", "McNemar p"]
    shown = Table(box=None, pad_edge=False, padding=(0, 1 if small else 2, 0, 0), header_style="bold")
    unicode = console.encoding.lower().startswith("utf")

    def plain(text: str) -> str:
        return text if unicode else text.replace("−", "-").replace("–", "-")

    for index, name in enumerate(heads):
        shown.add_column(
            Text("p" if small and name == "McNemar p" else plain(name)), justify="right" if index else "left"
        )
    for section, rows in table.sections():
        shown.add_row(Text(_BRIEF[section], style="bold"))
        for row in rows:
            texts = [row.n, *(_cell(row.cells[i]) for i in kept), _difference(row), row.p]
            if narrow:
                texts = [text.replace(" [", "\n[") for text in texts]
            shown.add_row(Text(f"  {row.label}"), *(Text(plain(text)) for text in texts))
    console.print(shown)
    for note in table.notes:
        console.print(Text(note, style="dim"))
