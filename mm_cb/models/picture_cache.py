"""What an image processor made of pictures, kept in a folder: no run prepares a picture that another one has prepared.

A file holds the pictures of one chat: some families show those of a chat with several in another way.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL.Image import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mm_cb.core.files import write_bytes
from mm_cb.core.provenance import package_versions
from mm_cb.models.inputs import Pictures, Shown

_BESIDE = "beside."


class PictureCache:
    """A folder of prepared pictures, one safetensors file for the pictures of a chat.

    A file's name is the SHA-256 of the decoded pictures, of everything that the processor says of itself, and of the
    versions of the packages: another picture, another setting or another version is another file. Processes may share
    a folder. A file that cannot be read is made again.
    """

    def __init__(self, folder: Path, processor: Any, *settings: object) -> None:
        """Keep pictures in a folder.

        Args:
            folder: Made when the first are kept.
            processor: The model's.
            settings: What else decides how it shows a picture.
        """
        self._folder = folder
        images = processor.image_processor
        decides = [type(processor), processor.to_dict(), type(images), images.to_dict(), settings, package_versions()]
        self._made_by = json.dumps(decides, sort_keys=True, default=str).encode()

    def shown(self, pictures: Sequence[Image], prepare: Callable[[], Shown]) -> Shown:
        """The pictures of one chat as the model takes them: those of the folder, or ``prepare``'s, which are then kept.

        Raises:
            UserError: If they cannot be written, or ``prepare`` raises it.
        """
        file = self._folder / f"{self._name(pictures)}.safetensors"
        if (held := _read(file)) is not None:
            return held
        made = prepare()
        write_bytes(file, _bytes(made))
        return made

    def _name(self, pictures: Sequence[Image]) -> str:
        digest = hashlib.sha256(self._made_by)
        for picture in pictures:
            digest.update(f"{picture.mode} {picture.size}".encode())
            digest.update(picture.tobytes())
        return digest.hexdigest()


def _bytes(shown: Shown) -> bytes:
    pictures = shown.pictures
    tensors = {"pixel_values": pictures.pixel_values}
    tensors |= {_BESIDE + name: value for name, value in pictures.beside.items()}
    tensors |= {} if pictures.pixel_rows is None else {"pixel_rows": pictures.pixel_rows}
    return save({name: value.contiguous() for name, value in tensors.items()}, {"tokens": json.dumps(shown.tokens)})


def _read(file: Path) -> Shown | None:
    """What a file holds; None where there is none, or none that can be read."""
    try:
        with safe_open(file, "pt") as held:
            tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118  # it is no dictionary
            tokens = json.loads(held.metadata()["tokens"])
        beside = {name.removeprefix(_BESIDE): value for name, value in tensors.items() if name.startswith(_BESIDE)}
        return Shown(Pictures(tensors["pixel_values"], beside, tensors.get("pixel_rows")), tokens)
    except (SafetensorError, OSError, LookupError, TypeError, ValueError):
        return None
