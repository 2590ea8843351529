"""Judgements of LLaVA-Wild answers: read from official review files, parsed from judges' texts, turned into items."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Required, TypedDict

from mm_cb.core.errors import UserError
from mm_cb.core.records import Item

RULES = ("official", "strict")
"""``official``: the original's parsing and rounding. ``strict``: scores outside 1..10 count as failed too, no rounding.
Both leave failed judgements out; only ``official`` takes them in, on request, as the original does."""
CATEGORIES = ("complex", "conv", "detail")
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
    parts = content.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = (float(part) for part in parts)
    except ValueError:
        return None
    return _pair(first, second)


def _pair(first: float, second: float) -> Pair | None:
    """The scores; None for the original's failure (-1 twice) and for what is no score on any scale."""
    return (first, second) if all(0 <= score <= HIGHEST for score in (first, second)) else None


def read_reviews(path: Path) -> list[Review]:
    """Read an official review file (JSON lines: question_id, category, tuple, content).

    The stored ``tuple`` counts, as in the original; ``content`` is read only where there is none.

    Raises:
        UserError: If the file cannot be read, a line is not as expected (file and line number), or a question comes
            twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise UserError(f"`{path}` must be a review file (JSONL, UTF-8), but it cannot be read: {e}.") from e
    reviews = [_review(line, f"{path}:{number}") for number, line in enumerate(lines, start=1) if line.strip()]
    if not reviews:
        raise UserError(f"`{path}` must hold reviews, it is empty.")
    id, times = Counter(review.question_id for review in reviews).most_common(1)[0]
    if times > 1:
        raise UserError(f"`{path}` must hold one review per question, question {id} comes {times} times.")
    return reviews


def _review(line: str, where: str) -> Review:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where} must be one JSON object, got a broken line ({e}).") from e
    if not isinstance(record, dict) or not isinstance(record.get("question_id"), int | str):
        raise UserError(f"{where} must be a JSON object with a `question_id`.")
    category = str(record.get("category")).removeprefix(_PREFIX)
    if category not in CATEGORIES:
        raise UserError(
            f"{where}: `category` must be one of {', '.join(_PREFIX + name for name in CATEGORIES)}, got "
            f"{record.get('category')!r}."
        )
    return Review(str(record["question_id"]), category, _stored_scores(record, where))


def _stored_scores(record: dict[str, Any], where: str) -> Pair | None:
    stored = record.get("tuple")
    if stored is None and isinstance(record.get("content"), str):
        return parse_scores(record["content"])
    numbers = all(isinstance(n, int | float) and not isinstance(n, bool) for n in stored) if stored else False
    if not isinstance(stored, list) or not numbers or len(stored) != 2:
        raise UserError(f"{where}: `tuple` must be two numbers (reference, candidate), got {stored!r}.")
    return _pair(float(stored[0]), float(stored[1]))


class Asked(TypedDict, total=False):
    """What an item says of a question and its answer beside the judgements."""

    subject: Required[str]
    prompt: str
    completion: str
    gibberish: bool
    seed: int
    nll_base: float | None
    incoherent: bool


def items_of(id: str, judgements: Sequence[Review], fields: Asked, *, official_failures: bool = False) -> list[Item]:
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
