"""Files that survive kill -9 and a full disk: whole files in one step, JSON lines one by one."""

import codecs
import contextlib
import dataclasses
import errno
import hashlib
import json
import os
import uuid
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mm_cb.core.errors import UserError
from mm_cb.core.reading import TextFault, decode, file_bytes, loads, refuse_pipe
from mm_cb.core.records import JsonObject

TEMPORARY_SUFFIX = ".mm-cb-tmp"
_NO_ROOM = "the disk is full; free some space and run the same command again."
_TOO_LARGE = (
    "a file may be no larger here (a limit of the shell, see `ulimit -f`, or of the file system); raise it, or take "
    "another place, and run the same command again."
)
_EITHER = (
    "the disk is full, or a file may be no larger here (see `ulimit -f`); make room and run the same command again."
)
_FULL = {errno.ENOSPC: _NO_ROOM, errno.EDQUOT: _NO_ROOM, errno.EFBIG: _TOO_LARGE}
_FULL_IN_WORDS = {
    **{"No space left on device": _NO_ROOM, "os error 28": _NO_ROOM},
    **{"File too large": _TOO_LARGE, "os error 27": _TOO_LARGE},
    **dict.fromkeys(("inline_container", "iostream error"), _EITHER),  # torch's, at different places of a file
}
_REFUSED = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG, errno.EEXIST),
    *(errno.ENOENT, errno.ELOOP, errno.EINVAL),  # folders that cannot be made, as below /proc
)


@contextlib.contextmanager
def file_errors(path: Path) -> Iterator[None]:
    """Turn a full disk, a limit of size or a refused path inside the block into a UserError that names ``path``."""
    try:
        yield
    except Exception as e:
        if why := no_room(e):
            raise UserError(f"`{path}` could not be written: {why}") from e
        if isinstance(e, OSError) and e.errno in _REFUSED:
            refuse_broken_link(path)
            raise UserError(
                f"`{path}` must be writable, got: {e.strerror}; give another path or change its rights."
            ) from e
        raise


def refuse_broken_link(path: Path) -> None:
    """Refuse a path on which a link leads nowhere, or in a circle.

    Raises:
        UserError: Naming the link.
    """
    for place in (path, *path.parents):
        if place.is_symlink() and not place.exists():
            raise UserError(
                f"`{place}` is a link to `{os.readlink(place)}`, which leads nowhere or in a circle; remove it, or "
                "give another path."
            )


def no_room(error: BaseException) -> str | None:
    """What to say where an error means a full disk, or a file that may be no larger; None for any other error.

    Whichever library met it: torch and safetensors say so in words alone.
    """
    if isinstance(error, OSError):
        return _FULL.get(error.errno or 0)
    return next((why for sign, why in _FULL_IN_WORDS.items() if sign in str(error)), None)


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file in one step: under its final name there is the old content or all of the new, never a part.

    Raises:
        UserError: If the disk is full or the path cannot be written.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}{TEMPORARY_SUFFIX}")  # pids repeat elsewhere
    with file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink()
            raise
        _sync_folder(path.parent)


def give_usual_modes(folder: Path) -> None:
    """Let others read the weights in a folder as far as the umask does: safetensors writes for their owner alone."""
    umask = os.umask(0o077)
    os.umask(umask)
    for file in folder.glob("*.safetensors"):
        file.chmod(0o666 & ~umask)


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 text file in one step, see `write_bytes`."""
    write_bytes(path, text.encode("utf-8", "backslashreplace"))


def write_json(path: Path, obj: Any) -> None:
    """Write an indented JSON file in one step, see `write_bytes`. NaN and infinity are refused (ValueError)."""
    write_text(path, dumps(obj, indent=2) + "\n")


def write_jsonl(path: Path, records: Iterable[Mapping[str, object]]) -> None:
    """Write all records as JSON lines in one step, see `write_bytes`."""
    write_text(path, "".join(dumps(record) + "\n" for record in records))


def append_jsonl(path: Path, record: Mapping[str, object]) -> None:
    """Append one record as one line and wait until it is on disk; a torn line left by a killed run is cut off first.

    Raises:
        UserError: If the disk is full or the path cannot be written; the file then ends as it did before the call.
    """
    path = Path(path)
    line = (dumps(record) + "\n").encode("utf-8", "backslashreplace")
    with file_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(path, "ab+", buffering=0) as file:
            end = _end_of_last_line(file)
            try:
                written = file.write(line)
                while written is not None and written < len(line):
                    line = line[written:]
                    written = file.write(line)
                os.fsync(file.fileno())
            except OSError:
                with contextlib.suppress(OSError):
                    file.truncate(end)
                raise


def read_jsonl(path: Path) -> list[JsonObject]:
    """The records of `jsonl_lines`, for files whose lines are checked by whoever reads them."""
    return [record for _, record in jsonl_lines(path)]


def jsonl_lines(path: Path) -> Iterator[tuple[int, JsonObject]]:
    """All complete records of a file written by `append_jsonl`, each with the number of its line.

    A torn last line is dropped, and no file is no records.

    Raises:
        UserError: If a complete line is not a JSON object, or the last one is no beginning of one; the message names
            the file and the line.
    """
    path = Path(path)
    if not path.exists():
        return
    with file_errors(path):
        *complete, torn = file_bytes(path).split(b"\n")
    for number, line in enumerate(complete, start=1):
        if not line.strip():
            continue
        try:
            record = loads(decode(line), any_text=True)
        except TextFault as e:
            raise UserError(f"{path}:{number} must be one JSON object, but it is broken: {str(e).rstrip('.')}.") from e
        if not isinstance(record, dict):
            raise UserError(f"{path}:{number} must be one JSON object, got {type(record).__name__}.")
        yield number, record
    if torn.strip() and not _begins_object(torn):
        raise UserError(f"{path}:{len(complete) + 1} must be one JSON object, but it is none: the file is damaged.")


def _begins_object(torn: bytes) -> bool:
    """Whether a line without its end may be what a stopped `append_jsonl` leaves."""
    try:
        codecs.getincrementaldecoder("utf-8")().decode(torn)
    except UnicodeDecodeError:
        return False
    return torn.startswith(b"{") and b"\0" not in torn


def file_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes, in hex; a pipe or a device is refused (UserError)."""
    refuse_pipe(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def text_sha256(text: str) -> str:
    """SHA-256 of a text, in hex."""
    return hashlib.sha256(text.encode("utf-8", "backslashreplace")).hexdigest()


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    if isinstance(value, Path):
        return str(value)
    if hasattr(value, "tolist"):  # numpy and torch scalars and arrays
        return value.tolist()
    raise TypeError(f"a JSON value was expected, got {type(value).__name__}.")


def dumps(obj: Any, indent: int | None = None) -> str:
    """Strict JSON text; paths, dataclasses and array scalars become plain values, NaN and infinity a ValueError."""
    return json.dumps(obj, ensure_ascii=False, allow_nan=False, default=_plain, indent=indent)


def _end_of_last_line(file: BinaryIO) -> int:
    """Cut a line without its line feed off the end of an open file; returns the position after the last full line."""
    size: int = file.seek(0, os.SEEK_END)
    if size == 0:
        return 0
    file.seek(size - 1)
    if file.read(1) == b"\n":
        return size
    end, step = size, 65536
    while end > 0:
        start = max(0, end - step)
        file.seek(start)
        found = file.read(end - start).rfind(b"\n")
        if found >= 0:
            end = start + found + 1
            break
        end = start
    file.truncate(end)
    return end


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
