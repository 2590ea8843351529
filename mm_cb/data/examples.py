"""Training examples: chats with pictures, of one of two sets."""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, Literal

from PIL import Image

from mm_cb.core.reading import shown, unfit
from mm_cb.core.records import Message
from mm_cb.data.pictures import PictureError, open_picture, path_inside

SetName = Literal["circuit_breaker", "retain"]
Modality = Literal["text", "multimodal"]

OnUnreadable = Callable[["Example", "PictureError"], None]
"""Told of every example that is left out because its picture cannot be read."""

SETS: tuple[SetName, ...] = ("circuit_breaker", "retain")
_KEYS = {"id", "messages", "images", "set", "source"}


@dataclass(frozen=True)
class Example:
    """One chat to train on.

    Attributes:
        id: Unique name.
        messages: Turns ``{"role": "user" | "assistant", "content": text or list of typed parts}``; the last is the
            assistant's. Parts are ``{"type": "image"}`` and ``{"type": "text", "text": ...}``.
        images: Pictures, the paths of their files, or the bytes of such, for the image parts in order.
        set: ``circuit_breaker`` (to reroute) or ``retain`` (to keep).
        source: Where it comes from.
        place: As text, file and line; worked out only when a message needs it.
    """

    id: str
    messages: Sequence[Message]
    images: Sequence[Image.Image | Path | bytes]
    set: SetName
    source: str = ""
    place: object = field(default=None, compare=False, repr=False)

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
    if not isinstance(record, dict) or not _KEYS - {"source"} <= record.keys() <= _KEYS:
        got = shown(sorted(record)) if isinstance(record, dict) else type(record).__name__
        raise ValueError(f"expected an object with the keys {sorted(_KEYS)}, got {got}")
    if record["set"] not in SETS:
        raise ValueError(f"`set` must be circuit_breaker or retain, got {shown(record['set'])}")
    if not isinstance(record["id"], str) or not record["id"] or not isinstance(record.get("source", ""), str):
        raise ValueError("`id` must be a text that is not empty, and `source` a text")
    pictures = check_messages(record["messages"])
    images = record["images"]
    if not isinstance(images, list) or len(images) != pictures:
        raise ValueError(f"`images` must be a list of {pictures} paths, one for each image part, got {shown(images)}")
    return Example(
        record["id"],
        record["messages"],
        [_inside(folder, image) for image in images],
        record["set"],
        record.get("source", ""),
    )


def check_messages(messages: Any) -> int:
    """The number of image parts in well-formed messages."""
    if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
        raise ValueError("`messages` must be a list of turns that is not empty")
    roles = [message.get("role") for message in messages]
    if roles != ["user", "assistant"] * (len(roles) // 2) or not roles:
        raise ValueError(f"the roles must alternate user, assistant and end with the assistant, got {shown(roles)}")
    pictures = 0
    for number, message in enumerate(messages, start=1):
        content = message.get("content")
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        if not isinstance(parts, list) or not parts or not all(map(_is_part, parts)):
            raise ValueError(
                f"`content` of turn {number} must be a text or a list of image parts and text parts, got "
                f"{'null or none' if content is None else shown(content)}"
            )
        named = sum(part["type"] == "image" for part in parts)
        if named and message["role"] == "assistant":
            raise ValueError("only the user's turns can hold image parts")
        for part in parts:
            if part["type"] == "text" and (reason := unfit(part["text"])):
                raise ValueError(f"a text cannot be used: {reason}")
        if not any(part["type"] == "text" and part["text"].strip() for part in parts):
            raise ValueError("every turn must hold some text")
        pictures += named
    return pictures


def _is_part(part: Any) -> bool:
    return part == {"type": "image"} or (
        isinstance(part, dict)
        and part.keys() == {"type", "text"}
        and part["type"] == "text"
        and isinstance(part["text"], str)
    )


def _inside(folder: Path, image: Any) -> Path:
    """The path of a picture below the folder of its file."""
    if (
        not isinstance(image, str)
        or not image
        or unfit(image)
        or PurePath(image).is_absolute()
        or ".." in PurePath(image).parts
    ):
        raise ValueError(f"picture paths must be relative to the file and stay inside its folder, got {shown(image)}")
    return path_inside(folder, image, what="a picture")
