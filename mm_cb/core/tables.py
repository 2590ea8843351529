"""The one strict reader of tables: a header, and as many fields in every row."""

import csv
import io
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
    return Table(columns, rows)


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
