"""The one strict reader of tables: a header, and as many fields in every row."""

import csv
import io
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from mm_cb.core.errors import UserError
from mm_cb.core.reading import Line, read_text

_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars", ",": "commas"}
_NAMES = {"\t": ", or name it .tsv", ",": ", or name it .csv"}


class Table(NamedTuple):
    """A table with a header."""

    columns: list[str]
    rows: list[Line]


def is_table(path: Path) -> bool:
    """Whether a file's name says that it is a table."""
    return path.suffix.lower() in (".csv", ".tsv")


def read_table(path: Path, known: Sequence[str] = ()) -> Table:
    """A table with a header: columns apart by commas (.csv) or tabs (.tsv), as many in every row.

    A first line ``sep=,``, in which Excel tells itself the separator, is passed over.

    Args:
        path: The file.
        known: Names of columns; a header that differs from one in case alone is taken for it.

    Raises:
        UserError: If the file cannot be read, its header is blank or names a column twice, a quote is never closed, or
            a row has more or fewer fields; names file and line.
    """
    text = read_text(path, "table")
    separator = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = list(_fields(text, path, separator))
    if lines and separator.join(lines[0][1]).lower() == f"sep={separator}":  # Excel's word to itself
        del lines[0]
    if len(lines) < 2:
        raise UserError(f"`{path}` must hold a header and at least one row, it holds {len(lines)} lines with content.")
    columns = _columns(f"{path}:{lines[0][0]}", lines[0][1], separator, known)
    rows = []
    for number, fields in lines[1:]:
        if len(fields) != len(columns):
            raise UserError(
                f"{path}:{number}: the header has {len(columns)} columns, the row {len(fields)} fields; put one that "
                "holds the separator or a line break in double quotes."
            )
        rows.append(Line(f"{path}:{number}", dict(zip(columns, fields, strict=True))))
    _refuse_swallowed(path, text, separator, [number for number, _ in lines[1:]], rows)
    return Table(columns, rows)


def _refuse_swallowed(path: Path, text: str, separator: str, starts: Sequence[int], rows: Sequence[Line]) -> None:
    """Refuse a row of several lines that are rows themselves: a stray quote opens in one and closes in a later one.

    Lines of an honest text may look like rows, too. They are taken for rows where they also say under some column what
    other rows say there, or numbers where others have numbers; else they are told.

    Raises:
        UserError: Naming the first line.
    """
    raw = list(io.StringIO(text, newline=""))
    ends = [*(start - 1 for start in starts[1:]), len(raw)]
    several = {}
    for place, (start, end) in enumerate(zip(starts, ends, strict=True)):
        if start == end:
            continue
        lines = [line.replace('"', "").strip("\r\n").split(separator) for line in raw[start - 1 : end] if line.strip()]
        if len(lines) > 1 and all(len(line) == len(rows[place].values) for line in lines):
            several[place] = lines
    others = [row for place, row in enumerate(rows) if place not in several]
    told = []
    for place, lines in several.items():
        for column, known in enumerate(zip(*(row.values.values() for row in others), strict=True)):
            said = {line[column].strip() for line in lines}
            if "" not in said and (said <= {*known} or all(map(str.isdecimal, (*said, *known)))):
                raise UserError(
                    f"{rows[place].where}: a double quote joins {len(lines)} lines that look like rows of their own; "
                    "remove it, or, where the text has these lines, put its last words on a line without the separator."
                )
        told.append(f"{starts[place]}-{ends[place]}")
    if told:
        warnings.warn(
            f"`{path}`: {len(told)} rows are of several lines, each of which could be a row (lines "
            f"{', '.join(told[:5])}): see that no quote is missing there.",
            stacklevel=3,
        )


def _fields(text: str, path: Path, separator: str) -> Iterator[tuple[int, list[str]]]:
    """The fields of every row that is not blank, with its first line."""
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=separator, strict=True)
    line = 1
    while True:
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            problem = str(error)
            if "unexpected end" in problem or "field larger" in problem:
                problem = (
                    f"a double quote is never closed, or a field has more than {csv.field_size_limit():,} characters"
                )
            elif "expected after" in problem:
                problem = "a double quote is closed in the middle of a field (write it twice inside quotes)"
            raise UserError(f"{path}:{line}: {problem}.") from error
        if fields:
            yield line, fields
        line = reader.line_num + 1


def _columns(where: str, header: list[str], separator: str, known: Sequence[str]) -> list[str]:
    """The names of a header, trimmed, in the case in which they are known."""
    folded = {name.casefold(): name for name in known}
    columns = [folded.get(name.strip().casefold(), name.strip()) for name in header]
    if len(columns) == 1 and (other := next((s for s in _SEPARATORS if s != separator and s in columns[0]), None)):
        raise UserError(
            f"{where}: the columns must be apart by {_SEPARATORS[separator]}, they seem to be by {_SEPARATORS[other]}; "
            f"save the table again{_NAMES.get(other, '')}."
        )
    if "" in columns:
        raise UserError(f"{where}: every column must have a name, column {columns.index('') + 1} has none.")
    if len(set(columns)) < len(columns):
        twice = next(name for name in columns if columns.count(name) > 1)
        raise UserError(f"{where}: every column must have a name of its own, `{twice}` comes twice.")
    return columns
