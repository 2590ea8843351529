"""Rows of a benchmark's data: JSON lines, Parquet files, or a data set on the hub."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mm_cb.core import reading
from mm_cb.core.errors import UserError, one_line
from mm_cb.core.file_kinds import refuse_others
from mm_cb.core.folding import is_blank
from mm_cb.core.paths import refuse_missing_parts
from mm_cb.core.records import JsonObject


class DataRow(NamedTuple):
    """One row of a data set."""

    values: JsonObject
    where: str
    """What error lines call it: file and line."""
    file: Path | None
    """None for what came from the hub."""


def read_rows(data: str, split: str = "test") -> list[DataRow]:
    """The rows of a file (.jsonl or .json of one object a line, .parquet), of a folder of such files, or of the hub.

    Pictures in columns come as bytes, see `mm_cb.benchmarks.pictures.stored_picture`.

    Raises:
        UserError: If nothing is there, or it cannot be read.
    """
    path = Path(data)
    if path.is_file():
        return list(parquet_rows([path]) if path.suffix == ".parquet" else json_lines(path))
    if not path.is_dir():
        from mm_cb.core import hub

        table = undecoded(hub.load_split(data, split))
        return [DataRow(values, f"{data}, row {place}", None) for place, values in enumerate(table, start=1)]
    files = sorted(path.rglob(f"{split}*.parquet")) or sorted(path.rglob("*.parquet"))
    if files:
        refuse_missing_parts(files)
        return list(parquet_rows(files))
    files = sorted(file for file in path.iterdir() if file.suffix in (".jsonl", ".json"))
    refuse_missing_parts(files)
    if not files:
        raise UserError(f"`{data}` must hold .jsonl, .json or .parquet files, it holds none.")
    return [row for file in files for row in json_lines(file)]


def json_lines(path: Path, own: Collection[str] = ()) -> Iterable[DataRow]:
    """One object a line; texts may be models' answers, which hold anything.

    Args:
        path: The file.
        own: Formats that are read, of `mm_cb.core.file_kinds`; none named means that any may be.

    Raises:
        UserError: If the file cannot be read, a line is no object, or one of another format.
    """
    for where, values in reading.json_lines(path, "file of JSON lines", nul=True):
        if own:
            refuse_others(values, own, where)
        yield DataRow(values, where, path)


def parquet_rows(files: Sequence[Path]) -> Iterable[DataRow]:
    """The rows of Parquet files.

    Raises:
        UserError: If one cannot be read.
    """
    import pyarrow.parquet

    for file in files:
        reading.refuse_pipe(file, "Parquet file")
        try:
            rows = pyarrow.parquet.read_table(file).to_pylist()
        except (OSError, ValueError, KeyError, MemoryError) as e:
            raise UserError(f"`{file}` cannot be read: {one_line(str(e))[:200]}.") from e
        yield from (DataRow(values, f"{file}, row {place}", file) for place, values in enumerate(rows, start=1))


def undecoded(table: Any) -> list[JsonObject]:
    """The rows of a ``datasets.Dataset``, pictures as bytes."""
    from mm_cb.data import rows

    return list(rows.undecoded(table))


def texts(row: DataRow, names: Sequence[str]) -> list[str]:
    """The texts of a row's columns; whole numbers count as texts.

    Raises:
        UserError: If one is missing, blank or of another kind.
    """
    held = {name: row.values.get(name) for name in names}
    wrong = [
        n
        for n, value in held.items()
        if isinstance(value, bool) or not isinstance(value, str | int) or is_blank(str(value))
    ]
    if wrong:
        raise UserError(f"{row.where} must have texts for {', '.join(names)}; wrong or missing: {', '.join(wrong)}.")
    return [str(value) for value in held.values()]
