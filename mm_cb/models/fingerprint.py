"""Which weights an adapter was trained on: told by their content, because a folder's name says nothing of it."""

import hashlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from math import prod
from pathlib import Path

from safetensors import safe_open

from mm_cb.core.errors import UserError, one_line
from mm_cb.core.files import write_json
from mm_cb.core.reading import decode, file_bytes, loads
from mm_cb.core.records import JsonObject
from mm_cb.models.cache import weight_files

FILE = "base.json"
"""Beside an adapter: the model it was trained for, and that model's fingerprint."""

_NUMBERS = 1024
_PLACES = 8
_LAYOUT = {"model", "language_model", "vision_model", "transformer"}
"""Parts of keys that come and go with versions of transformers."""
_TIED = {"lm_head": "embedding", "embed_tokens": "embedding", "wte": "embedding"}


def fingerprint(name_or_path: str | Path) -> str:
    """SHA-256 over some rows of every weight matrix of a checkpoint; empty if its files are not on this machine.

    Of each, some 1024 numbers, or 8 rows, spread evenly from the first row to the last are read (tens of MB of a 7B
    model), as float32, with their place in the model: the folder, the shards, the layout of keys, a copy of a tied
    matrix and a dtype that holds the same numbers change nothing; training or merging a matrix, which moves all of its
    rows, does. It is a sample, made to tell models apart and not to withstand forgery: a change of a few rows between
    those that are read is not seen. Norms are left out: many trainings leave them as they were. The file is read, not
    what was loaded, so that dtype and quantisation in memory change nothing, either.
    """
    digests: set[bytes] = set()
    for file in weight_files(name_or_path):
        with safe_open(file, "pt") as tensors:
            for key in tensors.keys():  # noqa: SIM118 (it is no mapping)
                part = tensors.get_slice(key)
                shape = part.get_shape()
                if len(shape) < 2 or not key.endswith("weight"):
                    continue
                digest = hashlib.sha256(f"{place(key)} {list(shape)}".encode())
                for rows in _samples(shape):
                    digest.update(part[rows].float().numpy().tobytes())
                digests.add(digest.digest())
    return hashlib.sha256(b"".join(sorted(digests))).hexdigest() if digests else ""


def place(key: str) -> str:
    """A tensor's place in its model, whichever version of transformers wrote the key."""
    return ".".join(_TIED.get(part, part) for part in key.split(".") if part not in _LAYOUT)


def _samples(shape: Sequence[int]) -> list[slice]:
    """Slices of rows, evenly spread over a matrix, the first and the last row in them."""
    rows = min(shape[0], max(1, _NUMBERS // max(1, prod(shape[1:])) // _PLACES))
    return [slice(at, at + rows) for at in sorted({n * (shape[0] - rows) // (_PLACES - 1) for n in range(_PLACES)})]


def remember_base(adapter: Path, name: str, files: Mapping[str, str] | None = None) -> None:
    """Write down, beside an adapter, which weights it was trained on, and the hashes of its own files (by name)."""
    told = {"model": name, "fingerprint": fingerprint(name)}
    write_json(adapter / FILE, told if files is None else {**told, "files": files})


def remembered(adapter: Path) -> JsonObject:
    """What `remember_base` wrote; nothing where there is no such file, or one of somebody else's.

    Raises:
        UserError: If it is damaged: what it vouches for would pass unseen.
    """
    try:
        told = loads(decode(file_bytes(adapter / FILE)))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(
            f"`{adapter / FILE}` must be JSON that tells what the adapter was trained on, it cannot be read "
            f"({one_line(str(error))[:200]}); take the whole folder from where it was made, or delete the file to use "
            "it as an adapter of unknown origin."
        ) from error
    return told if isinstance(told, dict) else {}


def refuse_edited(file: Path, found: Callable[[], str]) -> None:
    """Refuse a file of an adapter that is not as its training wrote it; foreign and older adapters hold no hashes.

    Args:
        file: In the adapter's folder.
        found: Gives its hash.

    Raises:
        UserError: Naming the file.
    """
    files = remembered(file.parent).get("files")
    if isinstance(files, dict) and file.name in files and files[file.name] != found():
        raise UserError(
            f"`{file}` was changed after its training wrote it (its hash is another one than in {FILE} beside it); "
            f"take the whole folder from where it was made, or delete {FILE} to use it as an adapter of unknown origin."
        )


def check_weights(adapter: Path, name: str) -> None:
    """Make sure that an adapter was trained on the weights of the model that ``name`` stands for.

    An adapter that does not say (a foreign or an older one) passes with a warning.

    Raises:
        UserError: If they are others.
    """
    if not (held := remembered(adapter).get("fingerprint")):
        _cannot_tell(adapter)
    elif (here := fingerprint(name)) and here != held:
        raise UserError(
            f"the adapter in `{adapter}` was trained on other weights than those of `{name}`; give the model it was "
            f"trained for, or delete {FILE} there if it is that model in other numbers."
        )


@cache
def _cannot_tell(adapter: Path) -> None:
    """Say it once for each adapter."""
    warnings.warn(
        f"the adapter in `{adapter}` has no {FILE} that tells the weights it was trained on: whether they are those of "
        "this model cannot be checked.",
        stacklevel=2,
    )
