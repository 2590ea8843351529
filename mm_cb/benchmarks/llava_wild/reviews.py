"""Judgements of LLaVA-Wild answers: read from official review files, parsed from judges' texts, turned into items."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required, TypedDict

from mm_cb.core.errors import UserError
from mm_cb.core.file_kinds import REVIEWS, refuse_others
from mm_cb.core.reading import Line, json_lines, shown
from mm_cb.core.records import Item, JsonObject

RULES = ("official", "strict")
"""``official``: the original's parsing and rounding. ``strict``: scores outside 1..10 count as failed too, no rounding.
Both leave failed judgements out; only ``official`` takes them in, on request, as the original does."""
CATEGORIES = ("complex", "conv", "detail")
SWAPPED = "candidate_first"
"""In the name of a file of ours whose judge was shown the candidate's answer first, and scores in that order."""
_PREFIX = "llava_bench_"
_FAILED = (-1.0, -1.0)
HIGHEST = 100.0
"""Largest number that counts as a score officially: some judges take percent for the asked 1 to 10."""

Pair = tuple[float, float]


@dataclass(frozen=True)
class Review:
    """One judgement of one answer."""

    question_id: str
    category: str
    """``complex``, ``conv`` or ``detail``."""
    scores: Pair | None
    """Reference's and candidate's, as the official rule reads them; None when the judgement failed."""

    @property
    def strict(self) -> Pair | None:
        """The scores, if both lie on the scale that the judge was given."""
        return self.scores if self.scores and all(1 <= score <= 10 for score in self.scores) else None


def parse_scores(content: str) -> Pair | None:
    """The two scores on a judgement's first line, or None when there are not exactly two.

    Source:
        LLaVA repository, ``eval_gpt_review_bench.py``: commas are blanks, single blanks separate, so that ``8, 7`` and
        a trailing blank fail. Deviation: a failure is None, not -1 twice, and so is what lies outside 0..100, which no
        judge's scale does (the original counts any number, ``-1 8`` and ``1e308 1`` included).
    """
    numbers = _first_line(content)
    return None if numbers is None else _pair(*numbers)


def _first_line(content: str) -> Pair | None:
    """The two numbers on a judgement's first line, whatever they are."""
    parts = content.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = (float(part) for part in parts)
    except ValueError:
        return None
    return first, second


def _pair(first: float, second: float) -> Pair | None:
    """The scores; None for the original's failure (-1 twice) and for what is no score on any scale."""
    return (float(first), float(second)) if all(0 <= score <= HIGHEST for score in (first, second)) else None


def read_reviews(path: Path) -> list[Review]:
    """Read an official review file (JSON lines: question_id, category, tuple, content).

    The stored ``tuple`` counts, as in the original, and must be what ``content`` begins with, turned in a file of ours
    whose name says `SWAPPED`; without a content it must be two scores in 0..100, or -1 twice. ``content`` is read where
    there is no tuple.

    Raises:
        UserError: If the file cannot be read, a line is not as expected (file and line number), or a question comes
            twice.
    """
    reviews: dict[str, Review] = {}
    for line in json_lines(path, "reviews", nul=True):
        review = _review(line, swapped=SWAPPED in path.name)
        if review.question_id in reviews:
            raise UserError(
                f"{line.where}: there must be one review per question, question {review.question_id} comes more than "
                "once."
            )
        reviews[review.question_id] = review
    if not reviews:
        raise UserError(f"`{path}` must hold reviews, it is empty.")
    return list(reviews.values())


def _review(line: Line, *, swapped: bool) -> Review:
    where, record = line
    refuse_others(record, (REVIEWS,), where)
    id = record.get("question_id")
    if isinstance(id, bool) or not isinstance(id, int | str) or id == "":
        raise UserError(f"{where} must be a JSON object with a `question_id`, got {shown(id)}.")
    category = str(record.get("category")).strip().lower().removeprefix(_PREFIX)
    if category not in CATEGORIES:
        raise UserError(
            f"{where}: `category` must be one of {', '.join(_PREFIX + name for name in CATEGORIES)}, got "
            f"{shown(record.get('category'))}."
        )
    return Review(str(id), category, _stored_scores(record, where, swapped=swapped))


def _stored_scores(record: JsonObject, where: str, *, swapped: bool) -> Pair | None:
    stored = record.get("tuple")
    if stored is None and isinstance(record.get("content"), str):
        scores = parse_scores(record["content"])
        return scores if scores is None or not swapped else scores[::-1]
    if not isinstance(stored, list) or len(stored) != 2 or not all(_is_number(score) for score in stored):
        raise UserError(f"{where}: `tuple` must be two numbers (reference, candidate), got {shown(stored)}.")
    first, second = stored
    content = record.get("content")
    if not (isinstance(content, str) and content):
        if (first, second) != _FAILED and _pair(first, second) is None:
            raise UserError(
                f"{where}: `tuple` must be two scores in 0..{HIGHEST:g}, or -1 twice where the judge gave none, got "
                f"{shown(stored)}."
            )
    elif not _fits(first, second, content, swapped=swapped):
        raise UserError(
            f"{where}: `tuple` must be the two scores that `content` begins with, the reference's first (last in our "
            f"files of {SWAPPED}), or -1 twice where there are none; got {shown(stored)} and {shown(content)}. One of "
            "them has been changed: take the file as the judge wrote it, or drop the `tuple`."
        )
    return _pair(first, second)


def _fits(first: float, second: float, content: str, *, swapped: bool) -> bool:
    """Whether stored numbers are a judgement's in its order, or turned; -1 twice says that it is none."""
    said = _first_line(content)
    if (first, second) == _FAILED:
        return said is None or _pair(*said) is None
    return said is not None and (first, second) == (said[::-1] if swapped else said)


def _is_number(value: Any) -> bool:
    return type(value) is int or (type(value) is float and math.isfinite(value))


class ItemFields(TypedDict, total=False):
    """What an item says of a question and its answer beside the judgements."""

    subject: Required[str]
    prompt: str
    completion: str
    gibberish: bool | None
    seed: int
    nll_base: float | None
    incoherent: bool


def unjudged_items(id: str, category: str, fields: ItemFields, reason: str) -> list[Item]:
    """The records of a question that has no answer to judge."""
    return [
        {
            "id": id,
            "metric": "llava_wild",
            "split": "all",
            "category": category,
            "outcome": None,
            "reference_score": None,
            "score": None,
            "counts": {},
            "reason": reason,
            **fields,
            "condition": rule,
        }
        for rule in RULES
    ]


def items_of(
    id: str, judgements: Sequence[Review], fields: ItemFields, *, official_failures: bool = False
) -> list[Item]:
    """Records of items.jsonl for one question, one per rule, from all judgements of its answer.

    Args:
        id: The item's id.
        judgements: One per judge run and order; those that worked are averaged.
        fields: Further fields of both records (subject, prompt, completion, ...).
        official_failures: Let a failed judgement enter the official score as -1 for both answers.

    Returns:
        Records with ``score`` (candidate) and ``reference_score`` on the judge's scale.
    """
    records = []
    for rule in RULES:
        pairs = [review.strict if rule == "strict" else review.scores for review in judgements]
        failed = sum(pair is None for pair in pairs)
        kept = official_failures and rule == "official"
        counted = [pair or _FAILED for pair in pairs if pair is not None or kept]
        record: Item = {
            "id": id,
            "metric": "llava_wild",
            "condition": rule,
            "split": "all",
            "category": judgements[0].category,
            "outcome": None,
            "reference_score": _mean(pair[0] for pair in counted),
            "score": _mean(pair[1] for pair in counted),
            "counts": {"judgements": len(pairs), "failed": failed, **({"failed_kept": failed} if kept else {})},
            **fields,
        }
        records.append(record)
    return records


def _mean(scores: Iterable[float]) -> float | None:
    given = list(scores)
    return math.fsum(given) / len(given) if given else None


def in_canonical_order(records: Iterable[Item]) -> list[Item]:
    """Records by subject, rule and question, numbers as numbers."""
    return sorted(records, key=lambda r: (r["subject"], r["condition"], len(r["id"]), r["id"]))
