"""``mm-cb eval mmmu``: stored answers scored, or a model asked and its answers scored."""

from __future__ import annotations

import time
from dataclasses import asdict
from pathlib import Path

from mm_cb.benchmarks.mmmu.output import finish, show
from mm_cb.benchmarks.mmmu.protocol import protocol
from mm_cb.benchmarks.mmmu.score import score_responses
from mm_cb.benchmarks.mmmu.settings import Settings
from mm_cb.benchmarks.mmmu.stored import read_predictions, read_responses, response_files
from mm_cb.core.hub import keep_to, used
from mm_cb.core.runs import RunDirectory, append_jsonl
from mm_cb.inference.source import Source


def run_responses(folder: Path, out: Path, *, subjects: tuple[str, ...], subject: str, seed: int) -> None:
    """Score stored outputs in the official layout."""
    files = response_files(folder, subjects)
    scored = score_responses(read_responses(files))
    recipe = {"benchmark": "mmmu", "responses": str(folder), "subjects": list(subjects), "subject": subject}
    with RunDirectory(out, "eval", recipe, seed, inputs=files) as run:
        if not run.finished:
            finish(run, scored, subject, seed=seed)
        show(run.path, subject)


def run_predictions(
    predictions: Path, answers: Path, out: Path, *, subjects: tuple[str, ...], subject: str, seed: int
) -> None:
    """Score parsed answers against an official answer file; which letters were drawn is not known, so nor is strict."""
    scored = read_predictions(predictions, answers, subjects)
    recipe = {"benchmark": "mmmu", "predictions": str(predictions), "answers": str(answers)}
    recipe |= {"subjects": ",".join(subjects), "subject": subject}
    with RunDirectory(out, "eval", recipe, seed, inputs=[predictions, answers]) as run:
        if not run.finished:
            finish(run, scored, subject, seed=seed)
        show(run.path, subject)


def run_model(source: Source, settings: Settings, out: Path, *, data: str | None, subject: str, seed: int) -> None:
    """Ask a model all questions and score its answers; a run that was stopped goes on where it was."""
    from mm_cb.attacks.run import weights_of
    from mm_cb.benchmarks.mmmu.prompt import request
    from mm_cb.benchmarks.mmmu.questions import fingerprint, read_questions
    from mm_cb.core.progress import Progress, console
    from mm_cb.inference.generation import LocalEngine, complete_all, refusal_note
    from mm_cb.inference.served import open_engine

    keep_to(out)
    data = data or protocol().dataset
    questions = read_questions(data, settings)
    requests = [request(question, settings.prompt, settings.pictures) for question in questions]
    asked = {name: value for name, value in asdict(settings).items() if name != "batch"}
    recipe = {"benchmark": "mmmu", **source.identity(), "subject": subject, "settings": asked}
    recipe["questions_sha256"] = fingerprint(questions)
    weights = weights_of(source.model, source.adapter) if source.endpoint is None else []
    inputs = [*weights, *used(data, kind="dataset")]
    with RunDirectory(out, "eval", recipe, seed, inputs=inputs) as run:
        store = run.path / "parts" / "completions.jsonl"
        if not run.finished:
            started = time.monotonic()
            engine = open_engine(source, subject, settings.batch)
            with Progress() as progress:
                task = progress.task(f"{subject}: MMMU", total=len(requests))
                completions = complete_all(engine, requests, store, settings.max_new_tokens, task)
                seconds = round(time.monotonic() - started, 1)
                passes = engine.forward_passes if isinstance(engine, LocalEngine) else None
                if passes:
                    progress.say(f"{passes} forward passes in batches of {settings.batch}, {seconds} s")
            spent = {"stage": f"MMMU {subject}", "seconds": seconds, "forward_passes": passes}
            append_jsonl(run.path / "timings.jsonl", spent)
            scored = score_responses(q.answered(completions[q.id]) for q in questions)
            finish(run, scored, subject, {r.key: r.text for r in requests}, seed)
        show(run.path, subject)
        if note := refusal_note(store):
            console().print(note)
