"""Answering questions: capability and over-refusal items, base and adapter on the same ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol

from PIL.Image import Image

from mm_cb.core.progress import Progress
from mm_cb.core.records import Item, ScoredCompletion
from mm_cb.inference.cached_chunks import chunks, once
from mm_cb.inference.generation import Request, complete_batch
from mm_cb.inference.subjects import Subject


class Askable(Protocol):
    """What a question must have to be asked."""

    @property
    def id(self) -> str:
        """Unique within a run."""

    @property
    def prompt(self) -> str:
        """The user's text."""

    @property
    def picture(self) -> Image | None:
        """The picture in front of it, if any."""


Scorer = Callable[[Any, str], ScoredCompletion]
"""From a question and a completion to the fields of items.jsonl that judge it."""


def ask(
    subject: Subject,
    questions: Sequence[Askable],
    score: Scorer,
    folder: Path,
    progress: Progress,
    *,
    name: str,
    max_new_tokens: int = 32,
    batch: int = 64,
) -> list[Item]:
    """Greedy answers to all questions, scored; finished batches in ``folder`` are read back, not repeated.

    Returns:
        One record of items.jsonl per question, in order.
    """
    task = progress.task(f"{subject.name}: {name}", total=len(questions))
    records: list[Item] = []
    for number, group in enumerate(chunks(questions, batch)):
        path = folder / "parts" / f"{name}-{number:04d}.json"
        completions = once(path, partial(complete, subject, group, max_new_tokens))
        for question, completion in zip(group, completions, strict=True):
            item: Item = {
                "id": question.id,
                "subject": subject.name,
                "prompt": question.prompt,
                "completion": completion,
                **score(question, completion),
            }
            records.append(item)
        task.advance(len(group))
    return records


def complete(subject: Subject, questions: Sequence[Askable], max_new_tokens: int) -> list[str]:
    """The subject's greedy completions, one per question."""
    requests = [Request(q.id, q.prompt, () if q.picture is None else (q.picture,)) for q in questions]
    return complete_batch(subject, requests, max_new_tokens)
