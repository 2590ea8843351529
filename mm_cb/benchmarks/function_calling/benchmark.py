"""Function calling: is the right function called with the right arguments, and none where none fits?"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_cb.benchmarks.base import Benchmark, Question, Score, Task, all_answers, check_questions
from mm_cb.benchmarks.function_calling.rules import FAULTS, Expected, fault
from mm_cb.benchmarks.settings import AskSettings, StoredAnswers, setting, setting_within
from mm_cb.core.errors import UserError
from mm_cb.core.limits import LIMITS
from mm_cb.core.python_calls import Call, NotCalls
from mm_cb.core.records import Item, JsonObject
from mm_cb.core.thoughts import answer_in
from mm_cb.inference.unanswered import is_error_text
from mm_cb.metrics.table import DETAIL, SIDE_EFFECT, Metric

if TYPE_CHECKING:
    from mm_cb.benchmarks.runner import Session
    from mm_cb.inference.source import ModelSource

AST, IRRELEVANT, RELEVANT = "function_calling", "irrelevance", "relevance"
_FOUR = ("simple", "multiple", "parallel", "parallel_multiple")
_FORMATS = ("python", "hermes", "mistral", "llama")
_UNDERSCORES = "Functions are called with _ for every dot of their names, as models say them that know no dots."


@dataclass(frozen=True)
class CallSettings(AskSettings):
    """How calls are asked for."""

    max_new_tokens: int = setting_within(LIMITS["max_new_tokens"], 512, "Longest answer, in tokens.")
    ask: str = setting(
        "auto",
        "BFCL's own prompt, or the tools of the model's template; auto takes the template where it takes tools.",
        choices=("auto", "prompt", "template"),
        metavar="WAY",
    )
    underscores: bool = setting(False, _UNDERSCORES)


@dataclass(frozen=True)
class StoredCalls(StoredAnswers):
    """Answers as BFCL's own program stores them, or ours."""

    answers: str = setting(
        "", "JSON lines of `id` and `result` (or `completion`), a file or a folder of such.", metavar="PATH"
    )
    format: str = setting("python", "How the calls are written.", choices=_FORMATS, metavar="NAME")
    underscores: bool = setting(False, _UNDERSCORES)


def _mean_of_four(*counts: Any) -> Any:
    """Of asked and right of the four categories, in turn: the mean of their shares, of those that were asked at all."""
    import numpy as np

    shares = [right / asked for asked, right in zip(counts[::2], counts[1::2], strict=True) if np.any(asked)]
    return sum(shares) / len(shares) if shares else np.nan


class FunctionCalling(Benchmark):
    """Function calling."""

    name = "function-calling"
    title = "function calling"
    about = "BFCL's AST categories, Python alone: the right call, and none where none fits, with broken text beside it"
    needs = "BFCL's questions, v4 or v1, with possible_answer/ beside them, or rows of your own in v4's layout"
    metrics = (
        Metric(AST, "function calling, all items", "share of right calls", DETAIL, seeded=False, shipped=True),
        Metric(
            "function_calling_mean",
            "function calling (AST)",
            "mean of simple, multiple, parallel and parallel_multiple, of those that the questions have, Python alone: "
            "v1's AST, v4's non-live",
            part_of=AST,
            columns=tuple(column for name in _FOUR for column in (name, f"{name}_right")),
            statistic=_mean_of_four,
            seeded=False,
            shipped=True,
        ),
        Metric(
            "function_calling_live",
            "function calling, live",
            "share of right calls among the live questions: v4's live",
            flag_of=(AST, "live_right"),
            seeded=False,
            shipped=True,
        ),
        Metric(
            "function_calling_undecoded",
            "answers that are no calls",
            "share of answers to questions with a right call that cannot be decoded",
            SIDE_EFFECT,
            higher_is_better=False,
            flag_of=(AST, "undecoded"),
            seeded=False,
            shipped=True,
        ),
        Metric(
            IRRELEVANT,
            "no call where none fits",
            "share without a call; strict: and without broken text, which officially earns the point",
            seeded=False,
            shipped=True,
        ),
        Metric(
            "irrelevance_broken",
            "broken text where no call fits",
            "share of answers that are empty, repeating or noise",
            SIDE_EFFECT,
            higher_is_better=False,
            flag_of=(IRRELEVANT, "gibberish"),
            seeded=False,
            shipped=True,
        ),
        Metric(RELEVANT, "some call where one fits", "share with a call", DETAIL, seeded=False, shipped=True),
    )
    settings = CallSettings
    stored = StoredCalls
    data_help = "BFCL's folder of questions (bfcl_eval/data), or one file of it."
    example = "--data data/examples/calls --max-new-tokens 8"
    score_example = "--data data/examples/calls --answers data/examples/call_answers.jsonl"

    def questions(self, data: str, settings: CallSettings) -> Sequence[Question]:
        """The questions in BFCL's prompt mode, whose answers are Python."""
        return made_questions(data, "python", template=False, underscores=settings.underscores)

    def task(self, data: str, settings: CallSettings, source: ModelSource) -> Task:
        """The questions as this model is to be asked: by its own template where that takes tools."""
        from mm_cb.benchmarks.pictures import fingerprint

        format = None if settings.ask == "prompt" else template_format(source, needed=settings.ask == "template")
        questions = made_questions(
            data, format or "python", template=format is not None, underscores=settings.underscores
        )[: settings.limit]
        check_questions(questions, data)
        identity = {"settings": settings.identity(), "questions_sha256": fingerprint(questions)}
        return Task(questions, identity, published=True)

    def score(self, question: Question, completion: str) -> Mapping[str, Score]:
        """By BFCL's rule; strictly, broken text is no restraint."""
        from mm_cb.metrics.degenerate import degenerate

        official = scored(question.reference, question.category, completion)
        strict = official
        if metric_of(question.category) == IRRELEVANT and official.value and degenerate(completion) is not None:
            strict = Score(0.0, official.parsed, counts=official.counts)
        return {"official": official, "strict": strict}

    def items(self, session: Session) -> list[Item]:
        """Irrelevance and relevance apart: no number of calls is mixed with one of their absence."""
        kept = []
        for item in super().items(session):
            item["metric"] = metric_of(str(item.get("category")))
            if item["metric"] == AST:
                lost = item["score"] is None
                item["undecoded"] = None if lost else item["parsed"] is None
                if str(item["category"]).startswith("live_"):
                    item["live_right"] = None if lost else bool(item["score"])
            if item["metric"] == IRRELEVANT or item["condition"] == "strict":  # else both rules say the same
                kept.append(item)
        return kept

    def score_stored(self, stored: StoredCalls, out: Path, *, data: str | None, subject: str, seed: int) -> None:
        """Score what BFCL's program, or another one, has stored."""
        from mm_cb.benchmarks.function_calling.stored import answer_files, read_answers
        from mm_cb.benchmarks.pictures import fingerprint
        from mm_cb.benchmarks.runner import finish_stored

        if not data:
            raise UserError(f"`mm-cb score {self.name}` needs `--data`: {self.needs}.")
        if not stored.answers:
            raise UserError(f"`mm-cb score {self.name}` needs `--answers`: the stored answers.")
        questions = made_questions(data, stored.format, template=False, underscores=stored.underscores)
        check_questions(questions, data)
        files = answer_files(Path(stored.answers))
        found = read_answers(files)
        answered = {question.category for question in questions if question.id in found}
        absent = sorted({question.category for question in questions} - answered)
        if found and absent:
            raise UserError(
                f"`{stored.answers}` must answer all questions of `{data}`, it answers none of "
                f"{', '.join(f'`{name}`' for name in absent)}; give `--data` the file of a category that is answered, "
                "or the answers that are lacking."
            )
        answers = all_answers(found, questions, stored.answers)
        if told := unread_note(questions, answers, stored.format):
            warnings.warn(told, stacklevel=2)
        identity = {"questions_sha256": fingerprint(questions)}
        recipe = {"benchmark": self.name, "responses": stored.answers, "subject": subject, **identity}
        task = Task(questions, identity)
        finish_stored(self, recipe, files, out, subject=subject, seed=seed, task=task, answers=answers)

    def show(self, folder: Path, subject: str) -> None:
        """The numbers, and what they do not cover."""
        from mm_cb.benchmarks.function_calling.questions import LEFT_OUT
        from mm_cb.core.progress import console

        super().show(folder, subject)
        console().print(f"left out {LEFT_OUT}: no number here is BFCL's overall score")


def unread_note(questions: Sequence[Question], answers: Mapping[str, str], format: str) -> str | None:
    """What to say where not one answer of a category with right calls can be read, and which formats can read some."""
    asked = [q for q in questions if metric_of(q.category) == AST and not is_error_text(answers[q.id])]
    read = {
        name: [question for question in asked if _reads({**question.reference, "format": name}, answers[question.id])]
        for name in _FORMATS
    }
    unread = {question.category for question in asked} - {question.category for question in read[format]}
    if not unread:
        return None
    of = [question for question in asked if question.category in unread]
    counts = {name: sum(question.category in unread for question in found) for name, found in read.items()}
    others = ", ".join(f"`--format {name}` reads {count}" for name, count in counts.items() if count)
    return (
        f"CAUTION not one of the {len(of)} answers that should be calls ({', '.join(sorted(unread))}) can be read with "
        f"`--format {format}`; {others or 'no other format reads one either'}."
    )


def _reads(reference: JsonObject, completion: str) -> bool:
    try:
        return bool(decoded(reference, answer_in(completion)))
    except NotCalls:
        return False


def metric_of(category: str) -> str:
    """Which metric a category belongs to."""
    return next((name for name in (IRRELEVANT, RELEVANT) if category.removeprefix("live_") == name), AST)


def made_questions(data: str, format: str, *, template: bool, underscores: bool) -> list[Question]:
    """BFCL's rows as questions.

    Args:
        data: File or folder.
        format: How answers are written, of `mm_cb.core.calls.FORMATS`.
        template: Whether the model's own template shows the functions; else BFCL's text does.
        underscores: Whether functions are called without dots.
    """
    from mm_cb.benchmarks.function_calling.questions import called, prompt, read_asked, tools

    found = []
    for asked in read_asked(data):
        expected = [one._replace(name=called(one.name, underscores=underscores)) for one in asked.expected]
        reference = {"format": format, "version": asked.version, "expected": [one._asdict() for one in expected]}
        text, shown = (asked.question, tools(asked, underscores=underscores)) if template else (prompt(asked), ())
        pictures = () if asked.image is None else (asked.image,)
        found.append(Question(asked.id, text, pictures, reference=reference, category=asked.category, tools=shown))
    return found


def scored(reference: JsonObject, category: str, completion: str) -> Score:
    """An answer's worth by BFCL's rules: of a call by the AST rules, else whether there is one at all."""
    from mm_cb.core.python_calls import write

    try:
        calls: list[Call] | None = decoded(reference, completion)
    except NotCalls:
        calls = None
    parsed = None if calls is None else write(calls)
    kind = metric_of(category)
    if kind != AST:
        return Score(float(bool(calls) is (kind == RELEVANT)), parsed)
    expected = [Expected(**one) for one in reference["expected"]]
    parallel, version = "parallel" in category, reference["version"]
    wrong = "undecoded" if calls is None else fault(calls, expected, parallel=parallel, version=version)
    counts = {category: 1, f"{category}_right": int(wrong is None)}
    counts |= {name: int(name == wrong) for name in ("undecoded", *FAULTS)}
    return Score(float(wrong is None), parsed, counts=counts)


def decoded(reference: JsonObject, completion: str) -> list[Call]:
    """The calls of an answer.

    Raises:
        NotCalls: If there is none; in BFCL's Python, text around the calls makes them none.
    """
    from mm_cb.core import python_calls
    from mm_cb.core.calls import FORMATS

    if reference["format"] == "python":
        return python_calls.read(completion, version=reference["version"])
    said = FORMATS[reference["format"]].read(completion)
    if not said.calls:
        raise NotCalls("no call")
    return said.calls


def template_format(source: ModelSource, *, needed: bool) -> str | None:
    """How a model writes calls whose own template takes tools; None where it takes none, or is served.

    Raises:
        UserError: If it is needed and there is none.
    """
    if source.endpoint is not None:
        if needed:
            raise UserError("`--ask template` shows tools in this process; a served model is asked by `--ask prompt`.")
        return None
    from mm_cb.models.families import load_processor, read_config
    from mm_cb.models.tools import tool_format

    processor = load_processor(source.model, read_config(source.model))
    try:
        return tool_format(processor).name
    except UserError as error:
        if needed:
            raise UserError(f"{str(error).rstrip('.')}; or ask in BFCL's own words: `--ask prompt`.") from error
        return None
