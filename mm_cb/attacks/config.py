"""One attack's configuration, from the flags to the items: what is searched, how long, and what is judged and kept.

Imports nothing heavy.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, Required, TypedDict, cast, get_args

from mm_cb.attacks.registry import SETTLES, Anneal, AttackEntry, attack_entry, attacks
from mm_cb.attacks.threats import Threat
from mm_cb.core.checked import checked
from mm_cb.core.errors import UserError
from mm_cb.core.limits import LIMITS
from mm_cb.core.records import JsonObject, Recipe, Run
from mm_cb.metrics.convergence import LEAST

DTYPES = ("float32", "bfloat16", "float16")
OPTIMIZERS = ("adam", "sign", "momentum")
ANNEAL = get_args(Anneal)
VARIED = ("picture", "text", "both")
IMAGE_BACKENDS = ("pil", "torchvision")


_NUMBERS = (
    *("steps", "restarts", "seed", "batch", "max_new_tokens", "term_weight", "iterates", "samples", "temperature"),
    *(
        "universal_train",
        "draws",
        "strength",
        "minibatch",
        "surrogate_scale",
        "eot_samples",
        "eot_scale",
        "eot_quality",
        "candidates",
    ),
    *("control", "check_convergence"),
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
        """
        attack_entry(self.name)
        for key in _NUMBERS:
            LIMITS[key].refuse(key, getattr(self, key))
        LIMITS["restarts"].refuse("prompts_each", self.prompts_each)
        if self.checkpoint_seconds is not None:
            LIMITS["checkpoint_seconds"].refuse("checkpoint_seconds", self.checkpoint_seconds)
        if 0 < self.check_convergence < LEAST:
            raise ValueError(
                f"`check_convergence` must be 0 or at least {LEAST}, which its rule asks for, got "
                f"{self.check_convergence}."
            )
        if self.early_stop and not self.iterates:
            raise ValueError("`iterates` must be at least 1 with `early_stop`, which judges them, got 0.")
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


def refuse_idle(config: AttackConfig, names: Sequence[str]) -> None:
    """Refuse settings that none of the named attacks reads: a run must not state what it did not do.

    Raises:
        UserError: If there is one, or a setting is missing that an attack cannot do without.
    """
    entries = [attack_entry(name) for name in names]
    own_term = any(entry.needs_adapter for entry in entries)
    drawn = any(entry.changes_picture for entry in entries)
    plain, asked = AttackConfig(), ",".join(names)
    for key, flag, read, needed in (
        *((key, f"--{key.replace('_', '-')}", *_own(key, entries)) for key in OWN),
        (
            "balance",
            "--balance",
            own_term,
            "an attack with a term beside the target's loss (one that needs an adapter)",
        ),
        ("term_weight", "--term-weight", own_term, "an attack with such a term (one that needs an adapter)"),
        ("optimizer", "--optimizer", any(e.search in ("pgd", "embedding") for e in entries), "an attack by PGD"),
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
        if getattr(config, key) != getattr(plain, key) and not read:
            raise UserError(f"`{flag}` is for {needed}; `--attack {asked}` does not read it: leave it out.")
    if config.corpus is None and any("corpus" in entry.reads for entry in entries):
        raise UserError("`--attack universal_corpus` needs `--corpus FILE`, the texts that its picture is made for.")
    if config.threat.norm != "linf" and not drawn:
        raise UserError(f"`--norm` is for an attack that changes a picture; `--attack {asked}` does not read it.")


def _own(key: str, entries: Sequence[AttackEntry]) -> tuple[bool, str]:
    """Whether one of the attacks reads a setting that few do, and which do."""
    readers = [f"`--attack {entry.name}`" for entry in attacks() if key in entry.reads]
    return any(key in entry.reads for entry in entries), " or ".join(readers) + " alone"


def refuse_mismatch(config: AttackConfig, names: Sequence[str]) -> None:
    """Refuse a norm beside an attack or a way to step that does not go with it.

    Raises:
        UserError: Saying what to change.
    """
    entries, norm = [attack_entry(name) for name in names], config.threat.norm
    if config.prompts is None and any(entry.imported for entry in entries):
        raise UserError("`--attack imported` needs `--prompts FILE`: the chats to send, see docs/formats.md.")
    if norm != "linf" and any(entry.relaxation for entry in entries):
        raise UserError(f"`--norm {norm}` is for pictures, and `embedding` makes none: give it a run of its own.")
    if norm == "l2" and config.optimizer == "adam" and any(entry.search == "pgd" for entry in entries):
        raise UserError("`--norm l2`: Adam steps value by value, which suits no l-2 ball; add `--optimizer momentum`.")


_RENAMED = {"term_weight": "matching_weight", "universal_train": "train"}
"""Field → its name in run.json and in a picture's JSON."""
_OPTIONS = (
    *("batch", "max_new_tokens", "term_weight", "optimizer", "balance", "iterates", "early_stop", "samples"),
    *("temperature", "universal_train", "chain", "hijacks", "image_backend", "prompts", "prompts_each"),
)
OWN = (
    *("universal_train", "draws", "strength", "vary", "corpus", "minibatch", "surrogate", "surrogate_scale"),
    *("eot_samples", "eot_scale", "eot_quality", "candidates"),
)
"""What single attacks read, by their rows' ``reads``; files hold it where such an attack was asked for."""
RUN_WIDE = (
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


def from_recipe(recipe: Recipe | AttackRecipe, seed: int) -> dict[str, AttackConfig]:
    """The attacks that a run.json states, by name.

    Raises:
        UserError: If it is not as `as_recipe` writes it.
    """
    stated = checked(recipe, _Recipe, "the recipe of run.json")
    options = {"steps": stated["steps"], "restarts": stated["restarts"], "seed": seed, **stated.get("options", {})}
    config = _stated(options, stated["epsilon"], "run.json")
    return {one.name: one for one in config.named(stated["attack"].split(","))}


def as_artefact(config: AttackConfig, canvas: Sequence[int]) -> dict[str, dict[str, object]]:
    """What the JSON beside a picture holds of it: ``attack`` and ``protocol``."""
    attack: dict[str, object] = {"name": config.name, "epsilon": config.threat.levels}
    attack |= {_RENAMED.get(key, key): getattr(config, key) for key in _BUDGET}
    own = [key for key in _told(config, config.entry.reads) if key not in RUN_WIDE]
    attack |= {key: getattr(config, key) for key in own}
    attack |= {"canvas": list(canvas), "threat_model": config.threat.text}
    protocol: dict[str, object] = {key: getattr(config, key) for key in _PROTOCOL}
    if config.annealing != "none":
        protocol["anneal"] = config.annealing
    return {"attack": attack, "protocol": protocol}


def from_artefact(attack: Recipe, protocol: Recipe) -> AttackConfig:
    """The attack that a picture's JSON states.

    Raises:
        UserError: If it is not as `as_artefact` writes it.
    """
    stated = {key: value for key, value in attack.items() if key not in ("canvas", "epsilon")}
    stated |= {key: value for key, value in protocol.items() if key in (*_PROTOCOL, "anneal")}
    return _stated(stated, checked(attack, _Attack, "the attack of a picture's JSON")["epsilon"], "a picture's JSON")


def read_recipe(run: Run, folder: Path) -> AttackRecipe:
    """The recipe of a run of ``mm-cb attack``.

    Raises:
        UserError: If the run is of another command, or its recipe is not as that one writes it.
    """
    if run["command"] != "attack":
        raise UserError(f"`{folder}` must be a run of `mm-cb attack`, its run.json says `{run['command']}`.")
    recipe = checked(run["recipe"], AttackRecipe, f"`{folder / 'run.json'}`: the recipe")
    if recipe.get("dtype", "float32") not in DTYPES:
        raise UserError(f"`{folder / 'run.json'}`: `dtype` must be one of {', '.join(DTYPES)}, got {recipe['dtype']}.")
    return recipe


class _Recipe(TypedDict, total=False):
    """How a run attacked."""

    attack: Required[str]
    epsilon: Required[int]
    steps: Required[int]
    restarts: Required[int]
    annealing: dict[str, str]
    """Attack → how it dialled the adapter up, where it did."""
    options: JsonObject


class AttackRecipe(_Recipe, total=False):
    """The same, and whom."""

    model: Required[str]
    adapter: Required[str | None]
    system: Required[str | None]
    base: str
    device: str
    dtype: str
    fiction: bool
    shard: str


class _Attack(TypedDict):
    """How a picture was made, as far as it is no option."""

    name: str
    epsilon: int


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


def _stated(options: Mapping[str, object], levels: int, where: str) -> AttackConfig:
    fields = {new: old for old, new in _RENAMED.items()}
    held: JsonObject = {
        fields.get(k, k): v for k, v in checked(options, _Options, f"what {where} says of an attack").items()
    }
    text = held.pop("threat_model", None)
    held |= {key: Path(held[key]) for key in ("hijacks", "prompts", "corpus", "surrogate") if held.get(key) is not None}
    if strange := held.keys() - {field.name for field in dataclasses.fields(AttackConfig)}:
        raise UserError(f"{where} must state an attack of this version, it has the unknown setting `{min(strange)}`.")
    try:
        return AttackConfig(threat=Threat.read(text, levels), **held)
    except ValueError as error:
        raise UserError(f"{where} states an attack that cannot be: {error}") from error
