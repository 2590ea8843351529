"""Chats as text and as tokens: the processor's own template, and what every token of the result is."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

from mm_cb.core.calls import Call, CallFormat, NotCalls
from mm_cb.core.errors import UserError
from mm_cb.core.records import JsonObject, Message
from mm_cb.core.thoughts import MARKS
from mm_cb.models.tools import call_id, call_message, call_place, tool_format

_BLANK = "\x1f"
"""Put around stand-ins for texts: blank to a template that trims, and in no template or text."""
_PLACEHOLDER = re.compile(f"({_BLANK}?\ue000\\d+\ue001{_BLANK}?)")


Text = tuple[str, str]
"""Whose it is, and a text of a chat."""


class TokenRole(IntEnum):
    """What a token is; everything that is none of the others is the template's own, an operator's, or padding."""

    TEMPLATE = 0
    USER = 1
    COMPLETION = 2
    IMAGE = 3
    CALL = 4
    """Of the assistant's too: a tool call, with the tags around it and the token that ends the turn."""


SAID = (TokenRole.COMPLETION, TokenRole.CALL)
"""What the assistant says."""
_AS_WRITTEN = ("call", "tool")
"""Whose texts stand in quotation marks of JSON in some templates, which write a blank's stand-in as another one."""
_ROLES = {"assistant": TokenRole.COMPLETION, "call": TokenRole.CALL, "system": TokenRole.TEMPLATE}
"""Whose a text is; all others are what the assistant is told: the user's, and tools' results."""


class Span(NamedTuple):
    """Characters ``start`` to ``end`` of a rendered chat, all of one role."""

    role: TokenRole
    start: int
    end: int


@dataclass(frozen=True)
class RenderedChat:
    """A chat as the model's template writes it, and where the texts and images lie in it."""

    text: str
    spans: tuple[Span, ...]

    def roles(self, offsets: Sequence[tuple[int, int]]) -> list[int]:
        """The role of every token, from the characters ``(start, end)`` that it covers."""
        roles = []
        for start, end in offsets:
            touching = (span.role for span in self.spans if start < span.end and end > span.start)
            roles.append(int(max(touching, default=TokenRole.TEMPLATE)))
        return roles

    def begun(self, opening: str) -> "RenderedChat":
        """The chat with the beginning of an answer behind it, as it is: no template writes on it."""
        end = len(self.text) + len(opening)
        return RenderedChat(self.text + opening, (*self.spans, Span(TokenRole.COMPLETION, len(self.text), end)))


def chat(text: str, *, images: int = 0, system: str | None = None, completion: str | None = None) -> list[Message]:
    """One exchange as messages; a system text is put in front of the user's (Mistral's format has no system role)."""
    asked = text if system is None else f"{system}\n\n{text}"
    content = [{"type": "image"}] * images + [{"type": "text", "text": asked}]
    messages: list[Message] = [{"role": "user", "content": content}]
    if completion is not None:
        messages.append({"role": "assistant", "content": [{"type": "text", "text": completion}]})
    return messages


@dataclass(frozen=True)
class Dialect:
    """What a model family's chats are made of beside texts; None where the family has no such token."""

    image_token: str | None
    """What the template writes for a picture."""
    soft_token: str | None
    """The token, repeated, whose embeddings a picture's features replace; often the same."""
    end_of_turn: str | None
    """What ends an answer."""
    settings: Mapping[str, object] = field(default_factory=dict)
    """What the chat template is called with beside the chat."""
    prompts_open: bool = False
    """Whether prompts end in a block that the template would write another way in front of a last answer: this is then
    written behind the prompt."""


def dialect_of(processor: Any) -> Dialect:
    """The dialect of most families: one token for pictures, answers that end in the end-of-sequence token."""
    return Dialect(processor.image_token, processor.image_token, processor.tokenizer.eos_token)


ANSWER = "answer"
"""A completion to see what a template writes behind it."""


def end_written(tokenizer: Any, rendered: str) -> int | None:
    """Id of the added token that a template writes behind `ANSWER`, the last answer of ``rendered``, if it does."""
    behind = rendered.rpartition(ANSWER)[2].lstrip()
    ids = {token: id for token, id in tokenizer.get_added_vocab().items() if behind.startswith(token)}
    return ids[max(ids, key=len)] if ids else None


def render_chat(
    processor: Any,
    messages: Sequence[Message],
    *,
    pictures: Sequence[str] = (),
    close_turn: bool = True,
    dialect: Dialect | None = None,
    tools: Sequence[JsonObject] = (),
) -> RenderedChat:
    """Write a chat with the processor's template and record which characters are whose.

    The template is run on stand-ins for the texts, which are filled in afterwards, so that no text, whatever it holds,
    can be mistaken for a part of the template. Where the template trims a text's blanks, so does this.

    Args:
        processor: A transformers processor with a chat template.
        messages: The turns. When the last one is the user's, the result ends where the model goes on.
        pictures: The tokens that stand for each image, in order; without it one placeholder stands for each.
        close_turn: Whether a final assistant turn is ended. False leaves it open, as a prefix, where the model goes on:
            also behind an empty thinking block, if the template ends prompts with one and leaves it out of full chats.
        dialect: The family's; None = that of most families.
        tools: JSON schemas of functions that the template shows the model. Calls are `Call`s in ``tool_calls`` of an
            assistant's turn.

    Returns:
        The text and its spans. A completion's span includes the token that ends the turn, if the template writes one.

    Raises:
        UserError: If a text holds the image placeholder, or a control token (but in an answer left open), or cannot be
            encoded, or the template fails, does not write every text and call as it is, blanks and earlier thoughts
            apart, or leaves out tools.

    Source:
        Deviations from the released trainer of circuit breakers, which tokenises request and answer apart: a blank
        opens an answer only where the template writes one, and every answer is ended where the template ends it.
    """
    dialect = dialect or dialect_of(processor)
    texts: list[Text] = []
    format = tool_format(processor) if tools or any("tool_calls" in message for message in messages) else None
    tokenizer = getattr(processor, "tokenizer", processor)
    turns = _ChatTurns(texts, dialect, tokenizer)
    for tool in tools:
        refuse_text(json.dumps(tool, ensure_ascii=False), dialect, tokenizer)
    stand_ins = [turns.stand_in(message) for message in messages[:-1]]
    answer = len(texts)
    if not close_turn and messages[-1]["role"] == "assistant":
        turns.tokenizer = None  # what a model said, perhaps: it may spell anything
    stand_ins.append(turns.stand_in(messages[-1]))
    shown = {"tools": list(tools)} if tools else {}
    try:
        template = by_template(processor, stand_ins, dialect, shown)
        _refuse_rewriting(template, by_template(processor, _said(stand_ins, texts), dialect, shown), texts, tokenizer)
        if not close_turn and messages[-1]["role"] == "assistant" and len(messages) > 1 and not dialect.prompts_open:
            asked = processor.apply_chat_template(
                stand_ins[:-1], tokenize=False, add_generation_prompt=True, **dialect.settings, **shown
            )
            template = _behind(asked, template, answer)
    except Exception as error:
        if not (isinstance(error, TypeError | ArithmeticError) or type(error).__module__.startswith("jinja2")):
            raise  # jinja2's are told by their module: whoever never renders a chat needs no jinja2
        roles = ", ".join(message["role"] for message in messages)
        raise UserError(f"the model's chat template cannot write a chat of {roles}: {error}") from error
    if format is not None:
        template = turns.filled(template, format)
    written = template.count(dialect.image_token) if dialect.image_token is not None else 0
    if written != (named := count_images(messages)):
        raise UserError(
            f"the chat template of {_template_of(tokenizer)} must write `{dialect.image_token}` once for each picture; "
            f"of {named} it wrote {written}."
        )
    to_come = iter(pictures) if pictures else None
    end = dialect.end_of_turn or ""
    pieces: list[str] = []
    spans: list[Span] = []
    found: list[int] = []
    length = 0
    for index, literal in enumerate(_PLACEHOLDER.split(template)):
        if index % 2:
            number = int(literal.strip(f"{_BLANK}\ue000\ue001"))
            role, text = texts[number]
            if role not in _AS_WRITTEN:
                text = text if literal.startswith(_BLANK) else text.lstrip()
                text = text if literal.endswith(_BLANK) else text.rstrip()
            found.append(number)
            spans.append(Span(_ROLES.get(role, TokenRole.USER), length, length + len(text)))
            pieces.append(text)
            length += len(text)
            continue
        if spans and spans[-1].role in SAID and end and literal.startswith(end):
            spans[-1] = spans[-1]._replace(end=length + len(end))
        for part, is_picture in _image_parts(literal, dialect, to_come):
            if is_picture:
                spans.append(Span(TokenRole.IMAGE, length, length + len(part)))
            pieces.append(part)
            length += len(part)
    if found != list(range(len(texts))):
        raise UserError(
            f"the chat template of {_template_of(tokenizer)} must write the texts of all messages as they are, once "
            f"and in order; of {len(texts)} it wrote {', '.join(f'no. {index + 1}' for index in found) or 'none'}."
        )
    joined = "".join(pieces)
    if messages[-1]["role"] == "assistant":
        last = max(span.end for span in spans if span.role in SAID)
        ended = bool(end) and joined[:last].endswith(end)
        if not close_turn:
            joined = joined[: last - len(end) if ended else last]
        elif ended and joined[last:].isspace():  # a template may go on with a blank or a new line
            joined = joined[:last]
    return RenderedChat(joined, tuple(spans))


def _said(stand_ins: Sequence[Message], texts: Sequence[Text]) -> list[Message]:
    """The chat with its texts in the place of their stand-ins."""

    def said(part: Message) -> Message:
        return {**part, "text": _filled(part["text"], texts)} if part["type"] == "text" else part

    return [{**turn, "content": [said(part) for part in turn["content"]]} for turn in stand_ins]


def _filled(written: str, texts: Sequence[Text]) -> str:
    """What is written with the texts that a template must leave as they are: no calls, and no thoughts."""

    def text_of(found: re.Match[str]) -> str:
        role, text = texts[int(found[0].strip(f"{_BLANK}\ue000\ue001"))]
        thought = role == "assistant" and any(mark in text for mark in MARKS)
        return found[0] if thought or role in _AS_WRITTEN else text

    return _PLACEHOLDER.sub(text_of, written)


def _refuse_rewriting(template: str, written: str, texts: Sequence[Text], tokenizer: Any) -> None:
    """Refuse a template that writes other words for some texts than for their stand-ins: another chat than is trained.

    Args:
        template: What it writes of the stand-ins.
        written: What it writes of the texts; blanks are not compared.
        texts: Role and text of every stand-in.
        tokenizer: Whose folder is named.
    """
    expected, came = ("".join(one.split()) for one in (_filled(template, texts), written))
    if expected == came or not all(text.strip() for _, text in texts):
        return
    differs = next((i for i, pair in enumerate(zip(expected, came, strict=False)) if pair[0] != pair[1]), -1)
    near = expected[max(differs - 20, 0) : differs + 20] if differs >= 0 else expected[-40:]
    lost = next((role for role, text in texts if "".join(text.split()) not in came), None)
    what = "writes more beside a text" if lost is None else f"changes the text of a turn of the role `{lost}`"
    raise UserError(
        f"the chat template of {_template_of(tokenizer)} must write every text as it is, but it {what}, at {near!r} "
        "(blanks left out): take the template from the model's published folder, or leave out those words."
    )


def count_images(messages: Sequence[Message]) -> int:
    """How many parts of a chat are pictures."""
    contents = (message.get("content") or () for message in messages)
    return sum(part["type"] == "image" for parts in contents if not isinstance(parts, str) for part in parts)


def _template_of(tokenizer: Any) -> str:
    return f"`{getattr(tokenizer, 'name_or_path', '') or 'the model'}`"


def by_template(processor: Any, messages: Sequence[Message], dialect: Dialect, shown: Mapping[str, Any]) -> str:
    """The chat as the template writes it."""
    asked = messages[-1]["role"] in ("user", "tool")
    behind = dialect.prompts_open and not asked and "tool_calls" not in messages[-1]
    chat = list(messages[:-1] if behind else messages)
    text: str = processor.apply_chat_template(
        chat, tokenize=False, add_generation_prompt=asked or behind, **dialect.settings, **shown
    )
    if not behind:
        return text
    return text + "".join(part["text"] for part in messages[-1]["content"]) + (dialect.end_of_turn or "")


def _behind(asked: str, template: str, answer: int) -> str:
    """A rendered chat with its last answer, from text ``answer`` on, behind all that the prompt ``asked`` says.

    Also where the template leaves other blanks in front of an answer than at the end of a prompt.
    """
    before = template.partition(f"\ue000{answer}\ue001")[0].removesuffix(_BLANK).rstrip()
    if not "".join(asked.split()).startswith("".join(before.split())):
        return template
    rest = template[len(before) :]
    return asked + (rest.lstrip(" \n") if asked[-1:].isspace() else rest)


def refuse_unwritable(text: str) -> None:
    r"""Refuse a text with half a character (``"\ud83d"`` alone), which no tokenizer takes.

    Raises:
        UserError: Saying where.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"a text must be whole characters, got half a one, {text[error.start]!a}, behind "
            f"{text[max(0, error.start - 40) : error.start]!r}; write the character itself or leave it out."
        ) from error


def refuse_text(text: str, dialect: Dialect, tokenizer: Any) -> None:
    """Refuse a text that would be taken for a picture or a part of the template, or that no tokenizer takes.

    Raises:
        UserError: Naming the token, or the character.
    """
    for token in (dialect.image_token, dialect.soft_token):
        if token is not None and token in text:
            raise UserError(
                f"a message text must not hold the image placeholder `{token}`, got {text[:80]!r}. "
                'Give images as parts: {"type": "image"}.'
            )
    if tokenizer is not None:
        refuse_control_tokens(text, tokenizer)
    refuse_unwritable(text)


def refuse_control_tokens(text: str, tokenizer: Any) -> None:
    """Refuse a text in which a control token of the model is spelt out: it would become the token, and end a turn.

    Raises:
        UserError: Naming the token.
    """
    if token := control_token(text, tokenizer):
        place = text.index(token)
        raise UserError(
            f"a text must not hold the model's control token `{token}`, got "
            f"{text[max(0, place - 40) : place + len(token) + 20]!r}; leave it out, or write it with a blank inside."
        )


def control_token(text: str, tokenizer: Any) -> str | None:
    """The first control token that a text spells out: a special token with a bracket, but that for what is unknown."""
    if tokenizer not in _CONTROLS:
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        named = {*map(str, tokenizer.all_special_tokens), *(token.content for token in added if token.special)}
        named.discard(str(tokenizer.unk_token))
        tokens = sorted((t for t in named if len(t) > 2 and _BRACKET.search(t)), key=len, reverse=True)
        _CONTROLS[tokenizer] = re.compile("|".join(map(re.escape, tokens)) or r"(?!)")
    found = _BRACKET.search(text) and _CONTROLS[tokenizer].search(text)
    return found[0] if found else None


_BRACKET = re.compile(r"[<\[{|]")
_CONTROLS: WeakKeyDictionary[Any, re.Pattern[str]] = WeakKeyDictionary()


class _ChatTurns:
    """A chat's turns with numbered placeholders for texts and calls, which are appended to ``texts``."""

    def __init__(self, texts: list[Text], dialect: Dialect, tokenizer: Any) -> None:
        self._texts, self._dialect = texts, dialect
        self.tokenizer = tokenizer
        self._calls: dict[int, Sequence[Call]] = {}
        self._called = self._answered = 0

    def stand_in(self, message: Message) -> Message:
        """The message with every text replaced, and the name of its first call."""
        content = message.get("content") or []
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        replaced = [self._part(message["role"], part) for part in parts]
        if message["role"] == "tool":
            self._answered += 1
            return {"role": "tool", "content": replaced, "tool_call_id": call_id(self._answered - 1)}
        if not (calls := message.get("tool_calls")):
            return {"role": message["role"], "content": replaced}
        for call in calls:
            refuse_text(str(call), self._dialect, self.tokenizer)
        place = self._number("call", calls[0].name)
        self._calls[len(self._texts) - 1] = calls
        self._called += len(calls)
        return call_message(replaced, [calls[0]._replace(name=place), *calls[1:]], self._called - len(calls))

    def filled(self, template: str, format: CallFormat) -> str:
        """The written chat with one placeholder for each turn's calls, and none between quotation marks.

        Raises:
            UserError: If calls are not written as they are.
        """
        for number, calls in self._calls.items():
            place = f"\ue000{number}\ue001"
            try:
                start, end = call_place(template, template.find(place), len(calls), format)
                written = template[start:end].replace(place, calls[0].name)
                if format.read(written).calls != list(calls):
                    raise NotCalls("other calls")
            except NotCalls as error:
                raise UserError(
                    f"the model's chat template must write calls as they are ({format.about}), it does not write "
                    f"{len(calls)} of `{calls[0].name[:40]}` so: {error}."
                ) from error
            self._texts[number] = ("call", written)
            template = template[:start] + place + template[end:]
        for number, (role, text) in enumerate(self._texts):
            if role == "tool" and f'"\ue000{number}\ue001"' in template:  # a string of JSON
                self._texts[number] = (role, json.dumps(text, ensure_ascii=False)[1:-1])
        return template

    def _part(self, role: str, part: Message) -> Message:
        if part["type"] != "text":
            return part
        refuse_text(part["text"], self._dialect, self.tokenizer)
        number = self._number(role, part["text"])
        return {"type": "text", "text": number if role in _AS_WRITTEN else f"{_BLANK}{number}{_BLANK}"}

    def _number(self, role: str, text: str) -> str:
        self._texts.append((role, text))
        return f"\ue000{len(self._texts) - 1}\ue001"


def _image_parts(literal: str, dialect: Dialect, pictures: Iterator[str] | None) -> Iterator[tuple[str, bool]]:
    """Cut a piece of template at its pictures, putting each one's tokens there; True for runs of soft tokens."""
    if dialect.image_token is None:
        yield literal, False
        return
    for part in re.split(f"({re.escape(dialect.image_token)})", literal):
        stands = next(pictures) if part == dialect.image_token and pictures is not None else part
        soft = re.escape(dialect.soft_token or dialect.image_token)
        for number, piece in enumerate(re.split(f"((?:{soft})+)", stands)):
            if piece:
                yield piece, bool(number % 2)
