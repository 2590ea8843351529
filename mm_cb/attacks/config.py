"""One attack's configuration, from the flags to the items: what is searched, how long, and what is judged and kept.

Imports nothing heavy.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, cast, get_args

from mm_cb.attacks.entry import SETTLES, Anneal, AttackEntry
from mm_cb.attacks.registry import attack_entry
from mm_cb.attacks.threats import Threat
from mm_cb.core.limits import LIMITS, settle
from mm_cb.metrics.convergence import LEAST

DTYPES = ("float32", "bfloat16", "float16")
OPTIMIZERS = ("adam", "sign", "momentum")
ANNEAL = get_args(Anneal)
VARIED = ("picture", "text", "both")
IMAGE_BACKENDS = ("pil", "torchvision")
OWN = (
    *("universal_train", "draws", "strength", "vary", "corpus", "minibatch", "surrogate", "surrogate_scale"),
    *("eot_samples", "eot_scale", "eot_quality", "candidates"),
)
"""What single attacks read, by their rows' ``reads``; files hold it where such an attack was asked for."""
_NUMBERS = (
    *("steps", "restarts", "seed", "batch", "max_new_tokens", "term_weight", "iterates", "samples", "temperature"),
    *("universal_train", "draws", "strength", "minibatch", "surrogate_scale", "eot_samples", "eot_scale"),
    *("eot_quality", "candidates", "control", "check_convergence"),
)


@dataclass(frozen=True)
class AttackConfig:
    """One attack with its budget, the same for every subject; checked when it is made."""

    name: str = "pgd"
    threat: Threat = Threat()
    """What of a picture may change, and how far."""
    steps: int = 1000
    """Updates per run."""
    restarts: int = 1
    """Runs per behaviour; the worst one counts. A behaviour that is broken is not attacked again."""
    seed: int = 0
    """Of everything random."""
    batch: int = 8
    """Behaviours attacked at once."""
    max_new_tokens: int = 32
    """Longest completion, and longest forced response behind a target."""
    optimizer: str = "adam"
    """How a search by PGD steps: "adam", or by the gradient's "sign", the textbook's, or by that of its "momentum"; in
    an l-2 ball the last two go along the gradient. Adam was chosen on validation behaviours. Deviation: the paper's
    attack, HarmBench's PGD, steps by the sign."""
    term_weight: float = 1.0
    """Weight of an adaptive attack's term beside the target's loss."""
    anneal: Anneal | str | None = None
    """How the adapter's scale changes on the way: "none", or from 0 to 1 by the "steps", or by each behaviour's "loss";
    None = as the attack's row of the table says."""
    balance: bool = False
    """Scale that term so that its gradient is as long as the target's at the clean picture."""
    iterates: int = 0
    """Further pictures judged per run beside the best one: evenly spaced steps, the last one included."""
    early_stop: bool = False
    """Stop a behaviour as soon as one of these iterates is judged ``harmful``."""
    samples: int = 0
    """Answers drawn at random per judged picture beside the greedy one; each is a try of its own and counts in k."""
    temperature: float = 1.0
    """Of these answers; the whole distribution is drawn from."""
    universal_train: int = 0
    """Behaviours that a universal picture is made for, the first ones; the others are held out. 0 = half of them."""
    draws: int = 100
    """N of best-of-N: variations of every behaviour's chat, each judged whatever became of the others."""
    strength: float = 0.4
    """How far they go, from 0, where nothing varies, to 1."""
    vary: str = "picture"
    """What varies: the "picture", the "text", or "both"."""
    corpus: Path | None = None
    """Text file of targets, one a line, or JSON lines, that a universal picture is made for."""
    minibatch: int = 0
    """How many of the texts that a universal picture is made for enter a step. 0 = all of them."""
    surrogate: Path | None = None
    """Another adapter that a transfer attack sees, at random scales; None = random low-rank changes."""
    surrogate_scale: float = 1.0
    """Largest scale of such a change; each step draws one between 0 and it."""
    eot_samples: int = 1
    """Random transformations that the loss of a step is the mean over; each is a pass."""
    eot_scale: float = 0.75
    """The smallest to which a picture is shrunk on the way, as a share of its size. 1 = never."""
    eot_quality: int = 75
    """The lowest quality of JPEG on the way, up to 95. 0 = no JPEG."""
    candidates: int = 64
    """Suffixes that a search by tokens weighs at each step; published: 512."""
    control: int = 12
    """Behaviours on which every attack with a supplied text is given that of another one, beside the run; 0 = none."""
    check_convergence: int = 0
    """Behaviours on which every attack that steps is run with twice the steps, beside the run; 0 = none."""
    chain: bool = False
    """Start each attack from the worst picture of the ones before it."""
    hijacks: Path | None = None
    """Run directory of an attack on the base: its harmful completions become the long targets."""
    prompts: Path | None = None
    """Prompts made elsewhere, for ``imported``."""
    prompts_each: int = 1
    """Prompts of the behaviour that has most of them in that file; set by the run, which reads it."""
    image_backend: Literal["pil", "torchvision"] | str = "pil"
    """Which image processor resizes the pictures."""
    artefacts: bool = True
    """Write a JSON beside every picture, and the completion's loss under the base model."""
    checkpoint_seconds: float | None = 60.0
    """How often the state of a running optimisation is saved; None = never."""

    def __post_init__(self) -> None:
        """Check the values.

        Raises:
            UserError: If the attack is unknown.
            ValueError: If a value is out of range.
            TypeError: If the threat is none.
        """
        attack_entry(self.name)
        if not isinstance(self.threat, Threat):
            raise TypeError(
                f"`threat` must be an mm_cb.Threat, got {self.threat!r:.60} ({type(self.threat).__name__})."
            )
        for key in _NUMBERS:
            settle(self, key, LIMITS[key])
        settle(self, "prompts_each", LIMITS["restarts"])
        if self.checkpoint_seconds is not None:
            settle(self, "checkpoint_seconds", LIMITS["checkpoint_seconds"])
        if 0 < self.check_convergence < LEAST:
            raise ValueError(
                f"`--check-convergence` must be 0 or at least {LEAST}, which its rule asks for, got "
                f"{self.check_convergence}."
            )
        if self.early_stop and not self.iterates:
            raise ValueError("`--iterates` must be at least 1 with `--early-stop`, which judges them, got 0.")
        if self.vary not in VARIED:
            raise ValueError(f"`vary` must be one of {', '.join(VARIED)}, got {self.vary!r}.")
        if self.optimizer not in OPTIMIZERS:
            raise ValueError(f"`optimizer` must be one of {', '.join(OPTIMIZERS)}, got {self.optimizer!r}.")
        if self.anneal is not None and self.anneal not in ANNEAL:
            raise ValueError(f"`anneal` must be one of {', '.join(ANNEAL)}, got {self.anneal!r}.")
        if self.image_backend not in IMAGE_BACKENDS:
            raise ValueError(f"`image_backend` must be one of {', '.join(IMAGE_BACKENDS)}, got {self.image_backend!r}.")

    @property
    def entry(self) -> AttackEntry:
        """The attack's row of the table."""
        return attack_entry(self.name)

    @property
    def annealing(self) -> Anneal:
        """How the adapter's scale changes on the way of this very attack."""
        if not self.entry.can_anneal:
            return "none"
        return cast("Anneal", self.entry.anneal if self.anneal is None else self.anneal)

    @property
    def settles(self) -> float:
        """Share of the steps after which what is minimised is the attacked model's own loss."""
        return SETTLES[self.annealing]

    def named(self, names: Sequence[str]) -> list[AttackConfig]:
        """The same settings for several attacks."""
        return [replace(self, name=name) for name in names]

    @property
    def moments(self) -> list[int]:
        """The steps whose pictures are kept: ``iterates`` of them, evenly spaced, the last one included."""
        return sorted({round(self.steps * (i + 1) / self.iterates) for i in range(self.iterates)} - {0})

    @property
    def pictures_per_run(self) -> int:
        """Pictures judged in one run of one behaviour."""
        return 1 + len(self.moments) if self.entry.searches_pixels else 1

    @property
    def runs(self) -> int:
        """Runs per behaviour: the placebo gets as many tries as an attack has pictures; what never varies gets one.

        Each prompt of a file is a run.
        """
        if self.entry.imported:
            return self.prompts_each
        if self.entry.search == "vary":
            return self.draws
        if self.entry.search == "noise":
            return self.restarts * (1 + len(self.moments))
        return self.restarts if self.entry.optimises else 1

    @property
    def tries(self) -> int:
        """k: answers judged per behaviour at most, fixed before the run; a relaxation has no picture to sample from."""
        answers = 1 if self.entry.relaxation else 1 + self.samples
        return self.runs * self.pictures_per_run * answers


def checked_by_default(attacks: str) -> int:
    """What ``check_convergence`` is where nobody says: ``--attack all`` is a whole evaluation, which has it checked."""
    return LEAST if attacks == "all" else 0
