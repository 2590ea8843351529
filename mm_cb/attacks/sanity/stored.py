"""Whether a stored battery's checks are those of its own numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from mm_cb.core.errors import UserError
from mm_cb.core.reading import file_bytes
from mm_cb.core.records import Check, RecipeFields

NUMBERS = "battery.json"


def refuse_other_checks(folder: Path, recipe: RecipeFields, checks: Sequence[Check]) -> None:
    """Refuse checks that say something else than battery.json gives by the same rule.

    Rules of another version, and a battery that another version wrote in another way, are left alone.

    Raises:
        UserError: Naming the first such check.
    """
    from mm_cb.attacks.config import AttackConfig
    from mm_cb.attacks.sanity.checks import checks_of
    from mm_cb.attacks.sanity.measure import measured_from
    from mm_cb.attacks.threats import Threat

    try:
        held = json.loads(file_bytes(folder / NUMBERS))
        found = {name: measured_from(held[name]) for name in ("base", "rr") if name in held}
        config = AttackConfig(threat=Threat(levels=int(str(recipe["epsilon"]))))
        last = found.get("rr", found["base"])
        again = {one["name"]: one for one in checks_of(last, config, found["base"] if "rr" in found else None)}
    except (OSError, ValueError, TypeError, AttributeError, RuntimeError, LookupError, ArithmeticError):
        return
    for stored in checks:
        made = again.get(stored["name"])
        same_rule = made is not None and all(made[key] == stored[key] for key in ("expected", "why"))
        if made is None or not same_rule:
            continue
        for key in ("passed", "value"):
            if json.loads(json.dumps(made[key])) != stored[key]:
                raise UserError(
                    f"`{folder / 'checks.json'}` and {NUMBERS} must agree, but `{stored['name']}` has the {key} "
                    f"{stored[key]!r:.80} there and {made[key]!r:.80} by these numbers; repeat the run."
                )
