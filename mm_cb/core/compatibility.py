"""What earlier versions wrote, as today's code reads it: the one place that knows."""

from collections.abc import Mapping
from typing import Any

from mm_cb.core.embedded import is_fiction

_NEVER_IN_WORST_CASE = ("no_attack", "noise", "prefill_only", "prefill", "embedding", "universal")
"""Revision 714213b: conditions of ``compliance`` that were left out of ``worst_case``."""
_PREFILLED = ("prefill_only", "prefill")
"""Revision 714213b: conditions whose answers were generated behind their target."""


def counts_in_worst_case(item: Mapping[str, Any]) -> bool:
    """Whether an item's attack enters ``worst_case``: its own flag, or by its condition where it has none."""
    flag = item.get("worst_case")
    return item.get("condition") not in _NEVER_IN_WORST_CASE if flag is None else bool(flag)


def is_prefilled(item: Mapping[str, Any]) -> bool:
    """Whether an item's answer was generated behind its target: its own flag, or by its condition."""
    flag = item.get("prefilled")
    return item.get("condition") in _PREFILLED if flag is None else bool(flag)


_ADDED: Mapping[str, Mapping[str, Any]] = {"train": {"circuit_breaker": {"loss": "rr", "loss_settings": {}}}}
"""Fields of a command's recipe that later versions added, by section, with what earlier ones did."""


def with_added_fields(command: str, recipe: Any) -> Any:
    """A held recipe with the fields that it was written without."""
    if not isinstance(recipe, dict):
        return recipe
    added: dict[str, Any] = {
        section: {**fields, **recipe[section]}
        for section, fields in _ADDED.get(command, {}).items()
        if isinstance(recipe.get(section), dict)
    }
    if command == "eval" and is_fiction(str(recipe.get("model"))) and not recipe.get("endpoint"):
        added["fiction"] = True
    return {**recipe, **added}
