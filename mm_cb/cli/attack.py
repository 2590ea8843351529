"""``mm-cb attack``, ``mm-cb attack verify``, ``mm-cb attack check``, ``mm-cb attack transfer``."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from mm_cb.attacks.registry import ATTACKS
from mm_cb.cli.options import (
    Adapter,
    Device,
    Dtype,
    Model,
    Out,
    Seed,
    System,
    parse_epsilon,
    read_system,
)
from mm_cb.core.errors import UserError

EXAMPLE = "Example: mm-cb attack --model miniature --adapter runs/rr --behaviors behaviors.jsonl --out runs/attack"

Behaviors = Annotated[Path, typer.Option(metavar="FILE", help="Behaviours file (JSONL).")]
Epsilon = Annotated[str, typer.Option(metavar="N/255", help="Largest change of a pixel.")]
Restarts = Annotated[int, typer.Option(metavar="N", help="Runs per behaviour; the worst one counts.", min=1)]


def attack(
    model: Model,
    behaviors: Behaviors,
    out: Out,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="[KEY=VALUE]", help="iterates=4, chain=true, threat_model=patch:24, and others."),
    ] = None,
    adapter: Adapter = None,
    attack: Annotated[
        str, typer.Option(metavar="NAME", help=f"Some of {', '.join(ATTACKS)}, with commas between, or `all`.")
    ] = "pgd",
    epsilon: Epsilon = "32/255",
    steps: Annotated[int, typer.Option(metavar="N", help="Attack steps.", min=1)] = 1000,
    restarts: Restarts = 1,
    shard: Annotated[
        str | None,
        typer.Option(metavar="I/N", help="Only this part; `auto` = as the launcher says. Gather without it."),
    ] = None,
    system: System = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Attack a model's image input and judge it from the saved image files."""
    from mm_cb.attacks.options import parse_attacks, resolve

    parse_attacks(attack, adapted=True)  # names only: what needs an adapter is refused where the run starts
    resolve(overrides or [])
    numerator = parse_epsilon(epsilon)
    text = read_system(system)
    from mm_cb.attacks.run import run_attack
    from mm_cb.attacks.shards import Shard, launched_device

    run_attack(
        model=model,
        adapter=adapter,
        behaviors=behaviors,
        out=out,
        attack=attack,
        epsilon=numerator,
        steps=steps,
        restarts=restarts,
        seed=seed,
        device=launched_device(device) if shard == "auto" else device,
        dtype=dtype,
        shard=None if shard is None else Shard.parse(shard),
        overrides=overrides or [],
        system=text,
    )


def verify(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A finished `mm-cb attack` run.")],
    model: Annotated[
        str | None, typer.Option(metavar="M", help="Where the model lies here, if not where the run found it.")
    ] = None,
    adapter: Adapter = None,
    device: Device = "cpu",
) -> None:
    """Compute epsilon, hashes, losses and greedy answers again from pictures, JSON and model; exit 2 if one disagrees.

    Verdicts are judged again on the miniature alone, which has an exact judge; drawn answers are compared by hash.
    """
    from mm_cb.attacks.verify.run import verify_run

    verify_run(run_dir, model=model, adapter=adapter, device=device)


def check(
    model: Model,
    behaviors: Behaviors,
    out: Out,
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]", help="steps=40, behaviors=8, and others.")
    ] = None,
    adapter: Adapter = None,
    epsilon: Epsilon = "32/255",
    system: System = None,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Run the sanity battery of an attack evaluation: is a low number the model's strength or the attack's weakness?"""
    numerator, text = parse_epsilon(epsilon), read_system(system)
    from mm_cb.attacks.sanity.run import run_battery

    run_battery(
        model=model,
        adapter=adapter,
        behaviors=behaviors,
        out=out,
        epsilon=numerator,
        seed=seed,
        device=device,
        dtype=dtype,
        overrides=overrides or [],
        system=text,
    )


def transfer(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR RUN_DIR", help="Finished runs on two models.")],
    behaviors: Behaviors,
    out: Out,
    device: Device = "cpu",
) -> None:
    """Judge the pictures made on each of two models on both of them: the 2 x 2 transfer matrix."""
    if len(runs) != 2:
        raise UserError(f"`mm-cb attack transfer` needs two run directories, got {len(runs)}.")
    from mm_cb.attacks.transfer import run_transfer

    run_transfer(runs[0], runs[1], behaviors, out, device=device)


SUBCOMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "attack verify": (verify, "Example: mm-cb attack verify runs/attack"),
    "attack check": (
        check,
        "Example: mm-cb attack check --model miniature --behaviors behaviors.jsonl --out runs/check",
    ),
    "attack transfer": (
        transfer,
        "Example: mm-cb attack transfer runs/base runs/rr --behaviors behaviors.jsonl --out runs/transfer",
    ),
}
