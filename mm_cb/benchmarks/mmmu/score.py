"""Scoring MMMU responses: the official rule with its seeded random letters, and beside it the strict one."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from mm_cb.benchmarks.mmmu.parse import (
    AnswerPiece,
    parse_multiple_choice,
    parse_open,
    right_letter,
    right_open,
    says_plainly,
)
from mm_cb.benchmarks.mmmu.protocol import MULTIPLE_CHOICE, QUESTION_TYPES, protocol, subject_of
from mm_cb.core.errors import UserError
from mm_cb.core.reading import shown
from mm_cb.core.records import JsonObject
from mm_cb.metrics.degenerate import degenerate, is_noise

RightAnswer = str | tuple[str, ...]


@dataclass(frozen=True)
class Response:
    """One question with its answer and what the model said."""

    id: str
    question_type: str
    answer: RightAnswer
    """Letter, text or number; several of which any counts."""
    response: str
    letters: tuple[str, ...] = ()
    """Of its options, in order; none for an open question."""
    options: Mapping[str, str] = field(default_factory=dict)
    """Letter -> text."""

    @property
    def subject(self) -> str:
        """The MMMU subject, from the id."""
        return subject_of(self.id)

    @property
    def open(self) -> bool:
        """Whether no option has to be chosen."""
        return self.question_type != MULTIPLE_CHOICE


@dataclass(frozen=True)
class ScoredResponse:
    """One response under both rules."""

    response: Response
    parsed: str | tuple[AnswerPiece, ...] | None
    """Letter, the pieces of an open response, or None where nothing could be found."""
    letter: str | None
    """The letter that counts officially: the parsed one, or the one drawn for it. None for open questions."""
    official: bool
    strict: bool | None
    """Right without luck: a drawn letter is wrong, so is an option's text that was only found inside other words, and
    whatever is found in blindly drawn characters. An answer that the model then repeats without end still counts. None
    where nobody knows which letters were drawn."""

    @property
    def fallback(self) -> bool:
        """Whether the official letter was drawn at random."""
        return self.parsed is None

    @property
    def read_here(self) -> bool:
        """Whether the model's own words are at hand, and not only what somebody else parsed from them."""
        return self.strict is not None

    @cached_property
    def degenerate(self) -> str | None:
        """``empty``, ``noise``, ``repetition`` or None."""
        return degenerate(self.response.response)


def score(records: Iterable[JsonObject]) -> list[ScoredResponse]:
    """Score responses in the official layout.

    Args:
        records: ``id``, ``question_type``, ``answer``, ``response``, and for multiple choice ``all_choices`` and
            ``index2ans``. Subjects may come in any order; within a subject the order decides the random letters.

    Returns:
        Subjects in official (alphabetical) order, inside them the records' own.

    Raises:
        UserError: If a record lacks something, or an id comes twice.

    Source:
        MMMU-Benchmark/MMMU, ``mmmu/main_parse_and_eval.py``. Deviation: the generator of the random letters is our own,
        with the official seed, so that nothing else that draws changes them.
    """
    return score_responses(response_from(record, "record") for record in records)


def score_responses(responses: Iterable[Response]) -> list[ScoredResponse]:
    """As `score`, for responses that have been read already."""
    order = {subject: place for place, subject in enumerate(protocol().subjects)}
    ordered = sorted(responses, key=lambda response: order[response.subject])
    seen: set[str] = set()
    for response in ordered:
        if response.id in seen:
            raise UserError(f"MMMU question `{response.id}` must come once, it comes again.")
        seen.add(response.id)
    rng = random.Random(protocol().seed)
    return [_score_one(response, rng) for response in ordered]


def _score_one(response: Response, rng: random.Random) -> ScoredResponse:
    if response.open:
        pieces = tuple(parse_open(response.response))
        right = right_open(response.answer, pieces)
        return ScoredResponse(response, pieces, None, official=right, strict=right and not is_noise(response.response))
    parsed = parse_multiple_choice(response.response, response.letters, response.options)
    letter = rng.choice(response.letters) if parsed is None else parsed
    return ScoredResponse(
        response,
        parsed,
        letter,
        official=right_letter(response.answer, letter),
        strict=parsed is not None
        and right_letter(response.answer, parsed)
        and says_plainly(response.response, parsed, response.options)
        and not is_noise(response.response),
    )


def response_from(record: JsonObject, where: str) -> Response:
    """Check one record of the official layout.

    Args:
        record: See `score`.
        where: What to call it in an error, such as a file and a place in it.

    Raises:
        UserError: If a field is missing or of another kind; a letter without option text, an answer that is no option.
    """
    wrong = [key for key in ("id", "question_type", "response") if not isinstance(record.get(key), str)]
    if wrong:
        raise UserError(f"{where} must hold the texts `id`, `question_type`, `response`; {wrong} are not there.")
    where = f"{where} (`{record['id'][:80]}`)"
    subject_of(record["id"])
    answer, kind = answer_from(record.get("answer"), where), question_type(record["question_type"], where)
    if kind != MULTIPLE_CHOICE:
        return Response(record["id"], kind, answer, record["response"])
    letters, options = _options(record.get("all_choices"), record.get("index2ans"), where)
    if not any(right_letter(answer, letter) for letter in letters):
        raise UserError(f"{where}: `answer` must be one of the letters {', '.join(letters)}, got {answer!r}.")
    return Response(record["id"], kind, answer, record["response"], letters, options)


def question_type(value: str, where: str) -> str:
    """One of the known types, without case: with any other word letters would be read as open answers.

    Raises:
        UserError: If it is none.
    """
    if (kind := value.strip().lower()) not in QUESTION_TYPES:
        raise UserError(f"{where}: `question_type` must be {', '.join(QUESTION_TYPES)}, got {shown(value)}.")
    return kind


def answer_from(answer: Any, where: str) -> RightAnswer:
    """An answer, or several, as texts.

    Raises:
        UserError: If it is neither a text nor a list of texts, or the stand-in for a withheld one.
    """
    if isinstance(answer, list) and answer and all(isinstance(one, str) for one in answer):
        return tuple(answer)
    if isinstance(answer, str) and answer not in ("", "?"):
        return answer
    raise UserError(
        f"{where}: the answer must be a text or a list of texts, got {shown(answer)}; the answers of split `test` are "
        "withheld, score `validation`."
    )


def _options(letters: Any, texts: Any, where: str) -> tuple[tuple[str, ...], dict[str, str]]:
    """The letters in order, and letter -> text, both as they came."""
    if isinstance(letters, list) and letters and isinstance(texts, dict):
        strings = all(isinstance(text, str) for text in (*letters, *texts.values()))
        if strings and len(set(letters)) == len(letters) and set(letters) == set(texts):
            return tuple(letters), texts
    raise UserError(
        f"{where}: a multiple-choice record must hold `all_choices` (letters) and `index2ans` (letter to text, of the "
        f"same letters), got {shown(letters)} and {shown(texts)}."
    )


def plain(parsed: str | tuple[AnswerPiece, ...] | None) -> str | list[AnswerPiece] | None:
    """A parsed answer as JSON holds it; numbers that are none (``nan``, ``inf``) become texts."""
    if not isinstance(parsed, tuple):
        return parsed
    return [str(piece) if isinstance(piece, float) and not math.isfinite(piece) else piece for piece in parsed]
