"""Rows of a file or a hub data set, one at a time: nothing but their places is held in memory.

An index of 158,000 records takes a few megabytes, whatever their texts are; a record is read when it is asked for, by
whichever process asks (each read opens the file itself, so data-loader workers share nothing).
"""

import mmap
import re
from array import array
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any, BinaryIO

from mm_cb.core import hub
from mm_cb.core.errors import UserError, one_line
from mm_cb.core.folders import what_is
from mm_cb.core.paths import refuse_missing_parts
from mm_cb.core.reading import BOM, TextFault, decode, loads, other_kind, refuse_pipe
from mm_cb.core.records import JsonObject
from mm_cb.core.tables import is_table, read_table

Record = JsonObject

_STRUCTURE = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"|[][{}"]', re.DOTALL)
_STEP = 1 << 24
_SHOWN = 200
_ONLY_OBJECTS = "a JSON array must hold objects with commas between them, and end the file; something else stands here."


class FileRows(Sequence[Record]):
    """Records of one JSON file, found by their byte offsets."""

    def __init__(self, path: Path, starts: Sequence[int], ends: Sequence[int]) -> None:
        """Keep the places of the records of ``path``."""
        self.path = path
        self._starts = array("Q", starts)
        self._ends = array("Q", ends)

    def __len__(self) -> int:
        """How many records there are."""
        return len(self._starts)

    def __getitem__(self, index: Any) -> Any:
        """One record.

        Raises:
            ValueError: If it is not a JSON object.
        """
        start, end = self._starts[index], self._ends[index]
        with open(self.path, "rb") as file:
            file.seek(start)
            content = file.read(end - start)
        try:
            record = loads(decode(content))
        except TextFault as fault:
            raise ValueError(f"expected a JSON object, got {fault}") from fault
        if not isinstance(record, dict):
            raise ValueError(f"expected a JSON object, got {type(record).__name__}")
        return record

    def where(self, index: int) -> str:
        """``file:line`` of a record's first line; with ``row n``, from 1, where one line holds several records."""
        line = 1 + self._line_feeds(0, self._starts[index])
        neighbours = self._starts[max(index - 1, 0) : index + 2]
        alone = all(self._line_feeds(*pair) for pair in pairwise(neighbours))
        return f"{self.path}:{line}" + ("" if alone else f" row {index + 1}")

    def _line_feeds(self, start: int, end: int) -> int:
        """Line feeds between two places of the file."""
        count = 0
        with open(self.path, "rb") as file:
            file.seek(start)
            while start < end and (block := file.read(min(end - start, _STEP))):
                count += block.count(b"\n")
                start += len(block)
        return count


class TableRows(Sequence[Record]):
    """Rows of a table with a header; such sets are small and are held in memory."""

    def __init__(self, path: Path) -> None:
        """Read the file.

        Raises:
            UserError: If it is no table, see `mm_cb.core.tables.read_table`.
        """
        self.path = path
        self._rows = read_table(path).rows

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        """One row: column name → text."""
        return self._rows[index].values

    def where(self, index: int) -> str:
        """``file:line`` of a row's first line."""
        return self._rows[index].where


class HubRows(Sequence[Record]):
    """Rows of a ``datasets.Dataset``, which maps its files into memory; pictures stay encoded until they are opened."""

    def __init__(self, dataset: Any, name: str, inputs: Sequence[hub.Repository] = ()) -> None:
        """Wrap a data set; ``name`` is what messages call it, ``inputs`` where on the hub it is from."""
        self._dataset = undecoded(dataset)
        self._name = name
        self.inputs = list(inputs)

    def __len__(self) -> int:
        """How many rows there are."""
        return len(self._dataset)

    def __getitem__(self, index: Any) -> Any:
        """One row: column name → value."""
        return self._dataset[int(index)]

    def where(self, index: int) -> str:
        """``name row number``, counted from 1 as lines are."""
        return f"{self._name} row {index + 1}"


DataRows = FileRows | TableRows | HubRows


def undecoded(dataset: Any) -> Any:
    """A ``datasets.Dataset`` whose pictures stay encoded until they are opened, by our own reader."""
    import datasets

    for column, feature in dataset.features.items():
        inner = getattr(feature, "feature", feature)
        if isinstance(inner, datasets.Image):
            encoded = datasets.Image(decode=False)
            dataset = dataset.cast_column(column, encoded if inner is feature else datasets.List(encoded))
    return dataset


def open_rows(path: Path) -> DataRows:
    """The rows of a JSONL file, a JSON array, a CSV or TSV table, or a folder of a saved or plain hub data set.

    Raises:
        UserError: If there is nothing to read, or it is none of these.
    """
    if path.is_dir():
        if kind := what_is(path):
            raise UserError(f"`{path}` must be rows (a file, or the folder of a data set); it is {kind}.")
        return HubRows(_load_folder(path), str(path))
    if is_table(path):
        return TableRows(path)
    try:
        refuse_pipe(path, "data file")
        with open(path, "rb") as file:
            places = _places(file, path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the data file `{path}`: {getattr(error, 'strerror', None) or error}") from error
    if not places[0]:
        raise UserError(f"`{path}` must hold rows (JSON lines, a JSON array or a table), it holds none.")
    return FileRows(path, *places)


def load_hub(name: str, split: str, config: str | None = None) -> HubRows:
    """A split of a hub data set, downloaded once and then mapped into memory.

    Raises:
        UserError: If it can neither be found in the cache nor be downloaded.
    """
    dataset = hub.load_split(name, split, config)
    return HubRows(dataset, f"{name}[{split}]", hub.used(name, kind="dataset"))


def _load_folder(path: Path) -> Any:
    """A folder made by ``save_to_disk``, or one of data files (parquet, JSON lines, pictures with metadata)."""
    import datasets

    saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    for table in () if saved else filter(is_table, sorted(path.rglob("*"))):
        if table.stem != "metadata":  # of pictures
            raise UserError(
                f"`{path}` holds the table `{table.name}`; give that file, whose every row is then checked."
            )
        TableRows(table)
    refuse_missing_parts(sorted(path.rglob("*-of-*")))
    try:
        with hub.silent(datasets):
            loaded = datasets.load_from_disk(str(path)) if saved else datasets.load_dataset(str(path))
    except Exception as error:  # whatever the reader of that file type raises
        cause = error.__cause__ or error  # "an error occurred" says nothing
        raise UserError(
            f"`{path}` must be a folder of data files (JSON lines, Parquet) or one made by `save_to_disk`, but it "
            f"cannot be read as one ({type(cause).__name__}: {one_line(str(cause))[:_SHOWN]}); give the file that "
            "holds the rows, or mend the folder."
        ) from error
    if isinstance(loaded, datasets.Dataset):
        return loaded
    if len(loaded) == 1:
        return next(iter(loaded.values()))
    raise UserError(f"`{path}` holds the splits {sorted(loaded)}; give the folder of one split.")


def _places(file: BinaryIO, path: Path) -> tuple[array, array]:
    """Start and end of every record."""
    head = file.read(4096)
    start = len(BOM) if head.startswith(BOM) else 0
    if not head[start:]:
        raise UserError(f"`{path}` must hold rows (JSON lines, a JSON array or a table), it is empty.")
    if fault := other_kind(head):
        raise UserError(f"{path}:1: {fault}")
    if not head[start:].lstrip().startswith(b"["):
        return _line_places(file, start)
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return _array_places(content, start, path)


def _line_places(file: BinaryIO, start: int) -> tuple[array, array]:
    """Start and end of every line that is not blank; the file is not mapped, whose pages would count as memory."""
    starts, ends = array("Q"), array("Q")
    file.seek(start)
    for line in file:
        end = start + len(line)
        if line.strip():
            starts.append(start)
            ends.append(end - line.endswith(b"\n"))
        start = end
    return starts, ends


def _array_places(content: mmap.mmap, begin: int, path: Path) -> tuple[array, array]:
    """Start and end of every object of a JSON array; strings are stepped over whole, so nothing is parsed.

    Between the objects there must be one comma and nothing else: what stands there would be passed over in silence.
    """
    starts, ends = array("Q"), array("Q")
    depth = 0
    for match in _STRUCTURE.finditer(content, begin):
        token = match[0]
        if token in (b"{", b"["):
            depth += 1
            if depth == 2:
                _check_gap(content, ends[-1] if ends else None, match.start(), begin, path)
                starts.append(match.start())
        elif token in (b"}", b"]"):
            depth -= 1
            if depth == 1:
                ends.append(match.end())
        elif token == b'"':
            break  # a string that never ends
        if not depth:
            last = ends[-1] if ends else content.find(b"[", begin) + 1
            if token != b"]" or content[last : match.start()].strip() or content[match.end() :].strip():
                raise UserError(f"{path}:{_line_at(content, last)}: {_ONLY_OBJECTS}")
            return starts, ends
    line = _line_at(content, starts[-1] if starts else 0)
    raise UserError(f"{path}:{line}: the JSON array does not end; the file is damaged or half downloaded.")


def _check_gap(content: mmap.mmap, last: int | None, start: int, begin: int, path: Path) -> None:
    """Make sure that nothing but what JSON wants stands between two objects, or in front of the first."""
    between = content[begin if last is None else last : start].strip()
    if between != (b"[" if last is None else b","):
        raise UserError(f"{path}:{_line_at(content, begin if last is None else last)}: {_ONLY_OBJECTS}")


def _line_at(content: mmap.mmap, place: int) -> int:
    return content[:place].count(b"\n") + 1
