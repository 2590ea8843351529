"""Query and completion from what a generator answered."""

import json
from collections.abc import Iterator
from typing import NamedTuple

from mm_cb.core.reading import unfit
from mm_cb.core.records import JsonObject

_PLACEHOLDER = "<image>"
_TRIES = 100


class GeneratedPair(NamedTuple):
    """What the generator wrote for a picture."""

    query: str
    completion: str


def parse_pair(answer: str) -> GeneratedPair | str:
    """Query and completion from an answer that holds a JSON object, in a code fence or not; else what is wrong."""
    if not answer.strip():
        return "empty answer"
    held = list(objects(answer))
    if not held:
        return "no JSON object"
    found = next((one for one in held if one.keys() >= set(GeneratedPair._fields)), held[0])
    texts = [found.get(name) for name in GeneratedPair._fields]
    if not all(isinstance(text, str) and text.strip() for text in texts):
        return "query or completion missing"
    pair = GeneratedPair(*(str(text).strip() for text in texts))
    if any(map(unfit, pair)):
        return "holds what is no character"
    return "holds the image placeholder" if any(_PLACEHOLDER in text for text in pair) else pair


def objects(answer: str) -> Iterator[JsonObject]:
    """The JSON objects of a text, in a code fence or not; of braces that open none, the first ones are tried."""
    decoder, start = json.JSONDecoder(strict=False), answer.find("{")
    for _ in range(_TRIES):
        if start < 0:
            return
        try:
            found, end = decoder.raw_decode(answer, start)
            yield found
        except (ValueError, RecursionError):
            end = start + 1
        start = answer.find("{", end)
