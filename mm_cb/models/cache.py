"""Where a model's files are: in a folder, or in the hub's cache, fetched if need be."""

import os
from pathlib import Path, PurePath
from typing import TypedDict

from mm_cb.core import hub
from mm_cb.core.checked import checked, read_json
from mm_cb.core.embedded import embedded, guests
from mm_cb.core.errors import UserError, nearest
from mm_cb.core.folders import looks_like
from mm_cb.core.paths import refuse_unusable
from mm_cb.core.reading import is_there, refuse_pipe, shown, unfit
from mm_cb.core.weights import refuse_cut

_CONFIG, _INDEX, _SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
ADAPTER, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_DESCRIPTION = ("*.json", "*.jinja", "*.txt", "*.model")
"""Everything but weights; no code, so none can run."""
_GGUF = (
    "`{}` is a GGUF file, whose weights have no gradients: give the model that it was made from, in safetensors, or "
    "write it as such once (rounded as it is; needs the `gguf` package): "
    "from_pretrained('{}', gguf_file='{}') and save_pretrained(FOLDER) of transformers, for model and tokenizer."
)


class _Index(TypedDict):
    """An index of weights, as far as it is read here."""

    weight_map: dict[str, str]
    """Tensor → file."""


def model_folder(name_or_path: str | Path, *, weights: bool = False) -> Path:
    """The folder of a model: the given one, or one of the hub's cache with its configuration and tokenizer.

    Args:
        name_or_path: An embedded model's name, a local folder, or a hub id, perhaps with ``@REVISION``.
        weights: Fetch the weights too: the safetensors that the index names, never anything else.

    Raises:
        UserError: If it is not to be had, or has no safetensors.
    """
    folder = _own_folder(name_or_path)
    refuse_unusable(folder, "model")
    _refuse_other_formats(folder)
    if folder.is_dir():
        for file in sorted(folder.iterdir()):
            if any(file.match(pattern) for pattern in (*_DESCRIPTION, "*.safetensors")):
                is_there(file, "file of a model")
            elif file.exists():
                refuse_pipe(file, "file of a model")
        if weights and not (folder / _SINGLE).is_file() and (folder / _INDEX).is_file():
            _shards(folder / _INDEX)
        return folder
    name = str(name_or_path)
    if meant := None if "/" in name else nearest(name, [guest.name for guest in guests()], cutoff=0.8):
        raise UserError(f"the model `{name}` is no folder here, did you mean `{meant}`?")
    folder = hub.fetch(name, _DESCRIPTION, flat=True)
    if weights:
        wanted = _weight_names(folder)
        hub.fetch(name, wanted, flat=True, bars=True)
        if absent := [file for file in wanted if not (folder / file).is_file()]:
            raise UserError(
                f"`{name}` must hold its weights as safetensors, it lacks {', '.join(absent[:3])}; other formats can "
                "run code when they are read, so they are refused: use a copy in safetensors (`save_pretrained`)."
            )
    return folder


def _refuse_other_formats(place: Path) -> None:
    """Refuse a file in place of a folder, and a folder whose weights are GGUF alone."""
    held = sorted(place.glob("*.gguf")) if place.is_dir() else []
    if place.suffix.lower() == ".gguf" and not place.is_dir():
        raise UserError(_GGUF.format(place, place.parent, place.name))
    if held and not any(place.glob("*.safetensors")) and not (place / _INDEX).is_file():
        raise UserError(_GGUF.format(held[0], place, held[0].name))
    if place.is_file():
        raise UserError(
            f"a model must be a folder with {_CONFIG} and safetensors, `{place}` is a file; give its folder."
        )


def model_inputs(name_or_path: str | Path) -> list[Path | hub.Repository]:
    """What a run records of a model: its local weight files, or the commit of its repository.

    Raises:
        UserError: If a hub id is not to be had.
    """
    folder = model_folder(name_or_path)
    files: list[Path | hub.Repository] = [*sorted(folder.glob("*.safetensors"))]
    return [*hub.used(str(name_or_path))] or files


def absent_files(name_or_path: str | Path) -> list[str]:
    """Files of a model that are neither in its folder nor in the hub's cache; empty if it can be loaded offline.

    Where not even the index of its weights is here, that one file stands for all of them.
    """
    found = {name: find_file(name_or_path, name) for name in (_CONFIG, _INDEX, _SINGLE)}
    absent = [] if found[_CONFIG] else [_CONFIG]
    if found[_SINGLE]:
        return absent
    index = found[_INDEX]
    if index is None:
        return [*absent, _SINGLE]
    return absent + [shard for shard in _shards(index) if find_file(name_or_path, shard) is None]


def weight_files(name_or_path: str | Path) -> list[Path]:
    """The safetensors of a model on this machine; empty unless they are all here.

    Raises:
        UserError: If one is not whole.
    """
    index = find_file(name_or_path, _INDEX)
    names = [_SINGLE] if index is None or find_file(name_or_path, _SINGLE) else _shards(index)
    found = [find_file(name_or_path, name) for name in names]
    here = [path for path in found if path is not None] if all(found) else []
    for path in here:
        refuse_cut(path)
    return here


def _own_folder(name_or_path: str | Path) -> Path:
    """The folder that a name stands for on this machine, whether it is there or not."""
    guest = embedded(name_or_path)
    return Path(name_or_path) if guest is None else guest.weights


def _weight_names(folder: Path) -> list[str]:
    """The names of a model's or an adapter's weight files, from its description."""
    if (folder / _INDEX).is_file():
        return _shards(folder / _INDEX)
    return [_ADAPTER_WEIGHTS if (folder / ADAPTER).is_file() and not (folder / _CONFIG).is_file() else _SINGLE]


def _shards(index: Path) -> list[str]:
    """The files that an index names, each a safetensors file in its folder: any other kind can run code when read.

    Raises:
        UserError: If it is damaged, or names anything else.
    """
    places = checked(read_json(index), _Index, f"`{index}`")["weight_map"]
    for name in places.values():
        if not name.endswith(".safetensors") or PurePath(name).name != name or unfit(name):
            raise UserError(f"`{index}` must name .safetensors files of its own folder, got {shown(name)}.")
    return sorted(set(places.values()))


def weights_fault(folder: Path) -> str | None:
    """What a folder's weights lack; None where nothing is missing."""
    index = folder / _INDEX
    if (folder / _SINGLE).is_file():
        return None
    if not index.is_file():
        return (
            f"it must hold its weights as {_SINGLE}, it has none{looks_like(folder / _SINGLE)}; other formats can run "
            "code when they are read, so they are refused: write them anew by `save_pretrained`."
        )
    if absent := [shard for shard in _shards(index) if not (folder / shard).is_file()]:
        alike = looks_like(folder / absent[0])
        return f"its {_INDEX} names `{absent[0]}`, which is not there ({len(absent)} such files){alike}; fetch them."
    if not isinstance(read_json(index).get("metadata"), dict):
        return f"its {_INDEX} must hold `metadata` beside `weight_map`, as `save_pretrained` writes it."
    return None


def find_file(name_or_path: str | Path, file: str) -> Path | None:
    """A model's file, in its folder or in the cache of the hub."""
    folder = _own_folder(name_or_path)
    if folder.is_dir():
        return folder / file if os.path.isfile(folder / file) else None
    return next(iter(hub.cached(str(name_or_path), file)), None)
