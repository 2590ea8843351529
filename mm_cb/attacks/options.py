"""The finer settings of ``mm-cb attack``, as ``key=value``; imports nothing heavy."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mm_cb.attacks.registry import ATTACKS, KINDS, Attack, Protocol
from mm_cb.attacks.threats import Threat
from mm_cb.core.errors import UserError, unknown
from mm_cb.core.settings import pairs


@dataclass(frozen=True)
class Options:
    """What ``key=value`` can set."""

    batch: int = 8
    """Behaviours attacked at once."""
    max_new_tokens: int = 32
    """Longest completion, and longest forced response behind a target."""
    matching_weight: float = 1.0
    """Weight of an adaptive attack's term beside the target's loss."""
    optimizer: str = "adam"
    """How a search by PGD steps: adam; sign, the textbook's; momentum, by the sign of accumulated gradients. In an l-2
    ball the last two go along the gradient instead of its sign."""
    threat_model: str = "linf"
    """What of a picture may change by ``--epsilon``: linf (all of it), l2:R, patch:N, border:N, blank."""
    balance: bool = False
    """Scale that term so that its gradient is as long as the target's at the clean picture."""
    iterates: int = 0
    """Further pictures judged per run: evenly spaced steps, the last one included."""
    early_stop: bool = False
    """Stop a behaviour when one of these iterates is judged harmful."""
    samples: int = 0
    """Answers drawn at random per judged picture, beside the greedy one; each is a try of its own and counts in k."""
    temperature: float = 1.0
    """Of these answers; the whole distribution is drawn from."""
    train: int = 0
    """Behaviours that `universal` makes its picture for, the first ones; the others are held out. 0 = half of them."""
    chain: bool = False
    """Start each attack from the worst picture of the ones before it."""
    hijacks: str | None = None
    """Run directory of an attack on the base: its harmful completions become the long targets."""
    image_backend: str = "pil"
    """Image processor: pil or torchvision."""
    checkpoint_seconds: float = 60.0
    """How often the state of a running optimisation is saved."""

    def protocol(self) -> Protocol:
        """How runs are stopped, judged and recorded."""
        return Protocol(
            self.iterates, self.early_stop, self.balance, True, self.checkpoint_seconds, self.samples, self.temperature
        )

    def attack(self, name: str, epsilon: int, steps: int, restarts: int, seed: int, canvas: tuple[int, int]) -> Attack:
        """One attack with these settings."""
        sizes = self.batch, self.max_new_tokens, self.matching_weight
        return Attack(
            name, epsilon, steps, restarts, seed, *sizes, canvas, self.train, self.optimizer, self.threat_model
        )

    def recipe(self) -> dict[str, Any]:
        """What decides the results: not how often the state is saved, nor settings of what is not asked for."""
        idle = {"checkpoint_seconds"} | (set() if self.samples else {"samples", "temperature"})
        idle |= set() if self.train else {"train"}
        idle |= set() if self.threat_model != "linf" else {"threat_model"}
        return {k: v for k, v in dataclasses.asdict(self).items() if k not in idle}


def refuse_idle(options: Options, names: Sequence[str]) -> None:
    """Refuse settings that none of the named attacks reads: a run must not state what it did not do.

    Raises:
        UserError: If there is one.
    """
    kinds = [KINDS[name] for name in names]
    own_term = any(kind.adaptive for kind in kinds)
    forced = any(kind.loss not in (None, "target", "universal") for kind in kinds)
    by_pgd = any(kind.search in ("pgd", "embedding") for kind in kinds)
    chained = sum(kind.searches_pixels for kind in kinds) > 1
    drawn = any(kind.searches_pixels for kind in kinds) or "noise" in names
    plain, asked = Options(), ",".join(names)
    for key, read, needed in (
        ("train", names == ["universal"], "`--attack universal` alone; every other makes a picture per behaviour"),
        ("balance", own_term, "an attack with a term beside the target's loss (those that need an adapter)"),
        ("matching_weight", own_term, "an attack with a term beside the target's loss (those that need an adapter)"),
        ("optimizer", by_pgd, "an attack that searches by PGD"),
        ("threat_model", drawn, "an attack that changes a picture"),
        ("hijacks", forced, "an attack that forces a long response, like `pgd_long`"),
        ("chain", chained, "two or more attacks that optimise a picture"),
    ):
        if getattr(options, key) != getattr(plain, key) and not read:
            raise UserError(f"`{key}` is for {needed}; `--attack {asked}` does not read it: leave it out.")


def refuse_mismatch(options: Options, names: Sequence[str], epsilon: int) -> None:
    """Refuse a threat model beside a budget or a way to step that does not go with it.

    Raises:
        UserError: Saying what to add.
    """
    threat, stated = Threat.parse(options.threat_model), f"`threat_model={options.threat_model}`"
    by_pgd = any(KINDS[name].search == "pgd" for name in names)
    if threat.whole_range and epsilon != 255:
        raise UserError(f"{stated} bounds no single value, got `--epsilon {epsilon}/255`: add `--epsilon 255/255`.")
    if threat.name != "linf" and "embedding" in names:
        raise UserError(f"{stated} is for pictures, and `embedding` makes none: give it a run of its own.")
    if threat.name == "l2" and by_pgd and options.optimizer == "adam":
        raise UserError(f"{stated}: Adam steps value by value, which suits no l-2 ball; add `optimizer=momentum`.")


def resolve(overrides: Sequence[str]) -> Options:
    """Options from ``key=value`` texts.

    Raises:
        UserError: If a text has no ``=``, a key is unknown or comes twice, or a value is not of its kind or out of
            range.
    """
    fields = {field.name: field for field in dataclasses.fields(Options)}
    found = {key: _value(key, value, type(fields[key].default)) for key, value in pairs(overrides, fields).items()}
    try:
        options = Options(**found)
        options.attack("pgd", 0, 1, 1, 0, (1, 1))
        options.protocol()
    except ValueError as error:
        raise UserError(str(error)) from error
    if "temperature" in found and not options.samples:
        raise UserError("`temperature` is that of sampled answers: set `samples` too, or leave it out.")
    if options.image_backend not in ("pil", "torchvision"):
        raise UserError(f"`image_backend` must be pil or torchvision, got `{options.image_backend}`.")
    return options


def _value(key: str, text: str, kind: type) -> Any:
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise UserError(f"`{key}` must be true or false, got `{text}`.")
        return text.lower() == "true"
    if kind in (int, float):
        try:
            return kind(text)
        except ValueError as error:
            name = "a whole number" if kind is int else "a number"
            raise UserError(f"`{key}` must be {name}, got `{text}`.") from error
    return text or None


def parse_attacks(text: str, *, adapted: bool) -> list[str]:
    """The attacks that ``--attack`` names, in order: a name, several with commas between, or ``all``.

    ``all`` are the placebo and every attack that changes a behaviour's own picture; without an adapter the ones that
    aim at it are left out.

    Raises:
        UserError: If a name is unknown, comes twice, or needs an adapter that is not there.
    """
    if text == "all":
        pictures = {n: k for n, k in KINDS.items() if not k.prefilled and not k.relaxation and k.loss != "universal"}
        return [n for n, k in pictures.items() if adapted or not k.adaptive]
    names = [name.strip() for name in text.split(",")]
    for name in names:
        if name not in KINDS:
            raise unknown("attack", name, [*ATTACKS, "all"])
        if KINDS[name].adaptive and not adapted:
            raise UserError(f"`--attack {name}` aims at what an adapter changed: give the `--adapter` to attack.")
    if "universal" in names and len(names) > 1:
        raise UserError(
            "`--attack universal` must be alone in its run: its picture is not the one that a behaviour comes with."
        )
    if len(set(names)) < len(names):
        raise UserError(f"`--attack` must name each attack once, got `{text}`.")
    return names
