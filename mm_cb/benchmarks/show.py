"""A finished run on the terminal: every rule and category, what could make the numbers lie, and where they are."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from mm_cb.attacks.labels import CONDITIONS, asked, label
from mm_cb.benchmarks.base import Benchmark
from mm_cb.core.chat_replies import CUT, UNANSWERED
from mm_cb.core.checked import read_list, read_records
from mm_cb.core.closing import here, say
from mm_cb.core.folding import is_blank
from mm_cb.core.records import Check, Item
from mm_cb.core.runs import read_run
from mm_cb.inference.unanswered import unanswered_note
from mm_cb.metrics.at_limit import at_limit_notes
from mm_cb.metrics.earned import unearned_note
from mm_cb.metrics.results import Measurement, find, read_results


def show_run(folder: Path, subject: str, benchmark: Benchmark) -> None:
    """Print a benchmark's own metrics, and every check that failed."""
    measured = read_results(folder / "results.json")
    for metric in benchmark.metrics:
        own = [m for m in measured if (m.subject, m.metric) == (subject, metric.name)]
        for m in (m for m in own if m.split == "all" or metric is benchmark.metrics[0]):
            rule = f", {label(CONDITIONS, m.condition)}" if len({one.condition for one in own}) > 1 else ""
            split = "" if m.split == "all" else f", {m.split}"
            missing = f", {m.counts['unscored']:.0f} without a score" if m.counts.get("unscored") else ""
            value = "no number" if m.value is None else f"{number(m.value)} %"
            say(f"{metric.label}{rule}{split}: {value}{interval(m, ' (', ')')} of {m.n}{missing}", "  ")
    for line in closing(folder):
        say(line, "  ")


def show_rules(
    folder: Path,
    title: str,
    metric: str,
    subject: str,
    rules: tuple[str, str],
    splits: Sequence[str],
    columns: Mapping[str, str],
    *,
    link: str = "–",
    missing: str = "–",
) -> None:
    """Print a table of two rules side by side.

    Args:
        folder: The run.
        title: Heading of the first column.
        metric: Whose numbers.
        subject: Whose answers.
        rules: Conditions; the first has the interval.
        splits: Rows, as far as they were measured.
        columns: Heading → name of a count of the first rule.
        link: Between the ends of an interval.
        missing: What stands for a number that is not there.
    """
    from rich.table import Table

    from mm_cb.core.progress import print_whole

    measured = read_results(folder / "results.json")
    table = Table(box=None, pad_edge=False)
    for place, column in enumerate((title, "n", rules[0], "95 %", rules[1], *columns)):
        table.add_column(column, justify="right" if place else "left", no_wrap=True)
    for split in splits:
        first, second = (find(measured, subject, metric, rule, split) for rule in rules)
        if first is not None:
            strict = number(None if second is None else second.value, missing)
            counts = [first.counts.get(name) for name in columns.values()]
            shown = [missing if c is None else f"{c:.1f}" if c != int(c) or "mean" in n else f"{c:.0f}"
                     for n, c in zip(columns.values(), counts, strict=True)]  # fmt: skip
            value = number(first.value, missing)
            table.add_row(split, str(first.n), value, interval(first, link=link), strict, *shown)
    print_whole(table)


def closing(folder: Path) -> list[str]:
    """The lines that end every run: failed checks, refused requests, and where the results are."""
    lines = [
        f"CAUTION {check['name']}: {check['value']}, expected {check['expected']} ({check['why']})"
        for check in read_list(folder / "checks.json", Check)
        if not check["passed"]
    ]
    items = read_records(folder / "items.jsonl", Item)
    lines += [*(unearned_note(items) or empty_note(items)), *thought_note(items)]
    lines += at_limit_notes(read_run(folder), items, _answers_of)
    lines.append(f"results {here(folder / 'results.json')}")
    note = unanswered_note(folder / "parts" / "completions.jsonl")
    return [*lines, note] if note else lines


def _answers_of(subject: str, metric: str, condition: str) -> str:
    return f"{subject} {asked(metric, condition)}"


def empty_note(items: Iterable[Item]) -> list[str]:
    """What to print where most answers of a model are empty; what had no answer is not counted."""
    said = {
        item["id"]: not is_blank(item["completion"])
        for item in items
        if isinstance(item.get("completion"), str) and item.get("reason") not in UNANSWERED and not item.get("thought")
    }
    if 2 * (empty := len(said) - sum(said.values())) <= len(said):
        return []
    return [f"CAUTION {empty} of {len(said)} answers are empty: see that the model is served as it is meant to be"]


def thought_note(items: Iterable[Item]) -> list[str]:
    """What to print where answers came behind a thought."""
    found = {
        (item["id"], item["thought"], item.get("completion")): not item.get("completion") and item.get("reason") != CUT
        for item in items
        if item.get("thought")
    }
    if not found:
        return []
    told = f"; behind {silent} of them the model stopped without an answer" if (silent := sum(found.values())) else ""
    many = f"{len(found)} answers came with a thought in front of them, which is not scored"
    return [f"{many}{told}: `thought` in items.jsonl"]


def number(value: float | None, missing: str = "–") -> str:
    """One decimal."""
    return missing if value is None else f"{value:.1f}"


def interval(m: Measurement, before: str = "", behind: str = "", link: str = " to ") -> str:
    """The 95 % interval, or nothing."""
    return "" if m.ci95 is None else f"{before}{m.ci95[0]:.1f}{link}{m.ci95[1]:.1f}{behind}"
