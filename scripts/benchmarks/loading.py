"""Steps of the miniature with large pictures, which are prepared in the run's own process or by workers beside it.

    python scripts/benchmarks/loading.py [--size 1600x1200] [--rows 4] [--steps 8] [--workers 0,1,2] [--json FILE]

Prints milliseconds of a step, how much of them was waiting for its batch, the run's own processor time, which does not
depend on what else runs on the machine, and both ratios to no workers. One thread of torch, so that a worker has a core
of its own where there are two.
"""

import argparse
import os
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch
from _loading import loaded_steps, picture_rows

from mm_cb import RRConfig, RRTrainer
from mm_cb.core.files import write_json
from mm_cb.training.lora import recipe_lora
from mm_cb.training.recipes.config import Lora


def main() -> None:
    """Time all numbers of workers in turn, twice, and keep the faster of both."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="1600x1200", help="width x height of the pictures")
    parser.add_argument("--rows", type=int, default=4, help="rows of each set in a step")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--workers", default="0,1,2")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    width, height = map(int, options.size.split("x"))
    rows = picture_rows((width, height), {name: [8] * options.rows for name in ("circuit_breaker", "retain")})
    config = RRConfig(
        output_dir=tempfile.mkdtemp(), batches="multimodal", target_layers=[4], max_steps=10, batch_size=options.rows,
        held_out=0, device="cpu", masks={"multimodal": "all"}, shared_openings="rerouted",
    )  # fmt: skip
    trainer = RRTrainer("miniature", config, rows, peft_config=recipe_lora(Lora(layers_to_transform=[0, 1, 2, 3])))
    trainer.state.global_step, trainer.state.max_steps = 5, 10
    found: dict[int, dict[str, float]] = {}
    for _ in range(2):
        for workers in map(int, options.workers.split(",")):
            timed = loaded_steps(trainer, trainer._encoder, rows, options.steps, workers)
            found[workers] = min(found.get(workers, timed), timed, key=lambda one: one["seconds"])
    first = next(iter(found.values()))
    print(f"{options.rows} + {options.rows} pictures of {options.size}, {os.cpu_count()} cores, load {os.getloadavg()}")
    for workers, timed in found.items():
        step, waited, own = (1000 * timed[name] for name in ("seconds", "waited", "own_cpu_seconds"))
        ratios = [f"x {timed[name] / first[name]:.2f}" for name in ("seconds", "own_cpu_seconds")]
        times = f"{step:.0f} ms a step ({ratios[0]}), {waited:.0f} of them waiting"
        print(f"{workers} workers: {times}; {own:.0f} ms of its own processor time ({ratios[1]})")
    if options.json:
        write_json(options.json, {"size": options.size, "rows": options.rows, "cores": os.cpu_count(), "found": found})


if __name__ == "__main__":
    main()
