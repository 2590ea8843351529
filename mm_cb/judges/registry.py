"""The judges by name: what each is, what it reads, how it is opened. Imports nothing heavy, for ``--help``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mm_cb.core.devices import refuse_unknown
from mm_cb.core.errors import UserError
from mm_cb.core.files import dumps
from mm_cb.core.limits import LIMITS, settle
from mm_cb.core.user_code import entry_of, is_ours, refuse_taken, registering_file
from mm_cb.metrics.table import is_known

if TYPE_CHECKING:
    from mm_cb.judges.base import Judge

JUDGED = ("compliance",)
"""What the published checkpoints can judge: answers to forbidden requests."""
STRONGREJECT_BASE = "google/gemma-2b"


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
    max_new_tokens: int = 64
    """For ``endpoint``: its longest answer."""

    def __post_init__(self) -> None:
        """Check the numbers, and the device's name.

        Raises:
            UserError: If one is out of range, or there is no such device on any machine.
        """
        refuse_unknown(self.device)
        settle(self, "batch", LIMITS["batch"])
        settle(self, "max_new_tokens", LIMITS["max_new_tokens"])


@dataclass(frozen=True)
class JudgeEntry:
    """One name of ``--judge``."""

    name: str
    about: str
    """One line for lists."""
    open: Callable[[JudgeOptions], Judge]
    """Loads the judge, or points at the server that has it."""
    reads: frozenset[str] = frozenset()
    """Which it reads of ``--judge-model``, ``--prompt-file``, ``--endpoint``, ``--label``, ``--pictures``; a judge that
    comes with the package also of ``--device``, ``--dtype``, ``--batch``, ``--max-new-tokens``."""
    checkpoint: str | None = None
    """Where its checkpoint is published; None = it needs none."""


def judge_names() -> list[str]:
    """All names, checkpoints first."""
    return list(_JUDGES)


def judge_entry(name: str) -> JudgeEntry:
    """The entry of a name, or of a Python file that registers one.

    Raises:
        UserError: If there is none; names the nearest one.
    """
    return entry_of(name, "judge", _JUDGES)


def free_judges() -> list[str]:
    """The names of judges that need no model and no server."""
    return [name for name, entry in _JUDGES.items() if entry.checkpoint is None and "--endpoint" not in entry.reads]


def register_judge(entry: JudgeEntry) -> None:
    """Make a judge known under its name; one of yours that has it already is replaced.

    Raises:
        UserError: If it is the name of one that comes with the package.
    """
    if not is_ours(entry.open):
        refuse_taken(entry.name, "judge", _shipped_names())
    _JUDGES[entry.name] = entry


def open_judge(options: JudgeOptions) -> Judge:
    """Load the judge, or point at the server that has it.

    Raises:
        UserError: If there is no such judge, it needs something that was not given, or would not read what was given.
    """
    entry = judge_entry(options.name)
    given = {
        "--judge-model": options.model is not None,
        "--prompt-file": options.prompt_file is not None,
        "--endpoint": options.endpoint is not None,
        "--label": bool(options.labels),
        "--pictures": options.pictures,
    }
    refuse_unread(entry, [option for option, there in given.items() if there])
    judge = entry.open(options)
    if is_ours(entry.open):
        return judge
    _refuse_strange(judge, entry)
    digest = registering_file(entry.name, "register_judge")
    return judge if digest is None else cast("Judge", _FromFile(judge, digest))


class _FromFile:
    """A user's judge, whose file's content decides its verdicts as well."""

    def __init__(self, judge: Judge, digest: str) -> None:
        self._judge = judge
        self.source = {**judge.source, "file_sha256": digest}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._judge, name)


def refuse_unread(entry: JudgeEntry, given: Iterable[str]) -> None:
    """Refuse options that a judge would not read.

    Raises:
        UserError: Naming the first.
    """
    reads = entry.reads if is_ours(entry.open) else entry.reads | _LOADING  # a user's says it of the others alone
    if useless := [option for option in given if option not in reads]:
        raise UserError(f"judge `{entry.name}` does not read `{useless[0]}`: drop it, or take another judge.")


def _shipped_names() -> list[str]:
    return [name for name, entry in _JUDGES.items() if is_ours(entry.open)]


def _refuse_strange(judge: Any, entry: JudgeEntry) -> None:
    """Refuse a user's judge that is none, or whose verdicts would lie where those of one that is shipped do."""
    there: dict[str, Any] = {name: getattr(judge, name, None) for name in ("name", "metrics", "source", "judge")}
    fit = isinstance(there["metrics"], Sequence) and not isinstance(there["metrics"], str)
    fit = fit and isinstance(there["source"], Mapping) and callable(there["judge"])
    if not fit:
        came = ", ".join(f"{name}={value!r:.40}" for name, value in there.items())
        raise UserError(
            f"what `{entry.name}` opens must be a judge, with `name`, `metrics` (a tuple), `source` (a mapping) and "
            f"`judge` (a method), got {type(judge).__name__} with {came}."
        )
    try:
        dumps(there["source"])
    except (TypeError, ValueError) as error:
        raise UserError(f"judge `{entry.name}` must have a `source` of plain values: {error}") from error
    if strange := [one for one in there["metrics"] if not (isinstance(one, str) and is_known(one))]:
        raise UserError(f"judge `{entry.name}` must name `metrics` that there are, got {strange[0]!r:.80}.")
    refuse_taken(judge.name, "judge", (*_shipped_names(), *_STORED))
    if judge.name.startswith("endpoint:"):
        raise UserError(f"the judge `{judge.name}` has the name of a served model's: rename yours.")


def _refusal_strings(options: JudgeOptions) -> Judge:
    from mm_cb.judges.rules import RefusalStrings

    return RefusalStrings()


def _target_call(options: JudgeOptions) -> Judge:
    from mm_cb.judges.calls import TargetCallJudge

    return TargetCallJudge()


def _endpoint_judge(options: JudgeOptions) -> Judge:
    from mm_cb.core.endpoint import Endpoint
    from mm_cb.judges.prompts import read_template
    from mm_cb.judges.served import EndpointJudge, parse_labels

    if options.endpoint is None or options.model is None or options.prompt_file is None:
        raise UserError(
            "judge `endpoint` needs `--endpoint URL`, `--judge-model NAME` and `--prompt-file FILE` with "
            "{completion}, and perhaps {behavior}."
        )
    endpoint = Endpoint(options.endpoint, options.model, concurrency=options.batch)
    template, labels, room = read_template(options.prompt_file), parse_labels(options.labels), options.max_new_tokens
    return EndpointJudge(endpoint, template, labels, pictures=options.pictures, max_new_tokens=room)


def _checkpoint_judge(options: JudgeOptions) -> Judge:
    from mm_cb.judges import classifiers
    from mm_cb.judges.local import LanguageModel, version_of
    from mm_cb.judges.prompts import read_template

    model = options.model or str(judge_entry(options.name).checkpoint)
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


def _source(options: JudgeOptions, model: str) -> Mapping[str, object]:
    """Taken after loading: only then is it known which commit of a hub id was loaded."""
    from mm_cb.judges.local import version_of

    return {"model": model, **version_of(model), "dtype": options.dtype}


def _prompt(options: JudgeOptions, model: str) -> str:
    from mm_cb.judges.prompts import card_prompts, read_card, read_template

    if options.prompt_file is not None:
        return read_template(options.prompt_file)
    prompts = card_prompts(read_card(model))
    if "prompt" not in prompts:
        raise UserError(
            f"the card of `{model}` shows no prompt: give `--prompt-file` with the one of the strong_reject package, "
            "its last blank included."
        )
    return prompts["prompt"]


def _published(name: str, about: str, checkpoint: str) -> JudgeEntry:
    reads = {"--judge-model", "--device", "--dtype"}
    reads |= set() if name.startswith("llama-guard") else {"--prompt-file", "--batch"}
    return JudgeEntry(name, about, _checkpoint_judge, frozenset(reads), checkpoint)


_LOADING = frozenset({"--device", "--dtype", "--batch"})
_SERVED = frozenset(
    {"--judge-model", "--prompt-file", "--endpoint", "--label", "--pictures", "--batch", "--max-new-tokens"}
)
_STORED = ("refusal-strings (proxy)", "as-run", "newest", "agreement")
"""Names of verdicts, and of what lies beside them."""
_JUDGES: dict[str, JudgeEntry] = {
    entry.name: entry
    for entry in (
        _published("harmbench", "HarmBench's classifier of texts", "cais/HarmBench-Llama-2-13b-cls"),
        _published(
            "harmbench-multimodal",
            "HarmBench's classifier of multimodal behaviours",
            "cais/HarmBench-Llama-2-13b-cls-multimodal-behaviors",
        ),
        _published(
            "harmbench-mistral", "HarmBench's smaller validation classifier", "cais/HarmBench-Mistral-7b-val-cls"
        ),
        _published(
            "llama-guard-3-vision", "Llama Guard 3, which sees the picture", "meta-llama/Llama-Guard-3-11B-Vision"
        ),
        _published("llama-guard-4", "Llama Guard 4, which sees the picture", "meta-llama/Llama-Guard-4-12B"),
        _published("strongreject", "StrongREJECT's grader, fine-tuned", "qylu4156/strongreject-15k-v1"),
        JudgeEntry(
            "endpoint", "any model behind an OpenAI-compatible address, with your prompt", _endpoint_judge, _SERVED
        ),
        JudgeEntry("refusal-strings", "phrases that refusals hold: a proxy, and called so", _refusal_strings),
        JudgeEntry("call", "whether the answer makes the call of a behaviour's `target_call`: a rule", _target_call),
    )
}
