"""What a model thought before it answered, taken off its answer: nothing scores or judges a thought."""

from __future__ import annotations

import re
from typing import Any

from mm_cb.core.records import JsonObject

_TAG = r"<(?P<tag>think|thinking|thought|thoughts|reasoning|seed:think)>"
_HEAD = r"(?:<\|start\|>assistant)?<\|channel\|>"
_BLOCKS = (
    (_TAG, r"</(?P=tag)>"),
    (r"\[THINK\]", r"\[/THINK\]"),
    (r"<\|channel>\s*(?:thought|analysis)\b", r"<channel\|>"),
    (_HEAD + r"analysis\b", r"<\|end\|>"),
    (r"<\|START_THINKING\|>", r"<\|END_THINKING\|>(?:\s*<\|START_RESPONSE\|>)?"),
    ("◁think▷", "◁/think▷"),
)
"""How the families write the marks around a thought."""
_FLAGS = re.IGNORECASE | re.DOTALL
_BEGUN = re.compile(r"\s*(?:" + "|".join(begin for begin, _ in _BLOCKS) + ")", _FLAGS)
_FINISHED = [re.compile(rf"\s*{begin}.*?{end}\s*", _FLAGS) for begin, end in _BLOCKS]
_FINISHED.append(re.compile(rf"\s*{_HEAD}final<\|message\|>", _FLAGS))
_CLOSED = re.compile(r"(?:\A|\n)[ \t]*</think>\s*|</think>[ \t]*\n\s*(?=\S)", re.IGNORECASE)
"""The end of a thought that the prompt had begun: alone in front of a line, or at the end of one."""
_END = re.compile(r"(?:</think>|\[/THINK\]|<channel\|>|<\|END_THINKING\|>|◁/think▷)\s*", re.IGNORECASE)
MARKS = frozenset(
    "<think> </think> [THINK] [/THINK] <|channel> <channel|> <|channel|> <|message|> <|start|> <|end|> "
    "<|START_THINKING|> <|END_THINKING|> <|START_RESPONSE|> ◁think▷ ◁/think▷".split()
)
"""Tokens that the marks are made of: special ones in some tokenizers, and part of the text all the same."""
FIELDS = ("reasoning_content", "reasoning", "reasoning_details", "thinking")
"""Where servers put a model's thoughts beside its answer, perhaps sealed."""


class AnswerText(str):
    """What a model answers: a text, without the thought in front of it.

    Attributes:
        thought: What was in front, marks included: with a finished one of the text, thought and answer joined are what
            the model wrote.
        refusal: Whether its server says that it is a refusal, whatever its words are.
        served: The model that its server names, where that is not the name that was asked for: a route, or another.
        at_limit: Whether it ends at the longest answer that was asked for, and not where the model ended it.
        unfinished: Whether its thought never ended.
    """

    __slots__ = ("at_limit", "refusal", "served", "thought", "unfinished")
    thought: str
    refusal: bool
    served: str
    at_limit: bool
    unfinished: bool

    def __new__(
        cls,
        text: str,
        thought: str = "",
        *,
        refusal: bool = False,
        served: str = "",
        at_limit: bool = False,
        unfinished: bool = False,
    ) -> AnswerText:
        """Keep all of it."""
        made = super().__new__(cls, text)
        made.thought, made.refusal, made.served = thought, refusal, served
        made.at_limit, made.unfinished = at_limit, unfinished
        return made

    @property
    def cut(self) -> bool:
        """Whether the model was stopped in its thought or right behind it, before it had begun to answer."""
        stopped = self.unfinished or self.at_limit
        return stopped and bool(self.thought.strip()) and not self.strip()


def answer_in(text: str, *, opened: bool = False, beside: str = "") -> AnswerText:
    """A model's text, as its answer and the thought in front of it.

    A thought is what stands between the marks of the families at the beginning; marks in the middle of an answer are
    part of it. A thought that never ends has no answer behind it.

    Args:
        text: What the model wrote.
        opened: Whether its prompt had begun the thought already.
        beside: A thought that came beside the text.
    """
    start, unfinished = 0, False
    if opened:
        end = _END.search(text)
        start, unfinished = end.end() if end else len(text), end is None
    while found := next((m for block in _FINISHED if (m := block.match(text, start)) and m.end() > start), None):
        start = found.end()
    if _BEGUN.match(text, start):
        start, unfinished = len(text), True
    if not start and not _BEGUN.search(text) and (end := _CLOSED.search(text)):
        start = end.end()
    return AnswerText(text[start:], beside + text[:start], at_limit=ends_at_limit(text), unfinished=unfinished)


def begins_with_thought(text: str) -> bool:
    """Whether a text begins with the mark of a thought."""
    return _BEGUN.match(text) is not None


def has_thought(text: str) -> bool:
    """Whether a text begins with the mark of a thought, or holds the end of one that its prompt had begun."""
    return begins_with_thought(text) or _END.search(text) is not None


def thought_beside(message: JsonObject) -> str:
    """The thought in the fields of a server's message, or in parts of its content; its texts alone."""
    held = [message.get(name) for name in FIELDS]
    content = message.get("content")
    parts = [part for part in content if isinstance(part, dict)] if isinstance(content, list) else []
    held += [[part["thinking"] for part in parts if "thinking" in part]]
    text = next((said for one in held if (said := _texts(one))), "")
    return text.encode("utf-8", "replace").decode()


def _texts(value: Any) -> str:
    """All texts of a thought's parts, joined."""
    if isinstance(value, str):
        return value
    if isinstance(value, list):
        return "".join(map(_texts, value))
    if isinstance(value, dict):
        return next(
            (text for key in ("text", "thinking", "summary", "content") if (text := _texts(value.get(key)))), ""
        )
    return ""


def is_refusal(completion: Any) -> bool:
    """Whether a completion is an answer that its server calls a refusal."""
    return isinstance(completion, AnswerText) and completion.refusal


def thought_of(completion: Any) -> str:
    """The thought that was taken off a completion; the empty text where there was none."""
    return completion.thought if isinstance(completion, AnswerText) else ""


def ends_at_limit(completion: Any) -> bool:
    """Whether a completion ends at the longest answer that was asked for, and not where the model ended it."""
    return isinstance(completion, AnswerText) and completion.at_limit


def first_line_cut(completion: Any) -> bool:
    """Whether a completion's limit came before its first line had ended: what stands there may begin another word."""
    return ends_at_limit(completion) and "\n" not in completion.lstrip()


def ending_as(text: str, said: str) -> str:
    """A text that what was said ends; where that ends at its limit, so does this."""
    return AnswerText(text, at_limit=True) if ends_at_limit(said) else text


def served_as(completion: Any) -> str:
    """The model that a completion's server names, if it is another name than was asked for; else the empty text."""
    return completion.served if isinstance(completion, AnswerText) else ""
