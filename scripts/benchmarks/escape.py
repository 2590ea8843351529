"""At which step does rerouting get away from its start, by the default settings, for states of any length?

``python scripts/benchmarks/escape.py [--real FOLDER] [--runs RUN ...] [--out results/escape.json]`` trains tiny random
models whose states are 1, 10, 100 and 300 long, the miniature (its blocks, target and masks as in the paper, its own
rows), and with ``--real`` the model of ``mm-cb demo --real`` in the folder that it was converted into, each for at most
30 steps of a schedule of 150, and prints the first step after which the cosine of held-out circuit-breaker rows is
below 0.9. Returns 1 if one never is, or the tiny models are more than a factor of 2 apart. ``--runs``: the same of
whole runs of ``mm-cb train``, which may never get away.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from mm_cb.core.runs import read_jsonl  # noqa: E402
from mm_cb.real.run import real_recipe  # noqa: E402
from mm_cb.training.recipes.recipe import load_recipe  # noqa: E402
from mm_cb.training.run import train  # noqa: E402
from tests.training.test_start import trainer_of  # noqa: E402

LENGTHS = (1, 10, 100, 300)
STEPS, SCHEDULE = 30, 150
DEFAULTS = ("circuit_breaker.retain_scale=relative", "training.start_distance=0.15", "training.learning_rate=1e-4")
"""What the recipes ``miniature-paper`` and of ``mm-cb demo --real`` have otherwise than the defaults."""
ENDS = (f"training.max_steps={STEPS}", f"circuit_breaker.schedule_steps={SCHEDULE}", "training.stop_at_cosine=0.9")


def main() -> int:
    """Train and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--runs", type=Path, nargs="*", default=[])
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    found = [tiny(length) for length in LENGTHS]
    steps = [one["step"] for one in found]
    held = None not in steps and max(steps) <= 2 * min(steps)
    found.append(miniature())
    if options.real:
        found.append(real(options.real))
    held = held and all(one["step"] is not None for one in found)
    found += [told(run.name, run) for run in options.runs]
    if options.out:
        options.out.write_text(json.dumps(found, indent=1) + "\n")
    return 0 if held else 1


def tiny(length: int) -> dict[str, Any]:
    """One random model."""
    settings = {"max_steps": STEPS, "schedule_steps": SCHEDULE, "held_out_steps": 1, "stop_at_cosine": 0.9}
    with TemporaryDirectory() as folder:
        trainer_of(length, Path(folder), **settings).train()
        return told(f"random, states {length} long", Path(folder))


def miniature() -> dict[str, Any]:
    """The miniature, every row of whose recipe but the measured ones is trained on."""
    own = ("circuit_breaker.shared_openings=left_out", "training.held_out=8", "training.held_out_steps=1")
    with TemporaryDirectory() as folder:
        out = train(load_recipe("miniature-paper", [*DEFAULTS, *ENDS, *own]), Path(folder) / "run")
        return told("miniature", out)


def real(model: Path) -> dict[str, Any]:
    """The real model with its own rows, mask and layers."""
    with TemporaryDirectory() as folder:
        out = train(real_recipe(model, 0, [*DEFAULTS, *ENDS, "training.held_out_steps=2"]), Path(folder) / "run")
        return told(model.name, out)


def told(name: str, folder: Path) -> dict[str, Any]:
    """What a run's metrics say, printed."""
    lines = read_jsonl(folder / "metrics.jsonl")
    measured = [line for line in lines if "held_out_retain_cosine" in line]
    step = next((line["step"] for line in measured if line["held_out_circuit_breaker_cosine"] < 0.9), None)
    lengths = {key: value for key, value in lines[0].items() if key.startswith("start_norm_")}
    last = {key: measured[-1][key] for key in ("held_out_circuit_breaker_cosine", "held_out_retain_cosine")}
    found = {"model": name, "step": step, "last": measured[-1]["step"], **lengths, **last}
    print(json.dumps(found), flush=True)
    return found


if __name__ == "__main__":
    sys.exit(main())
