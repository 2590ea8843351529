"""The one runner of benchmarks: asks a model or an endpoint, goes on where it was stopped, scores, measures, writes."""

from __future__ import annotations

import dataclasses
import json
import time
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_cb.benchmarks.base import Benchmark, Task, check_questions
from mm_cb.benchmarks.pictures import fingerprint, ready
from mm_cb.benchmarks.registry import get_benchmark, register_benchmark
from mm_cb.core import hub
from mm_cb.core.chat_replies import CUT, REFUSED
from mm_cb.core.checked import checked, made
from mm_cb.core.compatibility import with_added_fields
from mm_cb.core.errors import UserError, unknown
from mm_cb.core.files import dumps
from mm_cb.core.paths import named_path
from mm_cb.core.places import enclosing_run
from mm_cb.core.progress import Progress
from mm_cb.core.records import Check, Item, RecipeFields
from mm_cb.core.runs import RunDirectory, append_jsonl, hash_inputs, read_run, write_json, write_jsonl
from mm_cb.core.thoughts import answer_in, ends_at_limit, served_as, thought_of
from mm_cb.core.workers import Workers
from mm_cb.data.unknown import note_of_unknown
from mm_cb.inference.base_nll import Likelihood, likelihood_fields
from mm_cb.inference.generation import Engine, LocalEngine, Request, complete_all
from mm_cb.inference.served import open_engine
from mm_cb.inference.source import ModelSource, chosen_name, refuse_lookalike
from mm_cb.inference.subjects import Subject, changes_nothing, idle_note
from mm_cb.inference.unanswered import error_texts, unanswered
from mm_cb.metrics.checks import adapter_acts
from mm_cb.metrics.results import ITEMS, Measurement, find, read_results, write_results
from mm_cb.metrics.table import shipped, to_json
from mm_cb.metrics.whole import refuse_gone

COMPLETIONS = Path("parts") / "completions.jsonl"
METRICS = "metrics.json"
"""Beside the results of metrics that another installation may not know: what they are."""


@dataclass(frozen=True)
class Evaluation:
    """A finished run of a benchmark."""

    benchmark: str
    subject: str
    """What the model is called in results.json."""
    folder: Path
    """The run directory, which `mm-cb report` and `mm_cb.write_report` take."""
    measurements: tuple[Measurement, ...]

    def find(self, metric: str, condition: str = "strict", split: str = "all") -> Measurement | None:
        """One number, or None where it was not measured."""
        return find(self.measurements, self.subject, metric, condition, split)


@dataclass
class Session:
    """One run under way: what a benchmark is handed to score it."""

    run: RunDirectory
    task: Task
    settings: Any
    source: ModelSource | None
    """Who is asked; None where stored answers are scored."""
    subject: str
    seed: int
    weights: Sequence[Path | hub.Repository] = ()
    """The model's part of the run's inputs."""
    answers: Mapping[str, str] = field(default_factory=dict)
    """Question id → completion; the empty string for a question of ``unanswered``."""
    unanswered: Mapping[str, str] = field(default_factory=dict)
    """Question id → ``refused`` or ``cut``: the model has said nothing that could be scored."""
    engine: Engine | None = None
    workers: Workers[Subject] | None = None
    """Processes that hold the model; None = this one alone."""
    tools: Any = None
    """What `Benchmark.begin` opened."""
    progress: Progress | None = None
    idle: bool = False
    """Whether the model's adapter changes nothing, which its items and checks then say."""

    def say(self, text: str) -> None:
        """Print a line above the progress bars, if there are any."""
        if self.progress is not None:
            self.progress.say(text)

    @property
    def requests(self) -> list[Request]:
        """What the model is sent, in the order of the questions."""
        questions = self.task.questions
        pictures = ready(questions)
        return [
            Request(q.id, q.prompt, shown, q.tools, q.opening, self.task.published)
            for q, shown in zip(questions, pictures, strict=True)
        ]

    def likelihood(self) -> dict[str, Likelihood]:
        """By question id ``nll_base`` and ``incoherent``; nothing for a model that is served or was not asked."""
        if self.engine is None:
            return {}
        written = {key: answer and thought_of(answer) + answer for key, answer in self.answers.items()}
        return likelihood_fields(self.engine, self.requests, written, self.settings.batch)


def evaluate(
    benchmark: str | Benchmark,
    model: str,
    adapter: str | Path | None = None,
    *,
    out: str | Path,
    data: str | Path | None = None,
    endpoint: str | None = None,
    subject: str | None = None,
    system: str | None = None,
    probe: str | Path | None = None,
    thinking: bool = False,
    seed: int = 0,
    device: str = "cpu",
    dtype: str = "float32",
    **settings: Any,
) -> Evaluation:
    """Measure a model on a benchmark.

    Args:
        benchmark: A name (``mm-cb eval --list``), a Python file that registers one, or a `Benchmark`.
        model: Hub id, local directory, an embedded model, or the name that ``endpoint`` serves.
        adapter: Folder of a PEFT adapter.
        out: Run directory; an existing one of the same run is gone on with.
        data: Where the questions are; by default where they are published, if they are.
        endpoint: OpenAI-compatible address that serves the model.
        subject: What the model is called in results.json; ``base``, with an adapter ``rr``.
        system: Text in front of every request.
        probe: Folder of a harmfulness probe that withholds answers.
        thinking: Whether the model thinks first, where its chat template can leave that open.
        seed: Seed of everything random in the run.
        device: ``cpu``, ``cuda``, ``cuda:1``.
        dtype: ``float32``, ``bfloat16``, ``float16``.
        **settings: Of the benchmark: ``max_new_tokens``, ``limit``, ``batch`` and its own.

    Returns:
        The measurements, and the folder that a report takes.

    Raises:
        UserError: If something is not as expected: what was expected, what came, what to do.
        TypeError: If an argument is of another type.
    """
    if not isinstance(benchmark, str | Benchmark):
        raise TypeError(f"`benchmark` must be a name or a Benchmark, got {type(benchmark).__name__}.")
    chosen = get_benchmark(benchmark) if isinstance(benchmark, str) else benchmark
    if not isinstance(benchmark, str):
        register_benchmark(benchmark)
    adapter, probe = (None if one is None else str(one) for one in (adapter, probe))
    source = ModelSource(model, adapter, device, dtype, endpoint, system, probe=probe, thinking=thinking)
    name = chosen_name(source, subject)
    read = _settings(chosen.settings, settings)
    folder = named_path("out", out, "the path of a run directory")
    if data is not None:
        named_path("data", data, "the path of the questions, or a data set's name")
    return run_benchmark(chosen, source, read, folder, data=data, subject=name, seed=seed)


def run_benchmark(
    benchmark: Benchmark,
    source: ModelSource,
    settings: Any,
    out: Path,
    *,
    data: str | Path | None,
    subject: str,
    seed: int,
    workers: Workers[Subject] | None = None,
) -> Evaluation:
    """As `evaluate`, with everything read; ``workers`` answer several batches side by side."""
    hub.keep_to(out)
    where = _where(benchmark, data)
    task = benchmark.task(where, settings, source)
    recipe = {"benchmark": benchmark.name, **source.identity(), "subject": subject, **task.identity}
    recipe |= {"fiction": True} if source.fiction else {}
    weights = source.weights()
    _refuse_blind(benchmark, source, task)
    inputs = _inputs(task, [*hub.used(where, kind="dataset"), *weights])
    with RunDirectory(out, "eval", recipe, seed, inputs=inputs) as run:
        session = Session(run, task, settings, source, subject, seed, weights, workers=workers)
        if not (run.finished and benchmark.settled(out)):
            with Progress() as progress:
                session.progress = progress
                benchmark.begin(session)
                _ask(benchmark, session)
                _finish(benchmark, session)
    return _evaluation(benchmark, out, subject)


def _refuse_blind(benchmark: Benchmark, source: ModelSource, task: Task) -> None:
    """Refuse to show pictures to a model of text alone; what a served one sees nobody knows."""
    pictured = [question.id for question in task.questions if question.pictures]
    if source.endpoint is not None or not pictured:
        return
    from mm_cb.models.families import sees

    if not sees(source.model):
        raise UserError(
            f"`{source.model}` is a model of text alone, and {len(pictured)} of {len(task.questions)} questions of "
            f"{benchmark.title} have a picture, such as `{pictured[0]}`; possible are `mm-cb eval over-refusal` with "
            "requests that have none, and text benchmarks by other harnesses, see docs/other_harnesses.md."
        )


def _ask(benchmark: Benchmark, session: Session) -> None:
    """Get the answers to all questions; those that are in the run's folder are not asked for again."""
    started = time.monotonic()
    requests = session.requests
    assert session.source is not None and session.progress is not None
    shorter = "a --limit, fewer --max-new-tokens, a larger --batch, or a GPU"
    task = session.progress.task(f"{session.subject}: {benchmark.title}", total=len(requests), shorter=shorter)
    session.engine = open_engine(session.source, session.subject, session.settings.batch, session.workers)
    if isinstance(session.engine, LocalEngine) and changes_nothing(session.engine.subject):
        session.idle = True
        session.say(idle_note(session.engine.subject))
    if isinstance(session.engine, LocalEngine):
        tokenizer = session.engine.subject.model.processor.tokenizer
        if told := note_of_unknown(tokenizer, ((f"request `{r.key}`", (r.text,)) for r in requests), "requests"):
            session.say(told)
    store, longest = session.run.path / COMPLETIONS, session.settings.max_new_tokens
    session.answers = complete_all(session.engine, requests, store, longest, task)
    session.unanswered = {key: kind for key, (kind, _) in unanswered(store).items()}
    if benchmark.timed:
        seconds = round(time.monotonic() - started, 1)
        passes = session.engine.forward_passes if isinstance(session.engine, LocalEngine) else None
        if passes:
            session.say(f"{passes} forward passes in batches of {session.settings.batch}, {seconds} s")
        spent = {"stage": f"{benchmark.title} {session.subject}", "seconds": seconds, "forward_passes": passes}
        append_jsonl(session.run.path / "timings.jsonl", spent)


def score_answers(
    benchmark: Benchmark, stored: Any, out: Path, *, data: str | Path | None, subject: str, seed: int
) -> Evaluation:
    """Score answers that were stored before, without a model.

    Raises:
        UserError: If the answers are not as expected, or some are missing.
    """
    if not stored.answers:
        raise UserError(f"`mm-cb score {benchmark.name}` needs `--answers`: the stored answers.")
    file, where = Path(stored.answers), _where(benchmark, data)
    if file.is_file() and Path(where).is_file() and file.samefile(where):
        raise UserError(f"`--answers` must be another file than `--data`, the questions; got `{file}` twice.")
    questions = benchmark.questions(where, benchmark.settings())
    check_questions(questions, where)
    answers = benchmark.stored_answers(stored, questions)
    identity = {"questions_sha256": fingerprint(questions, pictures=False)}
    recipe = {"benchmark": benchmark.name, "responses": str(file), "subject": subject, **identity}
    task = Task(questions, identity)
    return finish_stored(benchmark, recipe, [file], out, subject=subject, seed=seed, task=task, answers=answers)


def finish_stored(
    benchmark: Benchmark,
    recipe: RecipeFields,
    files: Sequence[Path],
    out: Path,
    *,
    subject: str,
    seed: int,
    task: Task | None = None,
    answers: Mapping[str, str] | None = None,
    tools: Any = None,
) -> Evaluation:
    """Write the run of answers that nobody asked for here.

    Args:
        benchmark: Whose they are.
        recipe: What the run is, and where its answers are.
        files: The files that hold them.
        out: Run directory.
        subject: Who answered.
        seed: The run's seed.
        task: The questions, where the benchmark needs them to score.
        answers: By question id, likewise.
        tools: What the benchmark has read instead.
    """
    refuse_lookalike(subject)
    failed, told = error_texts(answers or {})
    if told:
        warnings.warn(told, stacklevel=2)
    made_up = bool(files) and all(map(_of_fiction, files))
    recipe = {**recipe, **({"fiction": True} if made_up else {})}
    with RunDirectory(out, "eval", recipe, seed, inputs=files) as run:
        known = task or Task((), {})
        said = {id: answer_in(answer) for id, answer in (answers or {}).items()}
        session = Session(run, known, benchmark.settings(), None, subject, seed, answers=said, tools=tools)
        session.unanswered = {id: CUT for id, answer in said.items() if answer.cut} | dict.fromkeys(failed, REFUSED)
        if not run.finished:
            _finish(benchmark, session)
    return _evaluation(benchmark, out, subject)


def _of_fiction(file: Path) -> bool:
    """Whether stored answers lie in a run whose model's world is made up."""
    run = enclosing_run(file)
    recipe = None if run is None else with_added_fields("eval", read_run(run)["recipe"])
    return recipe is not None and recipe.get("fiction") is True


def _finish(benchmark: Benchmark, session: Session) -> None:
    """Score, measure, and write the run's files."""
    items = [_with_source(item) for item in benchmark.items(session)]
    if session.idle:
        items = [{**item, "adapter_changes_nothing": True} for item in items]
    checks, idle = benchmark.checks(session), adapter_acts(items)
    _refuse_unreadable(benchmark, "items", items, Item)
    _refuse_unreadable(benchmark, "checks", checks or (), Check)
    measured = benchmark.measure(items, session)
    _refuse_unreadable(benchmark, "measure", map(dataclasses.asdict, measured), Measurement)
    folder = session.run.path
    write_jsonl(folder / "items.jsonl", items)
    if checks is not None or idle:
        write_json(folder / "checks.json", [*(checks or ()), *idle])
    if foreign := [to_json(one) for one in benchmark.metrics if not shipped(one.name)]:
        write_json(folder / METRICS, foreign)
    write_results(folder / "results.json", measured)
    session.run.finish()


def _refuse_unreadable(benchmark: Benchmark, method: str, records: Iterable[Any], kind: type[Any]) -> None:
    """Refuse what a benchmark's own code gives and no reader of the run would take, before any of it is written.

    Raises:
        UserError: Naming the file, the question and the key.
    """
    read = made if dataclasses.is_dataclass(kind) else checked
    for record in records:
        id = record.get("id") if isinstance(record, Mapping) else None
        where = f"{benchmark.written_in}: what `{method}` gives" + (f" for question `{id!s:.80}`" if id else "")
        try:
            read(json.loads(dumps(record)), kind, where)
        except (UserError, TypeError, ValueError) as error:
            told = str(error) if isinstance(error, UserError) else f"{where} must be plain values: {error}"
            raise UserError(f"{told.rstrip('.')}; correct it and give the same command again.") from error


def _with_source(item: Item) -> Item:
    """An item with the thought that was taken off its completion, the model that its server names, and how it ended."""
    thought, served = thought_of(item.get("completion")), served_as(item.get("completion"))
    item = {**item, "thought": thought} if thought else item
    item = {**item, "served": served} if served else item
    return {**item, "at_limit": True} if ends_at_limit(item.get("completion")) else item


def _evaluation(benchmark: Benchmark, out: Path, subject: str) -> Evaluation:
    refuse_gone(Path(out), ITEMS, "results.json")
    return Evaluation(benchmark.name, subject, Path(out), tuple(read_results(Path(out) / "results.json")))


def _where(benchmark: Benchmark, data: str | Path | None) -> str:
    where = benchmark.dataset if data is None else str(data)
    if not where:
        raise UserError(f"benchmark `{benchmark.name}` needs `--data`: {benchmark.needs}.")
    return where


def _inputs(task: Task, more: Sequence[Path | hub.Repository]) -> Any:
    if isinstance(task.inputs, Mapping):
        return {**task.inputs, **hash_inputs(more)}
    return [*task.inputs, *more]


def _settings(kind: type[Any], given: Mapping[str, object]) -> Any:
    """The settings of a benchmark, with the nearest valid name for one that it does not have."""
    valid = [field.name for field in dataclasses.fields(kind)]
    for name in given:
        if name not in valid:
            raise unknown("setting", name, valid)
    return kind(**given)
