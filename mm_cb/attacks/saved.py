"""Pictures as files, each decoded once: what verdicts, distances and hashes rest on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from image_attacks import ImageFileError, png_levels, save_png
from image_attacks.image_files import read_bytes
from mm_cb.core.paths import safe_id


@dataclass(frozen=True)
class SavedPicture:
    """A picture as its file holds it.

    Attributes:
        name: Its place in the run's folder.
        image: The picture, 8-bit RGB, as the model's processor gets it.
        sha256: Of the file.
    """

    name: str
    image: Image.Image
    sha256: str

    @property
    def pixels(self) -> Tensor:
        """Float32 ``(3, H, W)`` in [0, 1]."""
        return to_pixels(self.image)

    def levels_from(self, other: SavedPicture) -> Tensor:
        """Differences to another picture in whole levels, int32 ``(3, H, W)``.

        Raises:
            ImageFileError: If the two have different sizes.
        """
        if self.image.size != other.image.size:
            raise ImageFileError(f"{self.name} has size {self.image.size}, {other.name} has {other.image.size}.")
        mine, its = (torch.from_numpy(np.array(one.image)).int() for one in (self, other))
        return (mine - its).permute(2, 0, 1)


def to_pixels(picture: Image.Image) -> Tensor:
    """An 8-bit RGB picture as float32 ``(3, H, W)`` in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def as_picture(pixels: Tensor) -> Image.Image:
    """Pixels ``(3, H, W)`` as the 8-bit picture that a file would hold."""
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def clean_name(behavior_id: str) -> str:
    """Where a behaviour's clean picture lies in a run's folder."""
    return f"images/{safe_id(behavior_id)}.clean.png"


def attacked_name(behavior_id: str, stem: str) -> str:
    """Where one of its attacked pictures lies."""
    return f"images/{safe_id(behavior_id)}/{stem}.png"


def save(folder: Path, name: str, pixels: Tensor) -> SavedPicture:
    """Write pixels ``(3, H, W)`` and read the file back."""
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    save_png(pixels, folder / name)
    return read(folder, name)


def read(folder: Path, name: str) -> SavedPicture:
    """Read a saved picture.

    Raises:
        ImageFileError: If the file is missing, or is no 8-bit RGB PNG, which is what `save` writes.
    """
    data = read_bytes(folder / name)
    return SavedPicture(name, Image.fromarray(png_levels(data, str(folder / name))), hashlib.sha256(data).hexdigest())


def images(saved: Sequence[SavedPicture]) -> list[Image.Image]:
    """The pictures themselves."""
    return [one.image for one in saved]


def by_size(pictures: Sequence[Image.Image]) -> list[list[int]]:
    """Rows of pictures that have one size: what goes through a model together."""
    sizes = [picture.size for picture in pictures]
    return [[i for i, other in enumerate(sizes) if other == size] for size in sorted(set(sizes))]
