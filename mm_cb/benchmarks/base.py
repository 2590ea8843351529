"""What a benchmark is: questions, a score for an answer, metrics. The rest has a default that it may replace.

The runner asks, goes on where it was stopped, and writes the files; see docs/add_a_benchmark.md. Imports nothing heavy,
so that every benchmark can be listed.
"""

from __future__ import annotations

import math
import numbers
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_cb.benchmarks.settings import AskSettings, Settings, StoredAnswers
from mm_cb.core.errors import UserError
from mm_cb.core.files import dumps
from mm_cb.core.folding import is_blank
from mm_cb.core.names import refuse_merged
from mm_cb.core.reading import Line
from mm_cb.core.records import Check, Item, JsonObject, RecipeFields
from mm_cb.core.user_code import file_of
from mm_cb.metrics.table import Metric

if TYPE_CHECKING:
    from mm_cb.benchmarks.runner import Session
    from mm_cb.core.hub import Repository
    from mm_cb.data.pictures import Picture
    from mm_cb.inference.source import ModelSource
    from mm_cb.metrics.results import Measurement


@dataclass(frozen=True)
class Question:
    """One thing that is asked: the pictures, then the text."""

    id: str
    """Unique within the benchmark."""
    prompt: str
    pictures: tuple[Path | Picture, ...] = ()
    """Files, or pictures that are at hand; opened once before anything is asked, decoded when their turn comes."""
    reference: Any = None
    """What a right answer is, as JSON holds it."""
    category: str = "all"
    """Every category has a row of its own in results.json."""
    split: str = "all"
    """As the category; for a second way to divide the questions."""
    tools: tuple[JsonObject, ...] = ()
    """JSON schemas of functions that the model's own chat template shows it."""
    opening: str = ""
    """How the answer must begin, part of the completion then."""


@dataclass(frozen=True)
class Score:
    """What an answer is worth."""

    value: float | None
    """In [0, 1]; None where nothing can be said, which enters no mean and is counted."""
    parsed: Any = None
    """What was read in the answer, or None."""
    reason: str = ""
    """Why there is no value."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Further counts, summed over items; a metric's ``statistic`` reads them."""


@dataclass(frozen=True)
class Task:
    """What is to be asked in one run."""

    questions: Sequence[Question]
    identity: RecipeFields
    """What belongs to the run's recipe beside model, subject and benchmark."""
    inputs: Sequence[Path | Repository] | Mapping[str, str] = ()
    """Files and repositories beside the model's whose content decides the results."""
    more: Any = None
    """What the benchmark needs again when it scores."""
    published: bool = False
    """Whether the questions are as somebody published them, so that nobody here can mend one: what the model cannot be
    sent (it spells a control token of the model's, or is too long) is then left out, counted and named."""


class Benchmark:
    """A benchmark. Those that ask and score in their own way replace more than `questions` and `score`."""

    name: str
    """On the command line and in run.json."""
    title: str
    """In tables."""
    about: str
    """One line: what is measured."""
    needs: str
    """One line: what one must have for it."""
    metrics: tuple[Metric, ...] = ()
    """The first is that of the scores; others may be parts of it."""
    settings: type[AskSettings] = AskSettings
    stored: type[Settings] | None = StoredAnswers
    """The settings of `score_stored`; None = there is no such way."""
    dataset: str | None = None
    """Where the questions come from if nobody says; None = the user must say."""
    data_help: str = "Where the questions are."
    example: str = "--data DATA"
    """Further arguments of the example in ``--help``."""
    score_example: str = "--data DATA --answers answers.jsonl"
    timed: bool = True
    """Whether a run keeps how long it took."""

    def questions(self, data: str, settings: Any) -> Sequence[Question]:
        """Read the questions, checked before anything is asked.

        Raises:
            UserError: If the data are not as expected: what was expected, what came, what to do.
        """
        raise NotImplementedError

    def score(self, question: Question, completion: str) -> Score | Mapping[str, Score]:
        """Score one answer; by several rules, the same for all answers, as a mapping, else by the strict one."""
        raise NotImplementedError

    def task(self, data: str, settings: Any, source: ModelSource) -> Task:
        """What is to be asked of a model: the first ``limit`` questions, known by their content."""
        from mm_cb.benchmarks.pictures import fingerprint

        questions = list(self.questions(data, settings))[: settings.limit]
        check_questions(questions, data)
        identity = {"settings": settings.identity(), "questions_sha256": fingerprint(questions)}
        return Task(questions, identity, published=self.dataset is not None)

    def loading(self, settings: Any) -> Sequence[str]:
        """Which of ``--device`` and ``--dtype`` are read although the model is served: for a judge in this process."""
        return ()

    def begin(self, session: Session) -> None:
        """Prepare what scoring will need, such as a judge: called before a model is loaded."""

    def items(self, session: Session) -> list[Item]:
        """The lines of items.jsonl: all questions by one rule, then by the next.

        Raises:
            UserError: If a value lies outside 0..1, or the rules differ from answer to answer: a rate of some of the
                questions is none of all.
        """
        from mm_cb.metrics.degenerate import degenerate

        found: dict[str, list[Item]] = {}
        for question in session.task.questions:
            completion = session.answers[question.id]
            scores = self.score(question, completion)
            broken: bool | None = degenerate(completion) is not None
            by_rule = scores if isinstance(scores, Mapping) else {self.metrics[0].strict: scores}
            if wrong := next((told for one in by_rule.values() if (told := _fault(one))), None):
                raise UserError(
                    f"{self.written_in}: `score` must give {wrong} for question `{question.id[:80]}`; correct it and "
                    "give the same command again, the answers are kept."
                )
            if (lost := session.unanswered.get(question.id)) is not None:
                by_rule, broken = {rule: Score(None, reason=lost) for rule in by_rule}, None
            if not by_rule or (found and found.keys() != by_rule.keys()):
                raise UserError(
                    f"{self.written_in}: `score` must give every answer the same rules, got "
                    f"{', '.join(sorted(found)) or 'none'}, "
                    f"and for question `{question.id[:80]}` {', '.join(sorted(by_rule)) or 'none'}; where a rule says "
                    "nothing, give `Score(None, reason=...)`."
                )
            for rule, score in by_rule.items():
                item = self._item(question, completion, rule, score, session)
                item["gibberish"] = broken
                if score.value is None:
                    item["reason"] = score.reason
                item |= {"counts": {name: _plain(count) for name, count in score.counts.items()}, "seed": session.seed}
                found.setdefault(rule, []).append(item)
        return [item for items in found.values() for item in items]

    @property
    def written_in(self) -> str:
        """What an error about its code calls it: the user's file where there is one, else its name."""
        return f"`{file_of(type(self)) or self.name}`"

    def _item(self, question: Question, completion: str, rule: str, score: Score, session: Session) -> Item:
        return {
            "id": question.id,
            "metric": self.metrics[0].name,
            "subject": session.subject,
            "condition": rule,
            "split": question.split,
            "category": question.category,
            "prompt": question.prompt,
            "completion": completion,
            "parsed": score.parsed,
            "reference": question.reference,
            "outcome": None,
            "score": None if score.value is None else _plain(score.value),
        }

    def measure(self, items: list[Item], session: Session) -> list[Measurement]:
        """The numbers of results.json."""
        from mm_cb.metrics.results import measure

        return measure(items, pairs=[], seed=session.seed)

    def checks(self, session: Session) -> list[Check] | None:
        """Lines of checks.json; None for a benchmark without checks."""
        return None

    def stored_answers(self, stored: Any, questions: Sequence[Question]) -> dict[str, str]:
        """The completions of a file, by question id.

        Raises:
            UserError: If a question has none, or the file is not as expected.
        """
        from mm_cb.benchmarks.rows import json_lines
        from mm_cb.core.file_kinds import ANSWERS

        found: JsonObject = {}
        for row in json_lines(Path(stored.answers), (ANSWERS,)):
            id = str(row.values.get("id"))
            if id in found:
                raise UserError(f"{row.where}: every question must be answered once, `{id[:80]}` comes more than once.")
            found[id] = row.values.get("completion")
        return all_answers(found, questions, stored.answers)

    def score_stored(self, stored: Any, out: Path, *, data: str | None, subject: str, seed: int) -> None:
        """Score stored outputs.

        Raises:
            UserError: If they are not as expected.
        """
        from mm_cb.benchmarks.runner import score_answers

        score_answers(self, stored, out, data=data, subject=subject, seed=seed)

    def show(self, folder: Path, subject: str) -> None:
        """Print a finished run."""
        from mm_cb.benchmarks.show import show_run

        show_run(folder, subject, self)

    def settled(self, folder: Path) -> bool:
        """Whether a finished run stays as it is; if not, the same command asks for what it lacks."""
        return True

    def refuse(self, folder: Path) -> None:
        """Say why a finished run has no score, if it has none.

        Raises:
            UserError: In that case.
        """


def all_answers(found: Mapping[str, object], questions: Sequence[Question], where: str) -> dict[str, str]:
    """The answers to all questions, which must be there as texts; answers to others are said.

    Raises:
        UserError: If they are not.
    """
    lacking = [question.id for question in questions if not isinstance(found.get(question.id), str)]
    if lacking:
        raise UserError(
            f"`{where}` must answer every question with a text, {len(lacking)} of {len(questions)} have none, the "
            f"first `{lacking[0][:80]}`."
        )
    if strange := sorted(found.keys() - {question.id for question in questions}):
        warnings.warn(
            f"`{where}`: {len(strange)} of {len(found)} answers are to no question that is asked, the first of them "
            f"`{strange[0][:80]}`: they are not scored",
            stacklevel=2,
        )
    return {question.id: str(found[question.id]) for question in questions}


def _fault(one: Any) -> str | None:
    """What a score should be that cannot be kept and measured as it is, and what came; None where it can."""
    if not isinstance(one, Score):
        return f"a `Score`, or a mapping of them, got {one!r:.80}"
    if one.value is not None and not (_is_number(one.value) and 0 <= one.value <= 1):
        return f"a `Score` of a number (a truth as `float(...)`) in 0..1 or None, got {one.value!r:.80}"
    counts = one.counts
    if not isinstance(counts, Mapping) or not all(isinstance(k, str) and _is_number(v) for k, v in counts.items()):
        return f"a `Score` with `counts` that are finite numbers by name, got {counts!r:.80}"
    try:
        dumps([one.parsed, str.join("", [one.reason])])
    except (TypeError, ValueError):
        return f"a `Score` with plain values as `parsed` and a text as `reason`, got {one!r:.80}"
    return None


def _is_number(value: Any) -> bool:
    """Whether it is a finite number, of Python's or of numpy's; a truth is none."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)


def _plain(value: Any) -> Any:
    """A number as JSON is read again."""
    return value if type(value) in (int, float) else value.item() if hasattr(value, "item") else float(value)


def check_questions(questions: Iterable[Question], where: str) -> None:
    """Refuse no question at all, an id that comes twice, what is no text, or a blank group, where one must be.

    Groups that would be counted as one are refused as well.

    Raises:
        UserError: In these cases.
    """
    seen, keys = dict[str, Line](), ("category", "split")
    for question in questions:
        for name in ("id", "prompt", *keys):
            if not isinstance(came := getattr(question, name), str):
                raise UserError(
                    f"`{where}` must give every question a text as `{name}`, got {came!r:.80} for question "
                    f"`{question.id!s:.80}`."
                )
        for name in keys:
            if is_blank(getattr(question, name)):
                raise UserError(
                    f"`{where}` must give every question a `{name}` that is not blank, or leave it out, got "
                    f"{getattr(question, name)!r:.80} for question `{question.id:.80}`."
                )
        if question.id in seen:
            raise UserError(f"`{where}` must give every question its own id, `{question.id[:80]}` comes again.")
        named = f"`{where}`, question `{question.id[:80]}`"
        seen[question.id] = Line(named, {name: getattr(question, name) for name in keys})
    if not seen:
        raise UserError(f"`{where}` must hold at least one question, it holds none.")
    refuse_merged([*seen.values()], keys)
