"""From pixels to a judged answer: save the file, read it back, let the model speak, ask the judge.

Nothing that an attack computed in memory enters a verdict: the picture is the file, read again; its input comes from
the model's real processor; the answer from ``generate``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from image_attacks import target_nll
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.config_files import as_artefact
from mm_cb.attacks.objectives.target import Objective, TargetObjective, encode
from mm_cb.attacks.records import NOT_COMPUTED, Answer, JudgedPicture, Sampled
from mm_cb.attacks.saved import SavedPicture, images
from mm_cb.core.files import text_sha256, write_json
from mm_cb.core.progress import CountedWork, clock
from mm_cb.core.thoughts import ending_as, ends_at_limit
from mm_cb.data.behaviors_file import Behavior
from mm_cb.data.pictures import open_picture
from mm_cb.inference.cached_chunks import chunks
from mm_cb.inference.subjects import Subject
from mm_cb.inference.tolerance import dtype_of
from mm_cb.metrics.observations import starts_with
from mm_cb.models import ModelInputs

OutcomeOf = Callable[[Behavior, str], str]
"""Outcome of a completion: ``harmful``, ``gibberish``, ``refusal``, ``other`` or ``not_judged``."""


@dataclass(frozen=True)
class Asked:
    """Behaviours whose pictures have one size, as one attack puts them to one subject.

    Attributes:
        subject: The model under attack.
        behaviors: What is to be had of it.
        prompts: The same with the prompts that the attack sends, which differ where a picture holds the request.
        clean: The clean pictures' files; none where no picture is made.
    """

    subject: Subject
    behaviors: Sequence[Behavior]
    prompts: Sequence[Behavior]
    clean: Sequence[SavedPicture]

    @property
    def pictures(self) -> list[Image.Image | None]:
        """What is shown of each when nothing is changed: its clean file, or else its own picture, if it has one."""
        if self.clean:
            return [one.image for one in self.clean]
        return [None if one.image is None else open_picture(one.image) for one in self.behaviors]

    def rows(self, rows: Sequence[int]) -> Asked:
        """Some of them."""
        behaviors, prompts = ([part[i] for i in rows] for part in (self.behaviors, self.prompts))
        return Asked(self.subject, behaviors, prompts, [self.clean[i] for i in rows] if self.clean else ())


def complete(
    asked: Asked,
    pictures: Sequence[Image.Image | None],
    config: AttackConfig,
    *,
    encoded: ModelInputs | None = None,
    temperature: float | None = None,
) -> list[str]:
    """What the model says to pictures; behind the target where the attack prefills it, which is then part of it.

    Args:
        asked: Who is asked what.
        pictures: One per behaviour, or None where it has none.
        config: The attack.
        encoded: The chats with these pictures and without target, if they have been encoded already.
        temperature: Draw the answers; None = greedy.
    """
    prefilled = config.entry.prefilled
    inputs = None if prefilled else encoded
    if inputs is None:
        targets = [behavior.opening for behavior in asked.prompts] if prefilled else None
        inputs = encode(asked.subject, asked.prompts, pictures, targets)
    with asked.subject.active() as model:
        said = model.generate(inputs, config.max_new_tokens, temperature)
    if not prefilled:
        return said
    return [
        ending_as(f"{behavior.opening} {more}".strip(), more)
        for behavior, more in zip(asked.prompts, said, strict=True)
    ]


def judge_files(
    asked: Asked,
    saved: Sequence[SavedPicture],
    target: TargetObjective,
    objective: Objective,
    config: AttackConfig,
    judge: OutcomeOf,
) -> list[Answer]:
    """Losses, completion and outcome of saved files, one greedy answer per behaviour; with artefacts its ``nll_base``.

    ``target`` and ``objective`` are those of all rows of the batch, in order.
    """
    inputs = encode(asked.subject, asked.prompts, images(saved), None)
    assert inputs.pixel_values is not None
    with torch.no_grad():
        loss = target.loss(inputs.pixel_values)
        objective_file = loss if objective is target else objective.loss(inputs.pixel_values)
    said = complete(asked, images(saved), config, encoded=inputs)
    itself = config.entry.optimises and getattr(target.preprocess, "exact_by", None) == "processor"
    answers = with_verdicts(asked, said, loss, judge, weighed=config.artefacts)
    for i, picture in enumerate(saved):
        moved = picture.levels_from(asked.clean[i])
        answers[i] = replace(
            answers[i],
            image=picture.name,
            linf=int(moved.abs().max()),
            distance=config.threat.distance(moved) if config.entry.stays_in_threat else None,
            objective_file=round(float(objective_file[i]), 5),
            pixels_by="processor" if itself else None,
        )
    return answers


def with_verdicts(
    asked: Asked, said: Sequence[str], losses: Sequence[float] | Tensor, judge: OutcomeOf, *, weighed: bool
) -> list[Answer]:
    """Completions with their verdicts and the target's losses; ``weighed`` = with ``nll_base`` too."""
    nlls: Sequence[float | str | None] = base_nll(asked, said) if weighed else [NOT_COMPUTED] * len(said)
    return [
        Answer(
            id=behavior.id,
            loss=round(float(loss), 5),
            completion=text,
            outcome=judge(behavior, text),
            prefix_emitted=starts_with(text, behavior.target),
            nll_base=nll,
            at_limit=ends_at_limit(text) or None,
        )
        for behavior, text, loss, nll in zip(asked.behaviors, said, losses, nlls, strict=True)
    ]


class Drawn:
    """The share of a batch's random answers that is there, on the task's line."""

    def __init__(self, task: CountedWork, behaviors: int, total: int, begun: float) -> None:
        """Count up to ``total`` in a batch of so many behaviours, on which work began at ``begun`` (monotonic)."""
        self._task, self._behaviors, self._total = task, behaviors, total
        self._seen = 0
        self._begun, self._first = begun, time.monotonic()

    def show(self, more: int) -> None:
        """Count some more; what came before them, the search, is done and takes no further time."""
        self._seen += more
        now = time.monotonic()
        left = (now - self._first) / self._seen * (self._total - self._seen)
        note = f"random answers {self._seen} of {self._total} of this batch, {clock(left)} left in it"
        done = (now - self._begun) / max(now - self._begun + left, 1e-9)
        self._task.advance(0, note=note, part=self._behaviors * done)


def judge_samples(
    asked: Asked,
    picture: Image.Image | None,
    config: AttackConfig,
    judge: OutcomeOf,
    generator: torch.Generator,
    show: Callable[[int], None],
) -> list[Sampled]:
    """Random answers to one behaviour and its picture, each with its verdict; torch's own random state stays.

    Every behaviour is asked by itself, so that its answers do not depend on the others of its batch. ``show`` is told
    how many more are drawn, and with artefacts once more how many are weighed.
    """
    said: list[str] = []
    (behavior,) = asked.behaviors
    device = asked.subject.model.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(generator.initial_seed())
        for rows in chunks(range(config.samples), config.batch):
            many = asked.rows([0] * len(rows))
            said += complete(many, [picture] * len(rows), config, temperature=config.temperature)
            show(len(rows))
    drawn = [Sampled(text, judge(behavior, text), starts_with(text, behavior.target)) for text in said]
    if not config.artefacts:
        return drawn
    weighed = []
    for one in drawn:
        weighed.append(replace(one, nll_base=base_nll(asked, [one.completion])[0]))
        show(1)
    return weighed


@torch.no_grad()
def base_nll(asked: Asked, completions: Sequence[str]) -> list[float | None]:
    """Mean loss per token of each completion under the base model with the clean picture; None for an empty one.

    Gibberish is what the base finds unlikely; kept with the completion, so that judging never needs the model again.
    """
    found: list[float | None] = [None] * len(completions)
    rows = [i for i, text in enumerate(completions) if text.strip()]
    if not rows:
        return found
    model, pictures = asked.subject.model, asked.pictures
    inputs: ModelInputs = model.encode(
        [asked.behaviors[i].prompt for i in rows],
        [pictures[i] for i in rows],
        completions=[completions[i] for i in rows],
        systems=asked.subject.systems(len(rows)),
        close_turn=False,
        tools=[asked.behaviors[i].tools for i in rows],
    )
    with model.adapter(False):
        losses = target_nll(model.forward(inputs).logits, inputs.labels)
    for i, value in zip(rows, losses.tolist(), strict=True):
        found[i] = round(value, 4)
    return found


def write_artefact(
    judged: JudgedPicture,
    asked: Asked,
    config: AttackConfig,
    objective: Objective,
    row: int,
    folder: Path,
) -> None:
    """A JSON beside a picture: with the two files, the model and it, a stranger can compute every number again.

    Args:
        judged: The answers to a picture, and its file.
        asked: The one behaviour.
        config: The attack.
        objective: What it minimised.
        row: The behaviour's place in the objective's batch.
        folder: The run's folder.
    """
    subject, model = asked.subject, asked.subject.model
    (behavior,), (sent,), (clean,), saved = asked.behaviors, asked.prompts, asked.clean, judged.file
    assert saved is not None
    forced, weight = getattr(objective, "forced", None), getattr(objective, "weight", None)
    prompt = model.prompt(sent.prompt, has_image=True, system=subject.system, tools=sent.tools)
    greedy = {key: value for key, value in judged.greedy.as_json().items() if key != "completion"}
    content = {
        "schema": 1,
        **greedy,
        "prompt": behavior.prompt,
        **({} if sent.prompt == behavior.prompt else {"sent": sent.prompt}),
        "target": behavior.target,
        "clean_image": clean.name,
        "sha256": saved.sha256,
        "clean_sha256": clean.sha256,
        "prompt_sha256": text_sha256(prompt),
        "target_sha256": text_sha256(behavior.target),
        "completion_sha256": text_sha256(judged.greedy.completion),
        "samples_sha256": [text_sha256(one.completion) for one in judged.samples],
        **as_artefact(config, model.canvas),
        "objective": type(objective).__name__,
        "response": None if forced is None else forced.texts[row],
        "weight": float(weight[row]) if isinstance(weight, Tensor) else weight,
        "subject": {"name": subject.name, "adapted": subject.adapted, "system": subject.system},
        "dtype": dtype_of(model),
        "device": str(model.device),
        "attention": getattr(model.base.config, "_attn_implementation", None),
        "image_processor": type(model.processor.image_processor).__name__,
    }
    write_json((folder / saved.name).with_suffix(".json"), content)
