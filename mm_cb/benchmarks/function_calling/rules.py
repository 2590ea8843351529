"""BFCL's AST rules as pure functions: is this the call that was asked for?

Source:
    gorilla, berkeley-function-call-leaderboard, ``ast_checker.py`` at 6ea5797 (v4) and ``checker.py`` at de8307b (v1),
    Apache-2.0. Deviation: where the original fails with an exception, an answer is wrong here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from mm_cb.core.python_calls import Call

TYPES: Mapping[str, type] = {
    "string": str,
    "integer": int,
    "float": float,
    "boolean": bool,
    "array": list,
    "tuple": list,
    "dict": dict,
    "any": str,
}
"""What a schema may say, and what an argument then is, exactly: True is no integer."""
NESTED = ("array", "tuple")
"""Types whose elements have a type, which is looked at one level deep."""
FAULTS = ("wrong_count", "wrong_name", "missing", "unexpected", "wrong_type", "wrong_value")
"""Why a list of calls is wrong; of several calls in parallel, that no order makes them right is ``wrong_value``."""
_OMIT = ""
"""Among the possible answers: the argument may be left out."""
_IGNORED = re.compile(r"[ ,./\-_*^]")


class Expected(NamedTuple):
    """One call that is asked for."""

    name: str
    required: Sequence[str]
    properties: Mapping[str, Mapping[str, Any]]
    """The schema's, by argument."""
    possible: Mapping[str, Sequence[Any]]
    """Right answers, by argument."""


def fault(calls: Sequence[Call], expected: Sequence[Expected], *, parallel: bool, version: int = 4) -> str | None:
    """Why an answer's calls are wrong, one of `FAULTS`; None if they are right.

    Args:
        calls: What was decoded.
        expected: What is asked for.
        parallel: Whether the order is free: each expected call takes the first that is left and right.
        version: BFCL's, 1 or 4: dictionaries are compared in two ways.
    """
    if len(calls) != len(expected):
        return "wrong_count"
    if not parallel:
        return call_fault(calls[0], expected[0], version)
    left = list(calls)
    for one in expected:
        match = next((index for index, call in enumerate(left) if call_fault(call, one, version) is None), None)
        if match is None:
            return call_fault(left[0], one, version) if len(calls) == 1 else "wrong_value"
        del left[match]
    return None


def call_fault(call: Call, expected: Expected, version: int = 4) -> str | None:
    """Why one call is not the expected one, or None."""
    if call.name != expected.name:
        return "wrong_name"
    if any(name not in call.arguments for name in expected.required):
        return "missing"
    for name, value in call.arguments.items():
        if name not in expected.properties or name not in expected.possible:
            return "unexpected"
        if found := _argument_fault(value, expected.properties[name], expected.possible[name], version):
            return found
    omitted = (possible for name, possible in expected.possible.items() if name not in call.arguments)
    return None if all(_OMIT in possible for possible in omitted) else "missing"


def _argument_fault(value: Any, schema: Mapping[str, Any], possible: Sequence[Any], version: int) -> str | None:
    declared = schema["type"]
    kind = TYPES[declared]
    inner = TYPES[schema["items"]["type"]] if declared in NESTED else None
    if declared == "tuple" and type(value) is tuple:
        value = list(value)
    if declared == "float" and type(value) is int:
        value = float(value)
    variable = _variable(value, kind, inner, possible)
    if variable is None:
        return "wrong_type"
    right = value in possible if variable else _matches(value, kind, inner, possible, version)
    return None if right else "wrong_value"


def _variable(value: Any, kind: Any, inner: type | None, possible: Sequence[Any]) -> bool | None:
    """Whether a value is to be compared raw, as the name of a variable is; None if its type is wrong."""
    answered = _type_of(possible)
    if type(value) is kind:
        if inner is not None and not any(_elements_fit(value, inner, answer) for answer in possible):
            return None
        return answered is not None and answered is not kind
    return True if answered is not None and type(value) is answered else None


def _elements_fit(value: Sequence[Any], inner: type, answer: Any) -> bool:
    """Elements of the declared type, or of that of the answer's own; an answer that is no list asks for nothing."""
    return type(answer) is not list or all(type(one) in (inner, _type_of(answer)) for one in value)


def _type_of(possible: Sequence[Any]) -> type | None:
    return next((type(answer) for answer in possible if answer != _OMIT), None)


def _matches(value: Any, kind: type, inner: type | None, possible: Sequence[Any], version: int) -> bool:
    if kind is dict:
        return any(_dict_matches(value, answer, version) for answer in possible if answer != _OMIT)
    if kind is list and inner is dict:
        return any(_dicts_match(value, answer, version) for answer in possible)
    if kind is str:
        return plain(value) in [plain(answer) for answer in possible if type(answer) is str]
    if kind is list:
        return [plain(one) for one in value] in [_plain_list(answer) for answer in possible]
    return value in possible


def plain(value: Any) -> Any:
    r"""A text as it is compared: without ``[ ,./\-_*^]``, small, ``'`` as ``"``; other values as they are."""
    return _IGNORED.sub("", value).lower().replace("'", '"') if type(value) is str else value


def _plain_list(answer: Any) -> Any:
    return [plain(one) for one in answer] if isinstance(answer, Sequence) else answer


def _dict_matches(value: Any, answer: Any, version: int) -> bool:
    """Keys as they are, values in plain text; v1 wants every key, and looks into a dictionary in a dictionary."""
    if not isinstance(value, dict) or not isinstance(answer, Mapping) or (version == 1 and len(value) != len(answer)):
        return False
    for key, held in value.items():
        if key not in answer:
            return False
        wanted = answer[key]
        if version == 1 and isinstance(wanted, Mapping):
            if not _dict_matches(held, wanted, version):
                return False
        elif not isinstance(wanted, Sequence) or plain(held) not in [plain(one) for one in wanted]:
            return False
    return version == 1 or all(_OMIT in possible for key, possible in answer.items() if key not in value)


def _dicts_match(value: Sequence[Any], answer: Any, version: int) -> bool:
    if not isinstance(answer, Sequence) or len(value) != len(answer):
        return False
    return all(map(_dict_matches, value, answer, [version] * len(value)))
