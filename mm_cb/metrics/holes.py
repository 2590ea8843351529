"""What a run's folder lacks beside its numbers: files, and pictures that are gone or are not those that were judged."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from mm_cb.core.checked import read_list
from mm_cb.core.errors import UserError
from mm_cb.core.files import file_sha256
from mm_cb.core.reading import file_bytes
from mm_cb.core.records import Candidate, Curve, Item, JsonObject, Run
from mm_cb.core.runs import read_run
from mm_cb.data.pictures import file_inside, open_picture
from mm_cb.metrics.results import AGAIN

_WRITTEN = {
    "attack": ("checks.json", "curves.json", "protocol.json"),
    "attack check": ("checks.json",),
    "demo": ("checks.json", "curves.json", "representations.json"),
}
"""What a finished run of a command holds beside items and results, and beside the files that run.json names."""


def holes(folder: Path, run: Run, items: Sequence[Item]) -> list[str]:
    """One sentence about every kind of hole; empty for a whole run."""
    found = [*absent_outputs(folder, run), *absent_pictures(folder, items)]
    return [
        f"HOLE: {text} The numbers are those of the run when it was whole; its command with another "
        "`--out` makes all again."
        for text in found
    ]


def absent_outputs(folder: Path, run: Run) -> list[str]:
    """A sentence about files that the run's command wrote and that are not there."""
    written = dict.fromkeys([*_WRITTEN.get(run["command"], ()), *run.get("files", {})])
    if lacking := [name for name in written if not (folder / name).is_file()]:
        return [f"`{folder.name}` lacks {', '.join(lacking)}, which its command wrote: what they show is not here."]
    return []


def refuse_absent_outputs(folder: Path) -> None:
    """Refuse to take a run for finished of which a file is gone that its command wrote.

    Raises:
        UserError: Naming the files, and what brings them back.
    """
    for hole in absent_outputs(folder, read_run(folder)):
        raise UserError(f"{hole} {AGAIN}")


def absent_pictures(folder: Path, items: Sequence[Item]) -> list[str]:
    """A sentence each about pictures of these items that are gone, and that are other ones now."""
    found = []
    named = {name: None for item in items for name in _pictures(item)}
    if gone := [name for name in named if not file_inside(folder, name)]:
        found.append(f"{len(gone)} of {len(named)} pictures of `{folder.name}` are gone, the first `{gone[0]}`.")
    swapped = sorted({name for item in items for name in _swapped(folder, item)})
    if swapped:
        found.append(
            f"{len(swapped)} of {len(named)} pictures of `{folder.name}` are not the files that were judged, the first "
            f"`{swapped[0]}`."
        )
    return found


def refuse_swapped(folder: Path, items: Sequence[Item]) -> None:
    """Refuse to show a run's pictures to a model where one is not the file that the run judged.

    Raises:
        UserError: Naming it.
    """
    if swapped := sorted({name for item in items for name in _swapped(folder, item)}):
        raise UserError(
            f"`{folder / swapped[0]}` is not the picture that the run judged ({len(swapped)} in all); take the run's "
            "whole folder from where it was made, or repeat the run."
        )


def read_curves(path: Path) -> list[Curve]:
    """The loss curves of a run; none where there is no file.

    Raises:
        UserError: If they are damaged.
    """
    curves = read_list(path, Curve)
    for number, curve in enumerate(curves, start=1):
        if not len(curve["q25"]) == len(curve["q50"]) == len(curve["q75"]):
            raise UserError(f"`{path}`, entry {number}: `q25`, `q50` and `q75` must have one length.")
    return curves


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
        content = json.loads(file_bytes(path))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _largest_change(attacked: Path, clean: Path) -> int | None:
    """In 255ths; None where a file is no picture or the sizes differ."""
    try:
        one, other = (np.asarray(open_picture(path)) for path in (attacked, clean))
    except (OSError, ValueError):
        return None
    if one.shape != other.shape:
        return None
    return int(np.abs(one.astype(np.int16) - other.astype(np.int16)).max())
