"""Weight files looked at before they are read: whole, or what was fetched in their place."""

import json
import os
from pathlib import Path

from mm_cb.core.errors import UserError
from mm_cb.core.reading import LFS_POINTER, refuse_pipe

_PAGE = 4096
_LONGEST = 100_000_000
"""Bytes of a header, by safetensors' own limit."""


def refuse_cut(file: Path) -> None:
    """Refuse a safetensors file that is empty, cut off, or a pointer to where it lies; its tensors are not read.

    What is no safetensors file at all is left to whoever reads it.

    Raises:
        UserError: Saying how to get it whole.
    """
    refuse_pipe(file, "weight file")
    size = file.stat().st_size
    with open(file, "rb") as opened:
        head = opened.read(len(LFS_POINTER))
        if head == LFS_POINTER:
            raise UserError(f"`{file}` is a Git LFS pointer, not the weights: fetch them by `git lfs pull`.")
        length = int.from_bytes(head[:8], "little")
        opened.seek(8)
        header = opened.read(length) if length <= _LONGEST else b""
    if not size:
        raise UserError(f"`{file}` must be a whole safetensors file, it is empty; download it again.")
    if length > _LONGEST:
        return
    try:
        ends = [one["data_offsets"][1] for key, one in json.loads(header).items() if key != "__metadata__"]
        expected = 8 + length + max(ends, default=0)
    except (ValueError, TypeError, LookupError, AttributeError):
        expected = 8 + length + 1 if 8 + length > size else size
    if size < expected:
        raise UserError(
            f"`{file}` must be a whole safetensors file, it has {size:,} bytes of {expected:,} or more; download it "
            "again."
        )


def zeros_at_end(file: Path) -> str:
    """How many bytes of a file, from its end, are zeros, in words; nothing where they are fewer than a page."""
    with file.open("rb") as opened:
        opened.seek(-min(_PAGE, file.stat().st_size), os.SEEK_END)
        last = opened.read()
    if len(last) < _PAGE or any(last):  # so it is as a rule, and the rest is not read
        return ""
    content = file.read_bytes()
    return f"{len(content) - len(content.rstrip(bytes(1))):,} bytes of zeros"
