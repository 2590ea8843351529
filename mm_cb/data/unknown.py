"""Texts that are mostly unknown to a model: its tokenizer has one token for all words that it does not have."""

from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import Any, Generic, TypeVar

_STRANGE = "\N{CUNEIFORM SIGN A} \N{PHAISTOS DISC SIGN CAT}"
"""What a tokenizer that has a token for unknown words makes that token of; others spell it, in bytes."""
_REMEMBERED = 256
"""Texts whose tokens are counted once, though two questions are asked of them: those of a row."""
T = TypeVar("T")


class Words:
    """Which words a tokenizer has, and how many tokens it makes of them."""

    def __init__(self, tokenizer: Any) -> None:
        """Ask ``tokenizer``."""
        self._tokenizer, unknown = tokenizer, tokenizer.unk_token_id
        strange = self._ids(_STRANGE)
        self._unknown: int | None = unknown if unknown in strange else None
        self._around = len(tokenizer(_STRANGE).input_ids) - len(strange)
        self._counts = lru_cache(_REMEMBERED)(self._count)

    def length(self, text: str) -> int:
        """Tokens of a text, with those that the tokenizer puts around it."""
        return self._counts(text)[0] + self._around

    def mostly_unknown(self, texts: Iterable[str]) -> str | None:
        """The token for what the tokenizer does not know, where at least half of one of the texts comes to it."""
        return str(self._tokenizer.unk_token) if any(self._share(text) >= 0.5 for text in texts) else None

    def partly_unknown(self, text: str) -> bool:
        """Whether the tokenizer does not know all of a text."""
        return self._share(text) > 0

    def _share(self, text: str) -> float:
        if self._unknown is None:
            return 0.0
        tokens, unknown = self._counts(text)
        return unknown / tokens if tokens else 0.0

    def _count(self, text: str) -> tuple[int, int]:
        """Tokens of a text, and how many of them are the one for what is unknown."""
        ids = self._ids(text)
        return len(ids), ids.count(self._unknown) if self._unknown is not None else 0

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False).input_ids)


class Unknown(Generic[T]):
    """Counts rows of one source, and those of which the model reads next to nothing."""

    def __init__(self, mostly: Callable[[T], str | None] | None, what: str = "rows", to: str = "train") -> None:
        """Begin.

        Args:
            mostly: The token that at least half of one of a row's texts comes to, if any; None = not known here.
            what: What the rows are.
            to: What is done with a model by them.
        """
        self._mostly, self._what, self._to = mostly, what, to
        self._rows = self._unknown = 0
        self._first: object = None
        self._token = ""

    def count(self, row: T, place: object) -> None:
        """Take one more row."""
        self._rows += 1
        if self._mostly is not None and (token := self._mostly(row)):
            self._unknown += 1
            self._first = self._first if self._unknown > 1 else place
            self._token = token

    def warning(self) -> str | None:
        """What to say of a source that holds any; None if it holds none."""
        if not self._unknown:
            return None
        return (
            f"{self._first}: {self._unknown} of {self._rows} {self._what} have a text that is mostly `{self._token}` "
            f"to the model (the first here), words that its tokenizer does not have: leave them out, write them in "
            f"words that it has, or {self._to} a model that reads them"
        )


def note_of_unknown(
    tokenizer: Any, rows: Iterable[tuple[str, Sequence[str]]], what: str, to: str = "ask"
) -> str | None:
    """What to say of texts that a model is given, where it does not know half of one.

    Args:
        tokenizer: The model's.
        rows: A place and its texts, each of which the model should know.
        what: What they are: "behaviours".
        to: What is done with a model by them.
    """
    unknown = Unknown(Words(tokenizer).mostly_unknown, what, to)
    for place, texts in rows:
        unknown.count(texts, place)
    return unknown.warning()
