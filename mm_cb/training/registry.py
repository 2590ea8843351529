"""The losses by name: what ``circuit_breaker.loss`` can be, with settings, source and what goes with it."""

import inspect
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from mm_cb.core.errors import unknown
from mm_cb.core.limits import LIMITS
from mm_cb.core.user_code import entry_of, refuse_taken
from mm_cb.training.contrast import repbend_loss, triplet_loss
from mm_cb.training.losses import cosine_to_draw, rand_c_loss, rand_p_loss, reroute_loss, rmu_loss


@dataclass(frozen=True)
class Setting:
    """A number that a loss takes by keyword.

    Attributes:
        default: Where the recipe says nothing.
        about: One line: unit and the paper's value.
        above: What it must be larger than.
    """

    default: float
    about: str
    above: float = 0.0


@dataclass(frozen=True)
class Hold:
    """A measure of held-out rows that says whether a loss took hold.

    Attributes:
        measure: ``cosine``, or the loss's own.
        below: What it must be below; None for no bound.
        above: What it must not be below; None for no bound.
    """

    measure: str
    below: float | None = None
    above: float | None = None

    def holds(self, value: float) -> bool:
        """Whether a value lies within the bounds; what is not finite does not."""
        return (self.below is None or value < self.below) and (self.above is None or value >= self.above)

    @property
    def expected(self) -> str:
        """The bound in words."""
        return f"less than {self.below:g}" if self.below is not None else f"{self.above:g} or more"


@dataclass(frozen=True)
class LossEntry:
    """One value of ``circuit_breaker.loss``.

    Attributes:
        name: What the recipe calls it.
        function: ``(adapted, reference, mask, *, count, **settings)`` -> scalar, see `mm_cb.training.losses`. Values of
            tokens are summed and divided by layers times ``count``, so that the parts of a step add up.
        about: One line for lists and model cards.
        source: Where it is from, and each deviation from there.
        took_hold: What the log shows where it worked, in one line.
        settings: Numbers that ``circuit_breaker.loss_settings`` can set, by keyword of the function.
        random: Whether ``function`` takes a ``generator``: seeded anew by run and ``step``, or by the ``run`` alone.
        with_length: Whether `length_loss` (``keep_length``) can stand beside it.
        with_adversary: Whether the adversary, which turns states back to the reference, undoes what it does.
        among_tokens: Whether it compares tokens with each other: what a step is split into then changes it.
        measure: ``(name, function)``: a value of every layer and token, ``(adapted [, generator]) -> (L, N)``, whose
            mean over held-out rows is logged beside cosine and norms.
        hold: Where held-out circuit-breaker rows must be at the end; a run that ends elsewhere is told to be stuck.
    """

    name: str
    function: Callable[..., Tensor]
    about: str
    source: str
    took_hold: str
    settings: Mapping[str, Setting] = field(default_factory=dict)
    random: Literal["step", "run"] | None = None
    with_length: bool = False
    with_adversary: bool = False
    among_tokens: bool = False
    measure: tuple[str, Callable[..., Tensor]] | None = None
    hold: Hold = Hold("cosine", below=0.9)

    def draw(self, seed: int, step: int) -> dict[str, torch.Generator]:
        """The keyword ``generator`` of one step, if the loss takes one: the same in every part, process and resumption.

        Args:
            seed: The run's.
            step: Finished optimiser steps.
        """
        if self.random is None:
            return {}
        text = f"{self.name} {seed}" + (f" {step}" if self.random == "step" else "")
        return {"generator": torch.Generator().manual_seed(zlib.crc32(text.encode()))}  # hash() would differ


def loss_names() -> list[str]:
    """All names, the paper's own loss first."""
    return list(_LOSSES)


def loss_entry(name: str) -> LossEntry:
    """The entry of a name.

    Raises:
        UserError: If there is none; names the nearest one.
    """
    if name not in _LOSSES:
        raise unknown("loss", name, _LOSSES)
    return _LOSSES[name]


def chosen_loss(text: str) -> LossEntry:
    """The entry of a name, or of a Python file that registers one: the file is run.

    Raises:
        UserError: If there is none, or the file fails.
    """
    return entry_of(text, "loss", _LOSSES)


def register_loss(entry: LossEntry) -> None:
    """Make a loss known under its name; one of yours that has it already is replaced.

    Raises:
        TypeError: If its function does not take what it will be given.
        UserError: If its name is that of one that comes with the package.
    """
    refuse_taken(entry.name, "loss", _SHIPPED)
    given: dict[str, object] = {"count": None, **{name: one.default for name, one in entry.settings.items()}}
    given |= {"generator": None} if entry.random else {}
    try:
        inspect.signature(entry.function).bind(None, None, None, **given)
    except TypeError as error:
        keywords = ", ".join(f"{name}=..." for name in given)
        raise TypeError(
            f"the function of loss `{entry.name}` must take (adapted, reference, mask, {keywords}): {error}."
        ) from error
    _LOSSES[entry.name] = entry


def full_settings(name: str, given: Mapping[str, Any]) -> dict[str, float]:
    """All settings of a loss, its defaults where nothing is given.

    Raises:
        UserError: If the loss has no such setting; names the nearest one.
        ValueError: If one is no number or too small.
    """
    known = loss_entry(name).settings
    for key, value in given.items():
        if key not in known:
            raise unknown(f"setting of loss `{name}`", key, known)
        replace(LIMITS["loss_setting"], least=known[key].above, above=True).number(f"{key}` of loss `{name}", value)
    return {key: float(given.get(key, one.default)) for key, one in known.items()}


def check_combination(name: str, *, keep_length: float, adversary_steps: int) -> None:
    """Make sure that what stands beside a loss goes with it.

    Raises:
        ValueError: Naming what does not, and the losses it does go with.
    """
    entry = loss_entry(name)
    for option, on, fits in (
        ("keep_length", keep_length, "with_length"),
        ("adversary.steps", adversary_steps, "with_adversary"),
    ):
        if on and not getattr(entry, fits):
            others = ", ".join(f"`{other}`" for other, one in _LOSSES.items() if getattr(one, fits))
            raise ValueError(f"`{option}` must be 0 with the loss `{name}`, it goes with {others} only; got {on!r}")


_PAPER = "Zou et al. 2024 (arXiv:2406.04313)"
_RAND = f"{_PAPER}, Table 8. The distribution of r is not stated there: uniform in"
_SHARED = "drawn for each step and target layer and shared by all tokens, is ours."
_LOSSES: dict[str, LossEntry] = {}
_SHIPPED: list[str] = []
for _entry in (
    LossEntry(
        "rr",
        reroute_loss,
        "representation rerouting: mean ReLU(cos(h, h_base)), the paper's method",
        f"{_PAPER}, Algorithm 1. Deviation: none.",
        "held-out circuit-breaker cosine falls towards 0",
        with_length=True,
        with_adversary=True,
    ),
    LossEntry(
        "rand_p",
        rand_p_loss,
        "mean distance of h/|h| to a random direction of positive entries, another one each step (RandP)",
        f"{_RAND} [0, 1), {_SHARED}",
        "held-out circuit-breaker cosine falls, cosine_to_draw rises towards 0.87",
        random="step",
        with_length=True,
        with_adversary=True,
        measure=("cosine_to_draw", cosine_to_draw),
        hold=Hold("cosine_to_draw", above=0.5),
    ),
    LossEntry(
        "rand_c",
        rand_c_loss,
        "mean distance of h/|h| to a random direction centred at 0, another one each step (RandC)",
        f"{_RAND} [-1/2, 1/2), {_SHARED} It did not converge there.",
        "held-out circuit-breaker cosine falls; cosine_to_draw stays near 0, no direction is near to all draws",
        random="step",
        with_length=True,
        with_adversary=True,
        measure=("cosine_to_draw", partial(cosine_to_draw, centred=True)),
    ),
    LossEntry(
        "rmu",
        rmu_loss,
        "mean distance of h to one fixed random state of length `scale` (RMU)",
        f"{_PAPER}, Table 8. Deviation from RMU (Li et al. 2024, arXiv:2403.03218): the length of the difference in "
        "place of its mean square; r is uniform in [0, 1) and of length 1, as there.",
        "held-out circuit-breaker norm goes to `scale`, cosine_to_draw towards 1",
        settings={
            "scale": Setting(
                20.0,
                "Length of the state to go to, in that of hidden states (paper: not stated; RMU: 6.5 for a 7B).",
            )
        },
        random="run",
        measure=("cosine_to_draw", cosine_to_draw),
        hold=Hold("cosine_to_draw", above=0.5),
    ),
    LossEntry(
        "triplet",
        triplet_loss,
        "mean ReLU(d(h, mean h) - d(h, h_base) + margin), d = 1 - cos (the harmful triplet of Simko et al.)",
        "Simko et al. 2025 (arXiv:2506.11938), read in a re-implementation. Deviations: the retain loss stands for the "
        "benign triplet and the KL term; the mean is over the tokens of one pass.",
        "held-out circuit-breaker cosine falls below 0",
        settings={"margin": Setting(3.0, "How much nearer the mean must be (published: 3); above 2 never enough.")},
        with_length=True,
        with_adversary=True,
        among_tokens=True,
    ),
    LossEntry(
        "repbend",
        repbend_loss,
        "mean of -away * |h - h_base| + alike * (1 - cosine between tokens) (RepBend); without a lower bound",
        "RepBend (arXiv:2504.01550), its terms on unsafe rows. Deviations: the retain loss stands for the distance and "
        "the KL term on safe rows; cosines are between the tokens of one pass.",
        "held-out circuit-breaker cosine falls, the norm rises for as long as training goes on",
        settings={
            "away": Setting(0.5, "Weight of the distance to the reference (published: 0.5)."),
            "alike": Setting(0.1, "Weight of 1 - cosine between tokens (published: 0.1)."),
        },
        with_adversary=True,
        among_tokens=True,
    ),
):
    register_loss(_entry)
_SHIPPED.extend(_LOSSES)
