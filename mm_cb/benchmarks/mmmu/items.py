"""From scored responses to the lines of items.jsonl and the numbers of results.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

from mm_cb.benchmarks.mmmu.honesty import flags
from mm_cb.benchmarks.mmmu.protocol import protocol
from mm_cb.benchmarks.mmmu.score import Scored, plain
from mm_cb.metrics.results import Measurement, measure

RULES = ("official", "strict")


def items_of(
    scored: Sequence[Scored], subject: str, prompts: Mapping[str, str] | None = None, seed: int = 0
) -> list[dict[str, Any]]:
    """One record per question and rule; an unknown strict verdict is None, which counts as unscored.

    Where only parsed answers are known, nothing says whether the text was broken (no ``gibberish``).

    Args:
        scored: In canonical order.
        subject: Who answered: ``base``, ``rr``, ...
        prompts: Question id -> the text that was asked, where it is known.
        seed: The run's seed.
    """
    return [_item(one, rule, subject, (prompts or {}).get(one.response.id), seed) for rule in RULES for one in scored]


def _item(one: Scored, rule: str, subject: str, prompt: str | None, seed: int) -> dict[str, Any]:
    response = one.response
    right = one.official if rule == "official" else one.strict
    counts = {"open_correct": int(response.open and one.official)}
    words: dict[str, bool] = {}
    if one.read_here:
        counts |= {"degenerate": int(one.degenerate is not None), "fallback": int(one.fallback)}
        words = {"gibberish": one.degenerate is not None}
    return {
        "id": response.id,
        "metric": "mmmu",
        "subject": subject,
        "condition": rule,
        "split": protocol().domain[response.subject],
        "category": response.subject,
        "question_type": response.question_type,
        "prompt": prompt,
        "completion": response.response,
        "parsed": plain(one.parsed),
        "letter": one.letter,
        "answer": response.answer,
        "outcome": None,
        "score": None if right is None else float(right),
        **words,
        "counts": counts,
        "seed": seed,
    }


def measure_items(items: list[dict[str, Any]], scored: Sequence[Scored]) -> list[Measurement]:
    """Every number of the run; those over all questions also say how they compare with guessing."""
    extra = flags(scored)
    return [
        dataclasses.replace(measured, counts=measured.counts | extra)
        if (measured.metric, measured.split) == ("mmmu", "all")
        else measured
        for measured in measure(items, pairs=[])
    ]
