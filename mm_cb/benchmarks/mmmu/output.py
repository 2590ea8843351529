"""What an MMMU run leaves: items.jsonl, results.json, checks.json, and a table on the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mm_cb.benchmarks.mmmu.honesty import run_checks
from mm_cb.benchmarks.mmmu.items import RULES, items_of, measure_items
from mm_cb.benchmarks.mmmu.protocol import protocol
from mm_cb.benchmarks.mmmu.score import Scored
from mm_cb.core.runs import RunDirectory, write_json, write_jsonl
from mm_cb.metrics.results import Measurement, find, read_results, write_results


def finish(
    run: RunDirectory,
    scored: Sequence[Scored],
    subject: str,
    prompts: Mapping[str, str] | None = None,
    seed: int = 0,
) -> None:
    """Write the run's files and end it."""
    items = items_of(scored, subject, prompts, seed)
    write_jsonl(run.path / "items.jsonl", items)
    write_json(run.path / "checks.json", run_checks(scored))
    write_results(run.path / "results.json", measure_items(items, scored))
    run.finish()


def show(folder: Path, subject: str) -> None:
    """Print a finished run: overall and by domain, both rules, and every check that failed."""
    import json

    from rich.table import Table

    from mm_cb.core.progress import console

    measured = read_results(folder / "results.json")
    table = Table(box=None, pad_edge=False)
    for column in ("MMMU", "n", "official", "95 %", "strict", "drawn", "broken"):
        table.add_column(column, justify="left" if column == "MMMU" else "right", no_wrap=True)
    for split in ("all", *protocol().domains):
        rules = {rule: find(measured, subject, "mmmu", rule, split) for rule in RULES}
        if rules["official"] is not None:
            table.add_row(*_row(split, rules["official"], rules["strict"]))
    out = console()
    out.print(table)
    for check in json.loads((folder / "checks.json").read_bytes()):
        if not check["passed"]:
            out.print(f"CAUTION {check['name']}: {check['value']}, expected {check['expected']} ({check['why']})")
    out.print(f"results {folder / 'results.json'}")


def _row(split: str, official: Measurement, strict: Measurement | None) -> tuple[str, ...]:
    counts = official.counts
    return (
        split,
        str(official.n),
        _percent(official.value),
        "" if official.ci95 is None else f"{official.ci95[0]:.1f}–{official.ci95[1]:.1f}",
        _percent(None if strict is None else strict.value),
        f"{counts['fallback']:.0f}" if "fallback" in counts else "–",
        f"{counts['degenerate']:.0f}" if "degenerate" in counts else "–",
    )


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.1f}"
