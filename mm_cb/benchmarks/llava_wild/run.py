"""``mm-cb eval llava-wild --model``: answers, judgements, scores; stopped anywhere, it goes on there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mm_cb.benchmarks.llava_wild import judging
from mm_cb.benchmarks.llava_wild.answers import take_answers
from mm_cb.benchmarks.llava_wild.judging import ORDERS, Comparer, Plan, Rule
from mm_cb.benchmarks.llava_wild.questions import Question, fingerprint, protocol, read_questions
from mm_cb.benchmarks.llava_wild.reviews import in_canonical_order, items_of, parse_scores
from mm_cb.benchmarks.llava_wild.stored import show, why_no_score
from mm_cb.core import hub
from mm_cb.core.endpoint import Endpoint
from mm_cb.core.errors import UserError
from mm_cb.core.runs import RunDirectory, read_jsonl, write_jsonl
from mm_cb.inference.source import Source
from mm_cb.metrics.degenerate import degenerate
from mm_cb.metrics.results import Measurement, find, measure, read_results, write_results

_PREFIX = "llava_bench_"


@dataclass(frozen=True)
class Settings:
    """How answers are made and judged: everything that ``key=value`` can change."""

    max_new_tokens: int = field(default_factory=lambda: protocol()["max_new_tokens"])
    judge_runs: int = 1
    """How often every answer is judged; the published scores are means of three."""
    orders: str = "reference_first"
    """``reference_first`` (as the original) or ``both``."""
    judge_temperature: float = field(default_factory=lambda: protocol()["judge_temperature"])
    judge_system: str = ""
    """The judge's system message; the original sends one sentence, later harnesses none."""
    limit: int = 0
    """First so many questions, for a trial; 0 = all."""
    batch: int = 8
    """Questions answered at once. No part of the run's identity."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("batch", "max_new_tokens", "judge_runs"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.orders not in (ORDERS[0], "both"):
            raise UserError(f"`orders` must be {ORDERS[0]} or both, got `{self.orders}`.")


@dataclass(frozen=True)
class JudgeSource:
    """Who judges."""

    model: str
    """The name it is served under, or a folder or hub id."""
    endpoint: str | None = None
    device: str = "cpu"
    dtype: str = "bfloat16"


def open_comparer(judge: JudgeSource, settings: Settings) -> Comparer:
    """Point at the judge's server, or load the judge.

    Raises:
        UserError: If it is not there, or a greedy one is asked to draw.
    """
    if judge.endpoint is not None:
        return judging.ServedComparer(Endpoint(judge.endpoint, judge.model), settings.judge_temperature)
    if settings.judge_runs > 1:
        raise UserError("a local judge answers greedily: `judge_runs` above 1 would repeat the same judgements.")
    if settings.judge_temperature != protocol()["judge_temperature"]:
        raise UserError("a local judge answers greedily: `judge_temperature` belongs to `--judge-endpoint`.")
    from mm_cb.judges.local import LanguageModel

    return judging.LocalComparer(LanguageModel.load(judge.model, device=judge.device, dtype=judge.dtype))


def run_wild(
    source: Source,
    judge: JudgeSource,
    rule: Rule,
    settings: Settings,
    out: Path,
    *,
    data: str | None,
    subject: str,
    seed: int,
    answers_of: Path | None = None,
) -> None:
    """Answer the questions (or take the answers of an earlier run over), have the answers judged, and score them.

    Raises:
        UserError: If the data, the model or the judge are not as expected, or so many judgements failed that there is
            no score; what was answered and judged is kept.
    """
    from mm_cb.attacks.run import weights_of
    from mm_cb.core.progress import Progress
    from mm_cb.inference.base_nll import likelihood_fields
    from mm_cb.inference.generation import Request, complete_all
    from mm_cb.inference.served import open_engine

    hub.keep_to(out)
    data = data or str(protocol()["dataset"])
    questions = read_questions(data)[: settings.limit or None]
    kept = {key: value for key, value in dataclasses.asdict(settings).items() if key != "batch"}
    recipe = {"benchmark": "llava-wild", **source.identity(), "subject": subject, "settings": kept}
    recipe |= {"questions_sha256": fingerprint(questions), "judge": judge.model}
    recipe["judge_endpoint"] = "served" if judge.endpoint else None
    recipe |= {"rule_sha256": rule.sha256, "rule_is_original": rule.original}
    weights = [] if source.endpoint else weights_of(source.model, source.adapter)
    judges = [] if judge.endpoint else weights_of(judge.model, None)
    inputs = [*weights, *judges, *hub.used(data, kind="dataset")]
    with RunDirectory(out, "eval", recipe, seed, inputs=inputs) as run:
        if answers_of is not None:
            take_answers(answers_of, run, weights)
        if not run.finished:
            with Progress() as progress:
                comparer = open_comparer(judge, settings)  # a judge that cannot be had is known before any answer
                asked = [Request(q.id, q.text, (q.picture,)) for q in questions]
                task = progress.task(f"{subject}: LLaVA-Wild", total=len(asked))
                engine = open_engine(source, subject, settings.batch)
                store = run.path / "parts"
                answers = complete_all(engine, asked, store / "completions.jsonl", settings.max_new_tokens, task)
                orders = ORDERS if settings.orders == "both" else ORDERS[:1]
                plan = Plan(rule, settings.judge_runs, orders, settings.judge_system)
                judgements = judging.judge_answers(
                    questions, answers, plan, comparer, store / "judgements.jsonl", progress
                )
            likelihood = likelihood_fields(engine, asked, answers, settings.batch)
            _finish(run, questions, answers, judgements, likelihood, subject, seed)
        show(run.path)
        _refuse_without_score(run.path, judge.model)


def _refuse_without_score(folder: Path, judge: str) -> None:
    """Say that a finished run has no score, and what the judge answers instead of two numbers."""
    (m,) = (m for m in read_results(folder / "results.json") if (m.condition, m.split) == ("official", "all"))
    if m.value is not None:
        return
    kept = f"All is kept; ask a judge that keeps to the rule, with another `--out` and `--answers-of {folder}`."
    records = read_jsonl(folder / "parts" / "judgements.jsonl")
    refused = [record["refused"] for record in records if record["content"] is None]
    prose = [record["content"] for record in records if record["content"] is not None]
    example = next((content for content in prose if parse_scores(content) is None), None)
    if example is not None and m.counts["failed"] > len(refused):
        raise UserError(
            f"the judge `{judge}` must begin every judgement with two scores, {m.counts['failed']:.0f} of "
            f"{m.counts['judgements']:.0f} do not (at most 2 % may), such as `{example[:80]}`: no score. {kept}"
        )
    if refused:
        raise UserError(
            f"the judge `{judge}` must take every request, {len(refused)} of {m.counts['judgements']:.0f} it refused "
            f"(at most 2 % may fail), the first: {refused[0].rstrip('.')}; no score. {kept}"
        )
    raise UserError(f"no score: {why_no_score(m)} (judge `{judge}`). {kept}")


def _finish(
    run: RunDirectory,
    questions: Sequence[Question],
    answers: Mapping[str, str],
    judgements: Mapping[str, list[dict[str, Any]]],
    likelihood: Mapping[str, Mapping[str, Any]],
    subject: str,
    seed: int,
) -> None:
    """Items, results, and every judge run in the original's own layout under ``reviews/``."""
    fields = {
        q.id: {
            "subject": subject,
            "prompt": q.text,
            "completion": answers[q.id],
            "gibberish": degenerate(answers[q.id]) is not None or likelihood.get(q.id, {}).get("incoherent", False),
            "seed": seed,
            **likelihood.get(q.id, {}),
        }
        for q in questions
    }
    series = sorted({(j["run"], j["order"]) for found in judgements.values() for j in found})
    by_series: dict[str, float] = {}
    for number, order in series:
        chosen = {
            q.id: next(j for j in judgements[q.id] if (j["run"], j["order"]) == (number, order)) for q in questions
        }
        official = [_official(q, chosen[q.id]) for q in questions]
        write_jsonl(run.path / "reviews" / f"run-{number}-{order}.jsonl", official)
        part = [i for q in questions for i in items_of(q.id, [judging.review_of(q, chosen[q.id])], fields[q.id])]
        score = find(measure(part, pairs=[], seed=seed), subject, "llava_wild", "official")
        if score is not None and score.value is not None:
            by_series[f"run_{number}_{order}"] = score.value
    items = [
        item
        for q in questions
        for item in items_of(q.id, [judging.review_of(q, j) for j in judgements[q.id]], fields[q.id])
    ]
    items = in_canonical_order(items)
    write_jsonl(run.path / "items.jsonl", items)
    measured = measure(items, pairs=[], seed=seed)
    write_results(run.path / "results.json", [_with_series(m, by_series) for m in measured])
    run.finish()


def _official(question: Question, judgement: Mapping[str, Any]) -> dict[str, Any]:
    scores = judging.review_of(question, judgement).scores or (-1, -1)
    record = {"question_id": question.id, "category": _PREFIX + question.category}
    return {**record, "content": judgement["content"] or "", "tuple": list(scores)}


def _with_series(m: Measurement, by_series: Mapping[str, float]) -> Measurement:
    if (m.metric, m.condition, m.split) != ("llava_wild", "official", "all") or len(by_series) < 2:
        return m
    return dataclasses.replace(m, counts={**m.counts, **by_series})
