"""An attack's configuration in files: written into run.json and the JSON beside a picture, and read from the former.

Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Required, TypedDict

from mm_cb.attacks.config import DTYPES, OWN, AttackConfig
from mm_cb.attacks.registry import attack_entry
from mm_cb.attacks.threats import Threat
from mm_cb.core.checked import checked
from mm_cb.core.errors import UserError
from mm_cb.core.folders import but_is
from mm_cb.core.records import JsonObject, RecipeFields, Run

_RENAMED = {"term_weight": "matching_weight", "universal_train": "train"}
"""Field → its name in run.json and in a picture's JSON."""
_OPTIONS = (
    *("batch", "max_new_tokens", "term_weight", "optimizer", "balance", "iterates", "early_stop", "samples"),
    *("temperature", "universal_train", "chain", "hijacks", "image_backend", "prompts", "prompts_each"),
)
_RUN_WIDE = (
    *("hijacks", "chain", "image_backend", "anneal", "checkpoint_seconds", "corpus", "surrogate"),
    *("prompts", "prompts_each"),
)
"""What the JSON beside a picture leaves to run.json."""
_BUDGET = (*("steps", "restarts", "seed", "batch", "max_new_tokens", "term_weight", "universal_train", "optimizer"),)
_PROTOCOL = ("iterates", "early_stop", "balance", "artefacts", "samples", "temperature")


def as_recipe(config: AttackConfig, names: Sequence[str]) -> dict[str, object]:
    """What run.json holds of it: all that decides the results, without settings of what was not asked for."""
    idle = set() if config.samples else {"samples", "temperature"}
    idle |= set() if config.universal_train else {"universal_train"}
    idle |= set() if config.prompts else {"prompts", "prompts_each"}
    options = {_RENAMED.get(key, key): getattr(config, key) for key in _OPTIONS if key not in idle}
    if config.anneal is not None:
        options["anneal"] = config.anneal
    options["hijacks"] = _plain(config.hijacks)
    options |= {} if config.prompts is None else {"prompts": _plain(config.prompts)}
    read = {key for name in names for key in attack_entry(name).reads}
    options |= {key: _plain(getattr(config, key)) for key in _told(config, read)}
    if config.threat.text != "linf":
        options["threat_model"] = config.threat.text
    dialled = {one.name: one.annealing for one in config.named(names) if one.annealing != "none"}
    return {
        **({"annealing": dialled} if dialled else {}),  # as the table had it then: a run goes on as it was begun
        "attack": ",".join(names),
        "epsilon": config.threat.levels,
        "steps": config.steps,
        "restarts": config.restarts,
        "options": options,
    }


def _told(config: AttackConfig, read: Collection[str]) -> list[str]:
    """Which settings of single attacks files hold: those that are read or set; of all texts at once nothing is said."""
    own = [key for key in OWN if key not in _RENAMED]  # which stand under their old names in any case
    changed = {key for key in own if getattr(config, key) != getattr(AttackConfig, key)}
    return [key for key in own if key in changed or (key in read and key != "minibatch")]


def _plain(value: object) -> object:
    """A setting as JSON holds it."""
    return str(value) if isinstance(value, Path) else value


def from_recipe(recipe: RecipeFields | AttackRecipe, seed: int) -> dict[str, AttackConfig]:
    """The attacks that a run.json states, by name.

    Raises:
        UserError: If it is not as `as_recipe` writes it.
    """
    stated = checked(recipe, _AttackSettings, "the recipe of run.json")
    options = {"steps": stated["steps"], "restarts": stated["restarts"], "seed": seed, **stated.get("options", {})}
    config = _stated(options, stated["epsilon"])
    return {one.name: one for one in config.named(stated["attack"].split(","))}


def as_artefact(config: AttackConfig, canvas: Sequence[int]) -> dict[str, dict[str, object]]:
    """What the JSON beside a picture holds of it: ``attack`` and ``protocol``."""
    attack: dict[str, object] = {"name": config.name, "epsilon": config.threat.levels}
    attack |= {_RENAMED.get(key, key): getattr(config, key) for key in _BUDGET}
    own = [key for key in _told(config, config.entry.reads) if key not in _RUN_WIDE]
    attack |= {key: getattr(config, key) for key in own}
    attack |= {"canvas": list(canvas), "threat_model": config.threat.text}
    protocol: dict[str, object] = {key: getattr(config, key) for key in _PROTOCOL}
    if config.annealing != "none":
        protocol["anneal"] = config.annealing
    return {"attack": attack, "protocol": protocol}


def read_recipe(run: Run, folder: Path) -> AttackRecipe:
    """The recipe of a run of ``mm-cb attack``.

    Raises:
        UserError: If the run is of another command, or its recipe is not as that one writes it.
    """
    if run["command"] != "attack":
        raise UserError(f"`{folder}` must be a run of `mm-cb attack`{but_is(folder)}.")
    recipe = checked(run["recipe"], AttackRecipe, f"`{folder / 'run.json'}`: the recipe")
    if recipe.get("dtype", "float32") not in DTYPES:
        raise UserError(f"`{folder / 'run.json'}`: `dtype` must be one of {', '.join(DTYPES)}, got {recipe['dtype']}.")
    return recipe


class _AttackSettings(TypedDict, total=False):
    """How a run attacked."""

    attack: Required[str]
    epsilon: Required[int]
    steps: Required[int]
    restarts: Required[int]
    annealing: dict[str, str]
    """Attack → how it dialled the adapter up, where it did."""
    options: JsonObject


class AttackRecipe(_AttackSettings, total=False):
    """The same, and whom."""

    model: Required[str]
    adapter: Required[str | None]
    system: Required[str | None]
    base: str
    device: str
    dtype: str
    fiction: bool
    shard: str


class _Options(TypedDict, total=False):
    """What else may be stated of an attack; numbers are checked by `AttackConfig`."""

    name: str
    threat_model: str
    optimizer: str
    anneal: str
    balance: bool
    early_stop: bool
    chain: bool
    artefacts: bool
    hijacks: str | None
    prompts: str
    image_backend: str
    vary: str
    corpus: str | None
    surrogate: str | None


def _stated(options: Mapping[str, object], levels: int) -> AttackConfig:
    fields = {new: old for old, new in _RENAMED.items()}
    told = checked(options, _Options, "what run.json says of an attack")
    held: JsonObject = {fields.get(key, key): value for key, value in told.items()}
    text = held.pop("threat_model", None)
    held |= {key: Path(held[key]) for key in ("hijacks", "prompts", "corpus", "surrogate") if held.get(key) is not None}
    if strange := held.keys() - {field.name for field in dataclasses.fields(AttackConfig)}:
        raise UserError(f"run.json must state an attack of this version, it has the unknown setting `{min(strange)}`.")
    try:
        return AttackConfig(threat=Threat.read(text, levels), **held)
    except ValueError as error:
        raise UserError(f"run.json states an attack that cannot be: {error}") from error
