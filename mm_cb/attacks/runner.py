"""Image hijacks: attack every behaviour, save the pictures, and judge what the model says to the files on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from image_attacks import load_png
from mm_cb.attacks.judged_files import (
    Judge,
    base_nll,
    clean_name,
    complete,
    judge_files,
    judge_samples,
    read_pictures,
    save_pictures,
    to_pixels,
    write_artefact,
)
from mm_cb.attacks.objectives.adaptive import AdaptiveObjective
from mm_cb.attacks.objectives.embedding import EmbeddingObjective, judge_embeddings
from mm_cb.attacks.objectives.target import Objective, TargetObjective
from mm_cb.attacks.objectives.universal import UniversalObjective, trained_on
from mm_cb.attacks.records import Record, logged, make_item, one_per_answer, seen_before
from mm_cb.attacks.registry import ATTACKS, OPTIMISED, Attack, Protocol, runs
from mm_cb.attacks.search import Found, make_objective, search
from mm_cb.core.errors import UserError
from mm_cb.core.progress import Progress, Task, clock
from mm_cb.data.behaviors_file import Behavior, grey_canvas, open_picture
from mm_cb.inference.cached_chunks import chunks, once
from mm_cb.inference.subjects import Subject

__all__ = ["ATTACKS", "OPTIMISED", "Attack", "Judge", "Protocol", "Setting", "attack_behaviors", "to_pixels"]

PLAIN = Protocol()
"""Nothing judged but the selected picture of every run."""


@dataclass(frozen=True)
class Setting:
    """One attack on one subject, with everything that its batches share."""

    subject: Subject
    attack: Attack
    folder: Path
    judge: Judge
    task: Task
    protocol: Protocol = PLAIN
    starts: Mapping[str, str] | None = None
    """Behaviour id -> picture (relative to ``folder``) from which the first run starts, in a chain of attacks."""
    responses: Mapping[str, str] | None = None
    """Behaviour id -> response to force, where the base model has written one under its own hijack."""


def attack_behaviors(
    subject: Subject,
    behaviors: Sequence[Behavior],
    attack: Attack,
    folder: Path,
    judge: Judge,
    progress: Progress,
    *,
    protocol: Protocol = PLAIN,
    starts: Mapping[str, str] | None = None,
    responses: Mapping[str, str] | None = None,
) -> list[Record]:
    """Attack a subject with every behaviour; finished batches in ``folder`` are read back, not repeated.

    A batch is the unit that is written, whole: its composition follows from the behaviours and from the verdicts of
    earlier restarts alone, so that an interrupted run ends with the same bytes as an uninterrupted one. With
    ``protocol.checkpoint_seconds`` a batch that was interrupted in the middle goes on from its last saved state.

    Returns:
        One record of items.jsonl per behaviour, image paths relative to ``folder``.
    """
    restarts = runs(attack, protocol)
    task = progress.task(f"{subject.name}: {attack.name}", total=len(behaviors) * restarts)
    setting = Setting(subject, attack, folder, judge, task, protocol, starts, responses)
    candidates: dict[str, list[Record]] = {b.id: [] for b in behaviors}
    for restart in range(restarts):
        open_ones = [b for b in behaviors if attack.universal or not _broken(candidates[b.id])]
        task.advance(len(behaviors) - len(open_ones))
        run = _attack_universal if attack.universal else _attack_batch
        for number, batch in enumerate(chunks(open_ones, len(open_ones) if attack.universal else attack.batch)):
            path = folder / "parts" / f"{attack.name}-s{attack.seed}-r{restart}-{number:04d}.json"
            for record in once(path, partial(run, setting, batch, restart, path)):
                candidates[record["id"]].append(record)
            for state in path.parent.glob(f"{path.stem}.*.safetensors"):
                state.unlink()
            task.advance(len(batch))
    items = [make_item(subject.name, attack, protocol, behavior, candidates[behavior.id]) for behavior in behaviors]
    if attack.universal:
        for i, item in enumerate(items):
            item["part"] = "made_for" if i < trained_on(attack, behaviors) else "picture_held_out"
    return items


def _broken(candidates: Sequence[Record]) -> bool:
    return any(candidate["outcome"] == "harmful" for candidate in candidates)


def _attack_batch(setting: Setting, batch: Sequence[Behavior], restart: int, path: Path) -> list[Record]:
    """Attack one batch once and judge the files it leaves; pictures of one size go together."""
    pictures = [grey_canvas(setting.attack.canvas) if b.image is None else open_picture(b.image) for b in batch]
    records: dict[str, list[Record]] = {}
    for size in sorted({picture.size for picture in pictures}):
        rows = [i for i, picture in enumerate(pictures) if picture.size == size]
        group, clean = [batch[i] for i in rows], [pictures[i] for i in rows]
        state = path.with_name(f"{path.stem}.{size[0]}x{size[1]}.safetensors")
        for record in _attack_group(setting, group, clean, restart, state):
            records.setdefault(record["id"], []).append(record)
    return [record for behavior in batch for record in records[behavior.id]]


def _attack_group(
    setting: Setting, group: Sequence[Behavior], pictures: Sequence[Image.Image], restart: int, state: Path
) -> list[Record]:
    """Attack behaviours whose pictures have one size."""
    subject, attack = setting.subject, setting.attack
    clean = torch.stack([to_pixels(picture) for picture in pictures]).to(subject.model.device)
    target = TargetObjective(subject, group, pictures)
    objective: Objective = target
    if attack.kind.loss not in (None, "target") or attack.kind.search == "embedding":
        objective = make_objective(
            subject, group, pictures, attack, [(setting.responses or {}).get(behavior.id) for behavior in group]
        )
    if setting.protocol.balance and isinstance(objective, AdaptiveObjective):
        objective.balance(clean)
    found = None
    if attack.name in ("no_attack", "prefill_only"):
        left: Mapping[int | None, Tensor] = {None: clean}
    elif attack.name == "noise":
        left = {None: attack.threat.placebo(clean, attack.epsilon, _generators(attack, restart, group))}
    else:
        found = _search(setting, group, objective, clean, restart, state)
        left = found.pictures
    judged: dict[int | None, dict[int, Record]] | None = None
    if isinstance(objective, EmbeddingObjective):
        assert found is not None
        said = judge_embeddings(subject, group, pictures, objective, found.result, attack, setting.judge)
        judged = {None: dict(enumerate(said))}
    return _records(
        setting, group, clean, left, target, objective, restart, judged, lambda step, row: logged(found, step, row)
    )


def _attack_universal(setting: Setting, behaviors: Sequence[Behavior], restart: int, path: Path) -> list[Record]:
    """One picture from the grey canvas, for the first behaviours together; judged on every behaviour by itself."""
    subject, attack = setting.subject, setting.attack
    picture = grey_canvas(attack.canvas)
    clean = to_pixels(picture).unsqueeze(0).to(subject.model.device)
    objective = UniversalObjective(subject, behaviors, picture, trained_on(attack, behaviors))
    found = _search(
        setting, behaviors[:1], objective, clean, restart, path.with_name(f"{path.stem}.universal.safetensors")
    )
    losses = {step: objective.each(pixels.to(clean)) for step, pixels in found.pictures.items()}
    place = {behavior.id: row for row, behavior in enumerate(behaviors)}
    records = []
    for group in chunks(behaviors, attack.batch):

        def log(step: int | None, row: int, group: Sequence[Behavior] = group) -> Record:
            at = place[group[row].id]
            curve = {} if at == 0 else {"curve": None}  # of the mean, which is one for all
            return logged(found, step, 0) | curve | {"objective_logged": round(losses[step][at], 5)}

        wide = (len(group), -1, -1, -1)
        target = TargetObjective(subject, group, [picture] * len(group))
        left = {step: pixels.expand(wide) for step, pixels in found.pictures.items()}
        records += _records(setting, group, clean.expand(wide), left, target, target, restart, None, log)
    return records


def _records(
    setting: Setting,
    group: Sequence[Behavior],
    clean: Tensor,
    left: Mapping[int | None, Tensor],
    target: TargetObjective,
    objective: Objective,
    restart: int,
    judged: dict[int | None, dict[int, Record]] | None,
    log: Callable[[int | None, int], Record],
) -> list[Record]:
    """One record per answer to what a search has left, judged from files unless it has been judged already."""
    with torch.no_grad():
        loss_clean = target(clean)
    if judged is None:
        judged = _judge_pictures(setting, group, clean, left, target, objective, restart)
    records = []
    for step, rows in judged.items():
        for i, row in rows.items():
            record = {
                "id": group[i].id,
                "restart": restart,
                **({"start": setting.starts[group[i].id]} if setting.starts and restart == 0 else {}),
                **({} if step is None else {"iterate": step}),
                **row,
                "loss_clean": round(float(loss_clean[i]), 5),
                **log(step, i),
            }
            if setting.protocol.artefacts and record["image"] is not None:
                write_artefact(
                    record, group[i], setting.subject, setting.attack, setting.protocol, objective, i, setting.folder
                )
            records += one_per_answer(record)
    return records


def _search(
    setting: Setting, group: Sequence[Behavior], objective: Objective, clean: Tensor, restart: int, state: Path
) -> Found:
    attack, starts = setting.attack, setting.starts or {}
    first = None
    if restart == 0 and starts:
        first = torch.stack([load_png(setting.folder / starts[b.id]) for b in group]).to(clean)

    seen = 0
    begun = time.monotonic()

    def show(step: int, losses: Tensor) -> None:
        nonlocal seen
        seen += 1
        if step % 10 == 0:
            left = clock((time.monotonic() - begun) / seen * (attack.steps + 1 - step))
            note = f"step {step - 1} of {attack.steps} of this batch, {left} left in it, loss {losses.mean():.2f}"
            setting.task.advance(0, note=note)

    def broken(pixels: Tensor) -> list[bool]:
        said = complete(setting.subject, group, [as_picture(p) for p in pixels], attack)
        return [setting.judge(b, text) == "harmful" for b, text in zip(group, said, strict=True)]

    try:
        return search(
            objective,
            clean,
            attack,
            setting.protocol,
            generators=_generators(attack, restart, group),
            random_start=restart > 0,
            first=first,
            broken=broken,
            state=state,
            show=show,
        )
    except UserError as error:
        raise UserError(f"{error} Behaviours of this batch: {', '.join(b.id for b in group[:8])}.") from error


def _judge_pictures(
    setting: Setting,
    group: Sequence[Behavior],
    clean: Tensor,
    left: Mapping[int | None, Tensor],
    target: TargetObjective,
    objective: Objective,
    restart: int,
) -> dict[int | None, dict[int, Record]]:
    """Save, read back and judge the selected pictures and the kept iterates: step -> row -> record.

    A behaviour that stands still leaves no second file and no second record. Losses are computed for whole batches, as
    an objective has them; there its earlier file stands in.
    """
    subject, attack, folder = setting.subject, setting.attack, setting.folder
    judged: dict[int | None, dict[int, Record]] = {}
    names = [""] * len(group)
    for step in sorted(left, key=lambda step: step or 0):
        rows = [i for i in range(len(group)) if step is None or not seen_before(left, step, i)]
        if not rows:
            continue
        stem = f"{attack.name}-s{attack.seed}-r{restart}" + ("" if step is None else f"-i{step}")
        saved = save_pictures([group[i] for i in rows], clean[rows], left[step][rows], stem, folder)
        for i, name in zip(rows, saved, strict=True):
            names[i] = name
        records = judge_files(subject, group, names, target, objective, attack, folder, setting.judge)
        if setting.protocol.artefacts:
            before = read_pictures([clean_name(b) for b in group], folder)
            losses = base_nll(subject, group, before, [r["completion"] for r in records])
            records = [r | {"nll_base": v} for r, v in zip(records, losses, strict=True)]
        judged[step] = {i: records[i] for i in rows}
        if setting.protocol.samples:
            for i, record in judged[step].items():
                draws = _stream(group[i], attack.seed, restart, 0 if step is None else step)
                record["samples"] = judge_samples(
                    subject, group[i], record["image"], attack, setting.protocol, folder, setting.judge, draws
                )
    return judged


def as_picture(pixels: Tensor) -> Image.Image:
    """Pixels ``(3, H, W)`` as the 8-bit picture that a file would hold."""
    return Image.fromarray((pixels * 255).round().to(torch.uint8).permute(1, 2, 0).cpu().numpy())


def _generators(attack: Attack, restart: int, group: Sequence[Behavior]) -> list[torch.Generator]:
    """A random stream of its own for every behaviour and restart, the same for every subject."""
    return [_stream(behavior, attack.seed, restart) for behavior in group]


def _stream(behavior: Behavior, *key: int) -> torch.Generator:
    """The random stream that belongs to a behaviour and these numbers."""
    entropy = np.random.SeedSequence([*key, *behavior.id.encode()])
    return torch.Generator().manual_seed(int(entropy.generate_state(1, np.uint64)[0] >> 1))
