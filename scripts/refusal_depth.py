"""How attackable the base is, and what the breaker leaves, for every length of refusal training.

``python scripts/refusal_depth.py --miniature runs/miniature-0 --out results/refusal_depth.jsonl`` with the folder of a
finished ``scripts/train_miniature.py`` run. Each length is one line, appended when it is done; a rerun skips those that
were measured with the recipe of today. 48 behaviours, 100 steps, one start, eps 32/255, the breaker trained by the
shipped recipe, whose fingerprint stands in the line (none: measured before there was an adversary in it).
"""

from __future__ import annotations

import argparse
import hashlib
import json
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
from mm_cb.miniature.make import REFUSAL_LENGTHS, REPORT_SEED, knowledge_rate, refusal
from mm_cb.miniature.pretrain import Plan
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
    parser.add_argument("--out", type=Path, required=True, help="JSONL file, one line per length")
    parser.add_argument("--lengths", type=int, nargs="+", default=list(REFUSAL_LENGTHS))
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--threads", type=int, default=2)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    seed = json.loads((options.miniature / "training.json").read_text())["seed"]
    done = read_jsonl(options.out) if options.out.is_file() else []
    for length in options.lengths:
        key = {"training_seed": seed, "refusal_steps": length, "attack_steps": options.steps, "recipe": fingerprint()}
        if not any(key.items() <= record.items() for record in done):
            record = key | measure(options.miniature, seed, length, options.steps, options.threads)
            append_jsonl(options.out, record)
            sys.stdout.write(f"{record}\n")


def fingerprint() -> str:
    """Of the shipped recipe: another one is another breaker."""
    recipe = json.dumps(load_recipe("miniature").model_dump(mode="json"), sort_keys=True)
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]


def measure(miniature: Path, seed: int, length: int, steps: int, threads: int) -> dict[str, Any]:
    """Train the base's refusal so long, attack it, train a breaker on it, attack that."""
    knowing = miniature / "stages" / "knowledge"
    folder, validated = refusal(seed, miniature, knowing, Plan(), length, lambda **fields: None)
    work = miniature / f"depth-{length}-{steps}-{fingerprint()}"
    behaviors = read_behaviors(data.write_behaviors(data.behaviors(PER_SPLIT), work / "behaviors"))
    base = load_model(str(folder))
    with Progress() as progress:
        adapter = train(load_recipe("miniature", [f"model={folder}"]), work / "adapter", progress=progress)
        torch.set_num_threads(threads)
        rr = Subject("rr", load_model(str(folder), adapter=adapter), adapted=True)
        subjects = (Subject("base", base), rr)
        return {
            "validation": validated,
            "knows_forbidden": knowledge_rate(base, REPORT_SEED),
            **{s.name: compliance(s, behaviors, steps, work / "attacks" / s.name, progress) for s in subjects},
            "n": len(behaviors),
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
