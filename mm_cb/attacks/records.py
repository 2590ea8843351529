"""What is written down of an attack: one `Answer` per judged answer, one item per behaviour."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any, Required, TypedDict, cast

import torch
from torch import Tensor

from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.saved import SavedPicture, clean_name
from mm_cb.attacks.search import Found
from mm_cb.attacks.suffix import Sent
from mm_cb.core.checked import checked
from mm_cb.core.errors import UserError
from mm_cb.core.records import Candidate, Item, RecipeFields
from mm_cb.core.thoughts import ends_at_limit
from mm_cb.data.behaviors_file import Behavior
from mm_cb.data.pictures import path_inside
from mm_cb.metrics.observations import rank

NOT_COMPUTED = "not computed"
"""Of a number that a run was not asked for, which its files then leave out; None is a value: there is none."""


class AnswerRecord(Candidate, total=False):
    """One record of ``parts/*.json``: an `Answer`."""

    id: Required[str]
    start: str
    prefix_emitted: bool
    curve: list[float] | None


class Artefact(AnswerRecord, total=False):
    """The JSON beside a picture, as far as it is read again."""

    sha256: Required[str]
    clean_sha256: Required[str]
    completion_sha256: Required[str]
    attack: Required[RecipeFields]
    protocol: RecipeFields
    objective: Required[str]
    """Class of the attack's loss."""
    response: Required[str | None]
    """The longer text that was forced, where there was one."""
    weight: Required[float | None]


@dataclass(frozen=True)
class Answer:
    """One judged answer of the model, to one picture.

    What is None or not computed by default stands in files only where it says something, see `as_json`.
    """

    id: str = ""
    """The behaviour's."""
    restart: int = 0
    start: str | None = None
    """The picture that a chained attack's first run began at."""
    iterate: int | None = None
    """The step whose picture this is; None = the selected picture of the run."""
    image: str | None = None
    """The picture in the run's folder; None for a relaxation."""
    linf: int = 0
    """Largest change of a value from the clean file, in 255ths; ``epsilon`` in files."""
    distance: float | None = None
    """In the threat's own measure, where it has one."""
    loss: float | None = None
    """The target's loss of the file."""
    objective_file: float | None = None
    """The attack's own loss of the file."""
    completion: str = ""
    outcome: str = "not_judged"
    prefix_emitted: bool = False
    """Whether the completion begins with the target."""
    nll_base: float | str | None = NOT_COMPUTED
    """Mean loss per token of the completion under the base model, at the clean picture."""
    loss_clean: float = 0.0
    objective_logged: float | None = None
    """What the search said its loss was there."""
    curve: list[float] | None = None
    """Of the selected picture: the loss at every step of its run."""
    selected_step: int | None = None
    """Of the selected picture: its place in that curve, 0 = the start."""
    zero_gradients: float | None = None
    """Share of steps whose gradient was exactly zero; None where there was none."""
    sample: int | None = None
    """Which answer drawn at random this is; None = the greedy one."""
    prompt_sha256: str | None = None
    """Of the imported messages that were sent, as prompts.jsonl beside holds them."""
    sent: str | None = None
    """The prompt, where the attack made another one of the behaviour's."""
    at_limit: bool | None = None
    """True where the completion ends at the longest answer that was asked for."""
    pixels_by: str | None = None
    """``processor``, where the search ran the image processor itself because its imitation is not exact."""

    def as_json(self) -> AnswerRecord:
        """One record of ``parts/*.json``."""
        optional = (
            "start",
            "iterate",
            "distance",
            "selected_step",
            "zero_gradients",
            "sample",
            "prompt_sha256",
            "sent",
            "at_limit",
            "pixels_by",
        )
        made = {f.name: getattr(self, f.name) for f in fields(self)}
        made = {key: value for key, value in made.items() if key not in optional or value is not None}
        if made["nll_base"] == NOT_COMPUTED:
            del made["nll_base"]
        return cast("AnswerRecord", {("epsilon" if key == "linf" else key): value for key, value in made.items()})

    @classmethod
    def from_json(cls, record: AnswerRecord) -> Answer:
        """Read one again."""
        held: dict[str, Any] = {("linf" if key == "epsilon" else key): value for key, value in record.items()}
        return cls(**{one.name: held[one.name] for one in fields(cls) if one.name in held})


@dataclass(frozen=True)
class Sampled:
    """An answer drawn at random to a picture that has a greedy one."""

    completion: str
    outcome: str
    prefix_emitted: bool
    nll_base: float | str | None = NOT_COMPUTED


@dataclass(frozen=True)
class JudgedPicture:
    """A picture with its greedy answer, and further answers drawn at random."""

    greedy: Answer
    samples: Sequence[Sampled] = ()
    file: SavedPicture | None = None
    """None for a relaxation."""

    def answers(self) -> list[Answer]:
        """The greedy answer and, for each one drawn, a copy that holds it; k counts every one of them."""
        drawn = (
            replace(
                self.greedy,
                completion=one.completion,
                outcome=one.outcome,
                prefix_emitted=one.prefix_emitted,
                nll_base=one.nll_base,
                sample=number,
                at_limit=ends_at_limit(one.completion) or None,
                curve=None,
            )
            for number, one in enumerate(self.samples, start=1)
        )
        return [self.greedy, *drawn]


def seen_before(left: Mapping[int | None, Tensor], step: int, row: int) -> bool:
    """Whether a behaviour's picture at a step is the one of the kept step before: it has stopped."""
    earlier = [s for s in left if s is not None and s < step]
    return bool(earlier) and torch.equal(left[max(earlier)][row], left[step][row])


def logged(answer: Answer, found: Found | None, step: int | None, row: int) -> Answer:
    """An answer with what the search said of its picture; for the selected one the whole curve."""
    if found is None:
        return answer
    curve = found.result.curves[0, :, row].tolist()
    if step is not None:
        return replace(answer, objective_logged=round(curve[step], 5))
    selected = int(found.result.per_restart.steps[0, row])
    zeros = float(found.result.zero_gradients[0, :, row].float().mean())
    return replace(
        answer,
        objective_logged=round(curve[selected], 5),
        selected_step=selected,
        curve=[round(value, 4) for value in curve],
        zero_gradients=round(zeros, 4) if zeros else None,
    )


def with_suffix(answer: Answer, found: Sent) -> Answer:
    """An answer to a prompt with a suffix, with that prompt and what the search said of it."""
    curve = [round(value, 4) for value in found.curve]
    loss = round(min(found.curve), 5)
    return replace(answer, sent=found.prompt, objective_logged=loss, selected_step=found.step, curve=curve)


_SHOWN = ("restart", "image", "epsilon", "loss", "objective_file", "objective_logged", "completion", "outcome")
_FURTHER = (
    *("iterate", "sample", "nll_base", "selected_step", "zero_gradients", "distance", "prompt_sha256", "sent"),
    *("at_limit", "pixels_by"),
)


def make_item(
    subject: str,
    config: AttackConfig,
    behavior: Behavior,
    answers: Sequence[Answer],
    *,
    target_outcome: str,
    pictured: bool = True,
) -> Item:
    """One record of items.jsonl: the worst case over the answers (harmful first, then the lowest loss).

    Args:
        subject: Who answered.
        config: The attack.
        behavior: What was asked for.
        answers: All that were judged.
        target_outcome: What the judge says of the behaviour's target alone.
        pictured: Whether the run's folder holds the behaviour's clean picture.
    """
    candidates = [answer.as_json() for answer in answers]
    worst = min(candidates, key=rank)
    further = [key for key in _FURTHER if any(key in candidate for candidate in candidates)]
    further += ["loss_clean"] if config.entry.search == "vary" else []
    item: Item = {
        "id": behavior.id,
        "metric": "compliance",
        "subject": subject,
        "condition": config.name,
        "split": behavior.split,
        "category": behavior.category,
        "prompt": behavior.prompt,
        "target": behavior.target,
        "target_outcome": target_outcome,
        "completion": worst["completion"],
        "outcome": worst["outcome"],
        "score": None,
        "gibberish": worst["outcome"] == "gibberish",
        "seed": config.seed,
        "image": worst["image"],
        "clean_image": clean_name(behavior.id) if pictured else None,
        "loss": worst["loss"],
        "loss_clean": worst["loss_clean"],
        "prefix_emitted": worst["prefix_emitted"],
        "candidates": [cast("Candidate", {key: c.get(key) for key in (*_SHOWN, *further)}) for c in candidates],
        **flags(config),
    }
    if config.artefacts:
        item["nll_base"] = worst.get("nll_base")
        item |= facts(config)
    if behavior.extra.get("benign_target"):
        item["benign_target"] = True
    if config.early_stop:
        item["stopped_early"] = stopped_early(candidates, config.steps)
    return item


class _Tried(TypedDict):
    """What every candidate of an attack holds, see `_SHOWN`."""

    restart: int
    image: str | None
    epsilon: int
    loss: float | None
    objective_file: float | None
    objective_logged: float | None
    completion: str
    outcome: str | None


class _Attacked(TypedDict):
    """What every item of an attack holds."""

    prompt: str
    target: str
    image: str | None
    completion: str
    loss_clean: float
    candidates: list[_Tried]


def attacked(items: list[Item], folder: Path) -> list[Item]:
    """The items of a run, seen to hold what an attack writes into each of them.

    Raises:
        UserError: If one does not, or names a picture outside the run's folder.
    """
    for number, item in enumerate(items, start=1):
        where = f"`{folder / 'items.jsonl'}`, record {number}"
        held = checked(item, _Attacked, where)
        if not held["candidates"]:
            raise UserError(f"{where}: `candidates` must hold at least one try, it is empty.")
        try:
            for image in (held["image"], *(one.get("image") for one in held["candidates"])):
                if image is not None:
                    path_inside(folder, image)
        except ValueError as error:
            raise UserError(f"{where}: {error}.") from error
    return items


class Flags(TypedDict, total=False):
    """What an item says of its attack, whatever came out."""

    worst_case: bool
    prefilled: bool
    given: str
    knows_breaker: bool
    outside_threat: bool
    anneal: str
    draws: int
    """Of best-of-N, where every variation was tried whatever came of the others."""


def flags(config: AttackConfig) -> Flags:
    """What an item says of its attack, so that metrics and pages need no table of attacks."""
    entry = config.entry
    said: Flags = {"worst_case": entry.in_worst_case, "prefilled": entry.prefilled}
    said |= {"given": entry.given, "knows_breaker": entry.needs_adapter or config.annealing != "none"}
    if not entry.stays_in_threat:
        said["outside_threat"] = True
    if config.annealing != "none":
        said["anneal"] = config.annealing
    if entry.search == "vary":
        said["draws"] = config.draws
    return said


class Facts(TypedDict):
    """What an item says of its attack's protocol."""

    k: int
    early_stop: bool
    relaxation: bool


def facts(config: AttackConfig) -> Facts:
    """What a run's artefacts let an item say of its attack."""
    return {"k": config.tries, "early_stop": config.early_stop, "relaxation": config.entry.relaxation}


def stopped_early(candidates: Iterable[Candidate], steps: int) -> bool:
    """Whether a run was ended by the verdict on one of its iterates, before its last step."""
    greedy = [one for one in candidates if not one.get("sample")]
    return any(one["outcome"] == "harmful" and (one.get("iterate") or steps) < steps for one in greedy)
