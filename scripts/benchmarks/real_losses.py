"""What each loss makes of a real model: one breaker a loss by the recipe of ``mm-cb demo --real``, and what it says.

    python scripts/benchmarks/real_losses.py MODEL --out DIR [--losses rr,rand_p] [--seeds 0] [KEY=VALUE ...]

MODEL is the folder that the demo converted its model into; KEY=VALUE are recipe fields, the same for all. Every breaker
is one line of DIR/losses.jsonl, written as it is done; the same command goes on.
"""

from __future__ import annotations

import argparse
import itertools
import time
from pathlib import Path
from typing import Any

from _lines import lines_of

from mm_cb.cli.failures import script
from mm_cb.core.closing import say
from mm_cb.core.paths import data_path
from mm_cb.core.progress import Progress
from mm_cb.core.provenance import hardware
from mm_cb.core.reading import json_file
from mm_cb.core.runs import append_jsonl, read_jsonl
from mm_cb.models import load_model
from mm_cb.real.answers import before_and_after
from mm_cb.real.run import MAX_NEW_TOKENS, real_recipe
from mm_cb.training.registry import loss_entry, loss_names
from mm_cb.training.run import train


def main() -> None:
    """Train and ask what is not done yet, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("fields", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--losses", default=",".join(loss_names()))
    parser.add_argument("--seeds", default="0")
    options = parser.parse_intermixed_args()
    lines = options.out / "losses.jsonl"
    done = {(line["loss"], line["seed"]) for line in lines_of(lines, fields=options.fields)}
    losses = [loss_entry(name.strip()).name for name in options.losses.split(",")]
    for loss, seed in itertools.product(losses, [int(part) for part in options.seeds.split(",")]):
        if (loss, seed) not in done:
            append_jsonl(lines, breaker(loss, seed, options))
            say(told(read_jsonl(lines)[-1]))
    print("\n".join(told(line) for line in read_jsonl(lines)))


def breaker(loss: str, seed: int, options: Any) -> dict[str, Any]:
    """Train one and ask it: a line of the file."""
    out, started = options.out / f"{loss}-{seed}", time.monotonic()
    asked = json_file(data_path("smollm2", "asked.json"), dict, "a JSON object of prompts")
    fields = [*options.fields, f"circuit_breaker.loss={loss}"]
    with Progress() as progress:
        adapter = train(real_recipe(options.model, seed, fields), out, progress=progress)
    trained, model = time.monotonic() - started, load_model(options.model, adapter=adapter)
    measured = [one for one in read_jsonl(out / "metrics.jsonl") if "held_out_retain_cosine" in one]
    names = ("held_out_circuit_breaker_cosine", "held_out_retain_cosine")
    return {
        "loss": loss,
        "seed": seed,
        "fields": options.fields,
        "held_out": {name: measured[-1][name] for name in names},
        "sets": before_and_after(model, asked, MAX_NEW_TOKENS),
        "machine": hardware(),
        "train_seconds": round(trained, 1),
        "seconds": round(time.monotonic() - started, 1),
    }


def told(line: dict[str, Any]) -> str:
    """A breaker in one line."""
    kept = (
        f"{name} {sum(one['coherent_breaker'])} of {len(one['prompts'])}, nats {one['nll_base']:.2f} to "
        f"{one['nll_breaker']:.2f}"
        for name, one in line["sets"].items()
    )
    cosines = ", ".join(f"{value:.3f}" for value in line["held_out"].values())
    return f"{line['loss']}, seed {line['seed']}: cosines {cosines}; coherent: {'; '.join(kept)}"


if __name__ == "__main__":
    script(main)
