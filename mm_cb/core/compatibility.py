"""What earlier versions wrote, as today's code reads it: the one place that knows."""

from collections.abc import Mapping

from mm_cb.core.embedded import is_fiction
from mm_cb.core.records import Item, RecipeFields

_NEVER_IN_WORST_CASE = ("no_attack", "noise", "prefill_only", "prefill", "embedding", "universal")
"""Revision 714213b: conditions of ``compliance`` that were left out of ``worst_case``."""
_PREFILLED = ("prefill_only", "prefill")
"""Revision 714213b: conditions whose answers were generated behind their target."""

_GIVEN = {
    "nothing": ("no_attack", "noise", "typographic"),
    "supplied text": (
        *("pgd_long", "pgd_adaptive", "pgd_clean_teacher", "pgd_homotopy", "pgd_distill", "pgd_fluent", "prefill"),
    ),
}
"""Until ``given`` was written into items: what the shipped attacks were given; all others an opening."""
_KNOWS_BREAKER = ("pgd_adaptive", "pgd_clean_teacher", "pgd_homotopy", "pgd_distill", "pgd_fluent")
"""Until ``knows_breaker`` was written into items: the attacks that needed an adapter."""
SETTLED_THEN = {"pgd_homotopy": 0.7}
"""Until it was written into protocol.json: share of an attack's steps after which it was at the whole adapter."""
_MADE_ON = "from_"
"""Condition of pictures that `mm-cb attack transfer` judged, before the name of who was attacked with them."""


def counts_in_worst_case(item: Item) -> bool:
    """Whether an item's attack enters ``worst_case``: its own flag, or by its condition where it has none."""
    return in_worst_case(item["condition"], item.get("worst_case"))


def in_worst_case(condition: str, flag: float | None) -> bool:
    """The same of a measurement, whose ``in_worst_case`` says how many of its items have the flag."""
    return condition not in _NEVER_IN_WORST_CASE if flag is None else bool(flag)


def is_prefilled(item: Item) -> bool:
    """Whether an item's answer was generated behind its target: its own flag, or by its condition."""
    flag = item.get("prefilled")
    return item["condition"] in _PREFILLED if flag is None else bool(flag)


def with_attack_flags(item: Item) -> Item:
    """An item of an attack with what it was given and whether that knows the breaker, by its condition if unsaid."""
    condition = item["condition"]
    if item["metric"] != "compliance" or item.get("given") is not None:
        return item
    given = next((given for given, names in _GIVEN.items() if condition in names), "opening")
    if condition.startswith(_MADE_ON) and condition != f"{_MADE_ON}{item['subject']}":
        given = "base's pictures"
    return {**item, "given": given, "knows_breaker": condition in _KNOWS_BREAKER}


_ADDED: Mapping[str, RecipeFields] = {
    "train": {
        "circuit_breaker": {
            "loss": "rr",
            "loss_settings": {},
            "retain": "l2",
            "retain_scale": "absolute",
            "schedule_steps": None,
            "shared_openings": "rerouted",
            "answer_ends": "counted",
            "dial_from": 1.0,
        },
        "training": {
            "start_distance": 0.0,
            "stop_at_cosine": None,
            "lr_scheduler_type": "constant",
            "average_last": 0.0,
        },
    }
}
"""Fields of a command's recipe that later versions added, by section, with what earlier ones did."""


def with_added_fields(command: str, recipe: RecipeFields) -> RecipeFields:
    """A held recipe with the fields that it was written without."""
    added: dict[str, object] = {
        section: {**fields, **recipe[section]}
        for section, fields in _ADDED.get(command, {}).items()
        if isinstance(recipe.get(section), dict)
    }
    if command == "eval" and is_fiction(str(recipe.get("model"))) and not recipe.get("endpoint"):
        added["fiction"] = True
    return {**recipe, **added}
