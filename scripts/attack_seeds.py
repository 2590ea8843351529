"""How much of an attack's result is the seed's? Rates and losses of runs that differ in their seed alone.

``python scripts/attack_seeds.py RUN RUN RUN [--json]`` reads finished runs of ``mm-cb attack`` made by one command but
for ``--seed`` and ``--out``, three or more for a spread that means anything, and refuses others. For every attack that
searches, for random noise and for the worst case over the attacks it prints the compliance rate of each seed, their
mean and their standard deviation between seeds (of a sample: n - 1), the same of the mean best loss, and the union: the
share of behaviours that any seed broke, with its Wilson interval. The union has as many times the tries; compare it
with that of noise.

The best loss of a behaviour is its target's lowest over all pictures that the run saved of it; one that was broken was
not attacked again. A run's first restart starts at the clean picture, so that with ``--restarts 1`` the seed decides
over noise and sampled answers alone.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from mm_cb.errors import UserError  # noqa: E402
from mm_cb.evaluation.attacks import KINDS  # noqa: E402
from mm_cb.evaluation.observations import UNATTACKED, observe  # noqa: E402
from mm_cb.evaluation.statistics import wilson_interval  # noqa: E402
from mm_cb.report.comparable import judges_of  # noqa: E402
from mm_cb.report.comparisons import losses_of_tries  # noqa: E402
from mm_cb.runs import read_jsonl, read_run  # noqa: E402

Items = Sequence[dict[str, Any]]
_WORST = "worst_case"


def main() -> None:
    """Read, refuse what does not compare, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", metavar="RUN")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args()
    found = compare(options.runs)
    print(json.dumps(found, indent=2) if options.json else table(found))


def compare(folders: Sequence[Path]) -> dict[str, Any]:
    """What the runs have in common, and one row per condition.

    Raises:
        UserError: If there are fewer than two runs, one is not a finished attack, or they differ in more than the seed.
    """
    if len(folders) < 2:
        raise UserError(f"give two runs or more, three at least for a spread that means anything; got {len(folders)}.")
    runs = [_finished_attack(folder) for folder in folders]
    items = [read_jsonl(folder / "items.jsonl") for folder in folders]
    seeds = [run["seed"] for run in runs]
    for folder, own in zip(folders, items, strict=True):
        if not own:
            raise UserError(f"`{folder}` must hold the items of its behaviours, there are none.")
    for i, folder in enumerate(folders[1:], start=1):
        if differing := _differing(runs[0], runs[i]):
            raise UserError(f"`{folders[0]}` and `{folder}` must differ in `--seed` alone, they do in {differing}.")
        if judges_of(items[0]) != judges_of(items[i]):
            raise UserError(f"`{folders[0]}` and `{folder}` must have been judged by one judge: `mm-cb judge` both.")
        if seeds[i] in seeds[:i]:
            raise UserError(f"`{folder}` must have a seed of its own, but another run has {seeds[i]} too.")
    recipe = runs[0]["recipe"]
    return {
        "seeds": seeds,
        "subject": items[0][0]["subject"],
        **{key: recipe[key] for key in ("epsilon", "steps", "restarts")},
        "rows": rows(items),
    }


def _finished_attack(folder: Path) -> dict[str, Any]:
    run = read_run(folder)
    if run.get("command") != "attack" or not run.get("ended") or "shard" in run["recipe"]:
        raise UserError(f"`{folder}` must be a finished run of `mm-cb attack`, whole and not a shard.")
    return run


def _differing(one: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """The names of what differs in the recipes, options one by one, and in the files that were read."""
    sides = []
    for run in (one, other):
        recipe = {k: v for k, v in run["recipe"].items() if k != "options"} | run["recipe"].get("options", {})
        sides.append({f"`{k}`": v for k, v in recipe.items()} | {f"file `{k}`": v for k, v in run["inputs"].items()})
    first, second = sides
    return ", ".join(key for key in dict.fromkeys([*first, *second]) if first.get(key) != second.get(key))


def rows(runs: Sequence[Items]) -> list[dict[str, Any]]:
    """One row per attack that searches, for noise and for the worst case; a list in it has one entry per run."""
    verdicts = [_verdicts(items) for items in runs]
    losses = [_best_losses(items) for items in runs]
    found = []
    for condition in verdicts[0]:
        by_id = [seen[condition] for seen in verdicts]
        rates = [_mean([100 * v for v in seen.values() if v is not None]) for seen in by_id]
        best = [_mean(list(seen.get(condition, {}).values())) for seen in losses]
        found.append(
            {
                "condition": condition,
                "n": [sum(v is not None for v in seen.values()) for seen in by_id],
                "compliance_percent": rates,
                **{f"compliance_{key}": value for key, value in _spread(rates).items()},
                "best_loss": best,
                **{f"best_loss_{key}": value for key, value in _spread(best).items()},
                "any_seed": _union(by_id),
            }
        )
    return found


def _verdicts(items: Items) -> dict[str, dict[str, float | None]]:
    """Condition -> behaviour -> 1 if it was broken, 0 if not, None without a verdict; the worst case last."""
    found: dict[str, dict[str, float | None]] = {}
    for one in observe(items):
        searches = one.condition == "noise" or (one.condition in KINDS and KINDS[one.condition].loss)
        if one.metric == "compliance" and (searches or one.condition == _WORST):
            found.setdefault(one.condition, {})[one.id] = one.value
    return found


def _best_losses(items: Items) -> dict[str, dict[str, float]]:
    """Condition -> behaviour -> lowest loss of its pictures; the worst case has the lowest over its attacks."""
    found: dict[str, dict[str, float]] = defaultdict(dict)
    for item in items:
        lowest = min(losses_of_tries(item).values(), default=math.inf)
        for condition in (item["condition"], *([] if item["condition"] in UNATTACKED else [_WORST])):
            if lowest < math.inf:
                found[condition][item["id"]] = min(lowest, found[condition].get(item["id"], math.inf))
    return found


def _mean(values: Sequence[float]) -> float | None:
    return round(statistics.fmean(values), 5) if values else None


def _spread(values: Sequence[float | None]) -> dict[str, float | None]:
    """Mean and standard deviation between seeds; None where a seed has no value."""
    known = [value for value in values if value is not None]
    if len(known) < len(values):
        return {"mean": None, "sd": None}
    return {"mean": _mean(known), "sd": round(statistics.stdev(known), 5)}


def _union(runs: Sequence[Mapping[str, float | None]]) -> dict[str, Any]:
    """Behaviours that any run broke, of those that one did or all judged."""
    outcomes = []
    for id in runs[0]:
        values = [seen[id] for seen in runs]
        if any(values) or None not in values:
            outcomes.append(any(values))
    broken, n = sum(outcomes), len(outcomes)
    ends = [round(100 * end, 3) for end in wilson_interval(broken, n)] if n else None
    return {"broken": broken, "n": n, "percent": _mean([100 * one for one in outcomes]), "ci95": ends}


def table(found: Mapping[str, Any]) -> str:
    """One line per condition."""
    seeds = len(found["seeds"])
    width = max(22, 7 * seeds)
    lines = [
        f"{found['subject']}; seeds {', '.join(map(str, found['seeds']))}; restarts {found['restarts']}, "
        f"steps {found['steps']}, epsilon {found['epsilon']}/255",
        "SD: between seeds, n - 1; of rates in points, of losses in nats per token",
        f"{'condition':18}{'complied, % by seed':>{width}}{'mean':>8}{'SD':>7}"
        f"{'best loss by seed':>{width}}{'mean':>8}{'SD':>7}   any of {seeds} seeds, %",
    ]
    for row in found["rows"]:
        rates = "".join(f"{_shown(v, 1):>7}" for v in row["compliance_percent"])
        losses = "".join(f"{_shown(v, 3):>7}" for v in row["best_loss"])
        union = row["any_seed"]
        share = f"{union['broken']} of {union['n']}: {_shown(union['percent'], 1)}"
        share += "" if union["ci95"] is None else " [{:.1f}, {:.1f}]".format(*union["ci95"])
        lines.append(
            f"{row['condition']:18}{rates:>{width}}{_shown(row['compliance_mean'], 1):>8}"
            f"{_shown(row['compliance_sd'], 1):>7}{losses:>{width}}{_shown(row['best_loss_mean'], 3):>8}"
            f"{_shown(row['best_loss_sd'], 3):>7}   {share}"
        )
    return "\n".join(lines)


def _shown(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


if __name__ == "__main__":
    try:
        main()
    except (UserError, ValueError) as error:
        sys.stderr.write(f"attack_seeds: {error}\n")
        sys.exit(2)
