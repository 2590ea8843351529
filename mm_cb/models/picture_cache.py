"""What an image processor made of pictures, kept in a folder: no run prepares a picture that another one has prepared.

A file holds the pictures of one chat: some families show those of a chat with several in another way.
"""

import hashlib
import json
import warnings
import zlib
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL.Image import Image
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from mm_cb.core.errors import UserError
from mm_cb.core.files import write_bytes
from mm_cb.core.provenance import package_versions
from mm_cb.models.inputs import Pictures, Shown

_BESIDE = "beside."
_PLAIN = (str, int, float, bool, list, tuple, dict, type(None))
_CODE = hashlib.sha256(b"".join(file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py")))).hexdigest()
"""Of all families, as they were when they were imported."""


class PictureCache:
    """A folder of prepared pictures, one safetensors file for the pictures of a chat.

    A file's name is the SHA-256 of the decoded pictures, of the settings of the processor and its image processor, of
    the families' code, and of the versions of the packages: another picture, setting or version is another file.
    Processes and machines may share a folder. A file that is damaged is made again. Where one cannot be written, a
    warning says so, and nothing more is kept.
    """

    def __init__(self, folder: Path) -> None:
        """Keep pictures in a folder, made when the first are kept."""
        self._folder, self._writes = folder, True

    def shown(self, model: Any, pictures: Sequence[Image], prepare: Callable[[], Shown]) -> Shown:
        """The pictures of one chat as a model takes them: those of the folder, or ``prepare``'s, which are then kept.

        Raises:
            UserError: If ``prepare`` raises it.
        """
        file = self._folder / f"{_name(model, pictures)}.safetensors"
        if (held := _read(file)) is not None:
            return held
        made = prepare()
        try:
            if self._writes:
                write_bytes(file, _bytes(made))
        except UserError as error:
            self._writes = False
            why = getattr(error.__cause__, "strerror", None) or error
            told = f"prepared pictures are no longer kept in `{self._folder}` ({why}); the run goes on without."
            warnings.warn(told, stacklevel=2)
        return made


def _name(model: Any, pictures: Sequence[Image]) -> str:
    processor, images = model.processor, model.processor.image_processor
    settings = {name: value for name, value in vars(processor).items() if isinstance(value, _PLAIN)}
    decides = [type(model), type(processor), settings, type(images), images.to_dict(), model.options]
    told = json.dumps([*decides, _CODE, package_versions()], sort_keys=True, default=str)
    digest = hashlib.sha256(told.encode())
    for picture in pictures:
        digest.update(f"{picture.mode} {picture.size}".encode())
        digest.update(picture.tobytes())
    return digest.hexdigest()


def _bytes(shown: Shown) -> bytes:
    pictures = shown.pictures
    tensors = {"pixel_values": pictures.pixel_values}
    tensors |= {_BESIDE + name: value for name, value in pictures.beside.items()}
    tensors |= {} if pictures.pixel_rows is None else {"pixel_rows": pictures.pixel_rows}
    tensors = {name: value.clone(memory_format=torch.contiguous_format) for name, value in tensors.items()}
    tokens = json.dumps(shown.tokens)
    return save(tensors, {"tokens": tokens, "checksum": _checksum(tensors, tokens)})


def _checksum(tensors: Mapping[str, Tensor], tokens: str) -> str:
    found = zlib.crc32(tokens.encode())
    for name in sorted(tensors):
        found = zlib.crc32(tensors[name].flatten().view(torch.uint8).numpy().data, found)
    return str(found)


def _read(file: Path) -> Shown | None:
    """What a file holds; None where there is none, or a damaged one."""
    try:
        with safe_open(file, "pt") as held:
            tensors = {name: held.get_tensor(name) for name in held.keys()}  # noqa: SIM118  # it is no dictionary
            tokens, checksum = (held.metadata()[name] for name in ("tokens", "checksum"))
        if checksum != _checksum(tensors, tokens):
            return None
        beside = {name.removeprefix(_BESIDE): value for name, value in tensors.items() if name.startswith(_BESIDE)}
        return Shown(Pictures(tensors["pixel_values"], beside, tensors.get("pixel_rows")), json.loads(tokens))
    except (SafetensorError, OSError, LookupError, TypeError, ValueError):
        return None
