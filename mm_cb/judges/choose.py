"""From the name of a judge to the judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_cb.core.endpoint import Endpoint
from mm_cb.core.errors import UserError, unknown
from mm_cb.judges.base import Judge
from mm_cb.judges.names import CHECKPOINTS, JUDGES, STRONGREJECT_BASE
from mm_cb.judges.prompts import card_prompts, read_card, read_template


@dataclass(frozen=True)
class JudgeOptions:
    """What the user says about a judge."""

    name: str
    model: str | None = None
    """Folder or hub id instead of the published checkpoint; for ``endpoint`` the served name."""
    endpoint: str | None = None
    prompt_file: Path | None = None
    labels: Sequence[str] = ()
    """For ``endpoint``: ``ANSWER=OUTCOME``."""
    pictures: bool = False
    """For ``endpoint``: send the pictures too."""
    device: str = "cpu"
    dtype: str = "bfloat16"
    batch: int = 8


def open_judge(options: JudgeOptions) -> Judge:
    """Load the judge, or point at the server that has it.

    Raises:
        UserError: If there is no such judge, it needs something that was not given, or would not read what was given.
    """
    from mm_cb.judges.rules import MiniatureJudge, RefusalStrings

    if options.name not in JUDGES:
        raise unknown("judge", options.name, JUDGES)
    _refuse_unread(options)
    if options.name == "refusal-strings":
        return RefusalStrings()
    if options.name == "miniature":
        return MiniatureJudge()
    if options.name == "endpoint":
        return _endpoint_judge(options)
    return _checkpoint_judge(options)


def _refuse_unread(options: JudgeOptions) -> None:
    """Refuse options that this judge would not read."""
    name = options.name
    given = {
        "--judge-model": options.model is not None and name in ("refusal-strings", "miniature"),
        "--prompt-file": options.prompt_file is not None
        and (name in ("refusal-strings", "miniature") or name.startswith("llama-guard")),
        "--endpoint": options.endpoint is not None and name != "endpoint",
        "--label": bool(options.labels) and name != "endpoint",
        "--pictures": options.pictures and name != "endpoint",
    }
    if useless := [option for option, unread in given.items() if unread]:
        raise UserError(f"judge `{name}` does not read `{useless[0]}`: drop it, or take another judge.")


def _endpoint_judge(options: JudgeOptions) -> Judge:
    from mm_cb.judges.served import EndpointJudge, parse_labels

    if options.endpoint is None or options.model is None or options.prompt_file is None:
        raise UserError(
            "judge `endpoint` needs `--endpoint URL`, `--judge-model NAME` and `--prompt-file FILE` with {behavior} "
            "and {completion}."
        )
    endpoint = Endpoint(options.endpoint, options.model, concurrency=options.batch)
    labels = parse_labels(options.labels)
    return EndpointJudge(endpoint, read_template(options.prompt_file), labels, pictures=options.pictures)


def _checkpoint_judge(options: JudgeOptions) -> Judge:
    from mm_cb.judges import classifiers
    from mm_cb.judges.local import LanguageModel, version_of

    model = options.model or CHECKPOINTS[options.name]
    if options.name.startswith("llama-guard"):
        guard, processor = classifiers.load_guard(model, device=options.device, dtype=options.dtype)
        return classifiers.LlamaGuard(options.name, guard, processor, _source(options, model))
    if options.name == "strongreject":
        prompt = _prompt(options, model)
        loaded = LanguageModel.load(
            STRONGREJECT_BASE, adapter=model, device=options.device, dtype=options.dtype, batch=options.batch
        )
        base = {"model": STRONGREJECT_BASE, **version_of(STRONGREJECT_BASE)}
        return classifiers.StrongReject(loaded, prompt, {**_source(options, model), "base": base})
    prompts = (
        classifiers.harmbench_prompts(model)
        if options.prompt_file is None
        else {"prompt": read_template(options.prompt_file)}
    )
    loaded = LanguageModel.load(model, device=options.device, dtype=options.dtype, batch=options.batch)
    return classifiers.HarmBench(options.name, loaded, prompts, _source(options, model))


def _source(options: JudgeOptions, model: str) -> Mapping[str, Any]:
    """Taken after loading: only then is it known which commit of a hub id was loaded."""
    from mm_cb.judges.local import version_of

    return {"model": model, **version_of(model), "dtype": options.dtype}


def _prompt(options: JudgeOptions, model: str) -> str:
    if options.prompt_file is not None:
        return read_template(options.prompt_file)
    prompts = card_prompts(read_card(model))
    if "prompt" not in prompts:
        raise UserError(
            f"the card of `{model}` shows no prompt: give `--prompt-file` with the one of the strong_reject package, "
            "its last blank included."
        )
    return prompts["prompt"]
