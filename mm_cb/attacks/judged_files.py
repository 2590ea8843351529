"""From pixels to a judged record: save the files, read them back, let the model speak, ask the judge.

Nothing that an attack computed in memory enters a verdict: the picture is the file, read again; its input comes from
the model's real processor; the answer from ``generate``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from image_attacks import linf_255, load_png, save_png, target_nll
from mm_cb.attacks.objectives.target import Objective, TargetObjective, encode
from mm_cb.attacks.registry import Attack, Protocol
from mm_cb.core.paths import safe_id
from mm_cb.core.runs import file_sha256, write_json
from mm_cb.data.behaviors_file import Behavior
from mm_cb.inference.cached_chunks import chunks
from mm_cb.inference.subjects import Subject
from mm_cb.inference.tolerance import dtype_of
from mm_cb.metrics.observations import starts_with
from mm_cb.models import ModelInputs

Judge = Callable[[Behavior, str], str]
"""Outcome of a completion: ``harmful``, ``gibberish``, ``refusal``, ``other`` or ``not_judged``."""


def to_pixels(picture: Image.Image) -> Tensor:
    """An 8-bit RGB picture as float32 ``(3, H, W)`` in [0, 1]."""
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1).float() / 255


def clean_name(behavior: Behavior) -> str:
    """Where a behaviour's clean picture lies in a run's folder."""
    return f"images/{safe_id(behavior.id)}.clean.png"


def save_pictures(group: Sequence[Behavior], clean: Tensor, pixels: Tensor, stem: str, folder: Path) -> list[str]:
    """Save clean and attacked pictures; the names of the latter, relative to ``folder``."""
    names = []
    for behavior, before, after in zip(group, clean, pixels, strict=True):
        name = f"images/{safe_id(behavior.id)}/{stem}.png"
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        save_png(before, folder / clean_name(behavior))
        save_png(after, folder / name)
        assert torch.equal(load_png(folder / clean_name(behavior)), before.cpu())
        names.append(name)
    return names


def read_pictures(names: Sequence[str], folder: Path) -> list[Image.Image]:
    """The saved files, as the model's processor will get them."""
    return [Image.open(folder / name).convert("RGB") for name in names]


def complete(
    subject: Subject,
    group: Sequence[Behavior],
    pictures: Sequence[Image.Image],
    attack: Attack,
    temperature: float | None = None,
) -> list[str]:
    """What the model says to pictures; behind the target where the attack prefills it, which is then part of it."""
    if not attack.kind.prefilled:
        inputs = encode(subject, group, pictures, None)
        with subject.active() as model:
            return model.generate(inputs, attack.max_new_tokens, temperature)
    inputs = encode(subject, group, pictures, [b.target for b in group])
    with subject.active() as model:
        said = model.generate(inputs, attack.max_new_tokens, temperature)
    return [f"{behavior.target} {more}".strip() for behavior, more in zip(group, said, strict=True)]


def judge_files(
    subject: Subject,
    group: Sequence[Behavior],
    names: Sequence[str],
    target: TargetObjective,
    objective: Objective,
    attack: Attack,
    folder: Path,
    judge: Judge,
) -> list[dict[str, Any]]:
    """Losses, completion and outcome of saved files, one record per behaviour."""
    saved = read_pictures(names, folder)
    inputs = encode(subject, group, saved, None)
    assert inputs.pixel_values is not None
    with torch.no_grad():
        loss, objective_file = target.loss(inputs.pixel_values), objective.loss(inputs.pixel_values)
    completions = complete(subject, group, saved, attack)
    away = [attack.threat.distance(folder / names[i], folder / clean_name(b)) for i, b in enumerate(group)]
    return [
        {
            "image": names[i],
            "epsilon": linf_255(folder / names[i], folder / clean_name(behavior)),
            **({} if away[i] is None else {"distance": away[i]}),
            "loss": round(float(loss[i]), 5),
            "objective_file": round(float(objective_file[i]), 5),
            "completion": completions[i],
            "outcome": judge(behavior, completions[i]),
            "prefix_emitted": starts_with(completions[i], behavior.target),
        }
        for i, behavior in enumerate(group)
    ]


def judge_samples(
    subject: Subject,
    behavior: Behavior,
    name: str,
    attack: Attack,
    protocol: Protocol,
    folder: Path,
    judge: Judge,
    generator: torch.Generator,
) -> list[dict[str, Any]]:
    """A7: random answers to one saved picture, each with its verdict; torch's own random state stays as it was.

    Every behaviour is asked by itself, so that its answers do not depend on the others of its batch.
    """
    said: list[str] = []
    pictures = read_pictures([name, clean_name(behavior)], folder)
    devices = [subject.model.device] if subject.model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(generator.initial_seed())
        for rows in chunks(range(protocol.samples), attack.batch):
            many = len(rows)
            said += complete(subject, [behavior] * many, [pictures[0]] * many, attack, protocol.temperature)
    likely: list[float | None] = [None] * len(said)
    if protocol.artefacts:
        likely = [base_nll(subject, [behavior], pictures[1:], [text])[0] for text in said]
    return [
        {
            "completion": text,
            "outcome": judge(behavior, text),
            "prefix_emitted": starts_with(text, behavior.target),
            "nll_base": loss,
        }
        for text, loss in zip(said, likely, strict=True)
    ]


@torch.no_grad()
def base_nll(
    subject: Subject, group: Sequence[Behavior], pictures: Sequence[Image.Image], completions: Sequence[str]
) -> list[float | None]:
    """Mean loss per token of each completion under the base model with the clean picture; None for an empty one.

    Gibberish is what the base finds unlikely; kept with the completion, so that judging never needs the model again.
    """
    found: list[float | None] = [None] * len(group)
    rows = [i for i, text in enumerate(completions) if text.strip()]
    if not rows:
        return found
    inputs: ModelInputs = subject.model.encode(
        [group[i].prompt for i in rows],
        [pictures[i] for i in rows],
        completions=[completions[i] for i in rows],
        systems=subject.systems(len(rows)),
        close_turn=False,
    )
    with subject.model.adapter(False):
        losses = target_nll(subject.model.forward(inputs).logits, inputs.labels)
    for i, value in zip(rows, losses.tolist(), strict=True):
        found[i] = round(value, 4)
    return found


def write_artefact(
    record: dict[str, Any],
    behavior: Behavior,
    subject: Subject,
    attack: Attack,
    protocol: Protocol,
    objective: Objective,
    row: int,
    folder: Path,
) -> None:
    """A JSON beside a picture: with the two files, the model and it, a stranger can compute every number again."""
    model, processor = subject.model, subject.model.processor.image_processor
    forced, weight = getattr(objective, "forced", None), getattr(objective, "weight", None)
    prompt = model.prompt(behavior.prompt, has_image=True, system=subject.system)
    content = {
        "schema": 1,
        **{key: record[key] for key in record if key not in ("completion", "samples")},
        "prompt": behavior.prompt,
        "target": behavior.target,
        "clean_image": clean_name(behavior),
        "sha256": file_sha256(folder / record["image"]),
        "clean_sha256": file_sha256(folder / clean_name(behavior)),
        "prompt_sha256": hashlib.sha256(prompt.encode()).hexdigest(),
        "target_sha256": hashlib.sha256(behavior.target.encode()).hexdigest(),
        "completion_sha256": hashlib.sha256(record["completion"].encode()).hexdigest(),
        "samples_sha256": [hashlib.sha256(s["completion"].encode()).hexdigest() for s in record.get("samples", ())],
        "attack": asdict(attack),
        "protocol": {k: v for k, v in asdict(protocol).items() if k != "checkpoint_seconds"},
        "objective": type(objective).__name__,
        "response": None if forced is None else forced.texts[row],
        "weight": float(weight[row]) if isinstance(weight, Tensor) else weight,
        "subject": {"name": subject.name, "adapted": subject.adapted, "system": subject.system},
        "dtype": dtype_of(model),
        "device": str(model.device),
        "attention": getattr(model.base.config, "_attn_implementation", None),
        "image_processor": type(processor).__name__,
    }
    write_json((folder / record["image"]).with_suffix(".json"), content)
