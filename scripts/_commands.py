"""What the scripts that run many commands have in common: each command once, and numbers from its files."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from mm_cb.core.runs import read_jsonl
from mm_cb.metrics.results import Measurement, read_results


def run(words: Sequence[str | Path], out: Path) -> None:
    """Run ``mm-cb WORDS --out OUT``, unless that run has finished; one that was stopped is gone on with.

    Ends the script with the command's own exit code if it fails.
    """
    file = out / "run.json"
    if file.exists() and json.loads(file.read_text(encoding="utf-8")).get("ended"):
        return
    command = [sys.executable, "-m", "mm_cb", *map(str, words), "--out", str(out)]
    code = subprocess.run(command, stdout=subprocess.DEVNULL, check=False).returncode  # noqa: S603
    if code:
        sys.exit(code)


def measured(run: Path, metric: str = "compliance", condition: str = "worst_case") -> Measurement | None:
    """A number of a run over all its items; where one condition alone was measured, that one's."""
    found = [m for m in read_results(run / "results.json") if (m.metric, m.split) == (metric, "all")]
    named = [m for m in found if m.condition == condition]
    return next(iter(named or found), None) if named or len(found) == 1 else None


def cell(one: Measurement | None) -> str:
    """A rate in percent with its interval and n, as a table shows it; a dash where there is none."""
    if one is None or one.value is None:
        return "-"
    span = "" if one.ci95 is None else f" [{one.ci95[0]:.1f}, {one.ci95[1]:.1f}]"
    return f"{one.value:.1f}{span} n={one.n}"


def held_out(adapter: Path) -> tuple[str, str]:
    """The last cosine of held-out circuit-breaker and retain rows; dashes where none were held out."""
    last = next((r for r in reversed(read_jsonl(adapter / "metrics.jsonl")) if "held_out_retain_cosine" in r), None)
    if last is None:
        return "-", "-"
    return f"{last['held_out_circuit_breaker_cosine']:.3f}", f"{last['held_out_retain_cosine']:.3f}"


def table(rows: Sequence[Sequence[str]]) -> str:
    """Rows in Markdown, the first one is the head."""
    head, *rest = rows
    return "\n".join("| " + " | ".join(row) + " |" for row in (head, ["---"] * len(head), *rest))
