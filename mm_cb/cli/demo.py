"""``mm-cb demo``."""

from pathlib import Path
from typing import Annotated

import typer

from mm_cb.cli.options import Device, Dtype, Out, Seed, number

EXAMPLE = "Example: mm-cb demo --out my-demo"


def demo(
    out: Out = Path("mm-cb-demo"),
    full: Annotated[bool, typer.Option("--full", help="All behaviours, more steps, three restarts.")] = False,
    seed: Seed = 0,
    rr_seeds: Annotated[int, number("rr_seeds", "Circuit breakers to train, each from its own seed.")] = 1,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Run the whole experiment on the packaged miniature: train, attack, measure, report.

    Needs no network, no GPU and no account. Interrupted, the same command goes on where it was.
    """
    from mm_cb.demo import run_demo

    run_demo(out, full=full, seed=seed, rr_seeds=rr_seeds, device=device, dtype=dtype)
