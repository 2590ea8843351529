"""Training examples from rows in memory: a `datasets.Dataset`, or a list of dictionaries."""

import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from mm_cb.core.errors import nearest
from mm_cb.core.reading import shown
from mm_cb.core.records import JsonObject
from mm_cb.data.examples import KEYS, SETS, Example, Modality, SetName, check_messages, with_tools
from mm_cb.data.pictures import encoded
from mm_cb.data.refusals import Refusals
from mm_cb.data.rows import undecoded
from mm_cb.data.scan import Scan, lost_characters, message_texts, note_of_repeats
from mm_cb.data.sources import STRICT, RowFault

_NEEDED = ("messages", "set")


class Records(Sequence[Example]):
    """Rows with ``messages``, ``set`` and ``images`` as examples; pictures are decoded when an example is asked for.

    A row's ``id``, ``source`` and ``tools`` are used where there are such columns; others are refused, as in a file.
    """

    def __init__(self, rows: Any) -> None:
        """Check every row, without decoding a picture.

        Args:
            rows: A ``datasets.Dataset``, or a list of dictionaries. ``images`` holds Pillow images, paths, encoded
                bytes, or what an undecoded ``datasets.Image`` is, one for each image part of the messages in order; in
                rows without image parts they stand in front of the first turn. It may be absent where none has any.

        Raises:
            ValueError: If a column is absent or one that is not read, or a row is no training example, has the id of
                another or says what one of the other set says; names the row.
        """
        columnar = hasattr(rows, "column_names")
        self._rows = undecoded(rows.with_format(None)) if columnar else rows
        columns = list(rows.column_names) if columnar else sorted({key for row in rows for key in row})
        _check_columns(columns)
        counts = _picture_counts(self._rows, columns, columnar)
        if columnar and "tools" in columns:
            raise ValueError(
                "rows with `tools` must come as a list of dictionaries, as they were written: a datasets.Dataset gives "
                "every call the arguments of all others."
            )
        texts = self._rows.select_columns([*_NEEDED, *{"id"}.intersection(columns)]) if columnar else self._rows
        self._kinds: list[tuple[SetName, Modality]] = []
        refusals, again = Refusals(), list[tuple[object, object]]()
        scan = Scan(STRICT, lambda example, place: again.append((example.place, place)))
        for index, (row, count) in enumerate(zip(texts, counts, strict=True)):
            example = _checked(index, row, count)
            self._kinds.append((example.set, "multimodal" if count else "text"))
            found = lost_characters(example) or scan.compared(
                example, partial(self.__getitem__, index), bool(row.get("id"))
            )
            if isinstance(found, RowFault):
                raise ValueError(f"{example.place}: {found.message}.")
            refusals.count(example)
        if fault := refusals.fault():
            raise ValueError(f"{fault}.")
        for told in filter(None, (refusals.warning(), note_of_repeats(again))):
            warnings.warn(f"{told}.", stacklevel=3)

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        """The example of one row.

        Raises:
            ValueError: If what stands for a picture is none.
        """
        row = self._rows[index]
        pictures = [_picture(index, one) for one in row.get("images") or []]
        name = _name(index, row)
        messages, tools = with_tools(_with_parts(row["messages"], len(pictures)), row.get("tools"))
        source, place = str(row.get("source") or ""), f"rows[{index}]"
        return Example(name, messages, pictures, row["set"], source, place=place, tools=tools)

    def texts(self) -> Iterator[tuple[str, list[str]]]:
        """Place and texts of every row; no picture is decoded."""
        rows = self._rows.select_columns(["messages"]) if hasattr(self._rows, "column_names") else self._rows
        for index, row in enumerate(rows):
            yield f"rows[{index}]", [text for message in row["messages"] for text in message_texts(message)]

    def kinds(self) -> Iterator[tuple[SetName, Modality]]:
        """Set and modality of every row, known without reading any again."""
        return iter(self._kinds)


def as_examples(rows: Any) -> Sequence[Example]:
    """Whatever holds training rows as a sequence of examples; examples are taken as they are.

    Raises:
        TypeError: If it is neither a ``datasets.Dataset`` nor a list.
        ValueError: If it is empty, a column is absent or a row is broken.
    """
    columnar = hasattr(rows, "column_names") and not isinstance(rows, Mapping)
    if not hasattr(rows, "__len__") or not (columnar or (isinstance(rows, Sequence) and not isinstance(rows, str))):
        raise TypeError(
            "`train_dataset` must be a datasets.Dataset (one split, in memory or mapped, not streamed) or a list of "
            f"dictionaries, got {type(rows).__name__}."
        )
    if not len(rows):
        raise ValueError("`train_dataset` must hold rows, it is empty.")
    if isinstance(rows[0], Example):
        return rows
    for index, row in enumerate(() if columnar else rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"`train_dataset` must hold dictionaries, rows[{index}] is {type(row).__name__}.")
    return Records(rows)


def _check_columns(columns: Sequence[str]) -> None:
    for name in _NEEDED:
        if name not in columns:
            close = nearest(name, columns)
            hint = f"; rename `{close}`?" if close else "."
            raise ValueError(
                "`train_dataset` must have the columns `messages` and `set`, and `images` where rows have pictures; "
                f"`{name}` is not among {shown(list(columns))}{hint}"
            )
    if unread := sorted({*columns} - KEYS):
        told = ", ".join(f"`{column}`" for column in unread)
        raise ValueError(
            f"`train_dataset` must have no columns but {', '.join(sorted(KEYS))}, got {told}, which nothing reads; "
            "leave them out."
        )


def _picture_counts(rows: Any, columns: Sequence[str], columnar: bool) -> list[int]:
    """Pictures of every row, none of them decoded."""
    if "images" not in columns:
        return [0] * len(rows)
    if not columnar:
        return [_length(index, row.get("images")) for index, row in enumerate(rows)]
    import pyarrow
    from pyarrow import compute

    counts: list[int] = []
    for table in rows.select_columns(["images"]).with_format("arrow").iter(1000):
        try:
            counts += [count or 0 for count in compute.list_value_length(table["images"]).to_pylist()]
        except pyarrow.ArrowNotImplementedError as error:
            raise ValueError("the column `images` must hold a list of pictures in every row.") from error
    return counts


def _length(index: int, pictures: Any) -> int:
    if pictures is not None and (not isinstance(pictures, Sequence) or isinstance(pictures, str | bytes)):
        raise ValueError(f"rows[{index}]: `images` must be a list of pictures, got {shown(pictures)}.")
    return len(pictures or ())


def _checked(index: int, row: JsonObject, pictures: int) -> Example:
    """The example of a row that is sound, without its pictures."""
    place = f"rows[{index}]"
    if row.get("set") not in SETS:
        raise ValueError(f"{place}: `set` must be circuit_breaker or retain, got {shown(row.get('set'))}.")
    try:
        turns = _with_parts(row.get("messages"), pictures)
        named = check_messages(turns)
        messages, tools = with_tools(turns, row.get("tools"))
    except ValueError as error:
        raise ValueError(f"{place}: {error}.") from error
    if named != pictures:
        raise ValueError(
            f"{place}: `images` must hold {named} pictures, one for each image part of the row, got {pictures}."
        )
    return Example(_name(index, row), messages, (), row["set"], place=place, tools=tools)


def _name(index: int, row: JsonObject) -> str:
    return str(row.get("id") or f"row-{index}")


def _with_parts(messages: Any, pictures: int) -> Any:
    """Messages without the empty columns that Arrow adds to parts, and with image parts if none says where they are."""
    if not isinstance(messages, list) or not all(isinstance(turn, dict) for turn in messages):
        return messages
    turns = [_turn(turn) for turn in messages]
    parts = [part for turn in turns if isinstance(turn["content"], list) for part in turn["content"]]
    if not pictures or not turns or any(isinstance(part, dict) and part.get("type") == "image" for part in parts):
        return turns
    first = next((turn for turn in turns if turn["role"] == "user"), turns[0])
    texts = [{"type": "text", "text": first["content"]}] if isinstance(first["content"], str) else first["content"]
    if isinstance(texts, list):
        first["content"] = [{"type": "image"}] * pictures + texts
    return turns


def _turn(turn: JsonObject) -> JsonObject:
    calls = {} if turn.get("tool_calls") is None else {"tool_calls": turn["tool_calls"]}
    content = _parts(turn.get("content"))
    return {"role": turn.get("role"), "content": "" if content is None and calls else content, **calls}


def _parts(content: Any) -> Any:
    if not isinstance(content, list):
        return content
    return [
        {key: value for key, value in part.items() if value is not None} if isinstance(part, dict) else part
        for part in content
    ]


def _picture(index: int, value: Any) -> Image.Image | Path | bytes:
    """A picture: what Pillow has, the path of a file, or encoded bytes."""
    picture = value if isinstance(value, Image.Image) else encoded(value)
    if picture is None:
        raise ValueError(
            f"rows[{index}]: a picture must be a Pillow image, a path or the bytes of a file, got {shown(value)}."
        )
    return picture
