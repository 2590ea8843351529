"""Our attacks beside torchattacks, an oracle that no test may depend on: it pins an old ``requests``.

``pip install --no-deps --target DIR torchattacks``, then ``PYTHONPATH=DIR python scripts/benchmarks/hand_oracle.py
[--write]``. On the classifiers of `scripts/benchmarks/strength.py` (standard and adversarial, three seeds): whether
textbook settings give the same images, and the mean cross-entropy and robust accuracy of one run of 50 steps by our
defaults and by its PGD and Auto-PGD, which start at random as they do by default.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from image_attacks import L2, Linf, apgd, cross_entropy, pgd  # noqa: E402
from tests.image_attacks.networks import classifier, held_out  # noqa: E402

RADII = {"linf": [4 / 255, 8 / 255, 16 / 255, 32 / 255], "l2": [0.25, 0.5, 1.0]}
HARDENING = {"standard": 0.0, "adversarial": 16 / 255}
STEPS, TEXTBOOK_STEPS, TEXTBOOK_IMAGES = 50, 10, 20


def main() -> None:
    """Compare, print, and write with ``--write``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="into results/torchattacks.json, which is tracked")
    write = parser.parse_args().write
    try:
        import torchattacks
    except ImportError as error:
        parser.exit(2, f"torchattacks must be importable, got: {error}; see the first lines of this script.\n")
    torch.set_num_threads(1)
    cells, apart = [], dict.fromkeys(RADII, 0.0)
    for training, hardening in HARDENING.items():
        for seed in (0, 1, 2):
            network = classifier(seed, hardening, epochs=20)
            images, labels = held_out(network)
            for norm, radii in RADII.items():
                apart[norm] = max(apart[norm], textbook(torchattacks, network, images, labels, norm, radii[1]))
                for epsilon in radii:
                    found = strength(torchattacks, network, images, labels, norm, epsilon)
                    cell = {"training": training, "seed": seed, "norm": norm, "epsilon": epsilon, "n": len(labels)}
                    cells.append(cell | found)
                    print(json.dumps(cells[-1]), flush=True)
    record = {
        "versions": {"torch": torch.__version__, "torchattacks": torchattacks.__version__},
        "steps": STEPS,
        "textbook": {norm: {"images": 6 * TEXTBOOK_IMAGES, "furthest_apart": far} for norm, far in apart.items()},
        "summary": {name: summary(cells, name) for name in ("pgd", "apgd")},
        "cells": cells,
    }
    if write:
        (ROOT / "results" / "torchattacks.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: record[key] for key in ("textbook", "summary")}, indent=1))


def textbook(theirs: Any, network: Any, images: Tensor, labels: Tensor, norm: str, epsilon: float) -> float:
    """Largest difference of a value between both PGDs: no random start, one small step size, the last iterate.

    Both go by torch's own cross-entropy: ours keeps a direction where torch's is nought in float32, and goes on there.
    """
    images, labels = images[:TEXTBOOK_IMAGES], labels[:TEXTBOOK_IMAGES]
    if norm == "l2":  # away from the box: ball, then box, is the projection on both only there
        images = (255 * (0.3 + 0.4 * images)).round() / 255
    settings = {"eps": epsilon, "alpha": epsilon / 4, "steps": TEXTBOOK_STEPS, "random_start": False}
    expected = (theirs.PGD if norm == "linf" else theirs.PGDL2)(network, **settings)(images, labels)
    ours = pgd(
        lambda pixels: -F.cross_entropy(network(pixels), labels, reduction="none"),
        images,
        threat_model=(Linf if norm == "linf" else L2)(epsilon),
        steps=TEXTBOOK_STEPS,
        step_size=epsilon / 4,
        keep="last",
    ).images
    return (ours - expected).abs().max().item()


def strength(theirs: Any, network: Any, images: Tensor, labels: Tensor, norm: str, epsilon: float) -> dict[str, Any]:
    """Mean cross-entropy and percent still classified right under each attack, and how ours stand to the best."""

    def objective(pixels: Tensor) -> Tensor:
        return cross_entropy(network(pixels), labels)

    ball = (Linf if norm == "linf" else L2)(epsilon)
    kind, long = (theirs.PGD, "Linf") if norm == "linf" else (theirs.PGDL2, "L2")
    torch.manual_seed(0)
    pictures = {
        "pgd": pgd(objective, images, threat_model=ball, steps=STEPS).images,
        "apgd": apgd(objective, images, threat_model=ball, steps=STEPS).images,
        "torchattacks:pgd": kind(network, eps=epsilon, alpha=epsilon / 4, steps=STEPS)(images, labels),
        "torchattacks:apgd": theirs.APGD(network, norm=long, eps=epsilon, steps=STEPS)(images, labels),
    }
    found: dict[str, Any] = {"attacks": {}}
    for name, picture in pictures.items():
        away = (picture - images).flatten(1).norm(dim=1, p=2 if norm == "l2" else float("inf"))
        assert away.max() <= epsilon + 1e-4, name  # nobody may win by leaving the ball
        with torch.no_grad():
            logits = network(picture)
        right = 100 * (logits.argmax(1) == labels).float().mean().item()
        found["attacks"][name] = {"cross_entropy": -cross_entropy(logits, labels).mean().item(), "robust": right}
    other = [value for name, value in found["attacks"].items() if ":" in name]
    for name in ("pgd", "apgd"):
        ours = found["attacks"][name]
        found[name] = {
            "loss_ratio": round(ours["cross_entropy"] / max(one["cross_entropy"] for one in other), 5),
            "accuracy_above": round(ours["robust"] - min(one["robust"] for one in other), 3),
        }
    return found


def summary(cells: list[dict[str, Any]], name: str) -> dict[str, float]:
    """Cells in which one of ours has 99 % of the best loss and at most one point of accuracy more, and the extremes."""
    ratios, above = [cell[name]["loss_ratio"] for cell in cells], [cell[name]["accuracy_above"] for cell in cells]
    met = sum(ratio >= 0.99 and more <= 1 for ratio, more in zip(ratios, above, strict=True))
    return {
        "cells": len(cells),
        "cells_met": met,
        "lowest_loss_ratio": min(ratios),
        "highest_accuracy_above": max(above),
    }


if __name__ == "__main__":
    main()
