"""How far every numeric setting may go, and why no further: one table for flags, recipes and Python."""

import operator
from dataclasses import dataclass
from typing import Any

from mm_cb.core.errors import UserError


class OutOfRange(UserError, ValueError):
    """A number that cannot stand where it is."""


@dataclass(frozen=True)
class Limit:
    """What a setting may be."""

    least: float
    most: float
    why: str
    """Why no more than `most`."""
    whole: bool = True
    above: bool = False
    """`least` itself cannot stand there."""

    @property
    def range(self) -> str:
        """``1 to 1,000``, ``above 0 up to 10``."""
        return f"{'above ' if self.above else ''}{self.least:,g} {'up ' if self.above else ''}to {_most(self)}"

    @property
    def text(self) -> str:
        """``whole number from 1 to 1,000``."""
        return f"{'whole number' if self.whole else 'number'} {'' if self.above else 'from '}{self.range}"

    def holds(self, value: Any) -> bool:
        """Whether a value is a number that can stand there; what is true or false is none."""
        value = plain(value)
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        fits = self.least < value if self.above else self.least <= value
        return fits and value <= self.most and (not self.whole or value == int(value))

    def number(self, name: str, value: Any) -> Any:
        """A value that can stand there, as Python's own int or float.

        Raises:
            OutOfRange: Saying what can, and why no more.
        """
        found = plain(value)
        if not self.holds(found) or (self.whole and not isinstance(found, int)):
            raise self._fault(name, _shown(value))
        return found

    def _fault(self, name: str, got: str) -> OutOfRange:
        return OutOfRange(f"`{name}` must be a {self.text} ({self.why}), got {got}.")

    def read(self, name: str, text: Any) -> int | float:
        """A number from what stands behind a flag.

        Raises:
            OutOfRange: If it is none that can stand there.
        """
        value: Any = text
        if isinstance(text, str):
            try:
                plain = text.strip().isascii() and "_" not in text  # Python reads ``1_0`` and digits of any script
                value = text if not plain else int(text) if self.whole else float(text)
            except ValueError:  # also of more digits than Python reads
                value = text
        if isinstance(value, str):
            raise self._fault(name, _cut(value))
        found: int | float = self.number(name, value)
        return found


def plain(value: Any) -> Any:
    """A number of any library (numpy's, a tensor of one) as Python's own; what is none, or true or false, as it is."""
    kind = str(getattr(value, "dtype", "number"))
    if isinstance(value, str | bytes | bool) or not any(name in kind for name in ("int", "float", "number")):
        return value
    for read in (operator.index, float):
        try:
            return read(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            continue
    return value


def settle(settings: object, name: str, limit: Limit) -> None:
    """Hold a field of a frozen dataclass to its limit, and keep it as Python's own number."""
    object.__setattr__(settings, name, limit.number(name, getattr(settings, name)))


def _most(limit: Limit) -> str:
    return f"{int(limit.most):,}" if limit.most == int(limit.most) else f"{limit.most:g}"


def _shown(value: Any) -> str:
    """A value of Python; of one that is no plain number, its type too: ``2`` and ``"2"`` look alike."""
    if value is None or type(value) in (bool, float):
        return str(value)
    if type(value) is not int:
        return f"{_cut(repr(value))} ({type(value).__name__})"
    try:
        return _cut(str(value))
    except ValueError:  # an integer of thousands of digits
        return "a larger one"


def _cut(text: str) -> str:
    return text if len(text) <= 40 else f"{text[:37]}..."


_MEMORY = "more at once fits in no memory"
_PASSES = "each costs a pass through the model"
_FLOAT = "beyond it nothing but this term is left in float32"
_DAY = "a day"
LIMITS = {
    "seed": Limit(0, 2**32 - 1, "random generators take 32 bits"),
    "steps": Limit(1, 100_000, "published searches end below 10,000; use --restarts for more tries"),
    "restarts": Limit(1, 1_000, "each is a whole search of every behaviour"),
    "batch": Limit(1, 4_096, _MEMORY),
    "max_new_tokens": Limit(1, 131_072, "no model answers at greater length"),
    "term_weight": Limit(0, 1e6, _FLOAT, whole=False),
    "iterates": Limit(0, 10_000, "each is judged for every behaviour"),
    "samples": Limit(0, 10_000, "each is one more answer to every picture"),
    "temperature": Limit(0.001, 100, "beyond them answers are the greedy one, or even draws of words", whole=False),
    "universal_train": Limit(0, 1_000_000, "no file holds more behaviours"),
    "draws": Limit(1, 100_000, "published runs end at 10,000, and each leaves a file"),
    "strength": Limit(0, 1, "beyond it nothing is left of a picture or a text", whole=False),
    "minibatch": Limit(0, 65_536, _MEMORY),
    "surrogate_scale": Limit(0, 100, "beyond it nothing is left of the model", whole=False),
    "eot_samples": Limit(1, 1_000, _PASSES),
    "eot_scale": Limit(0.01, 1, "1 leaves a picture as it is", whole=False),
    "eot_quality": Limit(0, 100, "JPEG has no better one"),
    "candidates": Limit(1, 65_536, _MEMORY),
    "control": Limit(0, 1_000_000, "no file holds more behaviours"),
    "check_convergence": Limit(0, 1_000_000, "no file holds more behaviours"),
    "checkpoint_seconds": Limit(0, 86_400, _DAY, whole=False),
    "patch_size": Limit(1, 16_384, "no picture is wider"),
    "border_width": Limit(1, 8_192, "no picture has room for more"),
    "epsilon": Limit(0, 30_000, "no two pictures are further apart", whole=False, above=True),
    "count": Limit(1, 4_096, _MEMORY),
    "rr_seeds": Limit(1, 9, "each trains and attacks one more breaker"),
    "limit": Limit(1, 10_000_000, "no data set is larger; leave it out to ask all"),
    "judge_runs": Limit(1, 1_000, "each asks for every judgement again"),
    "judge_temperature": Limit(0, 100, "above it answers are drawn evenly from all words", whole=False),
    "attempts": Limit(1, 1_000, "each asks for every unusable answer again"),
    "max_tokens": Limit(1, 131_072, "no model answers at greater length"),
    "generator_temperature": Limit(0, 100, "above it answers are drawn evenly from all words", whole=False),
    "concurrency": Limit(1, 4_096, "no server takes more requests at once"),
    "timeout": Limit(0, 86_400, _DAY, whole=False, above=True),
    "retries": Limit(0, 1_000, "pauses between them grow to a minute"),
    "layer": Limit(1, 9_999, "no model has more layers"),
    "block": Limit(0, 9_999, "no model has more layers"),
    "adversary_steps": Limit(0, 1_000, _PASSES),
    "radius": Limit(0, 1e6, _FLOAT, whole=False, above=True),
    "alpha": Limit(0, 1e6, _FLOAT, whole=False, above=True),
    "keep_length": Limit(0, 1e6, _FLOAT, whole=False),
    "loss_setting": Limit(0, 1e6, _FLOAT, whole=False),
    "r": Limit(1, 16_384, "no layer is wider"),
    "lora_alpha": Limit(1, 1_000_000, _FLOAT),
    "weight": Limit(0, 10_000, "so often would every row come in one pass", whole=False, above=True),
    "rows": Limit(2, 1_000_000_000, "no data set is larger"),
    "max_steps": Limit(1, 1_000_000, "the paper takes 150; longer runs are several recipes"),
    "schedule_steps": Limit(1, 1_000_000, "over more steps the loss weights hardly change in any run"),
    "every": Limit(1, 1_000_000, "no run has more steps"),
    "batch_size": Limit(1, 65_536, _MEMORY),
    "micro_batches": Limit(1, 65_536, "no batch has more rows to split"),
    "tokens_per_pass": Limit(1, 10_000_000, _MEMORY),
    "max_length": Limit(1, 10_000_000, "no model reads more"),
    "learning_rate": Limit(0, 10, "AdamW moves every weight by so much in a step", whole=False, above=True),
    "weight_decay": Limit(0, 10, "AdamW takes so many times the learning rate off every weight", whole=False),
    "max_grad_norm": Limit(0, 1e6, "no gradient that is finite in training is longer", whole=False),
    "start_distance": Limit(0, 1, "beyond it states no longer start near the base's", whole=False),
    "false_positives": Limit(0, 1, "there are no more than all", whole=False),
    "workers": Limit(0, 1_000, "no machine has cores for more"),
    "held_out": Limit(0, 1_000_000, "each is measured again and again"),
}
"""By the setting's name, in all commands alike."""
