"""Training examples: chats with pictures, of one of two sets."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, Literal

from PIL import Image

from mm_cb.core.folding import is_blank
from mm_cb.core.reading import lost_picture, shown, unfit
from mm_cb.core.records import JsonObject, Message
from mm_cb.data.pictures import PictureError, leads_out, open_picture, path_inside
from mm_cb.data.tools import read_calls, read_tools

SetName = Literal["circuit_breaker", "retain"]
Modality = Literal["text", "multimodal"]

OnUnreadable = Callable[["Example", "PictureError"], None]
"""Told of every example that is left out because its picture cannot be read."""

SETS: tuple[SetName, ...] = ("circuit_breaker", "retain")
KEYS = {"id", "messages", "images", "set", "source", "tools"}
_OPTIONAL = {"source", "tools"}
_NOT_READ = ("reasoning", "reasoning_content", "thinking", "weight")
"""Keys of turns in other projects' files that change what is trained on."""


@dataclass(frozen=True)
class Example:
    """One chat to train on.

    Attributes:
        id: Unique name.
        messages: Turns ``{"role": "user" | "assistant", "content": text or list of typed parts}``; the last is the
            assistant's. Parts are ``{"type": "image"}`` and ``{"type": "text", "text": ...}``. With tools an
            assistant's turn may hold ``tool_calls``, `Call`s, and turns of ``tool`` hold their results; ``system`` may
            stand in front.
        images: Pictures, the paths of their files, or the bytes of such, for the image parts in order.
        set: ``circuit_breaker`` (to reroute) or ``retain`` (to keep).
        source: Where it comes from.
        place: As text, file and line; worked out only when a message needs it.
        tools: JSON schemas of the functions that may be called.
    """

    id: str
    messages: Sequence[Message]
    images: Sequence[Image.Image | Path | bytes]
    set: SetName
    source: str = ""
    place: object = field(default=None, compare=False, repr=False)
    tools: Sequence[JsonObject] = ()

    @property
    def modality(self) -> Modality:
        """``multimodal`` if there is a picture, else ``text``."""
        return "multimodal" if self.images else "text"

    def open_images(self) -> list[Image.Image]:
        """The pictures as the model is shown them, decoded now.

        Raises:
            PictureError: If one cannot be shown, see `mm_cb.data.pictures.open_picture`.
        """
        return [self._open(image) for image in self.images]

    def _open(self, image: Image.Image | Path | bytes) -> Image.Image:
        try:
            return open_picture(image)
        except PictureError as error:
            place = "" if self.place is None else f"{self.place}: "
            path = str(image) if isinstance(image, PurePath) else ""
            reason = str(error).removeprefix(f"picture {path}: " if path else "picture: ")
            name = f" `{path}`" if path else ""
            raise PictureError(f"{place}cannot read the picture{name} of example `{self.id}`: {reason}") from error


def opened(example: Example, on_unreadable: OnUnreadable) -> Example | None:
    """The example with its pictures in memory; None, and ``on_unreadable`` told, if one of them cannot be read."""
    try:
        return replace(example, images=example.open_images())
    except PictureError as error:
        on_unreadable(example, error)
        return None


def kinds_of(examples: Sequence[Example]) -> list[tuple[SetName, Modality]]:
    """Set and modality of every example; a mixture that lies on disk knows them without reading it again."""
    known = getattr(examples, "kinds", None)
    return [(example.set, example.modality) for example in examples] if known is None else list(known())


def rows_of(examples: Sequence[Example]) -> list[Hashable]:
    """What tells the row behind every example: equal where a mixture repeats one, with its request or without."""
    known = getattr(examples, "rows", None)
    return list(range(len(examples))) if known is None else list(known())


def parse_example(record: Any, folder: Path) -> Example:
    """One example from one JSON object; ValueError says what is wrong with it."""
    if not isinstance(record, dict) or not KEYS - _OPTIONAL <= record.keys() <= KEYS:
        got = shown(sorted(record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"expected an object with the keys {sorted(KEYS)}, got {got}")
    if record["set"] not in SETS:
        raise ValueError(f"`set` must be circuit_breaker or retain, got {shown(record['set'])}")
    if not isinstance(record["id"], str) or not record["id"] or not isinstance(record.get("source", ""), str):
        raise ValueError("`id` must be a text that is not empty, and `source` a text")
    pictures = check_messages(record["messages"])
    messages, tools = with_tools(record["messages"], record.get("tools"))
    images = record["images"]
    if not isinstance(images, list) or len(images) != pictures:
        raise ValueError(f"`images` must be a list of {pictures} paths, one for each image part, got {shown(images)}")
    return Example(
        record["id"],
        messages,
        [_inside(folder, image) for image in images],
        record["set"],
        record.get("source", ""),
        tools=tools,
    )


def with_tools(messages: Sequence[Message], tools: Any) -> tuple[list[Message], list[JsonObject]]:
    """Checked turns with their calls read, and the row's tools; ValueError says what is wrong with them."""
    known = [] if tools is None else read_tools(tools)
    read = [
        {**turn, "content": turn.get("content") or "", "tool_calls": read_calls(turn["tool_calls"], known)}
        if "tool_calls" in turn
        else turn
        for turn in messages
    ]
    return read, known


def check_messages(messages: Any) -> int:
    """The number of image parts in well-formed messages."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError("`messages` must be a list of turns that is not empty")
    _check_roles(messages)
    refuse_in_turns(messages)
    pictures = 0
    for number, message in enumerate(messages, start=1):
        if lost := [key for key in message if "call" in key.lower() and key not in ("tool_calls", "tool_call_id")]:
            raise ValueError(f"calls of turn {number} must stand in `tool_calls`, got the key {shown(lost[0])}")
        content = message.get("content")
        content = "" if content is None and "tool_calls" in message else content
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not parts or not all(map(_is_part, parts)):
            raise ValueError(
                f"`content` of turn {number} must be a text or a list of image parts and text parts, got "
                f"{'null or none' if content is None else shown(content)}"
            )
        named = sum(part["type"] == "image" for part in parts)
        if named and message["role"] != "user":
            raise ValueError("only the user's turns can hold image parts")
        for part in parts:
            if part["type"] == "text" and (reason := unfit(part["text"])):
                raise ValueError(f"a text cannot be used: {reason}")
        if "tool_calls" not in message and not any(
            part["type"] == "text" and not is_blank(part["text"]) for part in parts
        ):
            raise ValueError("every turn must hold some text")
        pictures += named
    return pictures


def refuse_in_turns(messages: Any) -> None:
    """Refuse a turn with a picture, a thought or a weight of its own, which would be passed over; ValueError says."""
    for number, turn in enumerate(messages if isinstance(messages, list | tuple) else (), start=1):
        for key in _NOT_READ if isinstance(turn, dict) else ():
            if turn.get(key) not in (None, "", 1):
                remedy = "leave the turn out" if key == "weight" else "put it into the text"
                raise ValueError(f"turn {number} says `{key}`, which is not read: {remedy}, or remove it")
        if isinstance(turn, dict) and (lost := lost_picture(turn, ())):
            raise ValueError(
                f"turn {number} names a picture in `{lost}`: a row names its pictures in `images`, and the place of "
                'each in the turn by the part {"type": "image"}'
            )


def _check_roles(messages: Sequence[Message]) -> None:
    """System perhaps in front; then user and assistant in turn; behind calls as many results, and the assistant."""
    roles = [message.get("role") for message in messages]
    if strange := [m for m in messages if "tool_calls" in m and m.get("role") != "assistant"]:
        raise ValueError(
            f"only the assistant's turns can hold `tool_calls`, got one of {shown(strange[0].get('role'))}"
        )
    if strange := [m["tool_calls"] for m in messages if "tool_calls" in m and not _is_list(m["tool_calls"])]:
        raise ValueError(f"`tool_calls` must be a list of calls that is not empty, got {shown(strange[0])}")
    wanted, waiting = ("user",), 0
    for role, message in zip(
        roles[1:] if roles[0] == "system" else roles, messages[roles[0] == "system" :], strict=True
    ):
        if role not in wanted:
            raise ValueError(
                "the roles must alternate user, assistant and end with the assistant (perhaps system in front, and "
                f"behind a turn with calls one of role tool for each, then the assistant), got {shown(roles)}"
            )
        waiting = waiting - 1 if role == "tool" else len(message.get("tool_calls") or ())
        told = ("assistant",) if role in ("user", "tool") else ("user",)
        wanted = ("tool",) if waiting else told
    if roles[-1] != "assistant":
        raise ValueError(f"the roles must alternate user, assistant and end with the assistant, got {shown(roles)}")


def _is_list(value: Any) -> bool:
    return isinstance(value, list) and bool(value)


def _is_part(part: Any) -> bool:
    return part == {"type": "image"} or (
        isinstance(part, dict)
        and part.keys() == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
    )


def _inside(folder: Path, image: Any) -> Path:
    """The path of a picture below the folder of its file."""
    if not isinstance(image, str) or not image or unfit(image) or leads_out(image):
        raise ValueError(f"picture paths must be relative to the file and stay inside its folder, got {shown(image)}")
    return path_inside(folder, image, what="a picture")
