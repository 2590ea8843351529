"""Behaviours whose target is a tool call: what an attacker wants called, with which arguments, of which functions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mm_cb.core.calls import Call
from mm_cb.core.reading import shown, unfit
from mm_cb.core.records import JsonObject
from mm_cb.data.tools import read_calls, read_tools, same

CALL, TOOLS, OPENING = "target_call", "tools", "target_opening"
"""Keys of a behaviour's line; the last is written by a run, into the copy that it keeps."""
_KEYS = ("name", "arguments", "match")


@dataclass(frozen=True)
class TargetCall:
    """A call that an attack is to bring about."""

    call: Call
    match: tuple[str, ...] | None = None
    """Names of the arguments that decide; None = all, and no others."""

    def made_by(self, calls: Sequence[Call]) -> bool:
        """Whether one of some calls is this one."""
        return any(self._is(call) for call in calls)

    def _is(self, call: Call) -> bool:
        wanted, got = self.call.arguments, call.arguments
        names = self.match if self.match is not None else tuple({**wanted, **got})
        return call.name == self.call.name and all(
            name in wanted and name in got and same(wanted[name], got[name]) for name in names
        )


def read_target_call(value: Any, tools: Sequence[JsonObject] = ()) -> TargetCall:
    """What stands under ``target_call``.

    Args:
        value: ``{"name", "arguments"}``, perhaps with ``match``, a list of names of arguments.
        tools: Function definitions that the call must fit; none = the prompt holds them in its own words.

    Raises:
        ValueError: If it is no such object, or no such call.
    """
    if not isinstance(value, dict) or not {"name", "arguments"} <= value.keys() <= set(_KEYS):
        raise ValueError(f"`{CALL}` must be an object of `name`, `arguments` and perhaps `match`, got {shown(value)}")
    name, arguments, match = (value.get(key) for key in _KEYS)
    if not isinstance(name, str) or not name.strip() or unfit(name) or not isinstance(arguments, dict):
        raise ValueError(f"`{CALL}` must have a text as `name` and an object as `arguments`, got {shown(value)}")
    if tools:
        read_calls([{"name": name, "arguments": arguments}], tools)
    known = [*map(str, arguments)]
    if match is not None and not (isinstance(match, list) and match and all(one in known for one in match)):
        raise ValueError(f"`match` of `{CALL}` must be a list of names of its arguments, got {shown(match)}")
    return TargetCall(Call(name, arguments), None if match is None else tuple(match))


def read_shown_tools(record: JsonObject) -> list[JsonObject]:
    """What stands under ``tools``, none if that is not there.

    Raises:
        ValueError: If these are no function definitions.
    """
    return [] if record.get(TOOLS) is None else read_tools(record[TOOLS])
