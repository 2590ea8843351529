"""Are our attacks, at their defaults, as strong as independent ones at equal steps and restarts?

``python scripts/benchmarks/strength.py [--out FILE] [--write]`` trains small classifiers on scikit-learn's digits
(standard and adversarial, three seeds fixed in advance), attacks the same held-out digits with our defaults and with
foolbox and the Adversarial Robustness Toolbox (ART, with its own Auto-PGD) and measures one cell per model, norm,
radius and budget. Both sides get the same number of steps and restarts, and per image the best restart counts. The
default of `image_attacks` is `pgd`, by the gradient's sign; `mm-cb attack` steps by Adam, `adam_pgd`, which refuses l-2
balls and is in the l-inf cells alone. Our first run starts at the image by default, ART's Auto-PGD never does: ours are
also run with random starts only. Each of ours gets a verdict of its own and changes no other.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

import mm_cb  # noqa: E402, F401  (it mends a torchvision that does not fit this torch, which ART imports)
from image_attacks import L2, Linf, adam_pgd, apgd, cross_entropy, pgd  # noqa: E402
from tests.image_attacks.networks import classifier, held_out  # noqa: E402
from tests.image_attacks.oracles import art_attack, foolbox_attack  # noqa: E402

SEEDS = (0, 1, 2)
TRAINING = {"standard": 0.0, "adversarial": 16 / 255}
RADII = {"linf": [4 / 255, 8 / 255, 16 / 255, 32 / 255], "l2": [0.25, 0.5, 1.0]}
BUDGETS = ((20, 1), (50, 2))  # steps, restarts
OURS: dict[str, tuple[Callable[..., Any], bool]] = {
    "ours:pgd": (pgd, False),
    "ours:apgd": (apgd, False),
    "ours:adam_pgd": (adam_pgd, False),
    "ours:pgd, random starts": (pgd, True),
    "ours:apgd, random starts": (apgd, True),
    "ours:adam_pgd, random starts": (adam_pgd, True),
}
"""Attack, and whether its first run starts at random too."""
Runs = Callable[[int], Tensor]
"""Images of one run, given its number."""


def main() -> int:
    """Run the sweep and return 1 if a goal is missed."""
    parser = argparse.ArgumentParser(description=__doc__)
    results = ROOT / "results" / "attack_strength.json"
    parser.add_argument("--out", type=Path, metavar="FILE", help="write every cell there")
    parser.add_argument("--write", action="store_const", const=results, dest="out", help="there: results/, tracked")
    options = parser.parse_args()
    torch.set_num_threads(1)
    cells = []
    for training, hardening in TRAINING.items():
        for seed in SEEDS:
            network = classifier(seed, hardening, epochs=20)
            images, labels = held_out(network)
            for norm, radii in RADII.items():
                for epsilon in radii:
                    for steps, restarts in BUDGETS:
                        found = attack_all(network, images, labels, norm, epsilon, steps, restarts)
                        cell = {"training": training, "seed": seed, "norm": norm, "epsilon": epsilon}
                        cell |= {"epsilon_255": round(255 * epsilon, 2), "steps": steps, "restarts": restarts}
                        cells.append(cell | {"n": len(labels), "attacks": found})
                        print(
                            training, seed, norm, round(255 * epsilon, 1), steps, restarts, verdict(found), flush=True
                        )
    summary = summarise(cells)
    versions = {"torch": torch.__version__, "foolbox": "3.3.4", "adversarial-robustness-toolbox": "1.20.1"}
    record = {
        "command": "python scripts/benchmarks/strength.py --write",
        "versions": versions,
        "summary": summary,
        "cells": cells,
    }
    if options.out is not None:
        options.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(summary, indent=1))
    return 0 if all(summary[name]["goal_met"] for name, (_, random) in OURS.items() if not random) else 1


def attack_all(
    network: Any, images: Tensor, labels: Tensor, norm: str, epsilon: float, steps: int, restarts: int
) -> dict[str, dict[str, float]]:
    """Mean best cross-entropy and robust accuracy (percent) of every attack."""

    def objective(pixels: Tensor) -> Tensor:
        return cross_entropy(network(pixels), labels)

    model = Linf(epsilon) if norm == "linf" else L2(epsilon)
    found = {}
    for name, (attack, random) in OURS.items():
        if norm == "l2" and attack is adam_pgd:
            continue
        result = attack(objective, images, threat_model=model, steps=steps, restarts=restarts, random_start=random)
        found[name] = score(network, labels, list(result.per_restart.images))
    for name, run in oracles(network, images, labels, norm, epsilon, steps).items():
        torch.manual_seed(0)
        np.random.seed(0)
        pictures = [run(number) for number in range(restarts)]
        for picture in pictures:  # nobody may win by leaving the ball
            away = (picture - images).flatten(1).norm(dim=1, p=2 if norm == "l2" else float("inf"))
            assert away.max() <= epsilon + 1e-4 and picture.min() >= 0 and picture.max() <= 1
        found[name] = score(network, labels, pictures)
    return found


def oracles(network: Any, images: Tensor, labels: Tensor, norm: str, epsilon: float, steps: int) -> dict[str, Runs]:
    """Foolbox's and ART's attacks; run 0 starts at the image where the attack lets it, later ones at random."""
    l2 = norm == "l2"
    art_norm: Any = 2 if l2 else np.inf
    kind = "L2PGD" if l2 else "LinfPGD"

    def from_foolbox(share: float | None) -> Runs:
        size = {} if share is None else {"rel_stepsize": share}
        return lambda number: foolbox_attack(
            kind, network, images, labels, epsilon, steps=steps, random_start=number > 0, **size
        )

    def from_art(number: int) -> Tensor:
        options = {"norm": art_norm, "eps": epsilon, "eps_step": epsilon / 4, "max_iter": steps}
        return art_attack(
            "ProjectedGradientDescentPyTorch", network, images, labels, num_random_init=int(number > 0), **options
        )

    def auto(number: int) -> Tensor:
        options = {"norm": art_norm, "eps": epsilon, "eps_step": 2 * epsilon, "max_iter": steps}
        kind = "AutoProjectedGradientDescent"
        return art_attack(kind, network, images, labels, nb_random_init=1, loss_type="cross_entropy", **options)

    return {
        "foolbox:default": from_foolbox(None),
        "foolbox:0.1": from_foolbox(0.1),
        "foolbox:0.33": from_foolbox(0.33),
        "art:pgd": from_art,
        "apgd:art": auto,
    }


def score(network: Any, labels: Tensor, runs: list[Tensor]) -> dict[str, float]:
    """Per image the best of the runs: mean cross-entropy, and percent still classified right in every run."""
    losses, right = [], []
    with torch.no_grad():
        for pictures in runs:
            logits = network(pictures)
            losses.append(-cross_entropy(logits, labels))
            right.append(logits.argmax(1) == labels)
    robust = torch.stack(right).all(dim=0).float().mean()
    return {"cross_entropy": torch.stack(losses).amax(0).mean().item(), "robust_accuracy": 100 * robust.item()}


def verdict(found: dict[str, dict[str, float]], name: str = "ours:pgd") -> dict[str, float]:
    """How one of ours compares with the best of the others."""
    others = [value for key, value in found.items() if not key.startswith("ours")]
    best = max(value["cross_entropy"] for value in others)
    lowest = min(value["robust_accuracy"] for value in others)
    ours = found[name]
    return {
        "loss_ratio": round(ours["cross_entropy"] / best, 5),
        "accuracy_above": round(ours["robust_accuracy"] - lowest, 3),
    }


def met(cell: dict[str, Any]) -> dict[str, bool]:
    """Whether each of ours meets the goal in a cell where it was run."""
    verdicts = {name: verdict(cell["attacks"], name) for name in OURS if name in cell["attacks"]}
    return {name: found["loss_ratio"] >= 0.99 and found["accuracy_above"] <= 1 for name, found in verdicts.items()}


def summarise(cells: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Goal per attack and cell: at least 99 % of the best loss, at most 1 point above the lowest accuracy."""
    summary = {}
    for name in OURS:
        run = [cell for cell in cells if name in cell["attacks"]]
        verdicts = [verdict(cell["attacks"], name) for cell in run]
        ratios, above = [v["loss_ratio"] for v in verdicts], [v["accuracy_above"] for v in verdicts]
        summary[name] = {
            "cells": len(run),
            "cells_met": sum(met(cell)[name] for cell in run),
            "goal_met": all(met(cell)[name] for cell in run),
            "lowest_loss_ratio": min(ratios),
            "mean_loss_ratio": round(statistics.mean(ratios), 5),
            "highest_accuracy_above": max(above),
        }
    return summary


if __name__ == "__main__":
    started = time.process_time()
    code = main()
    print(f"{time.process_time() - started:.0f} s of CPU time")
    sys.exit(code)
