"""Where things lie: the run that a path is inside, and what a run was given, when one of them has been moved."""

import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

from mm_cb.core.embedded import embedded
from mm_cb.core.errors import UserError
from mm_cb.core.files import file_sha256

RUN = "run.json"
_LEVELS_ABOVE = 4
"""Folders above a run's own that are searched for what it names."""
written_here: set[str] = set()
"""Run directories that this process writes, by their real paths: runs that it puts inside them are parts of them."""


def enclosing_run(path: Path) -> Path | None:
    """The nearest run directory above a path, which need not be there; None if it lies in none."""
    real = Path(os.path.realpath(path))
    return next((folder for folder in real.parents if _is_run(folder)), None)


def refuse_inside_run(out: Path) -> None:
    """Refuse a folder inside another run, unless this process writes that run too.

    Raises:
        UserError: Naming that run: what is not its own would no longer fit what it says of itself.
    """
    outer = enclosing_run(out)
    if outer is not None and str(outer) not in written_here:
        raise UserError(
            f"`--out` must lie outside of other runs, but `{out}` is inside the run `{outer}`, which holds its own "
            "files alone; give another path, such as a folder beside it."
        )


def refuse_inside_weights(out: Path, inputs: Iterable[str | Path]) -> None:
    """Refuse a path inside a folder of weights that the same command reads: a model, an adapter, a probe.

    Args:
        out: What is to be written.
        inputs: What is read; a name on the hub or a folder that holds no such thing does not matter.

    Raises:
        UserError: Naming that folder.
    """
    real = Path(os.path.realpath(out))
    for one in inputs:
        folder = Path(os.path.realpath(one))
        holds = any((folder / name).is_file() for name in ("config.json", "adapter_config.json", "probe.json"))
        if embedded(one) is None and folder in real.parents and holds:
            raise UserError(
                f"`--out` must lie outside of what is read, but `{out}` is inside `{one}`; give another path, such as "
                "a folder beside it."
            )


def _is_run(folder: Path) -> bool:
    if not os.path.isfile(folder / RUN):
        return False
    try:
        content = json.loads((folder / RUN).read_bytes())
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"command", "recipe"} <= content.keys()


def found_again(run: Path, name: str, inputs: Mapping[str, str], remedy: str) -> str:
    """Where a model or an adapter that a run.json names lies now: there, or beside the run, by the content it had.

    Args:
        run: The run's folder.
        name: What run.json holds: an embedded model, a hub id, a folder.
        inputs: Of run.json: the hashes of what the run read.
        remedy: What to do if it is not found, for the error line: ``"give `--adapter`"``.

    Raises:
        UserError: If it is nowhere.
    """
    if embedded(name) is not None or f"models/{name}" in inputs:
        return name
    hashes = {digest for key, digest in inputs.items() if key.endswith(".safetensors")}
    places = [Path(name), *_beside(run, name)]
    there = [place for place in places if place.is_dir()]
    found = next((place for place in there if not hashes or _weights_are(place, hashes)), None)
    if found is not None:
        return str(found)
    if not there and len(PurePath(name).parts) == 2 and not PurePath(name).is_absolute() and not hashes:
        return name  # of an older run: a hub id, perhaps
    what = "holds other weights than it had" if there else "is neither there nor beside the run"
    raise UserError(f"`{name}`, which `{run / RUN}` names, {what}; {remedy}.")


def may_be(place: str, name: str, inputs: Mapping[str, str]) -> bool:
    """Whether a given model or adapter may be the one that a run names: not where it is known to hold other weights."""
    hashes = {digest for key, digest in inputs.items() if key.endswith(".safetensors")}
    known = bool(hashes) and f"models/{name}" not in inputs and Path(place).is_dir()
    return not known or _weights_are(Path(place), hashes)


def _beside(run: Path, name: str) -> Iterator[Path]:
    """Places where a path may lie after a move: its end, longest first, below the run's folder and those above it."""
    real = Path(os.path.realpath(run))
    parts = [part for part in PurePath(name).parts if part not in ("..", ".", os.sep)]
    for above in (real, *real.parents[:_LEVELS_ABOVE]):
        yield from (above.joinpath(*parts[start:]) for start in range(len(parts)))


def _weights_are(folder: Path, hashes: set[str]) -> bool:
    files = sorted(folder.glob("*.safetensors"))
    return bool(files) and all(file_sha256(file) in hashes for file in files)


def same_inputs(held: Mapping[str, str], given: Mapping[str, str]) -> bool:
    """Whether two runs read the same: files of one name and content, whatever folders they lie in."""
    one, other = (Counter((PurePath(key).name, digest) for key, digest in each.items()) for each in (held, given))
    return one == other


def same_place(held: Any, given: Any, inputs: Mapping[str, str]) -> bool:
    """Whether two values of a recipe are one, or name one thing that has been moved: by its content, else by its name.

    Args:
        held: In run.json.
        given: Today.
        inputs: Hashes of what is read today, which is what the run read.
    """
    if held == given:
        return True
    if isinstance(held, list) and isinstance(given, list):
        pairs = zip(held, given, strict=False)
        return len(held) == len(given) and all(same_place(one, other, inputs) for one, other in pairs)
    if isinstance(held, dict) and isinstance(given, dict):
        return held.keys() == given.keys() and all(same_place(held[key], given[key], inputs) for key in held)
    if not (isinstance(held, str) and isinstance(given, str)) or embedded(held) or embedded(given):
        return False
    hashes = set(inputs.values())
    if os.path.isfile(given):
        return file_sha256(Path(given)) in hashes
    if not os.path.isdir(given):
        return False
    if any(Path(given).glob("*.safetensors")):
        return _weights_are(Path(given), hashes)
    return not os.path.exists(held) and PurePath(held).name == PurePath(os.path.abspath(given)).name
