"""Tools in chat templates: whether a template takes them, how it writes calls, and where in a chat a call stands."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any
from weakref import WeakKeyDictionary

from mm_cb.core.calls import FORMATS, Call, CallFormat, NotCalls, json_at
from mm_cb.core.errors import UserError
from mm_cb.core.records import JsonObject, Message

_TOOL, _ASKED = "ring_the_bell", "question"
PROBE: JsonObject = {
    "type": "function",
    "function": {
        "name": _TOOL,
        "description": "Rings a bell.",
        "parameters": {
            "type": "object",
            "properties": {"times": {"type": "integer", "description": "How often."}},
            "required": ["times"],
        },
    },
}
"""A tool to see what a template makes of tools."""
_PROBE_CALL = Call(_TOOL, {"times": 3})
_OPENS = {"hermes": "<tool_call>", "mistral": "[TOOL_CALLS]", "llama": "{"}
"""What stands in front of a turn's first name."""
_BLOCK = {
    "hermes": re.compile(r"\s*<tool_call>\s*"),
    "mistral": re.compile(r"\[TOOL_CALLS\]\s*"),
    "llama": re.compile(""),
}
_CLOSE = {"hermes": re.compile(r"\s*</tool_call>"), "mistral": re.compile(""), "llama": re.compile("")}


_known: WeakKeyDictionary[Any, tuple[str, CallFormat]] = WeakKeyDictionary()
"""Of every processor, its template and how that writes calls: asked of it once, not with every row."""


def tool_format(processor: Any) -> CallFormat:
    """How a processor's chat template writes calls.

    Raises:
        UserError: If it leaves out the tools that it is given, which transformers does not tell, or writes calls in no
            known way.
    """
    holders = (processor, getattr(processor, "tokenizer", None))
    template = repr([getattr(holder, "chat_template", None) for holder in holders])
    known = _known.get(processor)
    if known is None or known[0] != template:
        known = _known[processor] = template, _tried_format(processor)
    return known[1]


def _tried_format(processor: Any) -> CallFormat:
    name = getattr(getattr(processor, "tokenizer", processor), "name_or_path", "") or "the model"
    asked: Message = {"role": "user", "content": [{"type": "text", "text": _ASKED}]}
    shown = _written(processor, [asked], name)
    if _TOOL not in shown:
        raise UserError(
            f"the chat template of `{name}` leaves out the tools that it is given, in silence; give a model whose "
            "template takes tools, or write functions and calls into the texts (BFCL's prompt mode)."
        )
    said = _written(processor, [asked, call_message([], [_PROBE_CALL], 0)], name)
    behind = said[len(_common(shown, said)) :]
    for format in FORMATS.values():
        if format.mark and format.mark in behind:
            try:
                start, end = call_place(said, said.rindex(_TOOL), 1, format)
                if format.read(said[start:end]).calls == [_PROBE_CALL]:
                    return format
            except NotCalls:
                continue
    known = ", ".join(format.about for format in FORMATS.values() if format.mark)
    raise UserError(f"the chat template of `{name}` writes calls in a way that is not read here; known are {known}.")


def call_message(parts: Sequence[Message], calls: Sequence[Call], first: int) -> Message:
    """An assistant's turn as templates take it; ids have nine characters, as Mistral's template wants."""
    told = [
        {"type": "function", "id": call_id(first + n), "function": {"name": call.name, "arguments": call.arguments}}
        for n, call in enumerate(calls)
    ]
    return {"role": "assistant", "content": list(parts), "tool_calls": told}


def call_id(number: int) -> str:
    """The id of a chat's call, from 0."""
    return f"call{number:05d}"


def call_place(text: str, name: int, calls: int, format: CallFormat) -> tuple[int, int]:
    """From where to where a turn's calls stand, the tags around them included.

    Args:
        text: A chat as the template writes it.
        name: Where the first call's name stands.
        calls: How many there are.
        format: How they are written.

    Raises:
        NotCalls: If they do not stand there.
    """
    start = text.rfind(_OPENS[format.name], 0, name)
    end = start
    for _ in range(1 if format.name == "mistral" else calls):
        opened = _BLOCK[format.name].match(text, end) if start >= 0 else None
        if opened is None:
            raise NotCalls(f"no {_OPENS[format.name]} in front of a call")
        _, end = json_at(text, opened.end())
        closed = _CLOSE[format.name].match(text, end)
        if closed is None:
            raise NotCalls("a call is not closed")
        end = closed.end()
    return start, end


def _written(processor: Any, messages: Sequence[Message], name: str) -> str:
    try:
        return str(
            processor.apply_chat_template(
                list(messages), tools=[PROBE], tokenize=False, add_generation_prompt=messages[-1]["role"] == "user"
            )
        )
    except Exception as error:  # a template may raise whatever it likes
        raise UserError(f"the chat template of `{name}` cannot write a chat with tools: {error}") from error


def _common(left: str, right: str) -> str:
    same = next((n for n, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right)))
    return left[:same]
