"""Images as 8-bit PNG files: the form in which an attack is delivered, judged and verified."""

import io
import os
import tempfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from .errors import ImageFileError
from .file_kinds import kind_of
from .image_files import opened, read_bytes

_TEMPORARY_SUFFIX = ".mm-cb-tmp"
"""Of a file that is being written: mm-cb takes away what a killed process left of one in a run."""
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BIT_DEPTH_OFFSET = 24
"""Position of the bit depth inside the header chunk, which a PNG always starts with."""


def to_levels(pixels: Tensor) -> Tensor:
    """Round pixels in [0, 1] to the nearest of the 256 levels, as float values 0..255.

    Raises:
        ValueError: If a value is NaN or outside [0, 1].
    """
    low, high = (bound.item() for bound in pixels.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"`pixels` must lie in [0, 1], got values from {low} to {high}.")
    return (pixels * 255).round()


def round_towards(pixels: Tensor, clean: Tensor) -> Tensor:
    """Round pixels to 8-bit levels on the side of ``clean``, so that no distance from it grows.

    For budgets that rounding to the nearest level could exceed: an l-2 ball, or an l-inf radius off the 1/255 grid.

    Args:
        pixels: Attacked image or batch, values in [0, 1].
        clean: The 8-bit image it was made from (whole levels / 255), same shape.

    Returns:
        Whole levels / 255; :func:`save_png` writes them as they are.

    Raises:
        ValueError: If ``clean`` is not 8-bit, or a value is outside [0, 1].
    """
    start = to_levels(clean)
    if not torch.equal(start / 255, clean.to(start.dtype)):
        raise ValueError("`clean` must be an 8-bit image (whole levels / 255), as `load_png` returns it.")
    low, high = (bound.item() for bound in pixels.detach().aminmax())
    if not (low >= 0 and high <= 1):
        raise ValueError(f"`pixels` must lie in [0, 1], got values from {low} to {high}.")
    # A value within float32 noise of a level is that level.
    moved = ((pixels * 255 - start) * 1024).round() / 1024
    return ((start + moved.trunc()) / 255).clamp(0, 1)


def save_png(pixels: Tensor, path: str | Path) -> None:
    """Write one image as an 8-bit RGB PNG, rounding to the nearest level; the file appears whole or not at all.

    An image inside an l-inf ball whose radius is on the 1/255 grid, around an 8-bit image, stays inside it.

    Args:
        pixels: Shape ``(3, H, W)``, values in [0, 1]; ``(1, H, W)`` is grey and becomes three equal channels.
        path: File to write or replace; its folder must exist.

    Raises:
        ValueError: If the shape is another one, a value is outside [0, 1], or the name does not end in .png.
    """
    if Path(path).suffix.lower() != ".png":
        raise ValueError(f"`path` must end in .png, which is what is written, got `{path}`.")
    if pixels.ndim != 3 or pixels.shape[0] not in (1, 3) or pixels.numel() == 0:
        raise ValueError(
            f"`pixels` must have shape (3, H, W), or (1, H, W) for grey, got {tuple(pixels.shape)}; a file holds one "
            "picture, without transparency."
        )
    levels = to_levels(pixels.detach().expand(3, -1, -1)).to(torch.uint8).permute(1, 2, 0).contiguous().cpu().numpy()
    encoded = io.BytesIO()
    Image.fromarray(levels).save(encoded, format="PNG")
    _replace(Path(path), encoded.getvalue())


def _replace(path: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:40]}.", suffix=_TEMPORARY_SUFFIX)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def load_png(path: str | Path) -> Tensor:
    """Read an 8-bit RGB PNG.

    Args:
        path: File written by :func:`save_png`, or any 8-bit RGB PNG without transparency or animation.

    Returns:
        Pixels in [0, 1], shape ``(3, H, W)``, float32: level / 255.

    Raises:
        ImageFileError: If the file is missing, empty, damaged, too large to be an honest image, or another kind of
            image.
    """
    return torch.from_numpy(_read_levels(Path(path))).permute(2, 0, 1).contiguous().float() / 255


def linf_255(a_path: str | Path, b_path: str | Path) -> int:
    """Return the largest difference between two image files, in whole 8-bit levels.

    Raises:
        ImageFileError: If a file cannot be read or the two sizes differ.
    """
    a, b = _read_levels(Path(a_path)), _read_levels(Path(b_path))
    if a.shape != b.shape:
        raise ImageFileError(
            f"{a_path} and {b_path}: expected images of one size, got {a.shape[1]}x{a.shape[0]} and "
            f"{b.shape[1]}x{b.shape[0]}."
        )
    return int(np.abs(a.astype(np.int16) - b.astype(np.int16)).max())


def _read_levels(path: Path) -> np.ndarray:
    return png_levels(read_bytes(path), str(path))


def png_levels(data: bytes, name: str) -> np.ndarray:
    """The levels that an 8-bit RGB PNG holds, exactly, as uint8 of shape ``(H, W, 3)``.

    Args:
        data: What the file holds.
        name: What messages call it.

    Raises:
        ImageFileError: As :func:`load_png` does.
    """
    if not data.startswith(_SIGNATURE):
        raise ImageFileError(f"{name}: expected a PNG file, whatever its name says, got {kind_of(data)}.")
    with opened(data, name, ("PNG",)) as image:
        _check_kind(image, data, name)
        return np.array(image)


def _check_kind(image: Image.Image, data: bytes, name: str) -> None:
    """Refuse whatever reading as RGB would silently change: it would not be the image that was attacked."""
    kinds = {
        f"mode {image.mode}": image.mode != "RGB",
        f"{data[_BIT_DEPTH_OFFSET]} bits per channel": data[_BIT_DEPTH_OFFSET] != 8,
        "transparency": "transparency" in image.info,
        "animation": getattr(image, "n_frames", 1) > 1,
    }
    found = [kind for kind, present in kinds.items() if present]
    if found:
        raise ImageFileError(
            f"{name}: expected an 8-bit RGB PNG, got {', '.join(found)}. Convert it to RGB before the attack."
        )
