"""Attack runs: attacks on one model over a behaviours file, into one run directory."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, cast

from mm_cb.attacks.calls import kept_lines, spoken
from mm_cb.attacks.config import AttackConfig, checked_by_default
from mm_cb.attacks.config_files import as_recipe
from mm_cb.attacks.controls import CONTROL, CONVERGENCE, is_done, twice_the_steps, wrong_text
from mm_cb.attacks.job import Attacker
from mm_cb.attacks.judged_files import OutcomeOf
from mm_cb.attacks.objectives.universal import all_at_once, seen
from mm_cb.attacks.outputs import CURVES, PROTOCOL, best_pictures, by_processor, parts_of, summaries, write_outputs
from mm_cb.attacks.refusals import fitting, refuse_unfit, refuse_unseen, refuse_unsendable
from mm_cb.attacks.refused_settings import refuse_idle, refuse_mismatch
from mm_cb.attacks.registry import chosen_attacks
from mm_cb.attacks.runner import attack_behaviors
from mm_cb.attacks.shards import Shard, gather, shard_runs
from mm_cb.core import hub
from mm_cb.core.embedded import embedded
from mm_cb.core.errors import UserError, unknown
from mm_cb.core.folders import but_is
from mm_cb.core.limits import LIMITS
from mm_cb.core.paths import named_path
from mm_cb.core.progress import Progress
from mm_cb.core.records import Item, JsonObject
from mm_cb.core.runs import RunDirectory, append_jsonl, file_sha256, hash_inputs, read_run, write_bytes, write_jsonl
from mm_cb.core.workers import Workers
from mm_cb.data.behaviors_file import KEPT_AS, Behavior, asked_once, behaviors_path, read_behaviors
from mm_cb.data.corpus import read_corpus
from mm_cb.data.pictures import open_picture
from mm_cb.data.prompts_file import KEPT_AS as PROMPTS_KEPT_AS
from mm_cb.data.prompts_file import ImportedPrompt, read_prompts
from mm_cb.inference.source import ModelSource, subject_name
from mm_cb.inference.subjects import Subject, changes_nothing, idle_note, load_subject
from mm_cb.inference.tolerance import dtype_of
from mm_cb.judges.base import NOT_JUDGED, Case
from mm_cb.judges.registry import JudgeOptions, open_judge
from mm_cb.metrics.at_limit import shorter_than
from mm_cb.metrics.convergence import LEAST
from mm_cb.metrics.holes import refuse_absent_outputs
from mm_cb.metrics.results import Measurement, read_results
from mm_cb.metrics.whole import unchanged_items
from mm_cb.models import VisionModel
from mm_cb.models.adapters import WEIGHTS, read_settings, same_adapter


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
    attacks: str | Sequence[str] = "pgd",
    adapter: str | Path | None = None,
    base: str | Path | None = None,
    probe: str | Path | None = None,
    system: str | None = None,
    thinking: bool = False,
    device: str = "cpu",
    dtype: str = "float32",
    config: AttackConfig | None = None,
    **settings: Any,
) -> AttackRun:
    """Attack a model by pictures, judged from the saved files, or by texts; an existing ``out`` is gone on with.

    Args:
        model: Hub id, folder, or an embedded model's name.
        behaviors: Behaviours file (JSONL), or the name of an embedded model for its own.
        out: Run directory.
        attacks: One name, several in a list or with commas between, or ``all``.
        adapter: Folder of a PEFT adapter.
        base: What a breaker without adapter was made from, for attacks that aim at what sets it apart.
        probe: Folder of a harmfulness probe that withholds answers.
        system: Text in front of every request.
        thinking: Whether the model thinks first, where its chat template can leave that open.
        device: Torch device, ``"cpu"`` or ``"cuda:0"``.
        dtype: Of the model: float32, bfloat16 or float16, as a text or as torch's.
        config: Everything else; its attack's name is not read. None = the defaults, for ``all`` with
            ``check_convergence=12``.
        settings: Fields of `AttackConfig` to change: ``steps=100``, ``threat=Threat("l2", 255, 8.0)``.

    Raises:
        UserError: If something asked for cannot be had; the message says what.
        ValueError: If a setting is out of range.
        TypeError: If an argument is of another type.

    Example:
        >>> attack("ORG/NAME", "behaviors.jsonl", "runs/attack", attacks="pgd", steps=100)  # doctest: +SKIP
    """
    adapter, base, probe = (None if one is None else str(one) for one in (adapter, base, probe))
    source = ModelSource(model, adapter, device, dtype, system=system, base=base, probe=probe, thinking=thinking)
    asked = behaviors_path(named_path("behaviors", behaviors, "a file of behaviours, or an embedded model's name"))
    folder, called = named_path("out", out, "the path of a run directory"), _called(attacks)
    if not isinstance(config, AttackConfig | None):
        raise TypeError(f"`config` must be an mm_cb.AttackConfig, got {type(config).__name__}.")
    names = chosen_attacks(called, adapted=source.breaker, probed=probe is not None)
    if called == "all":
        names = fitting(source.model, names, asked, probed=probe is not None)
    _refuse_unknown(settings)
    whole = config or AttackConfig(check_convergence=checked_by_default(called))
    run_attack(source, asked, folder, names, replace(whole, **settings))
    return AttackRun(folder, read_results(folder / "results.json"))


_SAID_BY = {
    "name": "`attacks`: attacks={value!r}",
    "epsilon": "`threat`: threat=mm_cb.Threat(levels=8)",
    "norm": '`threat`: threat=mm_cb.Threat("l2", 255, 8.0)',
    "patch_size": '`threat`: threat=mm_cb.Threat("patch", 255, 24)',
    "border_width": '`threat`: threat=mm_cb.Threat("border", 255, 4)',
}
"""Settings of the command, and one of `AttackConfig`, that `attack` takes in another argument, and an example of it."""
_OF_THE_RUN = ("name", "prompts_each")


def _refuse_unknown(settings: Mapping[str, Any]) -> None:
    valid = [field.name for field in fields(AttackConfig) if field.name not in _OF_THE_RUN]
    for name, value in settings.items():
        if name in _SAID_BY:
            raise UserError(f"`{name}` is no setting of `attack`, it is said by {_SAID_BY[name].format(value=value)}.")
        if name not in valid:
            raise unknown("setting of `attack`", name, valid)


def _called(attacks: object) -> str:
    """Names of attacks as ``--attack`` takes them."""
    listed = [attacks] if isinstance(attacks, str) else attacks
    if not isinstance(listed, list | tuple) or not listed or not all(isinstance(name, str) for name in listed):
        raise TypeError(f"`attacks` must be the name of an attack, or a list of names, got {attacks!r:.60}.")
    return ",".join(listed)


def run_attack(
    source: ModelSource,
    behaviors: Path,
    out: Path,
    names: Sequence[str],
    config: AttackConfig,
    *,
    shard: Shard | None = None,
    workers: Workers[Attacker] | None = None,
) -> None:
    """Attack a model and write ``items.jsonl``, ``results.json``, ``curves.json``, ``checks.json`` and the pictures.

    What stands beside the run (`mm_cb.attacks.controls`) comes after it, also to a run that had finished without it.
    Without a judge for the model (only embedded models have an exact one) outcomes are ``not_judged``.

    Args:
        source: The model, its adapter, its device and dtype, and the operator's text.
        behaviors: Behaviours file.
        out: Run directory.
        names: The attacks, in order.
        config: Their settings.
        shard: The part of the behaviours that this process attacks; None = all, or gather what shards have left.
        workers: Processes that attack them together; None = this one alone.
    """
    hub.keep_to(out)
    read = read_behaviors(behaviors)
    asked = asked_once(read)
    _refuse(source, names, config, shard, asked)
    refuse_unseen(source.model, names, asked, behaviors)
    asked = spoken(asked, source.model)
    kept = {KEPT_AS: kept_lines(behaviors, asked)}
    responses, prompts = hijacked_responses(config.hijacks, asked), None
    if config.prompts is not None:
        prompts = read_prompts(config.prompts, [b.id for b in read])
        prompts = {b.id: prompts[b.id] for b in asked}
        kept[PROMPTS_KEPT_AS] = kept_lines(config.prompts, asked, spoken=False)
        config = replace(config, prompts_each=max(map(len, prompts.values())))
    recipe = {"model": source.model, "adapter": source.adapter, "system": source.system, **as_recipe(config, names)}
    recipe |= {} if source.base is None else {"base": source.base}
    recipe |= {} if source.probe is None else {"probe": source.probe}
    recipe |= {"thinking": True} if source.thinking else {}
    recipe |= {"device": source.device.partition(":")[0], "dtype": source.dtype, "fiction": source.fiction}
    files = [behaviors, *(b.image for b in asked if b.image is not None), *source.weights()]
    files += [file for file in (config.prompts, config.corpus) if file is not None]
    if config.surrogate is not None:  # whose hash says which of two adapters it is, wherever they lie
        files.append(config.surrogate / WEIGHTS)
        recipe["surrogate_sha256"] = file_sha256(config.surrogate / WEIGHTS)
    inputs = hash_inputs(files)
    with Progress() as progress:
        job = _Process(source, config.named(names), responses, prompts, progress, workers)
        if shard is not None:
            if shard.index > len(asked):
                progress.say(f"shard {shard} is empty, so it is done: there are only {len(asked)} behaviours")
                return
            with shard_runs(out, recipe, config.seed, inputs, shard) as run:
                if not run.finished:
                    job.attack(run.path, shard.part(asked))
                    _keep(run.path, kept)
                    run.finish(files=[*kept, CURVES, PROTOCOL])
                progress.say(f"shard {shard} is done; without --shard the same command gathers all of them")
            return
        with RunDirectory(out, "attack", recipe, config.seed, inputs=inputs) as run:
            gathered = not run.finished and gather(run.path, asked)
            if run.finished:
                refuse_absent_outputs(run.path)
                progress.say("finished before: nothing is attacked again")
            else:
                if not gathered:
                    progress.say(_announce(job.configs, len(asked)))
                    job.attack(run.path, asked)
                _keep(run.path, kept)
                run.finish(files=[*kept, CURVES, PROTOCOL])
                if job.configs[0].entry.universal and len(seen(config, asked)) == len(asked):
                    progress.say(_NOTHING_HELD_OUT)
            if gathered:
                progress.say("control and convergence were not run in parts: the same command again runs them")
            else:
                job.beside(run.path, recipe, inputs, asked)


def _announce(configs: Sequence[AttackConfig], behaviors: int) -> str:
    """What will be run, so that nobody waits without knowing for what."""
    first = configs[0]
    steps = f", {first.steps:,} steps" if any(one.entry.optimises for one in configs) else ""
    runs = f", {first.restarts} runs each" if first.restarts > 1 else ""
    many = "1 behaviour" if behaviors == 1 else f"{behaviors} behaviours"
    told = f"{', '.join(one.name for one in configs)} on {many}{steps}{runs}"
    beside = []
    if first.control and behaviors > 1 and any(one.entry.forces_response for one in configs):
        beside.append("a wrong text (--control 0: without)")
    if first.check_convergence and behaviors >= LEAST and steps:
        beside.append("twice the steps (--check-convergence 0: without)")
    return f"{told}{'; then, as controls, ' if beside else ''}{' and '.join(beside)}"


_NOTHING_HELD_OUT = "nothing is held out: the universal picture was made for every behaviour it is judged on"


def _refuse(
    source: ModelSource, names: Sequence[str], config: AttackConfig, shard: Shard | None, asked: Sequence[Behavior]
) -> None:
    """Refuse settings that do not go together, before anything is loaded."""
    if config.early_stop and embedded(source.model) is None and any(one.call is None for one in asked):
        raise UserError(
            f"`--early-stop` needs a judge, and there is none for `{source.model}` while it is attacked; leave it out."
        )
    if config.named(names)[0].entry.universal and (shard is not None or config.early_stop):
        raise UserError("`universal` makes one picture for all behaviours: leave out `--shard` and `--early-stop`.")
    if source.adapter is not None and source.base is not None:
        raise UserError(
            "`--base` is for a breaker without adapter: with `--adapter` the base is the `--model`; leave it out."
        )
    if not source.breaker and any(one.annealing != "none" for one in config.named(names)):
        raise UserError(
            f"`--anneal {config.anneal}` dials up what sets a breaker apart from its base: give the `--adapter`, or "
            "the `--base` of a breaker without one."
        )
    if config.check_convergence and 2 * config.steps > LIMITS["steps"].most:
        raise UserError(
            f"`--check-convergence` doubles `--steps {config.steps}`, of which {LIMITS['steps'].most:,} is the most: "
            "give 0."
        )
    refuse_idle(config, names)
    if config.corpus is not None:
        read_corpus(config.corpus)
    if config.surrogate is not None:
        read_settings(config.surrogate)
        if source.adapter is not None and same_adapter(config.surrogate, Path(source.adapter)):
            raise UserError(
                f"`--surrogate` must be another breaker's adapter than the one under attack, got `{config.surrogate}`, "
                "whose weights are those of `--adapter`: transfer would see what it is measured on; leave it out, or "
                "train one from another seed."
            )
    refuse_mismatch(config, names)


def _keep(folder: Path, files: Mapping[str, bytes]) -> None:
    """Keep copies of what was asked."""
    for name, content in files.items():
        write_bytes(folder / name, content)


@dataclass(frozen=True)
class _Process:
    """What one process attacks with."""

    source: ModelSource
    configs: Sequence[AttackConfig]
    responses: Mapping[str, str] | None
    prompts: Mapping[str, Sequence[ImportedPrompt]] | None
    progress: Progress
    workers: Workers[Attacker] | None = None

    @cached_property
    def subject(self) -> Subject:
        """The model, loaded once."""
        held = attacker(self.source, self.configs[0].image_backend) if self.workers is None else self.workers.held
        return held.subject

    def attack(self, folder: Path, chosen: Sequence[Behavior]) -> None:
        """Load the model and run every attack on these behaviours."""
        refuse_unfit(self.subject, chosen, *self.configs)
        refuse_unsendable(self.subject, chosen, self.prompts or {})
        if self.responses is not None:
            forced = sum(b.id in self.responses for b in chosen)
            self.progress.say(
                f"hijacks: {forced} of {len(chosen)} behaviours; the base continues the targets of the rest"
            )
        if self.configs[0].entry.universal and (said := all_at_once(self.configs[0], chosen)):
            self.progress.say(said)
        own = self.subject.model.processor.tokenizer
        lengths = [len(own(b.target, add_special_tokens=False)["input_ids"]) for b in chosen]
        if told := shorter_than(self.configs[0].max_new_tokens, lengths):
            self.progress.say(told)
        self._go_on(folder, chosen)

    def beside(self, folder: Path, recipe: JsonObject, inputs: Mapping[str, str], asked: Sequence[Behavior]) -> None:
        """Run what belongs beside the finished run in ``folder``, as far as it has not been."""
        left = [name for name in (CONTROL, CONVERGENCE) if not is_done(folder / name)]
        plans = [
            wrong_text(self.configs, asked, folder) if CONTROL in left else None,
            twice_the_steps(self.configs, asked, self.responses) if CONVERGENCE in left else None,
        ]
        for plan in (plan for plan in plans if plan is not None):
            self.progress.say(f"{plan.folder}: {plan.about}, on {len(plan.behaviors)} behaviours")
            seed = self.configs[0].seed
            with RunDirectory(folder / plan.folder, "attack", plan.recipe(recipe), seed, inputs=inputs) as run:
                replace(self, configs=plan.configs, responses=plan.responses)._go_on(run.path, plan.behaviors)
                write_jsonl(run.path / KEPT_AS, plan.kept())
                run.finish(files=[KEPT_AS, CURVES, PROTOCOL])

    def _go_on(self, folder: Path, behaviors: Sequence[Behavior]) -> None:
        judge = judge_of(self.source.model)
        attack_in_turn(
            self.subject,
            behaviors,
            self.configs,
            folder,
            judge,
            self.progress,
            self.responses,
            self.prompts,
            self.workers,
        )


def attack_in_turn(
    subject: Subject,
    behaviors: Sequence[Behavior],
    configs: Sequence[AttackConfig],
    folder: Path,
    judge: OutcomeOf,
    progress: Progress,
    responses: Mapping[str, str] | None = None,
    prompts: Mapping[str, Sequence[ImportedPrompt]] | None = None,
    workers: Workers[Attacker] | None = None,
) -> None:
    """Run several attacks, in a chain if asked to, and write what a run directory holds."""
    items: list[Item] = []
    if idle := changes_nothing(subject):
        if dialled := [config.name for config in configs if config.annealing != "none"]:
            raise UserError(
                f"`{dialled[0]}` dials the adapter up on the way, but the adapter of `{subject.name}` changes no logit "
                f"of `{subject.model.name}`: there is no breaker to attack; leave `{dialled[0]}` out, or give the "
                "adapter that was meant."
            )
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
            workers=workers,
        )
        seconds = round(time.monotonic() - started, 1)
        append_jsonl(folder / "timings.jsonl", {"stage": f"attack {config.name}", "seconds": seconds})
    if (first := next(by_processor(items), None)) is not None:
        progress.say(_by_processor_note(subject, folder / str(first["clean_image"])))
    if idle:
        items = [{**item, "adapter_changes_nothing": True} for item in items]
    write_outputs(folder, items, summaries(items, parts_of(folder), configs, dtype_of(subject.model)))


def _by_processor_note(subject: Subject, picture: Path) -> str:
    """What to print where the search could not imitate the image processor exactly."""
    shown = open_picture(picture)
    model = cast("VisionModel", subject.model)
    setting = model.unimitated((shown.height, shown.width))
    why = "the versions of its libraries here may resize in another way"
    if setting is not None:
        why = f"with its `{setting}` as its class has it, it would be"
    return (
        f"pixels: the image processor of `{model.name}` is not imitated exactly for pictures of {shown.width} x "
        f"{shown.height} ({why}), so it was run itself at every step: slower; files and losses are exact all the same, "
        "the gradient is that of the imitation"
    )


def attacker(source: ModelSource, image_backend: str) -> Attacker:
    """A model, loaded, and its judge."""
    name = subject_name(source.breaker, source.system, source.probe)
    return Attacker(load_subject(source, name, image_backend), judge_of(source.model))


def judge_of(model: str) -> OutcomeOf:
    """By rule where the target is a call; else the exact judge of an embedded model, or one that gives no verdict."""
    guest = embedded(model)
    exact = None if guest is None else open_judge(JudgeOptions(guest.judge))
    by_call = open_judge(JudgeOptions("call"))

    def judge(behavior: Behavior, completion: str) -> str:
        by = exact if behavior.call is None else by_call
        if by is None:
            return NOT_JUDGED
        case = Case(behavior.id, behavior.prompt, completion, extra=behavior.extra)
        return next(verdict for _, verdict in by.judge([case])).outcome

    return judge


def hijacked_responses(run: Path | None, behaviors: Sequence[Behavior]) -> dict[str, str] | None:
    """What the base model said to these when it was hijacked: the harmful completions of a finished run on it, by id.

    Raises:
        UserError: If the run attacked an adapter, or broke none of these behaviours.
    """
    if run is None:
        return None
    held = read_run(run)
    if held["command"] != "attack" or not held.get("ended"):
        raise UserError(f"`--hijacks` must be a finished run of `mm-cb attack`, `{run}` is none{but_is(run)}.")
    if any(held["recipe"].get(part) is not None for part in ("adapter", "base", "probe")):
        raise UserError(f"`--hijacks` must be an attack run on the base model, but `{run}` attacked a breaker.")
    items, asked = unchanged_items(run, held), {b.id for b in behaviors}
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
