"""Attack runs: attacks on one model over a behaviours file, into one run directory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mm_cb.attacks.config import AttackConfig, as_recipe, refuse_idle, refuse_mismatch
from mm_cb.attacks.judged_files import Judge
from mm_cb.attacks.outputs import best_pictures, curve_quartiles, summaries, write_outputs
from mm_cb.attacks.refusals import refuse_unfit, refuse_unseen, refuse_unsendable
from mm_cb.attacks.registry import chosen_attacks
from mm_cb.attacks.runner import attack_behaviors
from mm_cb.attacks.shards import Shard, gather, shard_runs
from mm_cb.core import hub
from mm_cb.core.embedded import embedded
from mm_cb.core.errors import UserError
from mm_cb.core.progress import Progress
from mm_cb.core.records import Item
from mm_cb.core.runs import RunDirectory, append_jsonl, read_run, write_bytes
from mm_cb.data.behaviors_file import KEPT_AS, Behavior, read_behaviors
from mm_cb.data.prompts_file import KEPT_AS as PROMPTS_KEPT_AS
from mm_cb.data.prompts_file import ImportedPrompt, read_prompts
from mm_cb.inference.source import ModelSource, subject_name
from mm_cb.inference.subjects import Subject, changes_nothing, idle_note, load_subject
from mm_cb.inference.tolerance import dtype_of
from mm_cb.judges.base import Case
from mm_cb.judges.registry import JudgeOptions, open_judge
from mm_cb.metrics.results import Measurement, read_results
from mm_cb.metrics.whole import whole_items


@dataclass(frozen=True)
class AttackRun:
    """A finished attack run.

    Attributes:
        folder: Its run directory, for `mm_cb.write_report` and ``mm-cb attack verify``.
        measurements: What results.json holds: compliance per attack and split, with n and interval.
    """

    folder: Path
    measurements: list[Measurement]


def attack(
    model: str,
    behaviors: str | Path,
    out: str | Path,
    *,
    attacks: str = "pgd",
    adapter: str | Path | None = None,
    system: str | None = None,
    device: str = "cpu",
    dtype: str = "float32",
    config: AttackConfig | None = None,
    **settings: Any,
) -> AttackRun:
    """Attack a model by pictures, judged from the saved files, or by texts; an existing ``out`` is gone on with.

    Args:
        model: Hub id, folder, or an embedded model's name.
        behaviors: Behaviours file (JSONL).
        out: Run directory.
        attacks: One name, several with commas between, or ``all``.
        adapter: Folder of a PEFT adapter.
        system: Text in front of every request.
        device: Torch device.
        dtype: Of the model: float32, bfloat16 or float16.
        config: Everything else; its attack's name is not read.
        settings: Fields of `AttackConfig` to change: ``steps=100``, ``threat=Threat("l2", 255, 8.0)``.

    Raises:
        UserError: If something asked for cannot be had; the message says what.
        ValueError: If a setting is out of range.

    Example:
        >>> attack("ORG/NAME", "behaviors.jsonl", "runs/attack", attacks="pgd", steps=100)  # doctest: +SKIP
    """
    source = ModelSource(model, None if adapter is None else str(adapter), device, dtype, system=system)
    names = chosen_attacks(attacks, adapted=adapter is not None)
    run_attack(source, Path(behaviors), Path(out), names, replace(config or AttackConfig(), **settings))
    return AttackRun(Path(out), read_results(Path(out) / "results.json"))


def run_attack(
    source: ModelSource,
    behaviors: Path,
    out: Path,
    names: Sequence[str],
    config: AttackConfig,
    *,
    shard: Shard | None = None,
) -> None:
    """Attack a model and write ``items.jsonl``, ``results.json``, ``curves.json``, ``checks.json`` and the pictures.

    Without a judge for the model (only embedded models have an exact one) outcomes are ``not_judged``.

    Args:
        source: The model, its adapter, its device and dtype, and the operator's text.
        behaviors: Behaviours file.
        out: Run directory.
        names: The attacks, in order.
        config: Their settings.
        shard: The part of the behaviours that this process attacks; None = all, or gather what shards have left.
    """
    hub.keep_to(out)
    asked, kept = read_behaviors(behaviors), {KEPT_AS: behaviors.read_bytes()}
    _refuse(source, names, config, shard)
    refuse_unseen(source.model, names, asked, behaviors)
    responses, prompts = hijacked_responses(config.hijacks, asked), None
    if config.prompts is not None:
        prompts = read_prompts(config.prompts, [b.id for b in asked])
        kept[PROMPTS_KEPT_AS] = config.prompts.read_bytes()
        config = replace(config, prompts_each=max(map(len, prompts.values())))
    recipe = {"model": source.model, "adapter": source.adapter, "system": source.system, **as_recipe(config, names)}
    recipe |= {"device": source.device.partition(":")[0], "dtype": source.dtype, "fiction": source.fiction}
    files = [behaviors, *([] if config.prompts is None else [config.prompts])]
    inputs = [*files, *(b.image for b in asked if b.image is not None), *source.weights()]
    with Progress() as progress:
        job = _Job(source, config.named(names), responses, prompts, progress)
        if shard is not None:
            if shard.index > len(asked):
                progress.say(f"shard {shard} is empty, so it is done: there are only {len(asked)} behaviours")
                return
            with shard_runs(out, recipe, config.seed, inputs, shard) as run:
                if not run.finished:
                    job.attack(run.path, shard.part(asked))
                    _keep(run.path, kept)
                    run.finish()
                progress.say(f"shard {shard} is done; without --shard the same command gathers all of them")
            return
        with RunDirectory(out, "attack", recipe, config.seed, inputs=inputs) as run:
            if run.finished:
                progress.say(f"finished before, results in {run.path / 'results.json'}")
                return
            if not gather(run.path, asked):
                job.attack(run.path, asked)
            _keep(run.path, kept)
            run.finish()
            if job.configs[0].entry.universal and (config.universal_train or 1) >= len(asked):
                progress.say("nothing is held out: the universal picture was made for every behaviour it is judged on")
            progress.say(f"{len(asked)} behaviours attacked, results in {run.path / 'results.json'}")


def _refuse(source: ModelSource, names: Sequence[str], config: AttackConfig, shard: Shard | None) -> None:
    """Refuse settings that do not go together, before anything is loaded."""
    if config.early_stop and embedded(source.model) is None:
        raise UserError(
            f"`--early-stop` needs a judge, and there is none for `{source.model}` while it is attacked; leave it out."
        )
    if config.named(names)[0].entry.universal and (shard is not None or config.early_stop):
        raise UserError("`universal` makes one picture for all behaviours: leave out `--shard` and `--early-stop`.")
    refuse_idle(config, names)
    refuse_mismatch(config, names)


def _keep(folder: Path, files: Mapping[str, bytes]) -> None:
    """Keep copies of what was asked."""
    for name, content in files.items():
        write_bytes(folder / name, content)


@dataclass(frozen=True)
class _Job:
    """What one process attacks with."""

    source: ModelSource
    configs: Sequence[AttackConfig]
    responses: Mapping[str, str] | None
    prompts: Mapping[str, Sequence[ImportedPrompt]] | None
    progress: Progress

    def attack(self, folder: Path, chosen: Sequence[Behavior]) -> None:
        """Load the model and run every attack on these behaviours."""
        source, first = self.source, self.configs[0]
        subject = load_subject(source, subject_name(source.adapter, source.system), first.image_backend)
        refuse_unfit(subject, chosen, first)
        refuse_unsendable(subject, chosen, self.prompts or {})
        if self.responses is not None:
            forced = sum(b.id in self.responses for b in chosen)
            self.progress.say(
                f"hijacks: {forced} of {len(chosen)} behaviours; the base continues the targets of the rest"
            )
        judge = judge_of(source.model)
        attack_in_turn(subject, chosen, self.configs, folder, judge, self.progress, self.responses, self.prompts)


def attack_in_turn(
    subject: Subject,
    behaviors: Sequence[Behavior],
    configs: Sequence[AttackConfig],
    folder: Path,
    judge: Judge,
    progress: Progress,
    responses: Mapping[str, str] | None = None,
    prompts: Mapping[str, Sequence[ImportedPrompt]] | None = None,
) -> None:
    """Run several attacks, in a chain if asked to, and write what a run directory holds."""
    items: list[Item] = []
    if idle := changes_nothing(subject):
        progress.say(idle_note(subject))
    for config in configs:
        started = time.monotonic()
        chained = config.chain and config.entry.searches_pixels
        items += attack_behaviors(
            subject,
            behaviors,
            config,
            folder,
            judge,
            progress,
            starts=best_pictures(items) if chained else None,
            responses=responses,
            prompts=prompts if config.entry.imported else None,
        )
        seconds = round(time.monotonic() - started, 1)
        append_jsonl(folder / "timings.jsonl", {"stage": f"attack {config.name}", "seconds": seconds})
    if idle:
        items = [{**item, "adapter_changes_nothing": True} for item in items]
    drawn = [quartiles for config in configs for quartiles in curve_quartiles(folder, subject.name, config.name)]
    k, dtype = {config.name: config.tries for config in configs}, dtype_of(subject.model)
    write_outputs(folder, items, summaries(items, drawn, configs[0], k, dtype))


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


def hijacked_responses(run: Path | None, behaviors: Sequence[Behavior]) -> dict[str, str] | None:
    """What the base model said to these when it was hijacked: the harmful completions of a finished run on it, by id.

    Raises:
        UserError: If the run attacked an adapter, or broke none of these behaviours.
    """
    if run is None:
        return None
    held = read_run(run)
    if held["command"] != "attack" or not held.get("ended"):
        raise UserError(f"`--hijacks` must be a finished run of `mm-cb attack`, `{run}` is none.")
    if held["recipe"].get("adapter") is not None:
        raise UserError(f"`--hijacks` must be an attack run on the base model, but `{run}` attacked an adapter.")
    items, asked = whole_items(run, held), {b.id for b in behaviors}
    said = {
        item["id"]: item["completion"] for item in items if item.get("outcome") == "harmful" and "completion" in item
    }
    if not said.keys() & asked:
        raise UserError(
            f"`--hijacks` must be a run that broke at least one of the {len(asked)} behaviours asked here; `{run}` "
            f"broke {len(said)}, none of them asked. Name another run, or leave it out: the base then continues the "
            "targets."
        )
    return {key: text for key, text in said.items() if key in asked}
