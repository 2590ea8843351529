"""Data cards: what a public data set is, how its columns are read, where to get it, whether it is here."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from mm_cb.core.checked import made
from mm_cb.core.embedded import guests
from mm_cb.core.errors import unknown
from mm_cb.core.hub import cached
from mm_cb.core.paths import data_path
from mm_cb.core.reading import load_yaml, read_text

HOME_VARIABLE = "MM_CB_DATA"


@dataclass(frozen=True)
class Card:
    """One data set as ``data/cards/NAME.yaml`` describes it."""

    name: str
    summary: str
    licence: str
    source: str
    used_for: str = "demo"
    """``training``, ``behaviours``, ``benchmark``, or ``demo``: an embedded model's own."""
    get: str = "comes with the package"
    """What the user does to have it."""
    commands: tuple[str, ...] = ()
    """The same as a shell takes it; empty where the hub has it (see `how`)."""
    files: tuple[str, ...] = ()
    """Files or folders the user downloads, below the data home (see `data_home`)."""
    hub: str | None = None
    config: str | None = None
    split: str | None = None
    format: str | None = None
    """How rows become examples, see `mm_cb.data.formats`."""
    columns: Mapping[str, str] = field(default_factory=dict)
    published: tuple[str, ...] = ()
    """Scores that others have published of it: number, model, source, a line each."""
    scenarios: Mapping[str, str] = field(default_factory=dict)
    """The data set's own categories → the paper's seven scenarios."""
    notes: str = ""

    @property
    def how(self) -> tuple[str, ...]:
        """Commands that get it."""
        part = f" --include '*/{self.split}-*.parquet'" if self.used_for == "training" else ""
        of_hub = () if self.hub is None else (f"hf download --repo-type dataset {self.hub}{part}",)
        return self.commands or of_hub


def cards() -> dict[str, Card]:
    """All cards by name, in alphabetical order."""
    paths = [*data_path("cards").glob("*.yaml"), *(guest.card for guest in guests())]
    read = [_read(read_text(path, "data card"), str(path)) for path in paths]
    return {card.name: card for card in sorted(read, key=lambda card: card.name)}


def card(name: str) -> Card:
    """One card.

    Raises:
        UserError: If there is none of that name; names the nearest one.
    """
    known = cards()
    if name not in known:
        raise unknown("data set", name, known)
    return known[name]


def data_home() -> Path:
    """Where downloaded data sets are looked for: ``$MM_CB_DATA``, or the folder ``datasets`` below the current one."""
    return Path(os.environ.get(HOME_VARIABLE) or "datasets")


def local_file(card: Card, file: str) -> Path | None:
    """A file of a data set in the data home, in the data set's own folder there or beside the others; None = absent."""
    home = data_home()
    for path in (home / card.name / file, home / file, home / card.name / Path(file).name):
        if os.path.exists(path):  # False, not an error, for a name that no system takes
            return path
    return None


def hub_files(card: Card) -> list[Path]:
    """The files of the data set's split that the hub's local cache holds."""
    if card.hub is None:
        return []
    return [file for p in (f"*/{card.split}-*.parquet", "metadata.csv") for file in cached(card.hub, p, kind="dataset")]


def whereabouts(card: Card) -> tuple[bool, str]:
    """Whether a data set is on this machine, and where, or what is missing."""
    if card.used_for == "demo":
        return True, f"in the package: {data_path(card.name)}"
    if found := hub_files(card):
        return True, f"in the hub's cache ({len(found)} files of {card.hub}, {card.split})"
    saved = data_home() / card.name
    if card.hub is not None and os.path.isdir(saved):  # a name that is too long for a file is none
        return True, str(saved)
    absent = [file for file in card.files if local_file(card, file) is None]
    if card.files and not absent:
        return True, str(local_file(card, card.files[0]))
    return False, f"{', '.join(absent) or card.hub or card.name} not found; {card.get}"


@cache
def _read(text: str, path: str) -> Card:
    """One card file; a fault in it is ours, or of whoever edited the packaged data."""
    content: Any = load_yaml(text, path)
    if isinstance(content, dict) and isinstance(content.get("files"), dict):
        content = {key: value for key, value in content.items() if key != "files"}  # an embedded model's, described
    return made(content, Card, f"the data card `{path}`")
