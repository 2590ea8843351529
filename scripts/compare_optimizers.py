"""Which way to step is strongest on a model, at equal steps?

``python scripts/compare_optimizers.py --behaviors FILE [--model miniature] [--adapter A] [--steps 150] [--out FILE]``
minimises the target's loss (with ``--loss matching`` the adaptive attack's) over the same pictures, from the picture
itself, with PGD by the sign, with momentum, by Auto-PGD and by Adam, and prints the losses on the way. Use validation
behaviours: what is chosen here must not be reported on the same ones. ``--out`` gets one row appended per subject.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from image_attacks import AttackResult, Linf, adam_pgd, apgd, pgd  # noqa: E402
from mm_cb.evaluation.adaptive import MatchingObjective  # noqa: E402
from mm_cb.evaluation.behaviors import open_picture, read_behaviors  # noqa: E402
from mm_cb.evaluation.hijack import to_pixels  # noqa: E402
from mm_cb.evaluation.objectives import TargetObjective  # noqa: E402
from mm_cb.evaluation.source import Source  # noqa: E402
from mm_cb.evaluation.subjects import load_subject  # noqa: E402

OPTIMIZERS: dict[str, Callable[..., AttackResult]] = {
    "sign": pgd,
    "sign, momentum 0.9": partial(pgd, momentum=0.9),
    "apgd": apgd,
    "adam": adam_pgd,
}
OBJECTIVES = {"target": TargetObjective, "matching": MatchingObjective}
FORCED = 0.1
"""A loss below this usually means that greedy decoding says the target."""


def main() -> None:
    """Attack, print, append."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--behaviors", type=Path, required=True)
    parser.add_argument("--model", default="miniature")
    parser.add_argument("--adapter")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--loss", choices=OBJECTIVES, default="target")
    parser.add_argument("--epsilon", type=int, default=32, help="in 255ths")
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--count", type=int, default=12, help="the first so many behaviours with a picture of one size")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    subject = load_subject(
        Source(options.model, options.adapter, device=options.device), "rr" if options.adapter else "base"
    )
    opened = [(b, open_picture(b.image)) for b in read_behaviors(options.behaviors) if b.image]
    alike = [(b, picture) for b, picture in opened if picture.size == opened[0][1].size][: options.count]
    behaviors, pictures = zip(*alike, strict=True)
    objective = OBJECTIVES[options.loss](subject, behaviors, pictures)
    clean = torch.stack([to_pixels(picture) for picture in pictures]).to(subject.model.device)
    row: dict[str, Any] = {
        "command": command(sys.argv[1:], str(options.out)),
        "subject": Path(options.adapter).name if options.adapter else "base",
        "loss": options.loss,
        "epsilon": options.epsilon,
        "n": len(behaviors),
    }
    for name, attack in OPTIMIZERS.items():
        result = attack(objective, clean, threat_model=Linf(options.epsilon / 255), steps=options.steps)
        row[name] = summary(result)
        print(name, json.dumps(row[name]), flush=True)
    if options.out:
        with options.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def command(arguments: Sequence[str], out: str) -> str:
    """What was typed, with files and folders by their own names: where they lie is nobody's business."""
    shown = []
    for argument in arguments:
        option, equals, value = argument.rpartition("=")
        path = Path(value)
        there = path.is_absolute() or path.exists() or value == out
        shown.append(option + equals + (path.absolute().name if there else value))
    return shlex.join(["python", "scripts/compare_optimizers.py", *shown])


def summary(result: AttackResult) -> dict[str, Any]:
    """Mean and median loss of the best iterates, how many are forced, and the mean of the best so far on the way."""
    best = result.curves[0].cummin(dim=0).values
    steps = len(best) - 1
    losses = result.losses.tolist()
    return {
        "mean": round(statistics.mean(losses), 4),
        "median": round(statistics.median(losses), 4),
        "forced": sum(loss < FORCED for loss in losses),
        "mean_after_share_of_steps": {
            str(share): round(best[int(share * steps)].mean().item(), 3) for share in (0, 0.25, 0.5, 0.75)
        },
    }


if __name__ == "__main__":
    main()
