"""How the rows of public data sets become examples: one small function per format."""

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any, NamedTuple

from mm_cb.core.folding import is_blank
from mm_cb.core.reading import PICTURES, lost_picture, shown, unfit
from mm_cb.core.records import Message
from mm_cb.data.examples import Example, SetName, parse_example, refuse_in_turns
from mm_cb.data.pictures import encoded, leads_out, path_inside
from mm_cb.data.rows import Record

COMPLIANCE, REFUSAL = "1_full_compliance", "2_full_refusal"
LABELS = (COMPLIANCE, REFUSAL, "3_partial_refusal")
_PLACEHOLDER = "<image>"
_OPERATORS = ("system", "system_prompt", "system_message")
"""Keys under which rows have a text in front of the chat, which would change what is asked."""
_COCO_2014 = "COCO_train2014_"


class Unmendable(ValueError):
    """A fault of a row that a published data set may have, where such rows are left out and counted."""

    def __init__(self, kind: str, message: str) -> None:
        """Keep the kind that such rows are counted under."""
        super().__init__(message)
        self.kind = kind


class Skip(NamedTuple):
    """A row that is left out by rule, not by fault."""

    reason: str


@dataclass(frozen=True)
class Context:
    """What a format needs to know besides the row."""

    id: str
    """Of the example to be made; formats with ids of their own do not use it."""
    source: str
    set: SetName | None
    """None = what the rows of our own format say."""
    folder: Path
    """Of the file; the base of relative picture paths."""
    images: Path | None
    """Folder of the pictures, if it is another one."""
    refusals: bool = False
    stood_for: dict[str, str] | None = None
    """File of a picture → the name that a row of this source gave it, of the rows read so far; None = not compared."""

    def chat(self, prompt: Any, completion: Any) -> Example | Skip:
        """One exchange as an example."""
        turns = [{"role": "user", "content": _text(prompt)}, {"role": "assistant", "content": _text(completion)}]
        return self.example(turns)

    def example(self, messages: Sequence[Message], images: Sequence[Path | bytes] = ()) -> Example | Skip:
        """Turns, checked: every one says something, and none could be mistaken for a picture."""
        for message in messages:
            content = message["content"]
            parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
            if not any(part["type"] == "text" and not is_blank(part["text"]) for part in parts):
                return Skip("empty turn")
            if any(part["type"] == "text" and _PLACEHOLDER in part["text"] for part in parts):
                return Skip(f"a text that holds {_PLACEHOLDER}")
        return Example(self.id, messages, images, self.set or "retain", self.source)


Convert = Callable[[Record, Context], Example | Skip]


class Format(NamedTuple):
    """The columns that tell a format, how its rows become examples, and of which set unless one is asked for."""

    columns: frozenset[str]
    convert: Convert
    set: SetName | None
    pictures: tuple[str, ...] = PICTURES
    """Keys that it reads pictures from."""

    def refuse_lost(self, record: Record) -> None:
        """Refuse a row that names a picture which would not be read; ValueError says where."""
        if key := lost_picture(record, self.pictures):
            how = f"call it `{self.pictures[0]}`" if self.pictures else "give rows of our own (docs/formats.md)"
            raise ValueError(f"the key `{key}` names a picture, which these rows do not have there; {how}")
        if self.set is not None and (key := next((key for key in _OPERATORS if record.get(key)), None)):
            raise ValueError(
                f"the key `{key}` is not read; give a row of our own (docs/formats.md) with a turn of role system"
            )
        refuse_in_turns(record.get("messages", record.get("conversations")))


def _own(record: Record, context: Context) -> Example | Skip:
    """Our JSONL (see `mm_cb.data.examples`), with its own ids and sets."""
    example = parse_example(record, context.folder)
    return example if context.set in (None, example.set) else Skip(f"not of the {context.set} set")


def _circuit_breakers(record: Record, context: Context) -> Example | Skip:
    """``prompt`` with the harmful ``output``, or, for the retain set, with the refusal.

    Source:
        Released trainer's data/circuit_breakers_train.json, where the refusal is called ``llama3_output``.
    """
    if context.set == "retain":
        refusal = record.get("llama3_output", record.get("refusal"))
        if refusal is None:
            raise ValueError(f"the retain set needs `llama3_output` or `refusal`, got the columns {sorted(record)}")
        return context.chat(record["prompt"], refusal)
    return context.chat(record["prompt"], record["output"])


def _completions(record: Record, context: Context) -> Example | Skip:
    """XSTest: only full compliance is kept, full refusals when asked for; partial refusals teach neither."""
    label = _text(record["final_label"]).strip().lower()
    if label not in LABELS:
        raise ValueError(f"`final_label` must be one of {', '.join(LABELS)}, got {shown(record['final_label'])}")
    if label == COMPLIANCE or (label == REFUSAL and context.refusals):
        return context.chat(record["prompt"], record["completion"])
    return Skip("not full compliance")


def _messages(record: Record, context: Context) -> Example | Skip:
    """Chats of ``role`` and ``content``; UltraChat's ``prompt`` says the first turn again."""
    given = record["messages"] if isinstance(record["messages"], list) else []
    if record.get("tools") or any(isinstance(turn, dict) and turn.get("tool_calls") for turn in given):
        raise ValueError(
            "a chat with tools must be a row of our own (id, messages, images, set, tools), or its calls would be "
            "left out"
        )
    told = _turns(record, "messages", "role", "content")
    turns = [{"role": turn["role"], "content": turn["content"]} for turn in told]
    prompt, first = record.get("prompt"), turns[0]["content"] if turns else None
    if isinstance(prompt, str) and isinstance(first, str) and prompt.strip() not in ("", first.strip()):
        raise Unmendable(
            "other prompt", f"`prompt` says {shown(prompt)}, the first turn {shown(first)}; leave one of them out"
        )
    pictures = _pictures(record, context)
    return _chat(turns, pictures, context, split=bool(pictures))


def _llava(record: Record, context: Context) -> Example | Skip:
    """LLaVA's ``conversations`` of ``from`` and ``value``; ``image`` names a picture, or several in order."""
    roles = {"human": "user", "gpt": "assistant"}
    told = _turns(record, "conversations", "from", "value")
    turns = [{"role": roles.get(str(turn["from"]), turn["from"]), "content": turn["value"]} for turn in told]
    return _chat(turns, _pictures(record, context), context, split=True)


FORMATS: Mapping[str, Format] = {
    "own": Format(frozenset({"id", "messages", "images", "set"}), _own, None),
    "circuit_breakers": Format(frozenset({"prompt", "output"}), _circuit_breakers, "circuit_breaker", ()),
    "completions": Format(frozenset({"prompt", "completion", "final_label"}), _completions, "retain", ()),
    "llava": Format(frozenset({"conversations"}), _llava, "retain"),
    "messages": Format(frozenset({"messages"}), _messages, "retain"),
}


def recognise(columns: Sequence[str]) -> str | None:
    """The format of rows with these columns: the first one that finds all of its own.

    Rows that say their set are ours or nobody's: of another format, what they say would be passed over.
    """
    if "set" in columns and not FORMATS["own"].columns <= set(columns):
        return None
    return next((name for name, form in FORMATS.items() if form.columns <= set(columns)), None)


def _turns(record: Record, key: str, *fields: str) -> list[Record]:
    """The turns of a row, each an object with these fields."""
    turns = record[key]
    if not isinstance(turns, list | tuple):
        raise ValueError(f"`{key}` must be a list of turns, got {shown(turns)}")
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not turn.keys() >= set(fields):
            held = " and ".join(f"`{field}`" for field in fields)
            raise ValueError(f"turn {number} of `{key}` must be an object with {held}, got {shown(turn)}")
    return list(turns)


def _chat(turns: list[Message], pictures: list[Path | bytes], context: Context, *, split: bool) -> Example | Skip:
    """An example from turns; ``split`` = placeholders in their texts stand for pictures."""
    if turns and turns[-1]["role"] == "user":
        raise Unmendable(
            "unanswered turn", "the user's turn is the last, which nothing answers; answer it, or cut it off"
        )
    if len(turns) < 2:
        return Skip("fewer than two turns")
    roles = [turn["role"] for turn in turns]
    if roles != ["user", "assistant"] * (len(roles) // 2):
        raise ValueError(f"the roles must alternate user, assistant, got {roles[:6]}")
    messages = [{"role": turn["role"], "content": _content(turn["content"], split)} for turn in turns]
    named = sum(part["type"] == "image" for turn in messages[::2] for part in _parts(turn["content"]))
    if any(part["type"] == "image" for turn in messages[1::2] for part in _parts(turn["content"])):
        raise ValueError("only the user's turns can hold a picture")
    if named != len(pictures):
        raise ValueError(f"the turns name {named} pictures, the row has {len(pictures)}")
    return context.example(messages, pictures)


def _content(content: Any, split: bool) -> str | list[Message]:
    r"""``"<image>\nWhat is it?"`` → an image part and a text part."""
    if not isinstance(content, str):
        return _own_parts(content)
    if not split or _PLACEHOLDER not in content:
        return content
    parts: list[Message] = []
    for piece in re.split(f"({_PLACEHOLDER})", content):
        if piece == _PLACEHOLDER:
            parts.append({"type": "image"})
        elif piece.strip():
            parts.append(_text_part(piece.strip("\n")))
    return parts


def _own_parts(content: Any) -> list[Message]:
    """Parts that a row lists itself."""
    if not isinstance(content, list | tuple):
        raise ValueError(f"the content of a turn must be a text or a list of parts, got {shown(content)}")
    for part in content:
        if not isinstance(part, dict) or (part.get("type") != "image" and "text" not in part):
            raise ValueError(f"a part of a turn must hold `text`, or be of the type `image`, got {shown(part)}")
    return [{"type": "image"} if part.get("type") == "image" else _text_part(part["text"]) for part in content]


def _parts(content: str | list[Message]) -> list[Message]:
    return [_text_part(content)] if isinstance(content, str) else content


def _text_part(text: Any) -> Message:
    return {"type": "text", "text": _text(text)}


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a text was expected, got {type(value).__name__}")
    if reason := unfit(value):
        raise ValueError(f"a text cannot be used: {reason}")
    return value


def _pictures(record: Record, context: Context) -> list[Path | bytes]:
    """The pictures of a row in order: ``image`` or ``images``, one or a list."""
    named = [record[column] for column in ("image", "images") if record.get(column)]
    if len(named) > 1:
        raise ValueError("a row must name its pictures in `image` or in `images`, not in both")
    pictures = named[0] if named else []
    return [_picture(one, context) for one in (pictures if isinstance(pictures, list | tuple) else [pictures])]


def _picture(value: Any, context: Context) -> Path | bytes:
    """A picture: the path of its file, or the encoded bytes of a hub data set, which are decoded when first used."""
    if not isinstance(value, str):
        picture = encoded(value)
        if picture is None:
            raise ValueError(
                f"a picture must be the name of a file, or what `datasets.Image` holds, got {shown(value)}; cast the "
                "column to `datasets.Image`, or write the pictures to files"
            )
        return picture
    if not value or unfit(value) or leads_out(value):
        raise ValueError(f"picture names must be relative and stay inside their folder, got {shown(value)}")
    folder = context.images or context.folder
    name = PurePath(value).name
    places = (value, name, f"train2017/{name}", _COCO_2014 + name)
    place = next((place for place in places if os.path.isfile(folder / place)), value)
    path = path_inside(folder, place, links=context.images is not None, what="a picture")
    if context.stood_for is not None:
        plain = os.path.normpath(value)
        first = context.stood_for.setdefault(str(path), plain)
        if first != plain:
            raise ValueError(
                f"two names of pictures, {shown(first)} and {shown(value)}, end at one file, `{path}`, which can be "
                "only one of them: put each picture at its own path below the folder"
            )
    return path
