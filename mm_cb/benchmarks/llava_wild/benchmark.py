"""LLaVA-Bench-in-the-Wild: answers, a judge that compares each with a reference answer, and its scores."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mm_cb.benchmarks.base import Benchmark, Task
from mm_cb.benchmarks.settings import AskSettings, Settings, setting, setting_within
from mm_cb.core.errors import UserError
from mm_cb.core.limits import LIMITS
from mm_cb.core.records import Item
from mm_cb.metrics.table import Metric

if TYPE_CHECKING:
    from mm_cb.benchmarks.llava_wild.judging import Comparer, Judgement, JudgeRule, JudgingSettings
    from mm_cb.benchmarks.llava_wild.questions import WildQuestion
    from mm_cb.benchmarks.llava_wild.reviews import ItemFields
    from mm_cb.benchmarks.runner import Session
    from mm_cb.inference.source import ModelSource
    from mm_cb.metrics.results import Measurement

_PREFIX = "llava_bench_"
TEMPERATURE = 0.2
"""At which the original's judge samples."""


@dataclass(frozen=True)
class WildSettings(AskSettings):
    """How answers are made and judged."""

    max_new_tokens: int = setting_within(LIMITS["max_new_tokens"], 1024, "Longest answer, in tokens.")
    judge_runs: int = setting_within(
        LIMITS["judge_runs"], 1, "How often every answer is judged; published scores are means of three."
    )
    orders: str = setting(
        "reference_first",
        "Which answer the judge reads first; the original always the reference:",
        choices=("reference_first", "both"),
        metavar="WHICH",
    )
    judge_temperature: float = setting_within(
        LIMITS["judge_temperature"], TEMPERATURE, "Temperature of a served judge."
    )
    judge_system: str = setting("", "The judge's system message; the original sends one sentence, later ones none.")
    judge_model: str = setting("", "The judge: its served name, a folder or a hub id.", identity=False, metavar="J")
    judge_endpoint: str | None = setting(
        None,
        "OpenAI-compatible address of the judge; its key in MM_CB_API_KEY.",
        identity=False,
        metavar="URL",
    )
    rule_file: str = setting("", "The original llava/eval/table/rule.json (checked).", identity=False, metavar="FILE")
    own_rule: str = setting(
        "", "A rule text of your own: scores compare with nobody else's.", identity=False, metavar="FILE"
    )
    answers_of: str = setting(
        "",
        "Judge the answers of this earlier run of the same model, ask none again.",
        identity=False,
        metavar="RUN_DIR",
    )


@dataclass(frozen=True)
class WildReviews(Settings):
    """Judgements that are there already."""

    reviews: tuple[str, ...] = setting(
        (), "Official review files (JSON lines), several after one another.", many=True, metavar="FILE..."
    )
    official_failures: bool = setting(False, "Count failed judgements as -1 points, as the original does.")


@dataclass(frozen=True)
class _JudgingJob:
    """What is judged, and by whom."""

    questions: list[WildQuestion]
    judge: ModelSource
    plan: JudgingSettings


@dataclass
class _Tools:
    """What a run opened and found."""

    comparer: Comparer
    by_series: dict[str, float] = field(default_factory=dict)
    """The official score of every judge run and order by itself."""


def open_comparer(judge: ModelSource, settings: WildSettings) -> Comparer:
    """Point at the judge's server, or load the judge.

    Raises:
        UserError: If it is not there, or a greedy one is asked to draw.
    """
    from mm_cb.benchmarks.llava_wild import judging
    from mm_cb.core.endpoint import Endpoint

    if judge.endpoint is not None:
        return judging.ServedComparer(Endpoint(judge.endpoint, judge.model), settings.judge_temperature)
    if settings.judge_runs > 1:
        raise UserError("a local judge answers greedily: `judge_runs` above 1 would repeat the same judgements.")
    if settings.judge_temperature != TEMPERATURE:
        raise UserError("a local judge answers greedily: `judge_temperature` belongs to `--judge-endpoint`.")
    from mm_cb.judges.local import LanguageModel

    return judging.LocalComparer(LanguageModel.load(judge.model, device=judge.device, dtype=judge.dtype))


class LlavaWild(Benchmark):
    """LLaVA-Bench-in-the-Wild."""

    name = "llava-wild"
    title = "LLaVA-Wild"
    about = "open questions about pictures, each answer judged beside a reference answer"
    needs = "a judge (--judge-model, served or local) and the original's rule file"
    metrics = (Metric("llava_wild", "LLaVA-Wild", "judge's score / the reference's", promised=True, shipped=True),)
    settings = WildSettings
    stored = WildReviews
    dataset = "lmms-lab/llava-bench-in-the-wild"
    data_help = "Folder with the original's files, or a hub id with its columns."
    example = "--rule-file rule.json --judge-model J"
    score_example = "--reviews review.jsonl"
    timed = False

    def task(self, data: str, settings: WildSettings, source: ModelSource) -> Task:
        """The questions, the rule and the judge; which server has the judge today does not belong to the run."""
        from mm_cb.benchmarks.llava_wild.judging import ORDERS, JudgingSettings
        from mm_cb.benchmarks.llava_wild.questions import as_asked, fingerprint, read_questions
        from mm_cb.inference.source import ModelSource

        if not settings.judge_model or bool(settings.rule_file) == bool(settings.own_rule):
            raise UserError("`--model` needs `--judge-model` and one of `--rule-file`, `--own-rule`.")
        rule = _rule(settings)
        judge = ModelSource(settings.judge_model, None, source.device, "bfloat16", settings.judge_endpoint)
        questions = read_questions(data)[: settings.limit]
        identity: dict[str, object] = {"settings": settings.identity(), "questions_sha256": fingerprint(questions)}
        identity |= {"judge": judge.model, "judge_endpoint": "served" if judge.endpoint else None}
        identity |= {"rule_sha256": rule.sha256, "rule_is_original": rule.original}
        orders = ORDERS if settings.orders == "both" else ORDERS[:1]
        plan = JudgingSettings(rule, settings.judge_runs, orders, settings.judge_system)
        job = _JudgingJob(questions, judge, plan)
        return Task([as_asked(q) for q in questions], identity, judge.weights(), job, published=True)

    def loading(self, settings: WildSettings) -> Sequence[str]:
        """The device of a judge that is not served."""
        return () if settings.judge_endpoint else ("--device",)

    def begin(self, session: Session) -> None:
        """Take the answers of an earlier run over; a judge that cannot be had is known before any answer."""
        from mm_cb.benchmarks.llava_wild.answers import take_answers

        if session.settings.answers_of:
            take_answers(Path(session.settings.answers_of), session.run, session.weights)
        session.tools = _Tools(open_comparer(session.task.more.judge, session.settings))

    def items(self, session: Session) -> list[Item]:
        """Have the answers judged; every judge run is also kept in the original's own layout under ``reviews/``."""
        from mm_cb.benchmarks.llava_wild import judging
        from mm_cb.benchmarks.llava_wild.reviews import in_canonical_order, items_of, unjudged_items

        more: _JudgingJob = session.task.more
        assert session.progress is not None
        answered = [q for q in more.questions if q.id not in session.unanswered]
        store = session.run.path / "parts" / "judgements.jsonl"
        judgements = judging.judge_answers(
            answered, session.answers, more.plan, session.tools.comparer, store, session.progress
        )
        fields = _fields(session)
        session.tools.by_series = _write_series(session, answered, judgements, fields)
        reviews = {q.id: [judging.review_of(q, judgement) for judgement in judgements[q.id]] for q in answered}
        items = [item for q in answered for item in items_of(q.id, reviews[q.id], fields[q.id])]
        for q in more.questions:
            if (lost := session.unanswered.get(q.id)) is not None:
                items += unjudged_items(q.id, q.category, {**fields[q.id], "gibberish": None}, lost)
        return in_canonical_order(items)

    def measure(self, items: list[Item], session: Session) -> list[Measurement]:
        """The scores, with those of every judge run and order among the counts."""
        return [_with_series(m, session.tools.by_series) for m in super().measure(items, session)]

    def score_stored(self, stored: WildReviews, out: Path, *, data: str | None, subject: str, seed: int) -> None:
        """Summarise review files, each as a subject of its own."""
        from mm_cb.benchmarks.llava_wild.stored import run_reviews

        files = [Path(name) for name in stored.reviews]
        run_reviews(files, out, official_failures=stored.official_failures, seed=seed)

    def show(self, folder: Path, subject: str) -> None:
        """Scores by category, and what could make them lie."""
        from mm_cb.benchmarks.llava_wild.stored import show

        show(folder)

    def settled(self, folder: Path) -> bool:
        """Not without a score for want of judgements: a corrected judge is asked for them."""
        from mm_cb.benchmarks.llava_wild.judging import UNREADABLE, Judgement, readable
        from mm_cb.core.checked import read_records
        from mm_cb.metrics.results import read_results

        measured = (m for m in read_results(folder / "results.json") if (m.condition, m.split) == ("official", "all"))
        if all(m.value is not None for m in measured):
            return True
        stores = (folder / "parts" / name for name in ("judgements.jsonl", UNREADABLE))
        return all(readable(record) for store in stores for record in read_records(store, Judgement))

    def refuse(self, folder: Path) -> None:
        """Say why there is no score."""
        from mm_cb.core.runs import read_run

        _refuse_without_score(folder, read_run(folder)["recipe"]["judge"])


def _rule(settings: WildSettings) -> JudgeRule:
    from mm_cb.benchmarks.llava_wild.judging import read_own_rule, read_rule

    return read_rule(Path(settings.rule_file)) if settings.rule_file else read_own_rule(Path(settings.own_rule))


def _refuse_without_score(folder: Path, judge: str) -> None:
    """Say that a finished run has no score, and what the judge answers instead of two numbers."""
    from mm_cb.benchmarks.llava_wild.judging import UNREADABLE, Judgement
    from mm_cb.benchmarks.llava_wild.reviews import parse_scores
    from mm_cb.benchmarks.llava_wild.stored import SILENT, why_no_score
    from mm_cb.core.chat_replies import unread
    from mm_cb.core.checked import read_records
    from mm_cb.metrics.results import read_results

    (m,) = (m for m in read_results(folder / "results.json") if (m.condition, m.split) == ("official", "all"))
    if m.value is not None or why_no_score(m) == SILENT:
        return
    kept = (
        "What could be read is kept: mend the judge and run the same command again, or ask another one, with another "
        f"`--out` and `--answers-of {folder}`."
    )
    kept_apart = folder / "parts" / UNREADABLE
    records = read_records(kept_apart if kept_apart.is_file() else folder / "parts" / "judgements.jsonl", Judgement)
    refused = [record["refused"] for record in records if record["content"] is None]
    prose = [record["content"] for record in records if record["content"] is not None]
    example = next((content for content in prose if parse_scores(content) is None), None)
    if example is not None and m.counts["failed"] > len(refused):
        raise UserError(
            f"the judge `{judge}` must begin every judgement with two scores, {m.counts['failed']:.0f} of "
            f"{m.counts['judgements']:.0f} do not (at most 2 % may), such as {unread(example)}: no score. {kept}"
        )
    if refused:
        raise UserError(
            f"the judge `{judge}` must take every request, {len(refused)} of {m.counts['judgements']:.0f} it refused "
            f"(at most 2 % may fail), the first: {refused[0].rstrip('.')}; no score. {kept}"
        )
    raise UserError(f"no score: {why_no_score(m)} (judge `{judge}`). {kept}")


def _fields(session: Session) -> dict[str, ItemFields]:
    """What the items of a question hold beside its scores, by question id."""
    from mm_cb.metrics.degenerate import degenerate

    likelihood = session.likelihood()
    found: dict[str, ItemFields] = {}
    for q in session.task.more.questions:
        answer, likely = session.answers[q.id], likelihood.get(q.id)
        broken = degenerate(answer) is not None or bool(likely and likely["incoherent"])
        own: ItemFields = {"subject": session.subject, "prompt": q.text, "completion": answer, "gibberish": broken}
        own["seed"] = session.seed
        found[q.id] = own | likely if likely else own
    return found


def _write_series(
    session: Session,
    questions: Sequence[WildQuestion],
    judgements: Mapping[str, Sequence[Judgement]],
    fields: Mapping[str, ItemFields],
) -> dict[str, float]:
    """Write every judge run as a review file; returns the official score of each, where it has one."""
    from mm_cb.benchmarks.llava_wild.judging import review_of
    from mm_cb.benchmarks.llava_wild.reviews import items_of
    from mm_cb.core.runs import write_jsonl
    from mm_cb.metrics.results import find, measure

    found: dict[str, float] = {}
    for number, order in sorted({(j["run"], j["order"]) for own in judgements.values() for j in own}):
        chosen = {
            q.id: next(j for j in judgements[q.id] if (j["run"], j["order"]) == (number, order)) for q in questions
        }
        reviews = session.run.path / "reviews" / f"run-{number}-{order}.jsonl"
        write_jsonl(reviews, [_official(q, chosen[q.id]) for q in questions])
        part = [item for q in questions for item in items_of(q.id, [review_of(q, chosen[q.id])], fields[q.id])]
        score = find(measure(part, pairs=[], seed=session.seed), session.subject, "llava_wild", "official")
        if score is not None and score.value is not None:
            found[f"run_{number}_{order}"] = score.value
    return found


def _official(question: WildQuestion, judgement: Judgement) -> dict[str, object]:
    from mm_cb.benchmarks.llava_wild.judging import review_of

    scores = review_of(question, judgement).scores or (-1, -1)
    record = {"question_id": question.id, "category": _PREFIX + question.category}
    return {**record, "content": judgement["content"] or "", "tuple": list(scores)}


def _with_series(m: Measurement, by_series: Mapping[str, float]) -> Measurement:
    if (m.metric, m.condition, m.split) != ("llava_wild", "official", "all") or len(by_series) < 2:
        return m
    return dataclasses.replace(m, counts={**m.counts, **by_series})
