"""Image files of any common kind, turned once into the 8-bit RGB pixels that an attack starts from."""

import io
import struct
import warnings
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from .png import ImageFileError

ACCEPTED_MODES = ("RGB", "RGBA", "L", "LA", "P", "PA", "1")
"""8-bit modes; what they become in RGB is what image processors make of them too."""


UNREADABLE = (OSError, ValueError, SyntaxError, EOFError, IndexError, struct.error, NotImplementedError, MemoryError)
"""What Pillow raises on damaged picture files, by format."""


def load_image(path: str | Path) -> Tensor:
    """Read an image file as 8-bit RGB.

    Grey, palette and transparent images are converted as image processors of transformers 5 do (transparency lies on
    white; plain Pillow would drop it and show the colours beneath), and turned upright by their EXIF orientation, as
    transformers' ``load_image`` and chats show photos from a phone. Start the attack from the result, saved with
    :func:`~image_attacks.save_png`, so that it is converted only once.

    Args:
        path: PNG, JPEG, WebP, GIF, BMP or TIFF file.

    Returns:
        Pixels in [0, 1], shape ``(3, H, W)``, float32: level / 255.

    Raises:
        ImageFileError: As :func:`open_image` does.
    """
    return torch.from_numpy(np.array(open_image(path))).permute(2, 0, 1).contiguous().float() / 255


def open_image(path: str | Path) -> Image.Image:
    """Read an image file as :func:`load_image` does, as a Pillow image in mode RGB.

    Raises:
        ImageFileError: If the file is missing, empty, truncated, too large to be an honest image, animated, or in a
            mode whose conversion to 8-bit RGB is ambiguous (CMYK, 16 bits, floats).
    """
    path = Path(path)
    try:
        data = path.read_bytes()
    except (OSError, ValueError) as e:
        reason = e.strerror if isinstance(e, OSError) else e
        raise ImageFileError(f"{path}: expected an image file, but it cannot be read ({reason}).") from e
    if not data:
        raise ImageFileError(f"{path}: expected an image file, got an empty one. Fetch it again.")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(io.BytesIO(data), formats=["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"]) as image:
                _check(image, path)
                return on_white(ImageOps.exif_transpose(image))
    except ImageFileError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
        raise ImageFileError(
            f"{path}: expected at most {Image.MAX_IMAGE_PIXELS} pixels, got more; make the image smaller first."
        ) from e
    except Image.UnidentifiedImageError as e:
        raise ImageFileError(
            f"{path}: expected a PNG, JPEG, WebP, GIF, BMP or TIFF image, got something else or a damaged header."
        ) from e
    except (*UNREADABLE, TypeError) as e:  # the last one on damaged EXIF data
        raise ImageFileError(f"{path}: expected a whole image, got a damaged one ({e}). Fetch it again.") from e


def on_white(image: Image.Image) -> Image.Image:
    """An opened picture as RGB, its transparency blended onto white: the rule of transformers 5's image processors."""
    if "A" not in image.getbands() and image.info.get("transparency") is None:
        return image.convert("RGB")
    white = Image.new("RGBA", image.size, (255, 255, 255, 255))
    return Image.alpha_composite(white, image.convert("RGBA")).convert("RGB")


def _check(image: Image.Image, path: Path) -> None:
    frames = getattr(image, "n_frames", 1)
    if frames > 1:
        raise ImageFileError(f"{path}: expected one picture, got {frames} frames. Save the one you mean.")
    if image.mode not in ACCEPTED_MODES or _sixteen_bits(image):
        got = "16 bits per channel" if _sixteen_bits(image) else f"mode {image.mode}"
        raise ImageFileError(
            f"{path}: expected 8-bit RGB, RGBA, grey or palette, got {got}. Convert it to 8-bit RGB with the colour "
            "management you want."
        )


def _sixteen_bits(image: Image.Image) -> bool:
    """Tell whether the file holds 16-bit channels, which Pillow cuts to 8 without a word for RGB."""
    tiles = getattr(image, "tile", ())
    raw = [tile[3] if isinstance(tile[3], str) else tile[3][0] for tile in tiles if tile[3]]
    return image.mode.startswith("I;16") or any(";16" in str(mode) for mode in raw)
