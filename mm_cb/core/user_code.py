"""A user's own Python file, run so that it registers what it brings (a benchmark, a judge), and the faults in it."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import sys
import traceback
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

from mm_cb.core.errors import UserError, one_line, unknown
from mm_cb.core.files import file_sha256
from mm_cb.core.paths import absolute

Entry = TypeVar("Entry")

_PACKAGE = Path(__file__).parents[1]
_files: dict[str, Path] = {}
"""Files that were run, as tracebacks name them, to what the user calls them."""
_digests: dict[tuple[str, str], str] = {}
"""Function that registers and name → hash of the file that did."""


def is_ours(thing: object) -> bool:
    """Whether a class or a function comes with the package, and is no user's."""
    return str(getattr(thing, "__module__", "")).partition(".")[0] == _PACKAGE.name


def refuse_taken(name: str, kind: str, shipped: Collection[str]) -> None:
    """Refuse a user's entry under the name of one that comes with the package: one would be taken for the other.

    Args:
        name: The user's.
        kind: What it names, in one word.
        shipped: Names that are taken, without regard to case.

    Raises:
        UserError: In that case, or if the name is no text.
    """
    if not isinstance(name, str) or not name.strip():
        raise UserError(f"a {kind} must have a text as its name, got {name!r:.80}.")
    if taken := [one for one in shipped if one.casefold() == name.strip().casefold()]:
        raise UserError(f"the {kind} `{name}` has the name of mm-cb's own `{taken[0]}`: rename yours.")


def entry_of(name: str, kind: str, table: Mapping[str, Entry]) -> Entry:
    """The entry of a name, or of a Python file that registers one.

    Args:
        name: A name of the table, or the path of a file that ends with ``.py``.
        kind: What the table holds, in one word; the file calls ``register_<kind>``.
        table: Entries by name.

    Raises:
        UserError: If there is none; names the nearest one. If the file registers several.
    """
    if not name.endswith(".py"):
        if name not in table:
            raise unknown(kind, name, table)
        return table[name]
    found = registered_by(Path(name), table, f"register_{kind}")
    if len(found) > 1:
        raise UserError(
            f"`{name}` must call `register_{kind}` once, it registers {len(found)}: give each a file of its own."
        )
    return found[0]


def registered_by(path: Path, table: Mapping[str, Entry], call: str) -> list[Entry]:
    """Run a file, and return the entries that it put into a table.

    Args:
        path: A Python file of the user's.
        table: Where it registers, by name.
        call: The function by which it does so, for the error line.

    Raises:
        UserError: If there is no such file, it fails, it registers nothing, or something under a name that is taken.
    """
    path = Path(path)
    spec = importlib.util.spec_from_file_location(path.stem, path) if path.is_file() else None
    if spec is None or spec.loader is None:
        raise UserError(f"`{path}` must be a Python file that calls `{call}`, there is no such file.")
    _files[str(spec.origin)] = path
    before, digest = dict(table), file_sha256(path)
    module = importlib.util.module_from_spec(spec)
    held = sys.modules.get(path.stem)
    sys.modules[path.stem] = module  # dataclasses look their module up
    kept, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # nothing is left beside the user's file
    here = absolute(".")  # the rest of the command line is from here, wherever the file goes
    try:
        spec.loader.exec_module(module)
    except UserError as e:
        raise UserError(f"`{path}`: {e}") from e
    except Exception as e:  # whatever the user's file raises
        raise UserError(f"`{path}` cannot be run: {type(e).__name__}: {one_line(str(e))}") from e
    finally:
        sys.dont_write_bytecode = kept
        with contextlib.suppress(OSError):
            os.chdir(here)
        if held is not None:
            sys.modules[path.stem] = held
    new = {name: entry for name, entry in table.items() if before.get(name) is not entry}
    if not new:
        raise UserError(f"`{path}` must call `{call}`, it registers nothing.")
    _digests.update({(call, name): digest for name in new})
    return list(new.values())


def file_of(kind: type) -> Path | None:
    """The user's file that defines a class; None for any other class."""
    codes = (getattr(value, "__code__", None) for value in vars(kind).values())
    return next((_files[code.co_filename] for code in codes if code and code.co_filename in _files), None)


def registering_file(name: str, call: str) -> str | None:
    """The SHA-256 of the user's file that registered a name by ``call``; None for what no file of theirs did."""
    return _digests.get((call, name))


def users_fault(error: BaseException) -> str | None:
    """One line about an error that a user's own file raised while we called it; None for any other error."""
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in _files:
            what = f"{type(error).__name__}: {one_line(str(error))}"
            return f"`{_files[frame.filename]}`, line {frame.lineno}, in `{frame.name}`: {what}"
        if Path(frame.filename).is_relative_to(_PACKAGE):
            return None
    return None
