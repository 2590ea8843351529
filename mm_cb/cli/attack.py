"""``mm-cb attack``, ``mm-cb attack verify``, ``mm-cb attack check``, ``mm-cb attack transfer``."""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from mm_cb.attacks.config import (
    ANNEAL,
    IMAGE_BACKENDS,
    OPTIMIZERS,
    VARIED,
    AttackConfig,
    checked_by_default,
)
from mm_cb.attacks.entry import AttackEntry
from mm_cb.attacks.registry import attack_entries, attack_entry, attacks, chosen_attacks
from mm_cb.attacks.threats import Threat
from mm_cb.cli.options import (
    Adapter,
    Behaviors,
    Device,
    Dtype,
    Model,
    OldSettings,
    Out,
    ProbeFolder,
    RayCount,
    Seed,
    System,
    Thinking,
    number,
    option,
    read_system,
    refuse_old_settings,
    switch,
)
from mm_cb.cli.threat_flags import PANEL, BorderWidth, Epsilon, Norm, PatchSize, parse_levels, parse_threat
from mm_cb.core.closing import Hint, files, listing, put, say, what_next
from mm_cb.core.errors import UserError

EXAMPLE = "Example: mm-cb attack --model miniature --adapter runs/rr --behaviors miniature --out runs/attack"

_MODEL, _SEARCH, _JUDGED, _RUN = "Model and data", "Search", "What is judged", "Run"
_SINGLE = "Of single attacks"
_DEFAULT = AttackConfig()

Optimizer = Annotated[
    str, option("NAME", f"How PGD steps: {', '.join(OPTIMIZERS)}; l2 needs sign or momentum.", _SEARCH)
]
Base = Annotated[str | None, option("M", "What a breaker without adapter was made from.", _MODEL)]
ImageBackend = Annotated[str, option("NAME", f"Image processor: {' or '.join(IMAGE_BACKENDS)}.", _RUN)]


_OLD = {
    "batch": "--batch",
    "max_new_tokens": "--max-new-tokens",
    "matching_weight": "--term-weight",
    "optimizer": "--optimizer",
    "balance": "--balance!",
    "iterates": "--iterates",
    "early_stop": "--early-stop!",
    "samples": "--samples",
    "temperature": "--temperature",
    "train": "--universal-train",
    "chain": "--chain!",
    "hijacks": "--hijacks",
    "image_backend": "--image-backend",
    "checkpoint_seconds": "--checkpoint-seconds",
    "threat_model": "--norm",
    "threat_model=l2": "--norm l2 --epsilon",
    "threat_model=patch": "--norm patch --patch-size",
    "threat_model=border": "--norm border --border-width",
    "steps": "--steps",
}
"""Settings of ``attack`` that were ``key=value``, or ``key=value:size``, → the flags they are."""
_OLD_CHECK = {
    **{"steps": "--steps", "iterates": "--iterates", "optimizer": "--optimizer"},
    **{"behaviors": "--count", "image_backend": "--image-backend"},
}
"""The same of ``attack check``."""


def _listed(wanted: bool) -> None:
    if wanted:
        listing((entry.name, entry.about, _needs(entry)) for entry in attacks())
        put("")
        say(_LEGEND)
        raise typer.Exit()


_LEGEND = (
    "Given: what the attacker knows of the answer: nothing; its first words (opening); its text, so that success is "
    "control over the output, not what the model knows (supplied text); how such answers are worded (form and "
    "words). In `all`: part of --attack all, where it applies; by name only: where --attack names it. The worst case "
    "counts a request as broken where any attack broke it, without controls and what no input reaches. An adapter: "
    "the circuit breaker, --adapter. Each in detail: docs/attacks.md."
)


def _needs(entry: AttackEntry) -> str:
    """What an attack needs, what it is given, and what it counts for."""
    needs = ["a model that sees"] if entry.needs_picture else ["no picture"]
    needs += ["an adapter (or --base)"] * entry.needs_adapter + ["--probe"] * entry.needs_probe
    needs += [f"`{field}` in the behaviours file" for field in entry.fields] + ["--prompts"] * entry.imported
    needs += ["--corpus"] * ("corpus" in entry.reads)
    marks = ["in `all`" if entry.in_all else "by name only"] + [f"anneal: {entry.anneal}"] * (entry.anneal != "none")
    marks += ["not in the worst case"] * (not entry.in_worst_case)
    return f"{', '.join(needs)}; given {entry.given}; {', '.join(marks)}"


def _config(flags: Mapping[str, Any]) -> AttackConfig:
    """What those flags that are called as settings set."""
    settings = {field.name: flags[field.name] for field in dataclasses.fields(AttackConfig) if field.name in flags}
    try:
        return AttackConfig(**settings)
    except ValueError as error:
        raise UserError(str(error)) from error


def attack(
    model: Model,
    behaviors: Behaviors,
    out: Out,
    old: OldSettings = None,
    adapter: Adapter = None,
    base: Base = None,
    probe: ProbeFolder = None,
    system: System = None,
    thinking: Thinking = False,
    attack: Annotated[
        str, option("NAMES", "Attacks or Python files of yours, with commas between, or `all`; see --list.", _SEARCH)
    ] = "pgd",
    list_: Annotated[
        bool, typer.Option("--list", callback=_listed, is_eager=True, help="List the attacks.", rich_help_panel=_SEARCH)
    ] = False,
    norm: Norm = "linf",
    epsilon: Epsilon = None,
    patch_size: PatchSize = None,
    border_width: BorderWidth = None,
    steps: Annotated[int, number("steps", "Steps per run.", _SEARCH)] = _DEFAULT.steps,
    restarts: Annotated[
        int, number("restarts", "Runs per behaviour; the worst one counts.", _SEARCH)
    ] = _DEFAULT.restarts,
    optimizer: Optimizer = _DEFAULT.optimizer,
    anneal: Annotated[
        str | None,
        option(
            "HOW", f"Dial the adapter up from 0 on the way: {', '.join(ANNEAL)}.  [default: as --list says]", _SEARCH
        ),
    ] = _DEFAULT.anneal,
    chain: Annotated[bool, switch("--chain", "Start each attack from the worst picture so far.", _SEARCH)] = False,
    hijacks: Annotated[
        Path | None, option("RUN", "An attack run on the base: what it said becomes the long targets.", _SEARCH)
    ] = None,
    prompts: Annotated[
        Path | None,
        option("FILE", "Prompts made elsewhere (JSONL), for --attack imported; see docs/formats.md.", _SEARCH),
    ] = None,
    term_weight: Annotated[
        float, number("term_weight", "Weight of an adaptive attack's term.", _SEARCH, metavar="W")
    ] = _DEFAULT.term_weight,
    balance: Annotated[
        bool, switch("--balance", "Scale that term: its gradient as long as the target's.", _SEARCH)
    ] = False,
    draws: Annotated[
        int, number("draws", "best_of_n: variations of every behaviour; each is a try.", _SINGLE)
    ] = _DEFAULT.draws,
    strength: Annotated[
        float, number("strength", "best_of_n: how far they go.", _SINGLE, metavar="S")
    ] = _DEFAULT.strength,
    vary: Annotated[str, option("WHAT", f"best_of_n: {', '.join(VARIED)}.", _SINGLE)] = _DEFAULT.vary,
    universal_train: Annotated[
        int, number("universal_train", "universal: behaviours the picture is made for; 0 = half.", _SINGLE)
    ] = _DEFAULT.universal_train,
    corpus: Annotated[
        Path | None,
        option(
            "FILE",
            "universal_corpus: the texts its picture is made for: .txt, one a line, or .jsonl with `target` and "
            "perhaps `prompt`.",
            _SINGLE,
        ),
    ] = None,
    minibatch: Annotated[
        int, number("minibatch", "universal, universal_corpus: texts a step; 0 = all.", _SINGLE)
    ] = _DEFAULT.minibatch,
    surrogate: Annotated[
        Path | None,
        option(
            "A", "pgd_transfer: another breaker's adapter to see, at random scales.  [default: random changes]", _SINGLE
        ),
    ] = None,
    surrogate_scale: Annotated[
        float, number("surrogate_scale", "pgd_transfer: the largest scale of a change.", _SINGLE, metavar="S")
    ] = _DEFAULT.surrogate_scale,
    eot_samples: Annotated[
        int, number("eot_samples", "pgd_eot: transformations a step, a pass each.", _SINGLE)
    ] = _DEFAULT.eot_samples,
    eot_scale: Annotated[
        float,
        number("eot_scale", "pgd_eot: the picture shrunk to this share at most; 1 = never.", _SINGLE, metavar="S"),
    ] = _DEFAULT.eot_scale,
    eot_quality: Annotated[
        int, number("eot_quality", "pgd_eot: JPEG from this quality up to 95; 0 = none.", _SINGLE, metavar="Q")
    ] = _DEFAULT.eot_quality,
    candidates: Annotated[int, number("candidates", "gcg: suffixes weighed a step.", _SINGLE)] = _DEFAULT.candidates,
    max_new_tokens: Annotated[
        int, number("max_new_tokens", "Longest answer, and forced response, in tokens.", _JUDGED)
    ] = _DEFAULT.max_new_tokens,
    iterates: Annotated[int, number("iterates", "Further pictures judged on the way.", _JUDGED)] = _DEFAULT.iterates,
    early_stop: Annotated[
        bool, switch("--early-stop", "Stop a search once one of them is judged harmful.", _JUDGED)
    ] = False,
    samples: Annotated[
        int, number("samples", "Answers drawn at random per picture; each is a try.", _JUDGED)
    ] = _DEFAULT.samples,
    temperature: Annotated[
        float | None, number("temperature", "Temperature of these answers.  [default: 1]", _JUDGED, metavar="T")
    ] = None,
    control: Annotated[
        int, number("control", "Behaviours given another one's text, beside the run; 0 = none.", _JUDGED)
    ] = _DEFAULT.control,
    check_convergence: Annotated[
        int | None,
        number(
            "check_convergence",
            "Behaviours attacked with twice the steps, beside the run; at least 12, 0 = none.  [default: 12 for all]",
            _JUDGED,
        ),
    ] = None,
    batch: Annotated[int, number("batch", "Behaviours at once.", _RUN)] = _DEFAULT.batch,
    shard: Annotated[
        str | None,
        option(
            "I/N", "Only the I-th of N parts; `auto` = as the launcher says. The same without it gathers them.", _RUN
        ),
    ] = None,
    ray: RayCount = None,
    image_backend: ImageBackend = _DEFAULT.image_backend,
    checkpoint_seconds: Annotated[
        float | None, number("checkpoint_seconds", "Seconds between two saves of a running search.", _RUN, metavar="S")
    ] = _DEFAULT.checkpoint_seconds,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Attack a model by pictures, judged from the saved files, or by texts."""
    flags = dict(locals())
    refuse_old_settings(old, _OLD)
    names = chosen_attacks(attack, adapted=adapter is not None or base is not None, probed=probe is not None)
    entries = [attack_entry(name) for name in names]  # controls alone may share the budget of other runs
    if (
        epsilon is not None
        and not any(e.changes_picture for e in entries)
        and not all(e.stays_in_threat for e in entries)
    ):
        raise UserError(f"`--epsilon` is for an attack that changes a picture; `--attack {attack}` draws its own.")
    if temperature is not None and not samples:
        raise UserError("`--temperature` is that of sampled answers: set `--samples` too, or leave it out.")
    flags["threat"] = parse_threat(norm, epsilon, patch_size, border_width)
    if temperature is None:
        flags["temperature"] = _DEFAULT.temperature
    if check_convergence is None:
        flags["check_convergence"] = checked_by_default(attack)
    config = _config(flags)
    text = read_system(system)
    from mm_cb.attacks.refusals import fitting
    from mm_cb.attacks.run import run_attack
    from mm_cb.attacks.shards import Shard, launched_device
    from mm_cb.cli.attacked import show_attacked
    from mm_cb.inference.source import ModelSource

    if ray is not None and shard is not None:
        raise UserError("`--ray` and `--shard` divide the same behaviours: leave one of them out.")
    place = launched_device(device) if shard == "auto" else device
    source = ModelSource(model, adapter, place, dtype, system=text, base=base, probe=probe, thinking=thinking)
    if attack == "all":
        names = fitting(model, names, behaviors, probed=probe is not None)
    if ray is not None:
        from mm_cb.attacks.on_ray import attack_on_ray

        attack_on_ray(ray, source, behaviors, out, names, config, attack)
    else:
        run_attack(source, behaviors, out, names, config, shard=None if shard is None else Shard.parse(shard))
    if shard is None:
        show_attacked(out, [name.strip() for name in attack.split(",") if name.strip().endswith(".py")])


def verify(
    run_dir: Annotated[Path, typer.Argument(metavar="RUN_DIR", help="A finished `mm-cb attack` run.")],
    model: Annotated[
        str | None, typer.Option(metavar="M", help="Where the model lies here, if not where the run found it.")
    ] = None,
    adapter: Adapter = None,
    base: Base = None,
    attack: Annotated[
        str | None, typer.Option(metavar="FILES", help="Your Python files, if they register attacks of this run.")
    ] = None,
    device: Device = "cpu",
) -> None:
    """Compute distances, hashes, losses, greedy answers and counts again from pictures and model.

    Exit code 2 if one disagrees. Verdicts are judged again where the model has an exact judge.
    """
    from mm_cb.attacks.verify import verify_run

    if attack is not None:
        attack_entries(attack)
    verify_run(run_dir, model=model, adapter=adapter, base=base, device=device)
    what_next(Hint("the run says what its files give; one page of it", ["report", run_dir]))


def check(
    model: Model,
    behaviors: Behaviors,
    out: Out,
    old: OldSettings = None,
    adapter: Adapter = None,
    system: System = None,
    epsilon: Annotated[str, option("N/255", "Largest change of a value: N from 1 to 255.", PANEL)] = "32/255",
    steps: Annotated[int, number("steps", "Steps per run.", _SEARCH)] = 100,
    optimizer: Optimizer = _DEFAULT.optimizer,
    iterates: Annotated[int, number("iterates", "Further pictures judged on the way.", _JUDGED)] = 5,
    count: Annotated[int, number("count", "Behaviours, the first of one picture size.", _RUN)] = 12,
    image_backend: ImageBackend = _DEFAULT.image_backend,
    seed: Seed = 0,
    device: Device = "cpu",
    dtype: Dtype = "float32",
) -> None:
    """Run the sanity battery of an attack evaluation: is a low number the model's strength or the attack's weakness?"""
    flags = dict(locals())
    refuse_old_settings(old, _OLD_CHECK)
    levels, text = parse_levels(epsilon), read_system(system)
    config = _config(flags | {"threat": Threat(levels=levels)})
    from mm_cb.attacks.sanity.run import run_battery
    from mm_cb.inference.source import ModelSource

    run_battery(ModelSource(model, adapter, device, dtype, system=text), behaviors, out, config, count)
    what_next(Hint("on the page of the attack run, whose verdict counts it", ["report", "ATTACK_RUN", out]))


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
    say(
        "If pictures made on the base break the breaker more often than its own do, the attack on the breaker is weak, "
        "and its low number no strength."
    )
    files({"results": out / "results.json"})
    what_next(Hint("one page of it", ["report", out]))


SUBCOMMANDS: dict[str, tuple[Callable[..., None], str]] = {
    "attack verify": (verify, "Example: mm-cb attack verify runs/attack"),
    "attack check": (
        check,
        "Example: mm-cb attack check --model miniature --behaviors miniature --out runs/check",
    ),
    "attack transfer": (
        transfer,
        "Example: mm-cb attack transfer runs/attack-base runs/attack-rr --behaviors miniature --out runs/transfer",
    ),
}
