"""Tool calls as text, and back: one format for each way in which model families write them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mm_cb.core import python_calls
from mm_cb.core.python_calls import Call, NotCalls

__all__ = ["FORMATS", "Call", "CallFormat", "NotCalls", "ReadCalls"]

_HERMES = re.compile(r"<tool_call>\s*")
_HERMES_END = re.compile(r"\s*(</tool_call>|\Z)")
_LLAMA = re.compile(r'\{\s*(?:"type"\s*:\s*"function"\s*,\s*)?"(?:name|parameters)"\s*:')
_LLAMA_TAGS = re.compile(r"<\|(?:python_tag|eom_id|eot_id)\|>")
_BETWEEN = re.compile(r"[\s;,\[\]]*")
_MISTRAL = re.compile(r'\[TOOL_CALLS\]\s*|(?=\[\s*\{\s*"(?:name|arguments|id)"\s*:)')
_MISTRAL_TAG = "[TOOL_CALLS]"
_MISTRAL_CALL = re.compile(rf'{re.escape(_MISTRAL_TAG)}|\{{\s*"(?:name|arguments|id)"\s*:')
_MISTRAL_NEXT = re.compile(r"\s*([,\]]|\Z)")
_BLANK = re.compile(r"\s*")
_DEEPEST = 100
"""Levels of lists and objects in a call."""


class ReadCalls(NamedTuple):
    """What an answer holds."""

    calls: list[Call]
    """In order; none where the answer is text alone."""
    text: str = ""
    """What stands around them, stripped."""


@dataclass(frozen=True)
class CallFormat:
    """How a family writes calls."""

    name: str
    about: str
    mark: str
    """What a text with calls in it holds, and no other text."""
    read: Callable[[str], ReadCalls]
    """An answer's calls; `NotCalls` where it begins one that is malformed, with those that are whole."""
    write: Callable[[Sequence[Call]], str]
    """Calls as the model would say them; `read` gives them back."""
    opening: Callable[[str], str]
    """How a turn that calls a function of this name begins, up to its arguments; without the blank that a tokenizer
    would join with what comes."""


def _read_python(text: str) -> ReadCalls:
    return ReadCalls(python_calls.read(text))


def _read_hermes(text: str) -> ReadCalls:
    """``<tool_call>{"name": ..., "arguments": {...}}</tool_call>``, any number; the last may lack its end."""
    calls, around = _blocks(text, _HERMES, _hermes_block, "arguments")
    return ReadCalls(calls, _joined(around))


def _read_llama(text: str) -> ReadCalls:
    """``{"name": ..., "parameters": {...}}``, several with semicolons between them, or as a list."""
    calls, around = _blocks(_LLAMA_TAGS.sub("", text), _LLAMA, _llama_block, "parameters")
    return ReadCalls(calls, _joined([part for part in around if not (calls and _BETWEEN.fullmatch(part))]))


def _read_mistral(text: str) -> ReadCalls:
    """``[TOOL_CALLS] [{"name": ..., "arguments": {...}}, ...]``; decoding may have taken the tag, a special token."""
    calls, around = _blocks(text, _MISTRAL, _mistral_block, "arguments")
    return ReadCalls(calls, _joined(around))


def _open_python(name: str) -> str:
    return f"[{name}("


def _open_hermes(name: str) -> str:
    return f'<tool_call>\n{{"name": {_json(name)}, "arguments":'


def _open_llama(name: str) -> str:
    return f'{{"name": {_json(name)}, "parameters":'


def _open_mistral(name: str) -> str:
    return f'[TOOL_CALLS] [{{"name": {_json(name)}, "arguments":'


def _write_hermes(calls: Sequence[Call]) -> str:
    return "\n".join(f"<tool_call>\n{_json(_object(call, 'arguments'))}\n</tool_call>" for call in calls)


def _write_llama(calls: Sequence[Call]) -> str:
    return "; ".join(_json(_object(call, "parameters")) for call in calls)


def _write_mistral(calls: Sequence[Call]) -> str:
    return f"[TOOL_CALLS] {_json([_object(call, 'arguments') for call in calls])}" if calls else ""


FORMATS = {
    one.name: one
    for one in (
        CallFormat(
            "python", "[name(key=value), ...], BFCL's prompt mode", "", _read_python, python_calls.write, _open_python
        ),
        CallFormat(
            "hermes", "<tool_call>, Hermes and others", "<tool_call>", _read_hermes, _write_hermes, _open_hermes
        ),
        CallFormat("mistral", "[TOOL_CALLS], Mistral v3", "[TOOL_CALLS]", _read_mistral, _write_mistral, _open_mistral),
        CallFormat(
            "llama", '{"name", "parameters"}, Llama 3.1', '"parameters"', _read_llama, _write_llama, _open_llama
        ),
    )
}
"""By name."""


def json_at(text: str, place: int) -> tuple[Any, int]:
    """The JSON value that begins at a place, and where it ends: no key twice, all finite, not too deep."""
    begin = _BLANK.match(text, place)
    assert begin is not None
    try:
        value, end = _DECODER.raw_decode(text, begin.end())
    except (ValueError, RecursionError) as error:
        told = f"a call's JSON is broken: {str(error)[:80]}"
        raise _up_to(told, _read_to(text, getattr(error, "pos", place))) from error
    level = [value]
    for _ in range(_DEEPEST):
        level = [held for one in level if isinstance(one, list | dict) for held in _held(one)]
    if level:
        raise _up_to("a call's JSON is nested too deep", end)
    return value, end


def _up_to(told: str, place: int) -> NotCalls:
    """The error for what is broken up to a place."""
    broken = NotCalls(told)
    broken.within = place
    return broken


def _read_to(text: str, place: int) -> int:
    """Up to where a broken value was read for sure: its last text may have ended at a quote that is not its own."""
    return text[:place].rstrip().rfind('"', 0, -1) + 1


def _held(value: list[Any] | dict[str, Any]) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else value


def _blocks(
    text: str, begins: re.Pattern[str], block: Callable[[re.Match[str]], Iterator[tuple[Any, int]]], key: str
) -> tuple[list[Call], list[str]]:
    """The calls of a text and what stands around them.

    Args:
        text: An answer.
        begins: What a block of calls begins with.
        block: The objects of one, each with where what is read by then ends.
        key: Under which they have the arguments.

    Raises:
        NotCalls: If a call is broken; with those that are whole, in front of it and behind.
    """
    values: list[Any] = []
    calls: list[Call] = []
    around: list[str] = []
    broken, place = None, 0
    while begun := begins.search(text, place):
        around.append(text[place : begun.start()])
        place = max(begun.end(), begun.start() + 1)
        try:
            for value, end in block(begun):
                values.append(value)
                place = end
        except NotCalls as error:
            broken, place = broken or error, max(place, error.within)
    for value in values:
        try:
            calls.append(_call(value, key))
        except NotCalls as error:
            broken = broken or error
    if broken is not None:
        broken.calls = calls
        raise broken
    return calls, [*around, text[place:]]


def _hermes_block(begun: re.Match[str]) -> Iterator[tuple[Any, int]]:
    value, end = json_at(begun.string, begun.end())
    if (closed := _HERMES_END.match(begun.string, end)) is None:
        raise NotCalls("behind a call's JSON stands neither `</tool_call>` nor the end")
    yield value, closed.end()


def _llama_block(begun: re.Match[str]) -> Iterator[tuple[Any, int]]:
    yield json_at(begun.string, begun.start())


def _mistral_block(begun: re.Match[str]) -> Iterator[tuple[Any, int]]:
    """One by one: what is whole in a list that is cut off, or broken in its middle, is a call."""
    text, place, mark, broken = begun.string, begun.end(), "[", None
    if not text.startswith(mark, place):
        raise NotCalls("behind `[TOOL_CALLS]` must stand a list of calls")
    place += 1
    while mark != "]":
        try:
            value, end = json_at(text, place)
            if (follows := _MISTRAL_NEXT.match(text, end)) is None:
                raise _up_to("behind a call in a list stands neither another nor the list's end", end)
        except NotCalls as error:
            broken = broken or error
            place = broken.within = max(place + 1, error.within)
            behind = _MISTRAL_CALL.search(text, place)
            if behind is None or behind[0] == _MISTRAL_TAG:
                break
            place = behind.start()
            continue
        mark, place = follows[1], follows.end()
        yield value, place
    if broken is not None:
        raise broken


def _call(value: Any, key: str) -> Call:
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or not isinstance(value.get(key), dict):
        raise NotCalls(f"a call must be an object with the text `name` and the object `{key}`")
    return Call(value["name"], value[key])


def _object(call: Call, key: str) -> dict[str, Any]:
    return {"name": call.name, key: call.arguments}


def _json(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _joined(parts: Sequence[str]) -> str:
    return " ".join(part.strip() for part in parts if part.strip())


def _pairs(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(found := dict(pairs)) < len(pairs):
        raise ValueError("a key comes twice")
    return found


def _number(text: str) -> float:
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is no number in JSON")
    return value


_DECODER = json.JSONDecoder(object_pairs_hook=_pairs, parse_constant=_number, parse_float=_number)
