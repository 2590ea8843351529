"""Pictures: one reader for all commands, so that a model sees the same pixels of a file whichever command shows it.

The rule is `image_attacks.as_rgb`: upright by EXIF, transparency on white, CMYK converted; what is animated, deeper
than 8 bits or damaged is refused. The one exception is MMMU, whose loaders drop transparency (`drop_alpha`).
"""

from __future__ import annotations

import errno
import os
import re
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path, PurePath
from typing import Any

from PIL import Image

from mm_cb.core import reading
from mm_cb.core.errors import UserError

_ADDRESS = re.compile(r"(?:data|file):|[a-z][a-z0-9+.-]*://", re.IGNORECASE)
_DRIVE = re.compile(r"[A-Za-z]:/")
_LINK = (
    "leads out of it by a link; put the picture itself there, or name the folder of the pictures where there is a "
    "setting for it"
)


class PictureError(UserError):
    """A picture that is missing, empty, damaged, or not to be shown as it is."""


def open_picture(picture: Path | bytes | Image.Image, where: str = "", *, drop_alpha: bool = False) -> Image.Image:
    """A picture as every model is shown it: 8-bit RGB, made by one rule whatever it comes as.

    Args:
        picture: A file, the bytes of one, or what Pillow has.
        where: File and line (or row and column) that name the picture, for messages.
        drop_alpha: Show the colours beneath transparency.

    Raises:
        PictureError: If it is missing, empty, damaged, animated, larger than an honest picture, no picture, or in a
            mode of which 8-bit RGB would be another picture than the one a user sees.
    """
    from image_attacks import as_rgb, decode_image, open_image

    with _named(picture, where):
        if isinstance(picture, PurePath):
            return open_image(picture, drop_alpha=drop_alpha)
        if isinstance(picture, bytes):
            return decode_image(picture, where or "picture", drop_alpha=drop_alpha)
        return as_rgb(picture, where or "picture", drop_alpha=drop_alpha)


def picture_bytes(picture: Path, where: str = "") -> bytes:
    """What a picture's file holds.

    Args:
        picture: The file.
        where: File and line that name it.

    Raises:
        PictureError: If it is missing, may not be read, or is no file: a pipe would be waited for.
    """
    from image_attacks.image_files import read_bytes

    with _named(picture, where):
        return read_bytes(picture)


@contextmanager
def _named(picture: object, where: str) -> Iterator[None]:
    """Errors of `image_attacks` as ours, which name the row too."""
    from image_attacks import ImageFileError

    try:
        yield
    except ImageFileError as error:
        place = f"{where}: " if where else ""
        raise PictureError(f"{place}picture {error}" if isinstance(picture, PurePath) else str(error)) from error


@dataclass(frozen=True)
class EncodedPicture:
    """A picture that is decoded anew whenever it is used: those of a benchmark would not fit into memory together.

    Attributes:
        source: Its file, or the bytes of one.
        where: File and line, or row and column, that name it.
        drop_alpha: Show the colours beneath transparency: MMMU's alone, whose loaders call ``convert("RGB")``.
    """

    source: Path | bytes
    where: str = ""
    drop_alpha: bool = False

    @cached_property
    def size(self) -> tuple[int, int]:
        """Width and height as it is shown, kept once it was decoded.

        Raises:
            PictureError: As `open_picture`.
        """
        return self.open().size

    def checked(self) -> EncodedPicture:
        """The same, decoded once now, so that a broken one is found before anything is asked.

        Raises:
            PictureError: As `open_picture`.
        """
        _ = self.size
        return self

    def open(self) -> Image.Image:
        """The picture.

        Raises:
            PictureError: As `open_picture`.
        """
        return open_picture(self.source, self.where, drop_alpha=self.drop_alpha)


Picture = Image.Image | EncodedPicture
"""What requests hold."""


def shown(picture: Picture) -> Image.Image:
    """What a model is shown of a picture.

    Raises:
        PictureError: As `open_picture`.
    """
    return picture.open() if isinstance(picture, EncodedPicture) else open_picture(picture)


def encoded(value: Any) -> bytes | Path | None:
    """What a data set's cell holds of a picture: bytes or a path, alone or as an undecoded ``datasets.Image``."""
    if isinstance(value, dict):
        value = value.get("bytes") or value.get("path")
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value) or None
    return Path(value) if isinstance(value, str | PurePath) and str(value) and not reading.unfit(str(value)) else None


def absent(path: Path) -> str | None:
    """What a path is that leads to no file, for messages; None where it leads to one."""
    try:
        return None if stat.S_ISREG(os.stat(path).st_mode) else "no file"
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return "not there"
    except OSError as error:
        return f"out of reach ({error.strerror})"


def file_inside(folder: Path, name: Any) -> Path | None:
    """The file of this name inside a folder; None where there is none, or the name leads out of it."""
    try:
        path = path_inside(folder, name)
    except ValueError:
        return None
    return path if os.path.isfile(path) else None


def leads_out(name: str) -> bool:
    """Whether a name leads out of the folder that it is relative to, wherever that is."""
    return os.path.isabs(name) or os.path.normpath(name).split(os.sep)[0] == os.pardir


def path_inside(folder: Path, name: Any, *, links: bool = False, what: str = "`image`") -> Path:
    """The path of a picture inside a folder, whether there is a file or not.

    Args:
        folder: Where it must lie.
        name: Relative to the folder.
        links: Whether links may lead out of it: where the user named the folder of the pictures. The hub's cache
            consists of links, which are followed inside it.
        what: What messages call the name.

    Raises:
        ValueError: If the name is no text, too long for a file, or leads out of the folder.
    """
    if not isinstance(name, str) or not name or reading.unfit(name):
        raise ValueError(f"{what} must be a path or null, got {reading.shown(name)}")
    root = os.path.abspath(folder)
    if (no_path := _no_path(name)) and not os.path.lexists(os.path.join(root, name)):
        raise ValueError(f"{what} must be the path of a file, got {reading.shown(name)}, {no_path}")
    path = os.path.normpath(os.path.join(root, name))
    if not f"{path}{os.sep}".startswith(os.path.join(root, "")):
        raise ValueError(f"{what} must lie inside `{folder}`, got {reading.shown(name)}")
    if not links and _has_link(root, path) and not Path(os.path.realpath(path)).is_relative_to(_real_root(Path(root))):
        raise ValueError(f"{what} must lie inside `{folder}`, but {reading.shown(name)} {_LINK}")
    try:
        os.lstat(path)
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            raise ValueError(f"{what} must be a path, got {reading.shown(name)}, too long for a file's name") from error
    return Path(path)


def _has_link(root: str, path: str) -> bool:
    """Whether a step of a path below its root is a link: one without stays inside."""
    while path != root:
        if os.path.islink(path):
            return True
        path = os.path.dirname(path)
    return False


def _no_path(name: str) -> str | None:
    """What a name is that no file has as a rule, and what to do; None for others."""
    if _ADDRESS.match(name):
        return "an address, which is not read: save the picture, and name its file"
    if "\\" in name or _DRIVE.match(name):
        return "a path as Windows writes it: give it relative, with `/`"
    return None


def _real_root(root: Path) -> Path:
    """Where a folder's files really lie; of a snapshot in the hub's cache they lie beside it, as blobs."""
    snapshots = next((parent for parent in (root, *root.parents) if parent.name == "snapshots"), None)
    cached = snapshots is not None and (snapshots.parent / "blobs").is_dir()
    return Path(os.path.realpath(snapshots.parent if cached and snapshots is not None else root))
