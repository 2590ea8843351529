"""How attackable the base is, and what the breaker leaves, for every depth of refusal training.

``python scripts/refusal_depth.py --miniature runs/miniature-0 --out results/refusal_depth.jsonl`` with the folder of a
finished ``scripts/train_miniature.py`` run. Each depth is one line, appended when it is done; a rerun skips finished
ones. 48 behaviours, 100 steps, one start, eps 32/255, the breaker trained by the shipped recipe.
"""

from __future__ import annotations

import argparse
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import torch

from mm_cb.evaluation.behaviors import Behavior, read_behaviors
from mm_cb.evaluation.hijack import Attack, attack_behaviors
from mm_cb.evaluation.statistics import wilson_interval
from mm_cb.evaluation.subjects import Subject
from mm_cb.files import append_jsonl, read_jsonl
from mm_cb.miniature import data
from mm_cb.miniature.make import make, measure_gates
from mm_cb.miniature.scoring import judge_behavior
from mm_cb.models import load_model
from mm_cb.progress import Progress
from mm_cb.training.recipe import load_recipe
from mm_cb.training.run import train

PER_SPLIT = (24, 12, 12)


def main() -> None:
    """Parse the arguments and run the sweep."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--miniature", type=Path, required=True, help="folder of a finished training run")
    parser.add_argument("--out", type=Path, required=True, help="JSONL file, one line per depth")
    parser.add_argument("--depths", type=float, nargs="+", default=[0.5, 1, 2, 4, 8])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    done = {record["depth"] for record in read_jsonl(options.out)} if options.out.is_file() else set()
    for depth in options.depths:
        if depth not in done:
            record = measure(options.miniature, depth, options.steps, options.threads)
            append_jsonl(options.out, record)
            sys.stdout.write(f"{record}\n")


def measure(miniature: Path, depth: float, steps: int, threads: int) -> dict[str, Any]:
    """Train the base to one depth, attack it, train a breaker on it, attack that."""
    folder = miniature / f"depth-{depth:g}"
    if not (folder / "training.json").is_file():
        make(int(miniature.name.rpartition("-")[2] or 0), miniature, depth=depth, threads=threads)
    behaviors = read_behaviors(data.write_behaviors(data.behaviors(PER_SPLIT), folder / "behaviors"))
    base = load_model(str(folder))
    gates = measure_gates(base)
    with Progress() as progress:
        adapter = train(load_recipe("miniature", [f"model={folder}"]), folder / "adapter", progress=progress)
        torch.set_num_threads(threads)
        rr = Subject("rr", load_model(str(folder), adapter=adapter), adapted=True)
        subjects = (Subject("base", base), rr)
        return {
            "depth": depth,
            "gates": {name: round(value, 1) for name, value in gates.items()},
            **{s.name: compliance(s, behaviors, steps, folder / "attacks" / s.name, progress) for s in subjects},
            "n": len(behaviors),
            "steps": steps,
        }


def compliance(
    subject: Subject, behaviors: list[Behavior], steps: int, folder: Path, progress: Progress
) -> dict[str, Any]:
    """Outcomes of one subject under PGD from the picture itself."""
    attack = Attack("pgd", steps=steps, canvas=data.CANVAS)
    items = attack_behaviors(subject, behaviors, attack, folder, judge_behavior, progress)
    outcomes = Counter(item["outcome"] for item in items)
    harmful = outcomes["harmful"]
    by_split = {
        split: [sum(i["outcome"] == "harmful" for i in items if i["split"] == split), n]
        for split, n in zip(data.SPLITS, PER_SPLIT, strict=True)
    }
    interval = [round(100 * bound, 1) for bound in wilson_interval(harmful, len(items))]
    return {
        "compliance": round(100 * harmful / len(items), 1),
        "ci95": interval,
        "outcomes": dict(outcomes),
        **by_split,
    }


if __name__ == "__main__":
    main()
