"""A training step of ours against two others: FLOPs at 7B shapes, CPU time, equality.

    python scripts/benchmarks/rr.py [--json FILE] [--write] [--full]

The strong baseline is plain PEFT as one would write it: the adapter off and on by its own switch, one pass of each set
and side, padded to the longest row, no head, nothing checkpointed. ``official`` is the shape of the released trainer:
padded to 1024 text tokens, with head and checkpointing.

Counts come from meta tensors at the true shapes of LLaVA-NeXT-Mistral-7B (16 + 16 rows, fills 0.52 and 0.29 of 1024
text tokens); LLaVA's picture rows count with its recipe's mask, ``after_image``. Times are CPU seconds of one thread on
a small model of the same layout, variants taking turns, all tokens counting; they depend on the machine, counts do not.
Memory is the estimate that ``--dry-run`` prints (`mm_cb.training.planning.memory`), not a measurement. Exits with 1 if
equality or a counted goal is missed; times are only printed.
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from _rr_workload import (
    LLAVA_RECIPE,
    MINI,
    SEVEN_B,
    TEXT_RECIPE,
    Shape,
    Step,
    batch,
    build,
    gradients,
    meta_passes,
    official_step,
    our_step,
    our_trainer,
    strong_step,
)

from mm_cb.core.files import write_json
from mm_cb.models.known import known_config
from mm_cb.training.planning.flops import FlopCount
from mm_cb.training.planning.plan import Smaller, TrainingPlan, make_plan
from mm_cb.training.recipes.recipe import load_recipe

RECIPES = {"llava": LLAVA_RECIPE, "text": TEXT_RECIPE}
FLOP_GOALS: list[tuple[str, str, tuple[int, int] | None, dict[Step, float]]] = [
    ("llava", "text rows", None, {"strong": 2.2, "official": 7.0}),
    ("llava", "336-px images", (336, 336), {"strong": 1.9, "official": 4.0}),
    ("llava", "COCO-size images", (480, 640), {"strong": 1.9, "official": 3.6}),
    ("text", "text rows", None, {"strong": 1.0, "official": 3.0}),
    ("text", "336-px images", (336, 336), {"strong": 1.0, "official": 1.9}),
]
TIME_GOALS = {("llava", "text rows"): 5.0, ("llava", "336-px images"): 3.0}
MEMORY_GOALS = [  # any row that can come: a picture of the size that takes most tokens and 1024 tokens of text
    ("default", Smaller(4096), 16.0),
    ("recompute=true tokens_per_pass=2048", Smaller(2048, recompute=True), 12.0),
    ("quantize=4bit recompute=true tokens_per_pass=2048", Smaller(2048, recompute=True, quantize="4bit"), 8.0),
]
ROWS = 4  # of each set, in the timed steps


def main() -> int:
    """Measure, print, and say whether every goal is met."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    results = Path(__file__).resolve().parents[2] / "results" / "benchmark_rr.json"
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the results there")
    parser.add_argument("--write", action="store_const", const=results, dest="json", help="there: results/, tracked")
    parser.add_argument("--full", action="store_true", help="also time the released text recipe")
    parser.add_argument("--repeats", type=int, default=3, help="timed steps of each variant")
    options = parser.parse_args()
    torch.set_num_threads(1)
    started, load = time.perf_counter(), os.getloadavg()[0]
    print(f"{os.cpu_count()} cores, load {load:.1f} ({'shared' if load > 1 else 'quiet'}), torch {torch.__version__}")
    goals = [found for goal in FLOP_GOALS for found in count_goals(*goal)]
    goals += [memory_goal(*goal) for goal in MEMORY_GOALS]
    jobs = [*TIME_GOALS, ("text", "text rows"), ("text", "336-px images")] if options.full else list(TIME_GOALS)
    timed = [time_steps(MINI, recipe, rows, options.repeats) for recipe, rows in jobs]
    for result in timed:
        goals += judge(result)
    finished = os.getloadavg()[0]
    for goal in goals:
        print(f"{'met   ' if goal['met'] else 'MISSED'} {goal['what']}: {goal['value']:.3g} (goal {goal['goal']})")
    if options.json:
        machine: dict[str, Any] = {"cores": os.cpu_count(), "load": [load, finished], "torch": torch.__version__}
        machine["seconds"] = {"wall": time.perf_counter() - started, "cpu": time.process_time()}
        write_json(options.json, {"machine": machine, "goals": goals, "timed": timed})
    return 0 if all(goal["met"] for goal in goals if goal["gate"]) else 1


@cache
def shapes(shape: Shape, recipe: str) -> Any:
    """A model without numbers."""
    return build(shape, RECIPES[recipe], "meta", torch.bfloat16)


def count_goals(
    recipe: str, rows: str, image: tuple[int, int] | None, goals: dict[Step, float]
) -> list[dict[str, Any]]:
    """FLOPs of one step at 7B shapes with 16 rows of each set, each other one's over ours."""
    counts = {step: flops(SEVEN_B, recipe, 16, image, step) for step in (*goals, "ours")}
    told = ", ".join(f"{step} {count / 1e12:.1f}" for step, count in counts.items())
    print(f"{recipe} recipe, {rows}: TFLOP of a step: {told}", flush=True)
    found = []
    for step, goal in goals.items():
        ratio, both = counts[step] / counts["ours"], [counts[step], counts["ours"]]
        what, met = f"{recipe} recipe, {rows}: fewer FLOPs at 7B shapes than {step}", ratio >= goal
        found.append({"what": what, "value": ratio, "goal": f">= {goal}", "met": met, "gate": True, "flops": both})
    return found


def flops(shape: Shape, recipe: str, rows: int, image: tuple[int, int] | None, step: Step) -> int:
    """Of one step, counted without numbers."""
    with FlopCount() as count:
        meta_passes(shapes(shape, recipe), shape, RECIPES[recipe], rows, image, step)
    return count.total


@cache
def plan() -> TrainingPlan:
    """The paper's recipe at its model's published shape, whether the model is on this machine or not."""
    recipe = load_recipe("llava-next-mistral-7b")
    with tempfile.TemporaryDirectory() as folder:
        config = known_config(recipe.model)
        assert config is not None
        config.save_pretrained(folder)
        return make_plan(load_recipe("llava-next-mistral-7b", [f"model={folder}"]))


def memory_goal(name: str, settings: Smaller, goal: float) -> dict[str, Any]:
    """The LLaVA recipe's estimate, see `mm_cb.training.planning.memory`."""
    memory = plan().memory(settings)
    total = memory.total / 1e9
    print(f"memory, {name}: {memory}")
    what = f"llava recipe, {name}: GB (1e9 bytes) at 7B, estimated"
    return {"what": what, "value": total, "goal": f"<= {goal}", "met": total <= goal, "gate": True}


def time_steps(shape: Shape, recipe: str, rows: str, repeats: int) -> dict[str, Any]:
    """Equality and CPU seconds of whole steps on the small model, variants taking turns."""
    model = build(shape, RECIPES[recipe], "cpu")
    image = None if rows == "text rows" else (shape.tile, shape.tile)
    padded, longest = (batch(model, shape, ROWS, image, padded) for padded in (True, False))
    trainer = our_trainer(model, RECIPES[recipe])
    steps = {
        "official": lambda: official_step(model, padded, RECIPES[recipe]),
        "strong": lambda: strong_step(model, longest, RECIPES[recipe]),
        "ours": lambda: our_step(trainer, padded),
    }
    apart = [  # the warm-up, too
        difference(model, steps["official"], steps["ours"]),
        difference(model, steps["strong"], lambda: our_step(trainer, longest)),  # a mean over as many positions
    ]
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(repeats):
        for name, step in steps.items():
            started = time.process_time()
            step()
            seconds[name].append(time.process_time() - started)
            gradients(model)
    medians = {name: round(statistics.median(values), 3) for name, values in seconds.items()}
    print(f"{recipe} recipe, {rows}: CPU seconds per step on the small model {medians}", flush=True)
    loss, gradient = (max(values) for values in zip(*apart, strict=True))
    return {
        "recipe": recipe,
        "rows": rows,
        "seconds": seconds,
        "loss_difference": loss,
        "gradient_difference": gradient,
    }


def difference(model: Any, other: Callable[[], torch.Tensor], ours: Callable[[], torch.Tensor]) -> tuple[float, float]:
    """How far two steps are apart, relatively: the loss, and the gradient of the matrix where it is most."""
    (loss, theirs), (our_loss, found) = ((float(step()), gradients(model)) for step in (other, ours))
    far = [float((found[name] - theirs[name]).norm() / theirs[name].norm()) for name in theirs]
    return abs(our_loss - loss) / abs(loss), max(far)


def judge(result: dict[str, Any]) -> list[dict[str, Any]]:
    """The goals of one timed job."""
    what = f"{result['recipe']} recipe, {result['rows']}"
    judged = []
    for key, limit in (("loss_difference", 1e-5), ("gradient_difference", 1e-4)):
        met = result[key] <= limit
        text = f"{what}: {key.replace('_', ' ')}"
        judged.append({"what": text, "value": result[key], "goal": f"<= {limit}", "met": met, "gate": True})
    medians = {name: statistics.median(values) for name, values in result["seconds"].items()}
    goal = TIME_GOALS.get((result["recipe"], result["rows"]), 1.0)
    for name in ("strong", "official"):
        ratio, least = medians[name] / medians["ours"], goal if name == "official" else 1.0
        text = f"{what}: less CPU time than {name}"
        judged.append({"what": text, "value": ratio, "goal": f">= {least}", "met": ratio >= least, "gate": False})
    return judged


if __name__ == "__main__":
    sys.exit(main())
