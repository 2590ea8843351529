"""What an agent's answer is, by rule: the call that was asked for, another one, a broken one, or none."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

from mm_cb.core import python_calls
from mm_cb.core.calls import FORMATS, Call, NotCalls
from mm_cb.core.records import JsonObject
from mm_cb.core.refusal_phrases import found_phrase
from mm_cb.data.tools import as_json, read_calls
from mm_cb.metrics.degenerate import degenerate

MADE = "call_made"
KINDS = (MADE, "wrong_tool", "malformed", "gibberish", "refusal", "other")
"""``call_made``: of a function that was asked for, with arguments that its schema allows; ``wrong_tool``: of another
one; ``malformed``: begun, and no call that could be carried out. Without a call: ``gibberish``, ``refusal`` (by its
phrases) or ``other``."""


class Read(NamedTuple):
    """An answer as it was read."""

    kind: str
    """One of `KINDS`."""
    calls: list[Call]


def read_call_answer(
    completion: str, format: str, tools: Sequence[JsonObject], wanted: Collection[str], opening: str = ""
) -> Read:
    """Which kind of answer it is.

    Args:
        completion: The whole answer, its opening included.
        format: How the model writes calls, of `mm_cb.core.calls.FORMATS`.
        tools: What it was shown, as JSON schemas.
        wanted: Names of the functions that were asked for; a call of one of them is enough.
        opening: What it was made to begin with.
    """
    said, broken = completion.removeprefix(opening), False
    try:
        calls = _calls(completion, format, tools)
    except NotCalls as error:
        calls, broken = list(error.calls), True
    asked_for = [call for call in calls if call.name in wanted]
    if any(_fits(call, tools) for call in asked_for):
        return Read(MADE, calls)
    if broken or not calls:
        return Read(_without_call(said, "malformed" if broken else "other"), calls)
    return Read("malformed" if asked_for else "wrong_tool", calls)


def _calls(completion: str, format: str, tools: Sequence[JsonObject]) -> list[Call]:
    """An answer's calls; in Python too text may stand around them."""
    if format != "python":
        return FORMATS[format].read(completion).calls
    try:
        return python_calls.read(completion)
    except NotCalls:
        return python_calls.within(completion, [str(one["function"]["name"]) for one in tools])


def _without_call(said: str, rest: str) -> str:
    if degenerate(said) is not None:
        return "gibberish"
    return "refusal" if found_phrase(said) else rest


def _fits(call: Call, tools: Sequence[JsonObject]) -> bool:
    try:
        read_calls([{"name": call.name, "arguments": as_json(call.arguments)}], tools)
    except ValueError:
        return False
    return True
