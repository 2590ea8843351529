"""Pictures of any common kind, in a file or in memory, turned once into the 8-bit RGB pixels that a model is shown."""

import io
import stat
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor

from .errors import ImageFileError
from .file_kinds import PICTURES, is_cut, kind_of

ACCEPTED_MODES = ("RGB", "RGBA", "RGBX", "L", "LA", "P", "PA", "1", "CMYK", "YCbCr")
"""8-bit modes; what they become in RGB is what image processors make of them too."""

LARGEST_FILE = 2**30
"""Bytes; no picture with as many pixels as Pillow allows is larger."""

_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""EXIF orientation -> what turns the picture upright."""

_GREY_STEP = {"L;2": 85, "L;4": 17}
"""Raw mode of a PNG of 2 or 4 bits -> what Pillow multiplies its levels with."""

_UNREADABLE = (
    *(OSError, ValueError, SyntaxError, EOFError, IndexError, KeyError, TypeError, OverflowError, struct.error),
    *(ZeroDivisionError, AttributeError, NotImplementedError, MemoryError),
)
"""What Pillow raises on damaged picture files, by format; some of it by accident."""

_WARNINGS = threading.Lock()
"""Filters of warnings are a whole process's: one thread at a time sets them."""


def load_image(path: str | Path) -> Tensor:
    """Read an image file as 8-bit RGB, by the rule of :func:`as_rgb`.

    Start the attack from the result, saved with :func:`~image_attacks.save_png`, so that it is converted only once.

    Args:
        path: PNG, JPEG, WebP, GIF, BMP or TIFF file, whatever its name ends with.

    Returns:
        Pixels in [0, 1], shape ``(3, H, W)``, float32: level / 255.

    Raises:
        ImageFileError: As :func:`open_image` does.
    """
    return torch.from_numpy(np.array(open_image(path))).permute(2, 0, 1).contiguous().float() / 255


def open_image(path: str | Path, *, drop_alpha: bool = False) -> Image.Image:
    """Read an image file as :func:`load_image` does, as a Pillow image in mode RGB.

    Raises:
        ImageFileError: As :func:`decode_image` does, and if the file is missing or is no file.
    """
    return decode_image(read_bytes(path), str(path), drop_alpha=drop_alpha)


def decode_image(data: bytes, name: str, *, drop_alpha: bool = False) -> Image.Image:
    """Decode the bytes of an image file, by the rule of :func:`as_rgb`.

    Args:
        data: What the file holds.
        name: What messages call it: its path, or the row and column that it is from.
        drop_alpha: As in :func:`as_rgb`.

    Raises:
        ImageFileError: If the picture is empty, truncated, too large to be honest, or not a picture; or as
            :func:`as_rgb` does.
    """
    with opened(data, name) as image:
        return as_rgb(image, name, drop_alpha=drop_alpha)


def as_rgb(image: Image.Image, name: str = "the image", *, drop_alpha: bool = False) -> Image.Image:
    """A Pillow image as 8-bit RGB pixels and nothing else; twice is the same as once.

    It is turned upright by its EXIF orientation, as transformers' ``load_image``, ``datasets`` and chats show photos;
    transparency lies on white, as for the image processors of transformers 5 (plain Pillow would drop it and show the
    colours beneath); grey, palette, CMYK and YCbCr become RGB as Pillow has it. Colour profiles are not applied.

    Args:
        image: In memory, or opened from a file and not decoded yet.
        name: What messages call it.
        drop_alpha: Show the colours beneath transparency, as loaders do that call ``convert("RGB")``.

    Raises:
        ImageFileError: If it is damaged, animated (or has several pages), or in a mode whose conversion to 8-bit RGB is
            ambiguous (16 or 32 bits, floats, LAB).
    """
    with _named(name):
        _check(image, name)
        step = _GREY_STEP.get(_raw_modes(image)[0], 1)
        image.load()  # a TIFF is turned by Pillow itself, here
        with _quiet():
            turn = _UPRIGHT.get(image.getexif().get(ExifTags.Base.Orientation, 1))
        shown = image.copy() if turn is None else image.transpose(turn)
        if step > 1 and "transparency" in shown.info:
            shown.info["transparency"] *= step
        if drop_alpha:
            shown.info.pop("transparency", None)
        rgb = shown.convert("RGB") if drop_alpha or not shown.has_transparency_data else _on_white(shown)
        rgb.info = {}  # neither an orientation nor a profile that somebody could apply again
        return rgb


def read_bytes(path: str | Path) -> bytes:
    """The bytes of an image file.

    Raises:
        ImageFileError: If it is missing, no regular file (reading a pipe would wait for ever), or too large.
    """
    try:
        status = Path(path).stat()
        if stat.S_ISREG(status.st_mode) and status.st_size <= LARGEST_FILE:
            return Path(path).read_bytes()
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise ImageFileError(f"{path}: expected an image file, but it cannot be read ({reason}).") from e
    if stat.S_ISDIR(status.st_mode):
        raise ImageFileError(f"{path}: expected an image file, but it cannot be read (Is a directory).")
    got = f"{status.st_size} bytes" if stat.S_ISREG(status.st_mode) else "a pipe or a device"
    raise ImageFileError(f"{path}: expected an image file of at most {LARGEST_FILE} bytes, got {got}.")


@contextmanager
def opened(data: bytes, name: str, formats: tuple[str, ...] = tuple(PICTURES)) -> Iterator[Image.Image]:
    """A picture whose header was read; what is wrong with it, then or in the block, becomes an error that names it.

    Raises:
        ImageFileError: As :func:`decode_image` does.
    """
    if not data:
        raise ImageFileError(f"{name}: expected an image file, got an empty one. Fetch it again.")
    with _named(name):
        try:
            with _quiet():
                image = Image.open(io.BytesIO(data), formats=formats)
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
            limit = Image.MAX_IMAGE_PIXELS
            raise ImageFileError(f"{name}: expected at most {limit} pixels; resize the image first.") from e
        except Image.UnidentifiedImageError as e:
            raise ImageFileError(
                f"{name}: expected a PNG, JPEG, WebP, GIF, BMP or TIFF image, got {kind_of(data)} ({len(data)} bytes)."
            ) from e
        with image:
            yield image
        if is_cut(data):
            raise ImageFileError(f"{name}: expected a whole image, got one without its end. Fetch it again.")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without Pillow's remarks about odd tags, which go with pictures that are shown and with such as are refused."""
    with _WARNINGS, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        yield


@contextmanager
def _named(name: str) -> Iterator[None]:
    try:
        yield
    except ImageFileError:
        raise
    except _UNREADABLE as e:
        what = str(e) or type(e).__name__
        raise ImageFileError(f"{name}: expected a whole image, got a damaged one ({what}). Fetch it again.") from e


def _on_white(image: Image.Image) -> Image.Image:
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _check(image: Image.Image, name: str) -> None:
    if not isinstance(image, Image.Image):
        raise ImageFileError(f"{name}: expected a Pillow image, got {type(image).__name__}.")
    # A JPEG of several pictures (MPO, from phones) holds one photograph, which comes first, and what belongs to it.
    frames = 1 if image.format == "MPO" else getattr(image, "n_frames", 1)
    if frames > 1:
        raise ImageFileError(
            f"{name}: expected one picture, got {frames} frames (an animation, or pages). Save the one you mean."
        )
    if not (image.width and image.height):
        raise ImageFileError(f"{name}: expected a picture, got {image.width} x {image.height} pixels.")
    sixteen = image.mode.startswith("I;16") or any(";16" in mode for mode in _raw_modes(image))
    if image.mode not in ACCEPTED_MODES or sixteen:
        got = "16 bits per channel" if sixteen else f"mode {image.mode}"
        raise ImageFileError(
            f"{name}: expected 8-bit RGB, RGBA, grey, palette or CMYK, got {got}. Convert it to 8-bit RGB with the "
            "scale that you want."
        )


def _raw_modes(image: Image.Image) -> list[str]:
    """How the file holds the levels, until it is decoded: Pillow cuts 16-bit colours to 8 without a word."""
    given = [tile[3] for tile in getattr(image, "tile", ()) if tile[3]]
    return [str(one if isinstance(one, str) else one[0]) for one in given] or [""]
