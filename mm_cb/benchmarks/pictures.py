"""Pictures of benchmarks: files and stored bytes, checked before anything is asked, decoded when their turn comes."""

from __future__ import annotations

import hashlib
import io
import os
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image

from image_attacks.image_files import UNREADABLE
from mm_cb.benchmarks.base import Question
from mm_cb.core.errors import UserError
from mm_cb.core.files import file_sha256
from mm_cb.core.reading import shown, unfit
from mm_cb.data.behaviors_file import open_picture
from mm_cb.inference.generation import Picture


@dataclass(frozen=True)
class FilePicture:
    """A picture file that is decoded when its turn comes."""

    path: Path
    size: tuple[int, int]

    def convert(self, mode: str) -> Image.Image:
        """The decoded picture."""
        return open_picture(self.path).convert(mode)


@dataclass(frozen=True)
class StoredPicture:
    """An encoded picture, decoded anew whenever it is used."""

    data: bytes
    size: tuple[int, int]
    """Width and height."""
    where: str

    def convert(self, mode: str) -> Image.Image:
        """The decoded picture; transparency is dropped, not laid on white.

        Raises:
            UserError: If its data are damaged.

        Source:
            lmms-eval's MMMU task, and the processor of LLaVA-1.5 behind the official runner, convert to RGB alike. The
            processors of transformers 5 lay transparent pictures on white; attacks follow those (`open_picture`).
        """
        try:
            with Image.open(io.BytesIO(self.data)) as picture:
                return picture.convert(mode)
        except UNREADABLE as e:
            raise UserError(f"{self.where} cannot be decoded: {e}.") from e


def file_picture(path: Path) -> FilePicture:
    """A picture file, opened once so that a broken one is found before anything is asked.

    Raises:
        UserError: If it cannot be read.
    """
    return FilePicture(path, open_picture(path).size)


def stored_picture(stored: Any, where: str) -> StoredPicture:
    """A picture of a data set's column, its header and checksums checked without decoding it.

    Raises:
        UserError: If there are no bytes, or they are no picture.
    """
    data = stored.get("bytes") if isinstance(stored, dict) else None
    if not isinstance(data, bytes) or not data:
        raise UserError(f"{where} must hold the picture's bytes, they are missing; load or save the data set again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data)) as picture:
                size = picture.size
                picture.verify()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise UserError(f"{where} has too many pixels; make it smaller.") from e
    except UNREADABLE as e:
        raise UserError(f"{where} is no readable picture ({len(data)} bytes); get the data set again.") from e
    return StoredPicture(data, size, where)


def picture_inside(folder: Path, name: Any, where: str) -> Path:
    """The path of a picture inside a folder; links are not followed, the hub's cache consists of them.

    That the file exists is looked at when its turn comes: stored answers are scored without pictures.

    Raises:
        UserError: If the name leads out of the folder.
    """
    if not isinstance(name, str) or not name or unfit(name):
        raise UserError(f"{where}: `image` must be a path, got {shown(name)}.")
    root = Path(os.path.abspath(folder))
    path = Path(os.path.normpath(root / name))
    if not path.is_relative_to(root):
        raise UserError(f"{where}: `image` must lie inside `{folder}`, got {shown(name)}.")
    return path


def opened(questions: Iterable[Question]) -> dict[Path, FilePicture]:
    """Every picture file of the questions, opened once."""
    files = {picture: None for question in questions for picture in question.pictures if isinstance(picture, Path)}
    return {path: file_picture(path) for path in files}


def fingerprint(questions: Sequence[Question], *, pictures: bool = True) -> str:
    """SHA-256 over everything that is asked: a run belongs to it, wherever the questions came from.

    Args:
        questions: In order.
        pictures: Whether the pictures' content belongs to it.

    Raises:
        UserError: If a picture does not exist.
    """
    digest = hashlib.sha256()
    for q in questions:
        digest.update(repr((q.id, q.prompt, q.reference, q.category, q.split)).encode("utf-8", "backslashreplace"))
        for picture in q.pictures if pictures else ():
            digest.update(_digest(picture) if isinstance(picture, Path) else _content(picture))
    return digest.hexdigest()


def _content(picture: Picture) -> bytes:
    return picture.data if isinstance(picture, StoredPicture) else picture.convert("RGB").tobytes()


def _digest(picture: Path) -> bytes:
    try:
        return file_sha256(picture).encode()
    except OSError as e:
        raise UserError(f"picture `{picture}` does not exist; get the data set's pictures.") from e
