"""Phrases that refusals hold, and begin with."""

import re
from functools import cache

from mm_cb.core.paths import protocol_file

_APOSTROPHES = str.maketrans("\u2019\u2018\u02bc", "'''")


@cache
def phrases() -> tuple[str, ...]:
    """The phrases whose presence is read as a refusal, in lower case."""
    return tuple(phrase.lower() for phrase in protocol_file("refusal_strings")["phrases"])


MATCHED = "anywhere in a text where a word begins"
"""How phrases are looked for, to be told beside them. Marks around a word, as of italics (``_sorry_``), are no part."""


@cache
def _found() -> re.Pattern[str]:
    return re.compile(rf"(?<![^\W_])(?:{'|'.join(map(re.escape, phrases()))})")


@cache
def _declining() -> re.Pattern[str]:
    openings = "|".join(re.escape(one.lower()) for one in protocol_file("refusal_strings")["openings"])
    return re.compile(rf"[\"'*_#>. -]*(?:{openings})\b")


def plain_text(text: str) -> str:
    """Lower case, plain apostrophes, single blanks."""
    return " ".join(text.lower().translate(_APOSTROPHES).split())


def found_phrase(completion: str) -> str | None:
    """The refusal phrase that comes first in a completion, or None."""
    found = _found().search(plain_text(completion))
    return found and found[0]


def begins_as_refusal(answer: str) -> bool:
    """Whether an answer to be trained on begins by declining, behind any marks: with one of the file's ``openings``."""
    return _declining().match(plain_text(answer)) is not None
