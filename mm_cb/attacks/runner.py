"""Attack runner: attack every behaviour, save the pictures, and judge what the model says to the files on disk."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from mm_cb.attacks import saved as files
from mm_cb.attacks import texts
from mm_cb.attacks.best_of_n import varied
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.entry import resolved
from mm_cb.attacks.job import Attacker, Job, generators, objective_of, search_batch, stream
from mm_cb.attacks.judged_files import (
    Asked,
    Drawn,
    OutcomeOf,
    judge_files,
    judge_samples,
    with_verdicts,
    write_artefact,
)
from mm_cb.attacks.objectives.adaptive import AdaptiveObjective
from mm_cb.attacks.objectives.target import Objective, Relaxed, TargetObjective
from mm_cb.attacks.objectives.universal import UniversalObjective, made_for, seen
from mm_cb.attacks.records import (
    Answer,
    AnswerRecord,
    JudgedPicture,
    Sampled,
    logged,
    make_item,
    seen_before,
    with_suffix,
)
from mm_cb.attacks.saved import SavedPicture, attacked_name, clean_name, to_pixels
from mm_cb.attacks.search import Found, make_objective
from mm_cb.attacks.suffix import ProbeTerm, Sent, find_suffix
from mm_cb.core.progress import CountedWork, Progress, clock
from mm_cb.core.records import Item
from mm_cb.core.workers import Workers
from mm_cb.data.behaviors_file import Behavior, grey_canvas
from mm_cb.data.pictures import open_picture
from mm_cb.data.prompts_file import ImportedPrompt
from mm_cb.inference.cached_chunks import chunks, once
from mm_cb.inference.subjects import Subject
from mm_cb.models.chat import control_token

Left = Mapping[int | None, Tensor]
"""What a search leaves: None → the selected picture of every row, step → the iterate there; pixels ``(B, 3, H, W)``."""

JudgedPictures = Mapping[int | None, Mapping[int, JudgedPicture]]
"""Step (None = the selected picture) → row → what was judged."""


def attack_behaviors(
    subject: Subject,
    behaviors: Sequence[Behavior],
    config: AttackConfig,
    folder: Path,
    judge: OutcomeOf,
    progress: Progress,
    *,
    starts: Mapping[str, str] | None = None,
    responses: Mapping[str, str] | None = None,
    prompts: Mapping[str, Sequence[ImportedPrompt]] | None = None,
    workers: Workers[Attacker] | None = None,
) -> list[Item]:
    """Attack a subject with every behaviour; finished batches in ``folder`` are read back, not repeated.

    A batch is the unit that is written, whole: its composition follows from the behaviours and from the verdicts of
    earlier restarts alone, so that an interrupted run ends with the same bytes as an uninterrupted one. With
    ``checkpoint_seconds`` a batch that was interrupted in the middle goes on from its last saved state. ``workers``
    attack several batches at a time, each as this process would.

    Returns:
        One record of items.jsonl per behaviour, image paths relative to ``folder``.
    """
    universal = config.entry.universal
    every = universal or config.entry.search == "vary"  # what is tried again whatever came of it
    fewer = [f"--steps ({config.steps})", *([f"--samples ({config.samples})"] if config.samples else [])]
    shorter = f"fewer {', '.join(fewer)} or --restarts ({config.restarts}), fewer behaviours, --shard, or a GPU"
    task = progress.task(f"{subject.name}: {config.name}", total=len(behaviors) * config.runs, shorter=shorter)
    job = Job(subject, config, folder, judge, task, starts, responses, prompts)
    answers: dict[str, list[Answer]] = {b.id: [] for b in behaviors}
    for restart in range(config.runs):
        open_ones = [b for b in behaviors if every or (job.tried(b, restart) and not _broken(answers[b.id]))]
        task.advance(len(behaviors) - len(open_ones))
        batches = chunks(open_ones, len(open_ones) if universal else config.batch)
        stem = f"{config.name}-s{config.seed}-r{restart}"
        paths = [folder / "parts" / f"{stem}-{number:04d}.json" for number in range(len(batches))]
        parts = _parts(job, batches, restart, paths, workers)
        for path, batch, records in zip(paths, batches, parts, strict=True):
            for record in records:
                answer = Answer.from_json(record)
                answers[answer.id].append(answer)
            for state in path.parent.glob(f"{path.stem}.*.safetensors"):
                state.unlink()
            task.advance(len(batch))
    items = [
        make_item(
            subject.name,
            config,
            behavior,
            answers[behavior.id],
            target_outcome=judge(behavior, behavior.target),
            pictured=job.pictured,
        )
        for behavior in behaviors
    ]
    if universal:
        known = seen(config, behaviors)
        for item in items:
            item["part"] = "made_for" if item["id"] in known else "picture_held_out"
    return items


def _broken(answers: Sequence[Answer]) -> bool:
    return any(answer.outcome == "harmful" for answer in answers)


def _parts(
    job: Job,
    batches: Sequence[Sequence[Behavior]],
    restart: int,
    paths: Sequence[Path],
    workers: Workers[Attacker] | None,
) -> Iterator[list[AnswerRecord]]:
    """The answers of every batch, each computed once."""
    if workers is None:
        return (
            once(path, partial(_batch_records, job, batch, restart, path))
            for path, batch in zip(paths, batches, strict=True)
        )
    pieces = []
    for path, batch in zip(paths, batches, strict=True):
        beside = [_of(held, batch) for held in (job.starts, job.responses, job.prompts)]
        pieces.append((job.config, job.folder, batch, restart, path, *beside))
    return workers.map(_part, pieces)


def _of(held: Mapping[str, Any] | None, batch: Sequence[Behavior]) -> dict[str, Any] | None:
    return None if held is None else {b.id: held[b.id] for b in batch if b.id in held}


def _part(
    attacker: Attacker,
    config: AttackConfig,
    folder: Path,
    batch: Sequence[Behavior],
    restart: int,
    path: Path,
    *beside: Mapping[str, Any] | None,
) -> list[AnswerRecord]:
    """The answers of one batch, in a process that attacks some of a run's."""
    unseen = CountedWork("", len(batch), 0, lambda task, complete: None)
    job = Job(attacker.subject, config, folder, attacker.judge, unseen, *beside)
    records: list[AnswerRecord] = once(path, partial(_batch_records, job, batch, restart, path))
    return records


def _batch_records(job: Job, batch: Sequence[Behavior], restart: int, path: Path) -> list[AnswerRecord]:
    """The answers of one batch, as its part file holds them."""
    alone = _attack_batch if job.pictured else _attack_texts
    attack = _attack_universal if job.config.entry.universal else alone
    return [answer.as_json() for answer in attack(job, batch, restart, path)]


def _attack_batch(job: Job, batch: Sequence[Behavior], restart: int, path: Path) -> list[Answer]:
    """Attack one batch once and judge the files it leaves; pictures of one size go together."""
    pictures = [grey_canvas(job.subject.model.canvas) if b.image is None else open_picture(b.image) for b in batch]
    found: dict[str, list[Answer]] = {}
    for rows in files.by_size(pictures):
        width, height = pictures[rows[0]].size
        state = path.with_name(f"{path.stem}.{width}x{height}.safetensors")
        asked = ask(job, [batch[i] for i in rows], [pictures[i] for i in rows], restart)
        for answer in _attack_group(job, asked, restart, state):
            found.setdefault(answer.id, []).append(answer)
        job.task.hold(len(rows))
    return [answer for behavior in batch for answer in found[behavior.id]]


def ask(job: Job, behaviors: Sequence[Behavior], pictures: Sequence[Image.Image], restart: int) -> Asked:
    """Behaviours as the attack puts them, with their clean pictures saved."""
    prompt = resolved(job.config.entry.ask)
    prompts = list(behaviors) if prompt is None else [replace(b, prompt=prompt(b)) for b in behaviors]
    if job.config.entry.search == "vary":
        prompts = _varied_prompts(job, behaviors, pictures, restart)
    clean = [
        files.save(job.folder, clean_name(b.id), to_pixels(picture))
        for b, picture in zip(behaviors, pictures, strict=True)
    ]
    return Asked(job.subject, behaviors, prompts, clean)


def _varied_prompts(
    job: Job, behaviors: Sequence[Behavior], pictures: Sequence[Image.Image], restart: int
) -> list[Behavior]:
    """The prompts of one variation; one that has come to spell a control token of the model's stays as it was."""
    tokenizer = job.subject.model.processor.tokenizer
    texts = [_vary(job.config, b, picture, restart)[1] for b, picture in zip(behaviors, pictures, strict=True)]
    return [
        b if control_token(text, tokenizer) else replace(b, prompt=text)
        for b, text in zip(behaviors, texts, strict=True)
    ]


def _vary(config: AttackConfig, behavior: Behavior, picture: Image.Image, draw: int) -> tuple[Image.Image, str]:
    return varied(behavior, picture, vary=config.vary, strength=config.strength, seed=config.seed, draw=draw)


def _attack_group(job: Job, asked: Asked, restart: int, state: Path) -> list[Answer]:
    """Attack behaviours whose pictures have one size."""
    config, pictures, begun = job.config, files.images(asked.clean), time.monotonic()
    clean = torch.stack([one.pixels for one in asked.clean]).to(job.subject.model.device)
    target = TargetObjective(job.subject, asked.prompts, pictures)
    objective = objective_of(job, asked, target, restart)
    if config.balance and isinstance(objective, AdaptiveObjective):
        objective.balance(clean)
    found = None
    if config.entry.optimises:
        found = search_batch(job, asked, objective, clean, restart, state)
    if isinstance(objective, Relaxed):
        assert found is not None
        judged: JudgedPictures = {None: _judge_relaxed(job, asked, objective, found)}
    else:
        left: Left = {None: _without_search(job, asked, clean, restart)} if found is None else found.pictures
        judged = _judge_pictures(job, asked, left, target, objective, restart, begun)
    with torch.no_grad():
        loss_clean = target(clean)
    return _answers(
        job, asked, judged, loss_clean, objective, restart, lambda answer, step, row: logged(answer, found, step, row)
    )


def _without_search(job: Job, asked: Asked, clean: Tensor, restart: int) -> Tensor:
    """The pictures of an attack that minimises nothing."""
    search = job.config.entry.search
    if search == "noise":
        return job.config.threat.placebo(clean, generators(job.config, restart, asked.behaviors))
    if search == "draw":
        draw = resolved(job.config.entry.draw)
        size = (clean.shape[2], clean.shape[3])
        return torch.stack([to_pixels(draw(behavior, size)) for behavior in asked.behaviors]).to(clean)
    if search == "vary":
        pairs = zip(asked.behaviors, asked.clean, strict=True)
        return torch.stack([to_pixels(_vary(job.config, b, one.image, restart)[0]) for b, one in pairs]).to(clean)
    return clean


def _judge_relaxed(job: Job, asked: Asked, objective: Relaxed, found: Found) -> dict[int, JudgedPicture]:
    """Answers to what is no picture, straight from the variable."""
    said = objective.answers(found.result.images, job.config.max_new_tokens)
    answers = with_verdicts(asked, said, found.result.losses, job.judge, weighed=False)
    return {i: JudgedPicture(answer) for i, answer in enumerate(answers)}


def _attack_universal(job: Job, behaviors: Sequence[Behavior], restart: int, path: Path) -> list[Answer]:
    """One picture from the grey canvas, for many texts together; judged on every behaviour by itself."""
    config = job.config
    picture = grey_canvas(job.subject.model.canvas)
    clean = to_pixels(picture).unsqueeze(0).to(job.subject.model.device)
    learnt, seed = made_for(config, behaviors), (config.seed, restart)
    objective = UniversalObjective(job.subject, behaviors, picture, learnt, minibatch=config.minibatch, seed=seed)
    state = path.with_name(f"{path.stem}.universal.safetensors")
    found = search_batch(job, ask(job, behaviors[:1], [picture], restart), objective, clean, restart, state)
    losses = {step: objective.each(pixels.to(clean)) for step, pixels in found.pictures.items()}
    place = {behavior.id: row for row, behavior in enumerate(behaviors)}

    def log(answer: Answer, step: int | None, row: int) -> Answer:
        at = place[answer.id]
        own = replace(logged(answer, found, step, 0), objective_logged=round(losses[step][at], 5))
        return own if at == 0 else replace(own, curve=None)  # of the mean, which is one for all

    answers = []
    for group in chunks(behaviors, config.batch):
        asked = ask(job, group, [picture] * len(group), restart)
        target = TargetObjective(job.subject, group, [picture] * len(group))
        left = {step: pixels.expand(len(group), -1, -1, -1) for step, pixels in found.pictures.items()}
        judged = _judge_pictures(job, asked, left, target, target, restart, time.monotonic())
        with torch.no_grad():
            loss_clean = target(clean.expand(len(group), -1, -1, -1))
        answers += _answers(job, asked, judged, loss_clean, target, restart, log)
    return answers


def _judge_pictures(
    job: Job, asked: Asked, left: Left, target: TargetObjective, objective: Objective, restart: int, begun: float
) -> JudgedPictures:
    """Save, read back and judge the selected pictures and the kept iterates: step → row → what was judged.

    A behaviour that stands still leaves no second file and no second record. Losses are computed for whole batches, as
    an objective has them; there its earlier file stands in.
    """
    config = job.config
    judged: dict[int | None, dict[int, JudgedPicture]] = {}
    saved: list[SavedPicture] = list(asked.clean)
    pictures = sum(step is None or not seen_before(left, step, i) for step in left for i in range(len(saved)))
    drawn = Drawn(job.task, len(saved), pictures * config.samples * (2 if config.artefacts else 1), begun)
    for step in sorted(left, key=lambda step: step or 0):
        rows = [i for i in range(len(saved)) if step is None or not seen_before(left, step, i)]
        if not rows:
            continue
        stem = f"{config.name}-s{config.seed}-r{restart}" + ("" if step is None else f"-i{step}")
        for i in rows:
            saved[i] = files.save(job.folder, attacked_name(asked.behaviors[i].id, stem), left[step][i])
        answers = judge_files(asked, saved, target, objective, config, job.judge)
        judged[step] = {}
        for i in rows:
            samples: Sequence[Sampled] = ()
            if config.samples:
                draws = stream(asked.behaviors[i], config.seed, restart, 0 if step is None else step)
                samples = judge_samples(asked.rows([i]), saved[i].image, config, job.judge, draws, drawn.show)
            judged[step][i] = JudgedPicture(answers[i], samples, saved[i])
    return judged


def _attack_texts(job: Job, batch: Sequence[Behavior], restart: int, path: Path) -> list[Answer]:
    """Attack one batch once without making a picture, and judge what the model says to the texts."""
    asked = texts.ask(job.subject, batch, job.prompts, restart)
    objective, found = None, None
    sent: list[Sent] = []
    if job.config.entry.search == "suffix":
        sent = [_suffix(job, behavior, restart) for behavior in batch]
        asked = replace(asked, prompts=[replace(b, prompt=one.prompt) for b, one in zip(batch, sent, strict=True)])
    if job.config.entry.optimises and not sent:
        objective = make_objective(job.subject, asked.prompts, asked.pictures, job.config)
        assert isinstance(objective, Relaxed)
        found = search_batch(job, asked, objective, objective.start(), restart, path.with_suffix(".text.safetensors"))
        judged: JudgedPictures = {None: _judge_relaxed(job, asked, objective, found)}
    else:
        draws = [stream(behavior, job.config.seed, restart) for behavior in batch]
        total = len(batch) * job.config.samples * (2 if job.config.artefacts else 1)
        drawn = Drawn(job.task, len(batch), total, time.monotonic())
        judged = {None: texts.judge(asked, job.config, job.judge, draws, drawn.show)}
    plain = texts.target_losses(replace(asked, prompts=batch))

    def log(answer: Answer, step: int | None, row: int) -> Answer:
        return with_suffix(answer, sent[row]) if sent else logged(answer, found, step, row)

    return _answers(job, asked, judged, plain, objective, restart, log)


def _suffix(job: Job, behavior: Behavior, restart: int) -> Sent:
    """Search a behaviour's suffix, and show how far it is."""
    steps, begun = job.config.steps, time.monotonic()

    def show(step: int, loss: float) -> None:
        left = clock((time.monotonic() - begun) / (step + 1) * (steps - step - 1))
        job.task.advance(0, note=f"step {step + 1} of {steps} of `{behavior.id}`, {left} left in it, loss {loss:.2f}")

    draws = stream(behavior, job.config.seed, restart)
    candidates, term = job.config.candidates, None
    if job.config.entry.needs_probe:
        term = ProbeTerm(job.config.term_weight, job.config.max_new_tokens)
    return find_suffix(
        job.subject, behavior, steps=steps, candidates=candidates, generator=draws, probe_term=term, show=show
    )


def _answers(
    job: Job,
    asked: Asked,
    judged: JudgedPictures,
    loss_clean: Tensor,
    objective: Objective | None,
    restart: int,
    log: Callable[[Answer, int | None, int], Answer],
) -> list[Answer]:
    """Every answer with what its run says of it, and the JSON beside its picture."""
    answers = []
    for step, rows in judged.items():
        for i, picture in rows.items():
            greedy = replace(
                picture.greedy,
                restart=restart,
                start=job.starts[asked.behaviors[i].id] if job.starts and restart == 0 else None,
                iterate=step,
                loss_clean=round(float(loss_clean[i]), 5),
            )
            picture = replace(picture, greedy=log(greedy, step, i))
            if job.config.artefacts and picture.file is not None and objective is not None:
                write_artefact(picture, asked.rows([i]), job.config, objective, i, job.folder)
            answers += picture.answers()
    return answers
