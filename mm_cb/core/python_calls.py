"""Calls written as Python, as BFCL asks models without a tool template for them: ``[name(key=value), ...]``."""

from __future__ import annotations

import ast
import operator
import re
import warnings
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

_STRIPPED = "`\n "
_LONGEST = 10_000
"""Bits of a whole number, and elements of a text or list, that a product in an answer may come to."""
_DEEPEST = 100
"""Brackets within brackets of a call in a text; Python itself reads no more than twice as many."""
_PARTS = re.compile(
    r"""(?s:'{3}(?:\\.|[^\\])*?'{3}|"{3}(?:\\.|[^\\])*?"{3})|'(?:\\(?s:.)|[^'\\\n])*'|"(?:\\(?s:.)|[^"\\\n])*"|[()\[\]{}]"""
)
"""Texts, whose brackets are none, and brackets."""
_SUMS: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
    ast.Pow: operator.pow,
}


class Call(NamedTuple):
    """One call of a tool."""

    name: str
    arguments: dict[str, Any]


class NotCalls(ValueError):
    """An answer that is no call and should be one; says why in a few words.

    Attributes:
        calls: Those beside what is broken that are whole.
        within: Up to where a text is part of what is broken.
    """

    calls: Sequence[Call] = ()
    within: int = 0


def read(text: str, *, version: int = 4) -> list[Call]:
    """The calls of an answer. Arguments without a name are passed over, names that stand for values are texts.

    Args:
        text: The whole answer.
        version: BFCL's; 1 strips new lines alone, and takes a call without named arguments for none.

    Raises:
        NotCalls: If it is not that, and nothing but that.

    Source:
        gorilla, ``model_handler/utils.py`` (``ast_parse``; v1: ``llama_handler.py``). Deviation: sums and products are
        worked out of plain values alone and to a bounded size, the original runs ``eval`` on them; any sign in front
        of a number is a minus there and here.
    """
    body = text.replace("\n", "") if version == 1 else text.strip(_STRIPPED)
    body = body if body.startswith("[") else f"[{body}"
    body = body if body.endswith("]") else f"{body}]"
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the answer's escapes
            top: Any = ast.parse(body if version == 1 else body.strip(), mode="eval").body
        calls = [top] if isinstance(top, ast.Call) else list(top.elts)
        return [_call(one, version) for one in calls]
    except NotCalls:
        raise
    except Exception as error:  # whatever a model may write: no Python, nested too deep, keys that cannot be keys
        raise NotCalls(f"no list of calls: {type(error).__name__}") from error


def within(text: str, names: Collection[str]) -> list[Call]:
    """The calls of some functions that stand anywhere in a text; none if it begins none.

    Args:
        text: The whole answer.
        names: Of the functions, as the model was shown them.

    Raises:
        NotCalls: If calls are begun and not one of them can be read.
    """
    longest_first = sorted(filter(None, names), key=len, reverse=True)
    begins = re.compile("|".join(rf"(?<![\w.]){re.escape(name)}\(" for name in longest_first) or r"(?!)")
    calls: list[Call] = []
    place, broken = 0, False
    while begun := begins.search(text, place):
        place, end = begun.end(), _closed(text, begun.end())
        try:
            calls += read(text[begun.start() : end]) if end else []
        except NotCalls:
            end = None
        broken, place = broken or not end, end or place
    if broken and not calls:
        raise NotCalls("a call is begun and cannot be read")
    return calls


def _closed(text: str, place: int) -> int | None:
    """Where the bracket that opens in front of a place is closed; None where it is not, or too many open inside it."""
    depth = 1
    for part in _PARTS.finditer(text, place):
        depth += (part[0] in "([{") - (part[0] in ")]}")
        if not 0 < depth <= _DEEPEST:
            return None if depth else part.end()
    return None


def write(calls: Sequence[Call]) -> str:
    """Calls as Python; `read` gives them back where every name is one in Python."""
    written = (
        f"{call.name}({', '.join(f'{key}={value!r}' for key, value in call.arguments.items())})" for call in calls
    )
    return f"[{', '.join(written)}]"


def _call(node: Any, version: int) -> Call:
    if not isinstance(node, ast.Call) or (version == 1 and not node.keywords):
        raise NotCalls("not every element is a call")
    parts, callee = [], node.func
    while isinstance(callee, ast.Attribute):
        parts.append(callee.attr)
        callee = callee.value
    if isinstance(callee, ast.Name):
        parts.append(callee.id)
    return Call(".".join(reversed(parts)), {k.arg or "**": _value(k.value) for k in node.keywords})


def _value(node: Any) -> Any:
    match node:
        case ast.Constant():
            return "..." if node.value is Ellipsis else _small(node.value)
        case ast.UnaryOp():
            return -_number(node.operand)
        case ast.List():
            return [_value(one) for one in node.elts]
        case ast.Tuple():
            return tuple(_value(one) for one in node.elts)
        case ast.Dict():
            return {_value(key): _value(value) for key, value in zip(node.keys, node.values, strict=True)}
        case ast.BinOp():
            return _worked_out(node)
        case ast.Name():
            return node.id
        case ast.Subscript():
            return f"{ast.unparse(node.value)}[{ast.unparse(node.slice)}]"
        case ast.Call() if not node.keywords:
            return ast.unparse(node)
        case ast.Call():
            inner = _call(node, 4)
            return {inner.name: inner.arguments}
    raise NotCalls(f"a value that is no value: {type(node).__name__}")


def _number(node: Any) -> Any:
    if not isinstance(node, ast.Constant):
        raise NotCalls("a sign in front of no number")
    return _small(node.value)


def _worked_out(node: Any) -> Any:
    """A sum or product of plain values."""
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub | ast.UAdd):
        inside = _worked_out(node.operand)
        return -inside if isinstance(node.op, ast.USub) else +inside
    if not isinstance(node, ast.BinOp):
        if isinstance(node, ast.Constant | ast.List | ast.Tuple):
            return ast.literal_eval(node)
        raise NotCalls("a sum or product of what is not a plain value")
    left, right = _worked_out(node.left), _worked_out(node.right)
    if _too_large(node.op, left, right):
        raise NotCalls("a product too large")
    if (act := _SUMS.get(type(node.op))) is None:
        raise NotCalls("a sum or product of another kind")
    return _small(act(left, right))


def _small(value: Any) -> Any:
    """A value that can be written out: Python writes no numbers of many thousands of digits."""
    if isinstance(value, int) and value.bit_length() > _LONGEST:
        raise NotCalls("a number too large")
    if isinstance(value, list | tuple | set | dict):
        for one in value.items() if isinstance(value, dict) else value:
            _small(one)
    return value


def _too_large(act: ast.operator, left: Any, right: Any) -> bool:
    """Whether a result would outgrow `_LONGEST`, or nobody knows: a text's ``%`` may ask for any width."""
    if isinstance(act, ast.Pow) and isinstance(left, int) and isinstance(right, int):
        return left.bit_length() * abs(right) > _LONGEST
    if isinstance(act, ast.Mult):
        pairs = (left, right), (right, left)
        return any(hasattr(a, "__len__") and isinstance(n, int) and len(a) * n > _LONGEST for a, n in pairs)
    return isinstance(act, ast.Mod) and hasattr(left, "__len__")
