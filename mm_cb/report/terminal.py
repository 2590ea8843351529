"""The headline table on a terminal."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mm_cb.metrics.results import Measurement, read_results
from mm_cb.metrics.table import HEADLINE
from mm_cb.report.labels import PROXY, interval, percent, signed, subject_label, without_value
from mm_cb.report.strength import Strength
from mm_cb.report.table import (
    ATTACKED_HEAD,
    CALLS_HEAD,
    FORCED_HEAD,
    KEPT_HEAD,
    SIDE_HEAD,
    SPLIT_HEADS,
    Row,
    headline_table,
)
from mm_cb.report.text import clean_text

if TYPE_CHECKING:
    from rich.console import Console

_BRIEF = {
    ATTACKED_HEAD: "complies, %",
    SPLIT_HEADS[HEADLINE]: "PGD by kind, %",
    SPLIT_HEADS["worst_case"]: "worst by kind, %",
    CALLS_HEAD: "agent, %",
    KEPT_HEAD: "kept, %",
    SIDE_HEAD: "side effects, %",
    FORCED_HEAD: "forced, %",
}
_WIDE = 120
_MIDDLE = 96


def _cell(measurement: Measurement | None) -> str:
    if measurement is None or measurement.value is None:
        return without_value(measurement)
    return f"{percent(measurement.value)} {interval(measurement.ci95)}".strip()


def _difference(row: Row) -> str:
    if row.paired is None:
        return "–"
    return f"{signed(row.paired.difference)} {interval(row.paired.difference_ci95, sign=True)}"


def print_table(
    results: Path | Sequence[Measurement],
    console: "Console | None" = None,
    *,
    strengths: Sequence[Strength] = (),
    pictured: bool = True,
) -> None:
    """Print the headline table to the terminal.

    On a narrow one intervals move below their values.

    Args:
        results: A run directory with a results.json, or the measurements of several runs.
        console: Where to print; a plain console on standard output when not given.
        strengths: How strong every attack was, told below its name.
        pictured: Whether pictures were attacked.
    """
    from rich.console import Console, Group
    from rich.padding import Padding
    from rich.table import Table
    from rich.text import Text

    from mm_cb.core.progress import print_whole

    console = console or Console()
    measured = read_results(results / "results.json") if isinstance(results, Path) else results
    table = headline_table(measured, strengths, pictured=pictured)
    narrow, small = console.width < _WIDE, console.width < _MIDDLE
    heads = ["", "n", *(subject_label(subject, short=True) for subject in table.subjects), "RR − base", "p"]
    shown = Table(box=None, pad_edge=False, padding=(0, 1 if small else 2, 0, 0), header_style="bold")
    unicode = console.encoding.lower().startswith("utf")

    def plain(text: str) -> str:
        text = clean_text(text)
        return text if unicode else text.replace("−", "-").replace("–", "-")

    for index, name in enumerate(heads):
        shown.add_column(Text(plain(name)), justify="right" if index else "left", overflow="fold")
    proxied = table.proxied()
    for section, rows in table.sections():
        by_proxy = f", {PROXY}" if section in proxied else ""
        shown.add_row(Text(f"{_BRIEF[section]}{by_proxy}", style="bold"))
        for row in rows:
            texts = [row.n, *map(_cell, row.cells), _difference(row), row.p]
            if narrow:
                texts = [text.replace(" [", "\n[") for text in texts]
            remarks = [one for one in row.remarks if not (one == PROXY and section in proxied)]
            below = [Padding(Text(plain(one), style="dim"), (0, 0, 0, 4)) for one in remarks]
            label = Group(Padding(Text(plain(row.label)), (0, 0, 0, 2)), *below)
            shown.add_row(label, *(Text(plain(text)) for text in texts))
    print_whole(shown, console)
    if table.unmeasured:
        console.print(Text(plain(f"Not measured: {', '.join(table.unmeasured)}.")))
    for note in table.notes:
        console.print(Text(plain(note), style="dim"))
