"""Requests that ask the same under two ids: they are asked once, and count once in every rate."""

from __future__ import annotations

import json
from collections.abc import Callable, Hashable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from mm_cb.core.files import file_sha256
from mm_cb.core.records import JsonObject

One = TypeVar("One")


def content_of(texts: Sequence[str], image: Path | None, tools: Sequence[JsonObject] = ()) -> Hashable:
    """What a request says and shows, without its id: equal for two that ask the same.

    Args:
        texts: Its words, as they are.
        image: The picture, known by the bytes of its file; None = without.
        tools: JSON schemas that the model is shown.
    """
    return (*texts, None if image is None else file_sha256(image), json.dumps(tools, sort_keys=True))


def once_each(requests: Iterable[One], content: Callable[[One], Hashable]) -> list[One]:
    """Every request once: of those of equal content the first."""
    held: dict[Hashable, One] = {}
    for one in requests:
        held.setdefault(content(one), one)
    return list(held.values())


def repeats_note(read: Sequence[object], kept: Sequence[object], what: str) -> str:
    """A line about those that repeat another one, or nothing."""
    repeated = len(read) - len(kept)
    return f"left out: {repeated} of {len(read)} {what}, which repeat another one" if repeated else ""
