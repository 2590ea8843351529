"""Benign requests beside the pictures of an attack run: a breaker that fires on any noisy picture shows itself here.

The clean pictures are the control, and no neutral one: they belong to forbidden requests, and may hold part of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mm_cb.benchmarks.over_refusal.data import BenignRequest
from mm_cb.core.compatibility import is_prefilled
from mm_cb.core.errors import UserError
from mm_cb.core.files import file_sha256
from mm_cb.core.folders import but_is
from mm_cb.core.records import RecipeFields
from mm_cb.core.runs import read_run
from mm_cb.metrics.holes import refuse_swapped
from mm_cb.metrics.observations import BESIDE
from mm_cb.metrics.whole import unchanged_items


@dataclass(frozen=True)
class ShownRequest:
    """One request under one condition."""

    request: BenignRequest
    picture: Path | None
    condition: str = "no_attack"
    behavior: str | None = None
    """Id of the attacked behaviour that the picture is from; None for a request as its file has it."""

    @property
    def key(self) -> str:
        """Unique within a run."""
        return self.request.id if self.behavior is None else f"{self.condition}/{self.request.id}"


@dataclass(frozen=True)
class AttackPictures:
    """The worst picture of every behaviour of an attack run, under every attack that leaves one."""

    folder: Path
    recipe: RecipeFields
    files: Mapping[str, Mapping[str, Path]]
    """Attack -> id of the behaviour -> picture; all attacks have the same behaviours, in one order."""

    @property
    def made(self) -> dict[str, object]:
        """Whom the pictures attacked, and how hard."""
        return {key: self.recipe.get(key) for key in ("subject", "epsilon", "steps")}

    def inputs(self, asked: Sequence[ShownRequest]) -> dict[str, str]:
        """Hashes of the run's items and of the pictures that are shown, by their places in the run, wherever it lies.

        Raises:
            UserError: If one cannot be read.
        """
        shown = {one.picture: None for one in asked if one.picture is not None}
        found = {}
        for file in (self.folder / "items.jsonl", *shown):
            try:
                found[f"pictures/{file.relative_to(self.folder).as_posix()}"] = file_sha256(file)
            except OSError as e:
                raise UserError(f"`{file}` must be a readable file, got: {e.strerror}.") from e
        return found


def read_attacked(folder: Path) -> AttackPictures:
    """Read a finished run of ``mm-cb attack``.

    Controls and attacks that need more than the item's own picture are left out: prefilled answers, embeddings, a
    universal picture, and records that repeat another attack's.

    Raises:
        UserError: If it is no such run, a record is not as that command writes it, a picture lies outside the run's
            folder, an attack lacks some behaviours' pictures, or there is no picture at all.
    """
    run = read_run(folder)
    if run["command"] != "attack" or not run.get("ended"):
        raise UserError(f"`--beside` must be a finished run of `mm-cb attack`, `{folder}` is none{but_is(folder)}.")
    root = Path(os.path.abspath(folder))
    behaviors: dict[str, str] = {}
    files: dict[str, dict[str, Path]] = {}
    items = unchanged_items(root, run)
    refuse_swapped(root, items)
    for number, item in enumerate(items, start=1):
        where = f"{folder / 'items.jsonl'}:{number}"
        behaviors.setdefault(item["id"], item["subject"])
        image = item.get("image")
        if image is not None and not (is_prefilled(item) or "part" in item or item.get("same_as")):
            files.setdefault(item["condition"], {})[item["id"]] = _inside(root, image, where)
    if not files:
        raise UserError(
            f"`{folder}` must hold pictures to ask beside, each made for its own behaviour and sent without a "
            "prefilled answer; it holds none."
        )
    for attack, found in files.items():
        if lacking := [id for id in behaviors if id not in found]:
            raise UserError(
                f"`{folder}` must hold a picture of every behaviour under {attack}, there is none for `{lacking[0]}`; "
                "finish or repeat that run."
            )
    ordered = {attack: {id: found[id] for id in behaviors} for attack, found in files.items()}
    return AttackPictures(root, {**run["recipe"], "subject": next(iter(behaviors.values()))}, ordered)


def _inside(root: Path, name: str, where: str) -> Path:
    """A picture of the run: the file itself and what it may be a link to lie in the run's folder."""
    if "\0" in name:
        raise UserError(f"{where}: `image` must be a path, got {name!r}.")
    picture = Path(os.path.normpath(root / name))
    if not (picture.is_relative_to(root) and picture.resolve().is_relative_to(root.resolve())):
        raise UserError(f"{where}: `image` must lie inside the folder of the run, got {name!r}.")
    return picture


def beside(requests: Sequence[BenignRequest], attacked: AttackPictures) -> list[ShownRequest]:
    """Every request beside one picture of every attack.

    Request i goes with behaviour i modulo their number, under every attack with the same one, so that attacks, like
    models, are compared item by item.

    Args:
        requests: Without pictures of their own.
        attacked: The pictures.
    """
    return [
        ShownRequest(request, found[id], f"{BESIDE}{attack}", id)
        for attack, found in attacked.files.items()
        for request, id in zip(requests, _in_turn(list(found), len(requests)), strict=True)
    ]


def _in_turn(ids: Sequence[str], count: int) -> list[str]:
    return [ids[i % len(ids)] for i in range(count)]
