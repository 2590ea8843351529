"""What a run's folder lacks beside its numbers: files, and pictures that are gone or are not those that were judged."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mm_cb.core.files import file_sha256
from mm_cb.core.records import Candidate, Item, JsonObject, Run
from mm_cb.data.pictures import file_inside

_WRITTEN = {"attack": ("checks.json", "curves.json"), "demo": ("checks.json", "curves.json", "representations.json")}
"""What a finished run of a command holds beside items and results."""


def holes(folder: Path, run: Run, items: Sequence[Item]) -> list[str]:
    """One sentence about every kind of hole; empty for a whole run."""
    found = []
    if lacking := [name for name in _WRITTEN.get(run["command"], ()) if not (folder / name).is_file()]:
        found.append(
            f"`{folder.name}` lacks {', '.join(lacking)}, which its command wrote: what they show is not here."
        )
    named = {name: None for item in items for name in _pictures(item)}
    gone = [name for name in named if not file_inside(folder, name)]
    if gone:
        found.append(f"{len(gone)} of {len(named)} pictures of `{folder.name}` are gone, the first `{gone[0]}`.")
    swapped = sorted({name for item in items for name in _swapped(folder, item)})
    if swapped:
        found.append(
            f"{len(swapped)} of {len(named)} pictures of `{folder.name}` are not the files that were judged, the first "
            f"`{swapped[0]}`."
        )
    return [f"HOLE: {text} The numbers are those of the run when it was whole." for text in found]


def _pictures(item: Item) -> Iterable[str]:
    named = (item.get("image"), item.get("clean_image"), *(one.get("image") for one in _candidates(item)))
    return [name for name in named if isinstance(name, str)]


def _candidates(item: Item) -> Sequence[Candidate]:
    return item.get("candidates") or ()


def _swapped(folder: Path, item: Item) -> Iterable[str]:
    """Pictures of an item with another hash than the JSON beside them, or another change than the item, states."""
    for one in _candidates(item) or (item,):
        name, clean = one.get("image"), item.get("clean_image")
        if not (
            isinstance(name, str)
            and isinstance(clean, str)
            and file_inside(folder, name)
            and file_inside(folder, clean)
        ):
            continue
        told = _json(folder / Path(name).with_suffix(".json"))
        if told:
            pairs = ((name, told.get("sha256")), (clean, told.get("clean_sha256")))
            yield from (file for file, digest in pairs if digest and file_sha256(folder / file) != digest)
        elif isinstance(one.get("epsilon"), int) and _largest_change(folder / name, folder / clean) != one["epsilon"]:
            yield name


def _json(path: Path) -> JsonObject:
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _largest_change(attacked: Path, clean: Path) -> int | None:
    """In 255ths; None where a file is no picture or the sizes differ."""
    from mm_cb.report.gallery import read_picture

    one, other = (read_picture(path.parent, path.name) for path in (attacked, clean))
    if one is None or other is None or one.shape != other.shape:
        return None
    return int(np.abs(one.astype(np.int16) - other.astype(np.int16)).max())
