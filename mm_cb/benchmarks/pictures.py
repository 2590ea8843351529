"""Pictures of benchmarks: files and stored bytes, checked before anything is asked, decoded when their turn comes."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_cb.benchmarks.base import Question
from mm_cb.core.errors import UserError
from mm_cb.core.reading import shown
from mm_cb.data.pictures import EncodedPicture, Picture, open_picture, path_inside, picture_bytes


def stored_picture(stored: Any, where: str, *, drop_alpha: bool = False) -> EncodedPicture:
    """A picture of a data set's column, decoded once so that a broken one is found before anything is asked.

    Args:
        stored: The cell.
        where: Row and column.
        drop_alpha: See `EncodedPicture`.

    Raises:
        UserError: If there are no bytes, or they cannot be shown as a picture.
    """
    data = stored.get("bytes") if isinstance(stored, dict) else stored
    if not isinstance(data, bytes) or not data:
        raise UserError(f"{where} must hold the picture's bytes, got {shown(stored)}; load or save the data set again.")
    return EncodedPicture(data, where, drop_alpha).checked()


def picture_inside(folder: Path, name: Any, where: str, *, links: bool = False) -> EncodedPicture:
    """A picture file inside a folder.

    That the file exists is looked at when its turn comes: stored answers are scored without pictures.

    Args:
        folder: Where it must lie.
        name: Relative to the folder.
        where: File and line that name it.
        links: Whether links may lead out of the folder, see `mm_cb.data.pictures.path_inside`.

    Raises:
        UserError: If there is no name, or it leads out of the folder.
    """
    if not isinstance(name, str) or not name:
        came = "null or none" if name is None else shown(name)
        raise UserError(f"{where}: `image` must be a path, got {came}; name the picture of every question.")
    try:
        return EncodedPicture(path_inside(folder, name, links=links), where)
    except ValueError as e:
        raise UserError(f"{where}: {e}.") from e


def ready(questions: Sequence[Question]) -> list[tuple[Picture, ...]]:
    """The pictures of every question, each decoded once so that a broken one is found before anything is asked.

    Raises:
        UserError: If one cannot be shown; names the row where a row names it.
    """
    known: dict[Path, EncodedPicture] = {}
    return [tuple(_ready(picture, known) for picture in question.pictures) for question in questions]


def _ready(picture: Path | Picture, known: dict[Path, EncodedPicture]) -> Picture:
    if isinstance(picture, Path):
        picture = EncodedPicture(picture)
    if not isinstance(picture, EncodedPicture):
        return open_picture(picture)
    if isinstance(picture.source, Path):
        picture = known.setdefault(picture.source, picture)
    return picture.checked()


def fingerprint(questions: Sequence[Question], *, pictures: bool = True) -> str:
    """SHA-256 over everything that is asked: a run belongs to it, wherever the questions came from.

    Args:
        questions: In order.
        pictures: Whether the pictures' content belongs to it.

    Raises:
        UserError: If a picture does not exist or cannot be read; names the row where a row names it.
    """
    digest = hashlib.sha256()
    for q in questions:
        digest.update(repr((q.id, q.prompt, q.reference, q.category, q.split)).encode("utf-8", "backslashreplace"))
        for more in (q.tools, q.opening):
            if more:
                digest.update(repr(more).encode("utf-8", "backslashreplace"))
        for picture in q.pictures if pictures else ():
            digest.update(_content(picture))
    return digest.hexdigest()


def _content(picture: Path | Picture) -> bytes:
    source, where = (picture.source, picture.where) if isinstance(picture, EncodedPicture) else (picture, "")
    if isinstance(source, bytes):
        return source
    if not isinstance(source, Path):
        return open_picture(source).tobytes()
    if not os.path.lexists(source):
        place = f"{where}: " if where else ""
        raise UserError(f"{place}picture `{source}` does not exist; get the data set's pictures.")
    return hashlib.sha256(picture_bytes(source, where)).hexdigest().encode()
