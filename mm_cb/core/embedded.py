"""Embedded models: what comes along with a model that lies inside the package, under a name of its own.

A guest registers itself here; every layer asks for what stands behind a name, and knows no guest.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mm_cb.core.reading import file_bytes


@dataclass(frozen=True)
class Embedded:
    """A model inside the package, and what only it has."""

    name: str
    weights: Path
    """Its folder, as transformers saved it."""
    judge: str
    """The name of its exact judge in `mm_cb.judges`."""
    training_examples: Callable[[int], Sequence[Any]]
    """Seed → the training examples that ``data: NAME`` of a recipe stands for (`mm_cb.data.examples.Example`)."""
    recipes: Path
    """A folder of recipes for it."""
    card: Path
    """The card of its data."""
    behaviors: Path | None = None
    """Its behaviours file, which its name stands for where one is asked for."""
    canvas: tuple[int, int] | None = None
    """Height and width of the picture of behaviours that have none; None = as the model's family has it."""
    refusal: Callable[[], str] | None = None
    """How it refuses, in its own words."""
    fiction: bool = False
    """Its texts are about a made-up world, so that pages show them whatever they say."""


_EMBEDDED: dict[str, Embedded] = {}


def register(guest: Embedded) -> None:
    """Make a guest known under its name."""
    _EMBEDDED[guest.name] = guest


def embedded(name: str | Path) -> Embedded | None:
    """The guest of this name, or None: then it is a folder or a hub id."""
    return _EMBEDDED.get(str(name))


def is_fiction(name: str | Path) -> bool:
    """Whether a name stands for a model of a made-up world: a guest, or a folder that knows a guest's words alone.

    A merged breaker, a copy and a model of another family raised in that world are models of it too: they can say
    nothing else, whatever their weights are.
    """
    guest = embedded(name)
    if guest is not None:
        return guest.fiction
    words = _words(Path(name))
    return bool(words) and any(one.fiction and _words(one.weights) == words for one in guests())


def _words(folder: Path) -> frozenset[str]:
    """All that a model with a whole-word vocabulary can say, its template's tokens left out; nothing for any other."""
    try:
        content = json.loads(file_bytes(folder / "tokenizer.json", "tokenizer"))
        if content["model"]["type"] != "WordLevel":
            return frozenset()
        added = content["added_tokens"]
        special = {token["content"] for token in added if token["special"]}
        return frozenset([*content["model"]["vocab"], *(token["content"] for token in added)]) - special
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return frozenset()


def guests() -> list[Embedded]:
    """All guests, in the order of their names."""
    return [_EMBEDDED[name] for name in sorted(_EMBEDDED)]


def guest_names() -> str:
    """Their names as an error line puts them: "`a`, `b`"."""
    return ", ".join(f"`{guest.name}`" for guest in guests())
