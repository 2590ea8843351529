"""The one judgement of rows: what `mm-cb data check` refuses, training refuses, and nothing else."""

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path

from PIL import Image

from mm_cb.core.files import file_sha256
from mm_cb.core.folding import folded
from mm_cb.core.names import alike
from mm_cb.core.reading import BROKEN, REPLACED
from mm_cb.core.records import Message
from mm_cb.data.examples import Example
from mm_cb.data.formats import Skip
from mm_cb.data.pictures import PictureError, open_picture
from mm_cb.data.refusals import Refusals
from mm_cb.data.sources import OpenSource, RowFault, Rules
from mm_cb.data.tools import call_text
from mm_cb.data.unknown import Unknown

ReadExample = Callable[[], Example]


class Scan:
    """Reads sources in order and holds their rows against each other.

    Attributes:
        refusals: Of the source that is read, or was read last; unknown tokens as well.
    """

    def __init__(self, rules: Rules, on_duplicate: Callable[[Example, object], None] | None = None) -> None:
        """Begin.

        Args:
            rules: Which rows are left out, which are refused.
            on_duplicate: Told of an example that says what an earlier one of its set says, and the place of that one.
        """
        self.refusals = Refusals()
        self._rules = rules
        self._unknown = self._unknown_rows()
        self._on_duplicate = on_duplicate
        self._ids: dict[str, tuple[str, object]] = {}
        self._first: dict[bytes, tuple[str, object, ReadExample]] = {}
        self._others: dict[bytes, dict[tuple[str, ...], tuple[str, object]]] = {}

    def outcomes(self, opened: OpenSource) -> Iterator[tuple[int, Example | Skip | RowFault]]:
        """Every row of a source in order, with what became of it."""
        own_ids = opened.form.set is None
        self.refusals, self._unknown = Refusals(), self._unknown_rows()
        for index, outcome in opened.examine(self._rules):
            if isinstance(outcome, Example) and (fault := lost_characters(outcome)):
                outcome = Skip(fault.kind) if opened.unmendable(fault) else fault
            if isinstance(outcome, Example):
                self.refusals.count(outcome)
                self._unknown.count(outcome, outcome.place)
                outcome = self.compared(outcome, partial(opened.example, index), own_ids)
            yield index, outcome

    def _unknown_rows(self) -> Unknown[Example]:
        return Unknown(self._rules.fit.mostly_unknown if self._rules.fit else None)

    def warnings(self) -> Iterator[tuple[str, str]]:
        """Kind and words of what is doubtful about the source that was read last as a whole."""
        for kind, said in (("some refusals", self.refusals.warning()), ("unknown tokens", self._unknown.warning())):
            if said is not None:
                yield kind, said

    def compared(self, example: Example, read: ReadExample, own_ids: bool = True) -> Example | RowFault:
        """The example, unless its id was used before, or the other set holds the same.

        Equal texts with equal pictures are the same, by content; pictures are read only where texts are equal.

        Args:
            example: With its place; its pictures are not looked at.
            read: Gives it again with its pictures, now or later.
            own_ids: Whether its id is the user's.
        """
        if own_ids:
            id, first = self._ids.setdefault(alike(example.id), (example.id, example.place))
            if first is not example.place:
                told = (
                    "was used"
                    if id == example.id
                    else f"differs by case, blanks or how a letter is encoded alone from `{id}`"
                )
                return RowFault("repeated id", f"the id `{example.id}` {told} at {first}")
        said = "\0".join(map(folded, texts_of(example)))
        digest = hashlib.blake2b(said.encode("utf-8", "replace"), digest_size=16).digest()
        if digest not in self._first:
            self._first[digest] = example.set, example.place, read
            return example
        if digest not in self._others:
            *row, again = self._first[digest]
            self._others[digest] = {_content(again()): (str(row[0]), row[1])}
        set_name, place = self._others[digest].setdefault(_content(read()), (example.set, example.place))
        if place is example.place:
            return example
        if set_name != example.set:
            return RowFault("in both sets", f"the same as {place}, which is of the {set_name} set")
        if self._on_duplicate is not None:
            self._on_duplicate(example, place)
        return example


def judged(
    examples: Sequence[Example], name: str, scan: Scan, rules: Rules
) -> Iterator[tuple[str, Example | RowFault]]:
    """Examples that are made in memory, each with its place and what became of it."""
    for number, example in enumerate(examples):
        placed = replace(example, place=f"{name} example {number}")
        fault = rules.fit(placed) if rules.fit else None
        yield str(placed.place), fault or scan.compared(placed, partial(examples.__getitem__, number))


def lost_characters(example: Example) -> RowFault | None:
    """The fault of an example whose texts came in another encoding than they were read in; None if it has none."""
    broken = any(REPLACED in text for text in texts_of(example))
    return RowFault("broken encoding", f"a text cannot be used: {BROKEN}") if broken else None


def note_of_repeats(again: Sequence[tuple[object, object]]) -> str | None:
    """What to say of rows that repeat others of their set, by the places of both; None if there are none."""
    if not again:
        return None
    return (
        f"{len(again)} rows say what an earlier row of their set says, the first {again[0][0]}, the same as "
        f"{again[0][1]}: each counts once more, and may be held out and trained on; leave them out"
    )


def texts_of(example: Example) -> Iterator[str]:
    """Every text of an example, in order, its tools first."""
    if example.tools:
        yield json.dumps(example.tools, ensure_ascii=False, sort_keys=True)
    for message in example.messages:
        yield from message_texts(message)


def message_texts(message: Message) -> Iterator[str]:
    """Every text of a turn, in order, its calls behind them."""
    content = message.get("content", "")
    if isinstance(content, str):
        yield content
    else:
        yield from (part["text"] for part in content if part["type"] == "text")
    if calls := call_text(message):
        yield calls


def _content(example: Example) -> tuple[str, ...]:
    """Names for what the pictures of an example hold; one that cannot be read is told from all others."""
    return tuple(_of_file(image) if isinstance(image, Path) else _pixels(image) for image in example.images)


def _pixels(picture: Image.Image | bytes) -> str:
    try:
        image = open_picture(picture)
    except PictureError:
        return f"unreadable {id(picture)}"
    return hashlib.blake2b(image.tobytes(), digest_size=8).hexdigest() + str(image.size)


@cache
def _of_file(path: Path) -> str:
    try:
        return file_sha256(path)
    except OSError:
        return str(path)
