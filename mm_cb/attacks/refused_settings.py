"""What attacks cannot be set to: what none of them reads, and what does not go together.

Imports nothing heavy.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence

from mm_cb.attacks.config import OWN, AttackConfig
from mm_cb.attacks.entry import AttackEntry
from mm_cb.attacks.registry import attack_entry, attacks
from mm_cb.core.errors import UserError

_OFF = {"control": 0, "anneal": "none", "term_weight": 0, "eot_quality": 0, "eot_scale": 1, "strength": 0}
"""What says that something is not done, and is so whatever the attack."""


def refuse_idle(config: AttackConfig, names: Sequence[str]) -> None:
    """Refuse settings that none of the named attacks reads: a run must not state what it did not do.

    Raises:
        UserError: If there is one, or a setting is missing that an attack cannot do without.
    """
    entries = [attack_entry(name) for name in names]
    own_term = any(entry.aimed for entry in entries)
    drawn = any(entry.changes_picture for entry in entries)
    stepping = any(entry.optimises for entry in entries)
    plain, asked = AttackConfig(), ",".join(names)
    for key, flag, read, needed in (
        *((key, f"--{key.replace('_', '-')}", *_own(key, entries)) for key in OWN),
        (
            "balance",
            "--balance",
            own_term,
            "an attack with a term beside the target's loss (one that needs an adapter or a probe)",
        ),
        ("term_weight", "--term-weight", own_term, "an attack with such a term (one that needs an adapter or a probe)"),
        (
            *("optimizer", "--optimizer"),
            any(e.search in ("pgd", "embedding") and e.optimizer is None for e in entries),
            "an attack by PGD that brings none of its own",
        ),
        ("anneal", "--anneal", any(e.can_anneal for e in entries), "an attack by PGD on pixels"),
        ("hijacks", "--hijacks", any(e.forces_response for e in entries), "an attack that forces a long response"),
        ("prompts", "--prompts", any(e.imported for e in entries), "`--attack imported`"),
        ("chain", "--chain", sum(e.searches_pixels for e in entries) > 1, "two or more attacks that step on pixels"),
        ("check_convergence", "--check-convergence", any(e.optimises for e in entries), "an attack that steps"),
        ("control", "--control", any(e.forces_response for e in entries), "an attack that is given a text"),
        ("iterates", "--iterates", drawn, "an attack that steps on pixels, or its placebo"),
        ("early_stop", "--early-stop", any(e.searches_pixels for e in entries), "an attack that steps on pixels"),
        ("samples", "--samples", any(not e.relaxation for e in entries), "an attack that leaves a picture"),
    ):
        if not read and getattr(config, key) not in (getattr(plain, key), _OFF.get(key)):
            raise UserError(f"`{flag}` is for {needed}; `--attack {asked}` does not read it: leave it out.")
    if config.corpus is None and any("corpus" in entry.reads for entry in entries):
        raise UserError("`--attack universal_corpus` needs `--corpus FILE`, the texts that its picture is made for.")
    if config.threat.norm != "linf" and not drawn:
        raise UserError(f"`--norm` is for an attack that changes a picture; `--attack {asked}` does not read it.")
    said = {
        "--steps": config.steps != plain.steps and not (stepping or (drawn and config.iterates)),
        "--restarts": config.restarts != plain.restarts and not (stepping or drawn),
        "--epsilon": config.threat != plain.threat and not drawn,
        "--temperature": config.temperature != plain.temperature and not config.samples,
    }
    if idle := [flag for flag, is_idle in said.items() if is_idle]:
        without = " without `--samples`" if idle == ["--temperature"] else ""
        warnings.warn(f"`--attack {asked}` does not read {' and '.join(idle)}{without}: nothing changes.", stacklevel=2)


def _own(key: str, entries: Sequence[AttackEntry]) -> tuple[bool, str]:
    """Whether one of the attacks reads a setting that few do, and which do."""
    readers = [f"`--attack {entry.name}`" for entry in attacks() if key in entry.reads]
    return any(key in entry.reads for entry in entries), " or ".join(readers) + " alone"


def refuse_mismatch(config: AttackConfig, names: Sequence[str]) -> None:
    """Refuse a norm beside an attack or a way to step that does not go with it, and what leaves an attack undone.

    Raises:
        UserError: Saying what to change.
    """
    entries, norm = [attack_entry(name) for name in names], config.threat.norm
    if config.iterates > config.steps and any(entry.changes_picture for entry in entries):
        raise UserError(
            f"`--iterates` must be at most `--steps`, of whose pictures they are: got {config.iterates} of "
            f"{config.steps} steps."
        )
    if config.threat.levels == 0 and any(entry.searches_pixels for entry in entries):
        raise UserError(
            "`--epsilon` must be at least 1/255 for an attack that steps on pixels: at 0/255 no picture changes. Give "
            "`--attack no_attack` for answers to the clean pictures."
        )
    if config.strength == 0 and any("strength" in entry.reads for entry in entries):
        raise UserError("`--strength` must be above 0 for `best_of_n`: at 0 all its draws are one and the same.")
    still = config.eot_scale == 1 and not config.eot_quality and norm != "patch"
    if still and any("eot_scale" in entry.reads for entry in entries):
        raise UserError(
            "`pgd_eot` must transform the picture, or it is `pgd`: give `--eot-scale` below 1, `--eot-quality` from 1, "
            "or `--norm patch`."
        )
    if config.prompts is None and any(entry.imported for entry in entries):
        raise UserError("`--attack imported` needs `--prompts FILE`: the chats to send, see docs/formats.md.")
    if norm != "linf" and any(entry.relaxation for entry in entries):
        raise UserError(f"`--norm {norm}` is for pictures, and `embedding` makes none: give it a run of its own.")
    if (
        norm == "l2"
        and config.optimizer == "adam"
        and any(entry.search == "pgd" and entry.optimizer is None for entry in entries)
    ):
        raise UserError("`--norm l2`: Adam steps value by value, which suits no l-2 ball; add `--optimizer momentum`.")
