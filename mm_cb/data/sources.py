"""Sources: what a run reads, row by row, each row an example, left out by rule, or a fault that is named."""

import random
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import ClassVar, NamedTuple, Protocol, get_args

from mm_cb.core.errors import UserError, unknown
from mm_cb.core.hub import Repository
from mm_cb.core.records import JsonObject
from mm_cb.data.cards import Card, card, cards, data_home, local_file
from mm_cb.data.examples import Example, SetName
from mm_cb.data.formats import FORMATS, Context, Format, Skip, Unmendable, recognise
from mm_cb.data.pictures import absent
from mm_cb.data.rows import DataRows, HubRows, load_hub, open_rows

HUB_PREFIX = "hub:"
UNMENDABLE = ("control token", "broken encoding", "unanswered turn", "other prompt")
"""Kinds of faults of rows that are left out and counted in data sets that nobody here can mend."""


@dataclass(frozen=True)
class Source:
    """One data set of a mixture; recipes list them under ``data``, by name or with the fields below."""

    __pydantic_config__: ClassVar[Mapping[str, str]] = {"extra": "forbid"}  # read where recipes are parsed

    name: str
    """A card's name, a file or folder, or ``hub:ORG/NAME`` with ``@SPLIT`` behind it (train if left out)."""
    weight: float = 1.0
    """How often every row comes in one pass over the mixture: 50 = fifty times, 0.25 = a seeded quarter of the rows."""
    set: SetName | None = None
    """Which example set the rows belong to; None = what the data set is for (our own files say it row by row)."""
    images: Path | None = None
    """Folder of the pictures, for data sets that only name them."""
    limit: int | None = None
    """Use a seeded sample of so many rows."""
    remove_request: float = 0.0
    """Share of the rows whose request is emptied and whose chat is cut to one exchange (released Llama-3 recipe: 0.5).
    """
    refusals: bool = False
    """XSTest: also keep full refusals."""
    own: bool = False
    """Whether the rows must be ours, which say their set one by one."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: If one is out of range.
        """
        if not self.name:
            raise UserError(
                "a data source needs a `name`: a data set (mm-cb data list), a file, a folder, or hub:ORG/NAME."
            )
        if not 0 < self.weight < float("inf"):
            raise UserError(f"`weight` of the data source `{self.name}` must be above 0, got {self.weight}.")
        if self.set not in (None, *get_args(SetName)):
            raise UserError(
                f"`set` of the data source `{self.name}` must be one of {get_args(SetName)}, got `{self.set}`."
            )
        if self.limit is not None and self.limit < 1:
            raise UserError(f"`limit` of the data source `{self.name}` must be at least 1, got {self.limit}.")
        if not 0 <= self.remove_request <= 1:
            raise UserError(
                f"`remove_request` of the data source `{self.name}` must lie in 0..1, got {self.remove_request}."
            )


class RowFault(NamedTuple):
    """A row that cannot be used, and why."""

    kind: str
    """``broken row``, ``missing image``, ``too long``, ``repeated id``, ``in both sets``, or one of `UNMENDABLE`."""
    message: str


class RowJudge(Protocol):
    """What a model makes of examples."""

    def __call__(self, example: Example) -> RowFault | None:
        """What is wrong with an example; None if the model can take it."""

    def mostly_unknown(self, example: Example) -> str | None:
        """The token for what its tokenizer does not know, where most of a text of an example comes to that."""

    def length(self, text: str) -> int:
        """How many tokens it makes of a text."""


@dataclass(frozen=True)
class Rules:
    """What becomes of rows that a run cannot use: left out and counted, or refused."""

    skip_missing_images: bool = False
    """Leave rows out whose picture is not there."""
    skip_too_long: bool = False
    """Leave rows out of which ``max_length`` would cut a picture off, or all that counts."""
    fit: RowJudge | None = None
    """Whether the model can take an example; None = not known here."""

    def left_out(self, fault: RowFault) -> bool:
        """Whether a row with this fault is left out instead of refused."""
        skips = {"missing image": self.skip_missing_images, "too long": self.skip_too_long}
        return skips.get(fault.kind, False)


STRICT = Rules()
"""Nothing is left out."""


class RowPlace(NamedTuple):
    """Where a row stands; as text, its file and line, which are looked for only then."""

    rows: DataRows
    number: int

    def __str__(self) -> str:
        """``file:line``."""
        return self.rows.where(self.number)


@dataclass
class OpenSource:
    """A source whose rows can be read.

    Attributes:
        key: Name of the source and its set; the beginning of its examples' ids.
        published: Whether it is a data set by its name or of the hub, whose rows nobody here can mend: one with a
            fault of `UNMENDABLE` is left out and counted.
        inputs: What was opened, for a run's record.
    """

    source: Source
    key: str
    rows: DataRows
    form: Format
    folder: Path
    inputs: list[Path | Repository] = field(default_factory=list)
    published: bool = False

    def read(self, index: int, stood_for: dict[str, str] | None = None) -> Example | Skip:
        """The example of a row.

        Args:
            index: Its number.
            stood_for: See `mm_cb.data.formats.Context`.

        Raises:
            ValueError: If the row is broken or not as the format has it.
        """
        set_name = self.source.set or self.form.set
        context = Context(
            f"{self.key}-{index:06}",
            self.key,
            set_name,
            self.folder,
            self.source.images,
            self.source.refusals,
            stood_for,
        )
        try:
            record = self.rows[index]
            if "set" in record and self.form.set is not None and not isinstance(self.rows, HubRows):
                raise ValueError(
                    f"`set` stands in this row and not in the file's first, by which all of it is {self.form.set}; "
                    "give every row its `set`, or none"
                )
            self.form.refuse_lost(record)
            outcome = self.form.convert(record, context)
            return replace(outcome, place=RowPlace(self.rows, index)) if isinstance(outcome, Example) else outcome
        except KeyError as error:
            raise ValueError(f"the row lacks {', '.join(f'`{key}`' for key in error.args)}") from error
        except (TypeError, AttributeError) as error:
            raise ValueError(f"the row is not as expected: {type(error).__name__}: {error}") from error

    def example(self, index: int) -> Example:
        """The example of a row that was one before."""
        outcome = self.read(index)
        assert isinstance(outcome, Example), f"row {index} of {self.key} changed while it was read"
        return outcome

    def examine(self, rules: Rules) -> Iterator[tuple[int, Example | Skip | RowFault]]:
        """Every row in order, with what became of it; pictures are looked for, not opened."""
        stood_for: dict[str, str] = {}
        for index in range(len(self.rows)):
            outcome = self._outcome(index, rules, stood_for)
            if isinstance(outcome, RowFault) and (rules.left_out(outcome) or self.unmendable(outcome)):
                outcome = Skip(outcome.kind)
            yield index, outcome

    def unmendable(self, fault: RowFault) -> bool:
        """Whether a row is left out because nobody here can mend it."""
        return self.published and fault.kind in UNMENDABLE

    def where(self, index: int) -> str:
        """File and line of a row."""
        return self.rows.where(index)

    def _outcome(self, index: int, rules: Rules, stood_for: dict[str, str]) -> Example | Skip | RowFault:
        try:
            outcome = self.read(index, stood_for)
        except ValueError as error:
            return RowFault(error.kind if isinstance(error, Unmendable) else "broken row", str(error))
        if isinstance(outcome, Skip):
            return outcome
        for image in outcome.images:
            if isinstance(image, Path) and (what := absent(image)):
                return RowFault("missing image", f"the picture `{image}` is {what}")
        return (rules.fit(outcome) if rules.fit else None) or outcome

    def kept(self, rows: list[int], seed: int) -> list[int]:
        """The rows to use out of those that can be used: all, or the seeded sample that ``limit`` asks for."""
        limit = self.source.limit
        if limit is None or limit >= len(rows):
            return rows
        return sorted(random.Random(f"limit {seed} {self.key}").sample(rows, limit))


def open_source(source: Source) -> OpenSource:
    """Find a source and index its rows.

    Raises:
        UserError: If it is not there (says how to get it), is empty, or has columns of no known format.
    """
    rows, folder, described = _find(source)
    columns = _columns(rows)
    name = "own" if source.own else described.format if described is not None else recognise(columns)
    if name is None and "set" in columns:
        name = "own"  # but for a column that is told below
    if name is None or not FORMATS[name].columns <= set(columns):
        known = "; ".join(str(sorted(form.columns)) for form in FORMATS.values())
        wanted = sorted(FORMATS[name].columns) if name else f"of one of these formats ({known})"
        lacking = f", and lacks {sorted(FORMATS[name].columns - set(columns))}" if name else ""
        raise UserError(
            f"{rows.where(0)}: `{source.name}` must have the columns {wanted}, it has {sorted(columns)[:20]}{lacking}."
        )
    form = FORMATS[name]
    if source.images is not None and not source.images.is_dir():
        raise UserError(f"`images` of the data source `{source.name}` must be a folder, got `{source.images}`.")
    set_name = source.set or form.set
    key = (Path(source.name).stem if described is None else described.name) + (f":{set_name}" if set_name else "")
    inputs = rows.inputs if isinstance(rows, HubRows) else [rows.path]
    published = described is not None or source.name.startswith(HUB_PREFIX)
    return OpenSource(source, key, rows, form, folder, [*inputs], published)


def _find(source: Source) -> tuple[DataRows, Path, Card | None]:
    """The rows of a source, the folder that relative paths start from, and its card if it has one."""
    name = source.name
    if name.startswith(HUB_PREFIX):
        hub, _, split = name.removeprefix(HUB_PREFIX).partition("@")
        return load_hub(hub, split or "train"), Path(), None
    path = Path(name)
    if path.exists():
        return open_rows(path), path if path.is_dir() else path.parent, None
    if path.suffix or len(path.parts) > 1:
        raise UserError(
            f"the data file `{name}` is not there; give a file of rows (docs/formats.md), a folder, hub:ORG/NAME, or "
            "a data set's name."
        )
    return _find_card(name)


def _find_card(name: str) -> tuple[DataRows, Path, Card]:
    usable = {key: value for key, value in cards().items() if value.used_for == "training"}
    if name not in usable:
        raise unknown("data set", name, usable)
    described = card(name)
    saved = data_home() / name
    for file in described.files:
        path = local_file(described, file)
        if path is None:
            raise UserError(
                f"the data set `{name}` is not here: {described.get}; put {file} into `{saved}` (or set MM_CB_DATA); "
                "or train on rows of yours: 'data=[rows.jsonl]'. All that a recipe lacks: mm-cb doctor --recipe RECIPE."
            )
        return open_rows(path), path.parent, described
    if saved.is_dir():
        return open_rows(saved), saved, described
    assert described.hub is not None and described.split is not None, name
    return load_hub(described.hub, described.split, described.config), Path(), described


def _columns(rows: DataRows) -> list[str]:
    try:
        first: JsonObject = rows[0]
    except ValueError as error:
        raise UserError(f"{rows.where(0)}: {error}") from error
    return [str(column) for column in first]


def count_reasons(skipped: Counter[str]) -> str:
    """``"3 fewer than two turns, 1 missing image"``."""
    return ", ".join(f"{count} {reason}" for reason, count in skipped.most_common())
