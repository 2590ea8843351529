"""Where packaged data lives, and how ids become file names."""

import errno
import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from mm_cb.core.errors import UserError

_PACKAGE = Path(__file__).resolve().parents[1]
_STEM_LENGTH = 80
_PART = re.compile(r"(.*-)([0-9]{1,9})-of-([0-9]{1,9})(\..*)")


def data_path(*parts: str) -> Path:
    """A file or folder under the top-level ``data/``: the wheel's packaged copy, or the checkout's own folder."""
    packaged = _PACKAGE / "_data"
    root = packaged if packaged.is_dir() else _PACKAGE.parent / "data"
    return root.joinpath(*parts)


def protocol_file(name: str) -> Any:
    """The content of ``data/protocols/<name>.yaml``."""
    import yaml

    return yaml.safe_load(data_path("protocols", f"{name}.yaml").read_text(encoding="utf-8"))


def refuse_missing_parts(files: Iterable[Path]) -> None:
    """Refuse numbered parts (``train-00000-of-00002.parquet``) of which some are not there, as of half a download.

    Raises:
        UserError: Naming how many are missing.
    """
    found: dict[tuple[Path, str, int, str], set[int]] = {}
    for file in files:
        if part := _PART.fullmatch(file.name):
            found.setdefault((file.parent, part[1], int(part[3]), part[4]), set()).add(int(part[2]))
    for (folder, begins, count, ends), numbers in found.items():
        if len(numbers) < count:
            raise UserError(
                f"`{folder}` must hold {count} parts `{begins}*-of-*{ends}`, as their names say, it holds "
                f"{len(numbers)}; get the missing ones."
            )


def named_path(name: str, value: object, what: str) -> Path:
    """A path that a Python user gives as the argument ``name``.

    Raises:
        TypeError: If it is neither a text nor a path; says what it is to be.
        UserError: If it is empty.
    """
    if value == "":
        raise UserError(f"`{name}` must be {what}, got an empty text.")
    if not isinstance(value, str | os.PathLike):
        raise TypeError(f"`{name}` must be {what}, got {type(value).__name__}.")
    return Path(value)


def refuse_unusable(path: str | Path, what: str) -> None:
    """Refuse a name or path that no file can have: one that is too long, or holds a NUL or half a character.

    Raises:
        UserError: Naming what it is and what is wrong.
    """
    try:
        os.stat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            shown = f"`{str(path)[:60]}...`, {len(str(path)):,} characters"
            raise UserError(f"the {what} must have a name that a file can have, {shown} are too many.") from error
    except ValueError as error:
        raise UserError(f"the {what} `{str(path)[:200]}` is no name that a file can have: {error}.") from error


def safe_id(id: str) -> str:
    """A file stem for an id that may hold anything: ``"../Cat 1"`` -> ``"cat_1-5f0c2d9e"``.

    Stems hold only ``a-z 0-9 _ -``: no dots (``x.clean.png`` belongs to ``x``), no separators, and no capitals (some
    file systems ignore case). Whenever that changes the id, a short hash of the original keeps different ids apart.
    """
    stem = re.sub(r"[^a-z0-9_-]+", "_", id.lower())[:_STEM_LENGTH].strip("_-")
    if stem and stem == id:
        return stem
    digest = hashlib.sha256(id.encode("utf-8", "backslashreplace")).hexdigest()[:8]
    return f"{stem or 'item'}-{digest}"


def absolute(path: str | Path) -> Path:
    """A path that stays the same file when a user's code changes the working directory; as given where that is gone."""
    try:
        return Path(os.path.abspath(path))
    except FileNotFoundError:
        return Path(path)
