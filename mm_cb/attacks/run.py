"""``mm-cb attack``: attacks on one model over a behaviours file, into one run directory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image

from mm_cb.attacks.objectives.target import encode
from mm_cb.attacks.options import Options, parse_attacks, refuse_idle, refuse_mismatch, resolve
from mm_cb.attacks.outputs import best_pictures, curve_quartiles, write_outputs
from mm_cb.attacks.registry import Attack, tries
from mm_cb.attacks.runner import Judge, attack_behaviors
from mm_cb.attacks.shards import Shard, gather, shard_runs
from mm_cb.core import hub
from mm_cb.core.embedded import embedded, is_fiction
from mm_cb.core.errors import UserError
from mm_cb.core.progress import Progress
from mm_cb.core.runs import RunDirectory, append_jsonl, read_jsonl, read_run, write_bytes
from mm_cb.data.behaviors_file import KEPT_AS, Behavior, grey_canvas, open_picture, read_behaviors, refuse_too_large
from mm_cb.inference.source import subject_name
from mm_cb.inference.subjects import Subject
from mm_cb.inference.tolerance import dtype_of
from mm_cb.judges.base import Case
from mm_cb.judges.registry import JudgeOptions, open_judge
from mm_cb.metrics.observations import starts_with
from mm_cb.models import ChatModel, load_model
from mm_cb.models.cache import model_inputs


def run_attack(
    *,
    model: str,
    adapter: str | None,
    behaviors: Path,
    out: Path,
    attack: str,
    epsilon: int,
    steps: int,
    restarts: int,
    seed: int,
    device: str = "cpu",
    dtype: str = "float32",
    shard: Shard | None = None,
    overrides: Sequence[str] = (),
    system: str | None = None,
) -> None:
    """Attack a model and write ``items.jsonl``, ``results.json``, ``curves.json``, ``checks.json`` and the pictures.

    Without a judge for the model (only embedded models have an exact one) outcomes are ``not_judged``.

    Args:
        model: Hub id, folder, or an embedded model's name.
        adapter: Folder of a PEFT adapter, or None.
        behaviors: Behaviours file.
        out: Run directory.
        attack: One name, several with commas between, or ``all``.
        epsilon: Budget in 255ths.
        steps: Updates per run.
        restarts: Runs per behaviour.
        seed: Of everything random.
        device: Torch device.
        dtype: Torch dtype of the model.
        shard: The part of the behaviours that this process attacks; None = all, or gather what shards have left.
        overrides: ``key=value`` for `Options`.
        system: Text in front of every request.
    """
    hub.keep_to(out)
    names = parse_attacks(attack, adapted=adapter is not None)
    options = resolve(overrides)
    asked, asked_file = read_behaviors(behaviors), behaviors.read_bytes()
    recipe = {
        "model": model,
        "adapter": adapter,
        "system": system,
        "attack": ",".join(names),
        "epsilon": epsilon,
        "steps": steps,
        "restarts": restarts,
        "device": device.partition(":")[0],
        "dtype": dtype,
        "options": options.recipe(),
        "fiction": is_fiction(model),
    }
    judge = judge_of(model)
    if options.early_stop and judge is _not_judged:
        raise UserError(
            f"`early_stop` needs a judge, and there is none for `{model}` while it is attacked; leave it out."
        )
    if names == ["universal"] and (shard is not None or options.early_stop):
        raise UserError("`universal` makes one picture for all behaviours: leave out `--shard` and `early_stop`.")
    refuse_idle(options, names)
    refuse_mismatch(options, names, epsilon)
    responses = hijacked_responses(options.hijacks, asked)
    inputs = [behaviors, *(b.image for b in asked if b.image is not None), *weights_of(model, adapter)]

    def attack_all(folder: Path, chosen: Sequence[Behavior], progress: Progress) -> None:
        loaded = load_model(model, adapter=adapter, device=device, dtype=dtype, image_backend=options.image_backend)
        canvas = loaded.canvas  # a model of text alone is refused here
        refuse_placeholders(chosen, loaded.processor.image_token)
        refuse_unsayable(chosen, loaded)
        refuse_too_large(chosen, options.batch)
        attacked = Subject(subject_name(adapter, system), loaded, adapted=adapter is not None, system=system)
        plans = [options.attack(name, epsilon, steps, restarts, seed, canvas) for name in names]
        for b in chosen:  # what cannot be attacked is said before the first batch
            picture = grey_canvas(canvas) if b.image is None or plans[0].universal else open_picture(b.image)
            refuse_unfit(plans[0], b, picture)
            if not plans[0].universal:  # which encodes every behaviour before it begins
                encode(attacked, [b], [picture], [b.target])
        if responses is not None:
            forced = sum(b.id in responses for b in chosen)
            progress.say(f"hijacks: {forced} of {len(chosen)} behaviours; the base continues the targets of the rest")
        attack_in_turn(attacked, chosen, plans, options, folder, judge, progress, responses)

    with Progress() as progress:
        if shard is not None:
            if shard.index > len(asked):
                progress.say(f"shard {shard} is empty, so it is done: there are only {len(asked)} behaviours")
                return
            with shard_runs(out, recipe, seed, inputs, shard) as run:
                if not run.finished:
                    attack_all(run.path, shard.part(asked), progress)
                    write_bytes(run.path / KEPT_AS, asked_file)
                    run.finish()
                progress.say(f"shard {shard} is done; without --shard the same command gathers all of them")
            return
        with RunDirectory(out, "attack", recipe, seed, inputs=inputs) as run:
            if run.finished:
                progress.say(f"finished before, results in {run.path / 'results.json'}")
                return
            if not gather(run.path, asked):
                attack_all(run.path, asked, progress)
            write_bytes(run.path / KEPT_AS, asked_file)
            run.finish()
            if names == ["universal"] and (options.train or 1) >= len(asked):
                progress.say("nothing is held out: the universal picture was made for every behaviour it is judged on")
            progress.say(f"{len(asked)} behaviours attacked, results in {run.path / 'results.json'}")


def attack_in_turn(
    subject: Subject,
    behaviors: Sequence[Behavior],
    attacks: Sequence[Attack],
    options: Options,
    folder: Path,
    judge: Judge,
    progress: Progress,
    responses: Mapping[str, str] | None = None,
) -> None:
    """Run several attacks, in a chain if asked to, and write what a run directory holds."""
    items: list[dict[str, Any]] = []
    for attack in attacks:
        started = time.monotonic()
        optimises = attack.kind.searches_pixels
        items += attack_behaviors(
            subject,
            behaviors,
            attack,
            folder,
            judge,
            progress,
            protocol=options.protocol(),
            starts=best_pictures(items) if options.chain and optimises else None,
            responses=responses,
        )
        seconds = round(time.monotonic() - started, 1)
        append_jsonl(folder / "timings.jsonl", {"stage": f"attack {attack.name}", "seconds": seconds})
    k = {attack.name: tries(attack, options.protocol()) for attack in attacks}
    drawn = [quartiles for attack in attacks for quartiles in curve_quartiles(folder, subject.name, attack.name)]
    epsilon, threat_model, dtype = attacks[0].epsilon, attacks[0].threat_model, dtype_of(subject.model)
    write_outputs(folder, items, drawn, epsilon=epsilon, k=k, threat_model=threat_model, dtype=dtype)


def refuse_unfit(attack: Attack, behavior: Behavior, picture: Image) -> None:
    """Refuse a threat model that does not fit a behaviour's picture."""
    try:
        attack.threat.allowed(attack.epsilon, (picture.height, picture.width))
    except ValueError as error:
        raise UserError(f"behaviour {behavior.id!r}: {error}") from error


def refuse_placeholders(behaviors: Sequence[Behavior], token: str) -> None:
    """Refuse texts that hold the model's image placeholder."""
    for behavior in behaviors:
        if token in behavior.prompt or token in behavior.target:
            raise UserError(
                f"behaviour {behavior.id!r} must not hold the model's image placeholder `{token}` in its texts; "
                "the picture is put in front of the prompt by itself."
            )


def refuse_unsayable(behaviors: Sequence[Behavior], model: ChatModel) -> None:
    """Refuse harmless targets that the model has no words for: no answer would ever be seen to start with them."""
    tokenizer = model.processor.tokenizer
    for behavior in behaviors:
        if not behavior.extra.get("benign_target"):
            continue
        tokens = tokenizer(behavior.target, add_special_tokens=False).input_ids
        written = tokenizer.decode(tokens, skip_special_tokens=True)
        if not starts_with(written, behavior.target):
            raise UserError(
                f"behaviour {behavior.id!r}: `{model.name}` cannot write its target {behavior.target!r}, only "
                f"{written!r}; give targets in the model's own words: `mm-cb data build benign --targets FILE`."
            )


def weights_of(model: str, adapter: str | None) -> list[Path | hub.Repository]:
    """What is behind a model and an adapter: a run belongs to its content, not to its name.

    Raises:
        UserError: If the model is neither here nor on the hub.
    """
    return [*model_inputs(model), *(sorted(Path(adapter).glob("*.safetensors")) if adapter else [])]


def judge_of(model: str) -> Judge:
    """The exact judge of an embedded model, otherwise one that gives no verdict."""
    guest = embedded(model)
    if guest is None:
        return _not_judged
    exact = open_judge(JudgeOptions(guest.judge))

    def judge(behavior: Behavior, completion: str) -> str:
        case = Case(behavior.id, behavior.prompt, completion, extra=behavior.extra)
        return next(verdict for _, verdict in exact.judge([case])).outcome

    return judge


def _not_judged(behavior: Behavior, completion: str) -> str:
    return "not_judged"


def hijacked_responses(run: str | None, behaviors: Sequence[Behavior]) -> dict[str, str] | None:
    """What the base model said to these when it was hijacked: the harmful completions of a finished run on it, by id.

    Raises:
        UserError: If the run attacked an adapter, or broke none of these behaviours.
    """
    if run is None:
        return None
    subject = read_run(Path(run)).get("recipe", {})
    if subject.get("adapter") is not None:
        raise UserError(f"`hijacks` must be an attack run on the base model, but `{run}` attacked an adapter.")
    items, asked = read_jsonl(Path(run) / "items.jsonl"), {b.id for b in behaviors}
    said = {item["id"]: item["completion"] for item in items if item.get("outcome") == "harmful"}
    if not said.keys() & asked:
        raise UserError(
            f"`hijacks` must be a run that broke at least one of the {len(asked)} behaviours asked here; `{run}` broke "
            f"{len(said)}, none of them asked. Name another run, or leave `hijacks` out: the base then continues the "
            "targets."
        )
    return {key: text for key, text in said.items() if key in asked}
