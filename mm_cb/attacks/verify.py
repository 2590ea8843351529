"""``mm-cb attack verify``: the numbers of a run again, from its pictures, their JSON and the model.

Of every picture: its hash, its distance from the clean one, its losses and the greedy answer, as the attack had them.
Of the run: the verdicts, by the exact judge where the model has one, and everything that is counted over items. A run
that somebody rewrote consistently is an honest run of what it then states.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from mm_cb.attacks.config import RUN_WIDE, AttackConfig, AttackRecipe, from_artefact, from_recipe, read_recipe
from mm_cb.attacks.judged_files import Asked, judge_files
from mm_cb.attacks.objectives.adaptive import AdaptiveObjective
from mm_cb.attacks.objectives.target import Objective, TargetObjective
from mm_cb.attacks.outputs import parts_of, summaries
from mm_cb.attacks.records import Answer, AnswerRecord, Artefact, attacked, make_item
from mm_cb.attacks.run import judge_of
from mm_cb.attacks.saved import SavedPicture, by_size, clean_name, images, read
from mm_cb.attacks.search import make_objective
from mm_cb.attacks.shards import Shard
from mm_cb.attacks.verify_texts import AnswerToText, Row, disagreements, texts_again
from mm_cb.core.checked import read_json, read_record
from mm_cb.core.errors import UserError
from mm_cb.core.files import text_sha256
from mm_cb.core.progress import Progress, console
from mm_cb.core.reading import json_lines
from mm_cb.core.records import Item
from mm_cb.core.runs import read_run
from mm_cb.data.behaviors_file import KEPT_AS, Behavior, kept_behaviors
from mm_cb.data.prompts_file import KEPT_AS as PROMPTS
from mm_cb.data.prompts_file import read_prompts
from mm_cb.inference.cached_chunks import chunks
from mm_cb.inference.source import source_again
from mm_cb.inference.subjects import Subject, load_subject
from mm_cb.inference.tolerance import TOLERANCE, dtype_of, tolerance
from mm_cb.metrics.agreement import completions_of
from mm_cb.metrics.observations import starts_with
from mm_cb.metrics.results import read_results
from mm_cb.metrics.whole import whole_items

_AGAIN = "Do not use the run's numbers; run the attack again."


@dataclass(frozen=True)
class _Run:
    """A run as its files state it."""

    folder: Path
    recipe: AttackRecipe
    configs: Mapping[str, AttackConfig]
    asked: Mapping[str, Behavior]
    items: list[Item]


@dataclass(frozen=True)
class _Picture:
    """What a run recorded of an attacked picture."""

    config: AttackConfig
    behavior: Behavior
    image: str
    """In the run's folder."""
    tried: Answer
    """In items.jsonl, with the greedy answer."""
    told: Artefact
    """In the JSON beside it."""
    stated: AttackConfig
    """The attack, as that JSON has it."""


def verify_run(
    folder: str | Path,
    *,
    model: str | None = None,
    adapter: str | None = None,
    base: str | None = None,
    device: str = "cpu",
) -> list[Row]:
    """Verify a run and print a table.

    Args:
        folder: A finished run of ``mm-cb attack``.
        model: Where its model lies here; None = where the run found it.
        adapter: Where its adapter lies here.
        base: Where the base of a breaker without adapter lies here.
        device: Torch device.

    Raises:
        UserError: If something disagrees (the first is named), or the folder holds nothing to verify.
    """
    folder = Path(folder)
    run = _read(folder)
    _check_items(run)
    answers, unseen = _texts(run)
    pictures, verdicts = _pictures(run, wanted=not answers and not unseen), _check_verdicts(run)
    sent = folder / PROMPTS
    prompts = read_prompts(sent, [b.id for b in kept_behaviors(folder)]) if sent.exists() else None
    source = source_again(folder, read_run(folder), "give `--{}`: where it lies here", device, model, adapter, base)
    backend = next(iter(run.configs.values())).image_backend
    subject = load_subject(source, run.items[0]["subject"], backend)
    as_run = run.recipe.get("device"), run.recipe.get("dtype", "float32")
    same_arithmetic = as_run == (device.partition(":")[0], "float32")
    rows: list[Row] = []
    with Progress() as progress:
        task = progress.task("verify", total=len(pictures) + len(answers))
        for name, config in run.configs.items():
            for group in chunks([one for one in pictures if one.config.name == name], config.batch):
                rows += _again(subject, folder, group, same_arithmetic)
                task.advance(len(group))
            for number in sorted({one.tried.restart for by, one in answers if by.name == name}):
                own = [one for by, one in answers if by.name == name and one.tried.restart == number]
                for texts in chunks(own, config.batch):
                    rows += texts_again(subject, config, prompts, texts, same_arithmetic)
                    task.advance(len(texts))
    unit = "pictures and texts" if answers else "pictures"
    _show(rows, unit, verdicts, same_arithmetic, dtype_of(subject.model))
    if unseen:
        console().print(
            f"not asked again: {unseen} of {unseen + len(answers)} answers to texts, beside pictures of yours"
        )
    if wrong := [row for row in rows if row.disagreements]:
        raise UserError(
            f"`{folder}`: `{wrong[0].image}` does not hold what the run recorded: {'; '.join(wrong[0].disagreements)} "
            f"({len(wrong)} of {len(rows)} {unit} disagree). {_AGAIN}"
        )
    _check_counts(run)
    return rows


def _read(folder: Path) -> _Run:
    content = read_run(folder)
    recipe, asked = read_recipe(content, folder), kept_behaviors(folder)
    asked = Shard.parse(recipe["shard"]).part(asked) if recipe.get("shard") else asked
    items = attacked(whole_items(folder, content), folder)
    return _Run(folder, recipe, from_recipe(recipe, content["seed"]), {b.id: b for b in asked}, items)


def _check_items(run: _Run) -> None:
    """Every behaviour under every attack, each item as its candidates and the run's settings give it."""
    path = run.folder / "items.jsonl"
    wanted = {(name, behavior) for name in run.configs for behavior in run.asked}
    if other := sorted(wanted ^ {(item["condition"], item["id"]) for item in run.items}):
        raise UserError(
            f"`{path}` must hold every behaviour under every attack of run.json, and no others: see `{other[0][1]}` "
            f"under {other[0][0]}. {_AGAIN}"
        )
    for item in run.items:
        there: Mapping[str, Any] = item
        config, behavior = run.configs[item["condition"]], run.asked[item["id"]]
        pictured = item.get("clean_image", "") is not None
        made: Mapping[str, Any] = make_item(item["subject"], config, behavior, _tries(item), pictured=pictured)
        own = {"candidates", *(("prefix_emitted", "stopped_early") if "judge" in item else ())}  # by verdicts of then
        if wrong := [key for key, value in made.items() if key not in own and there.get(key, value) != value]:
            raise UserError(
                f"`{path}`: {_who(item)} has another {wrong[0]} than its candidates and run.json give. {_AGAIN}"
            )


def _tries(item: Item) -> list[Answer]:
    """An item's candidates as the answers that they were made from."""
    tries = []
    for one in item.get("candidates") or ():
        emitted = starts_with(one["completion"], item["target"])
        record: AnswerRecord = {"loss_clean": item["loss_clean"], **one, "id": item["id"], "prefix_emitted": emitted}
        record.pop("judge_score", None)
        tries.append(Answer.from_json(record))
    return tries


def _pictures(run: _Run, *, wanted: bool) -> list[_Picture]:
    """The attacked pictures, which are those that the items name; ``wanted`` = there must be some."""
    tried = [(item, one) for item in run.items for one in _tries(item)]
    named = [(item, one, one.image) for item, one in tried if one.image is not None and not one.sample]
    found = {path.relative_to(run.folder).as_posix() for path in (run.folder / "images").glob("*/**/*.png")}
    if wanted and not found:
        raise UserError(f"`{run.folder}` must hold attacked pictures under images/, there are none to verify.")
    if other := sorted(found ^ {image for _, _, image in named}):
        raise UserError(f"`{run.folder}`: images/ and items.jsonl must hold the same pictures, see `{other[0]}`.")
    pictures = []
    for item, one, image in named:
        told = read_record((run.folder / image).with_suffix(".json"), Artefact)
        stated = from_artefact(told["attack"], told.get("protocol", {}))
        pictures.append(_Picture(run.configs[item["condition"]], run.asked[item["id"]], image, one, told, stated))
    if pictures and any("start" in one.told for one in pictures) != pictures[0].config.chain:
        raise UserError(f"`{run.folder}`: run.json and the JSON beside its pictures differ in `chain`. {_AGAIN}")
    return pictures


def _texts(run: _Run) -> tuple[list[tuple[AttackConfig, AnswerToText]], int]:
    """The greedy answers to what left no picture, each with its attack; and how many of them cannot be had again.

    These are answers to prompts beside a user's picture, which the run does not keep. A relaxation's are not looked at.
    """
    kept = json_lines(run.folder / KEPT_AS, "behaviours")
    beside = {record["id"] for _, record in kept if record.get("image") is not None}
    tried = [(run.configs[item["condition"]], run.asked[item["id"]], one) for item in run.items for one in _tries(item)]
    found = [
        (config, AnswerToText(behavior, one))
        for config, behavior, one in tried
        if not config.entry.relaxation and one.image is None and not one.sample
    ]
    again = [(by, one) for by, one in found if not (by.entry.imported and one.behavior.id in beside)]
    return again, len(found) - len(again)


def _check_verdicts(run: _Run) -> str:
    """Hold the run's own verdicts to the exact judge, where there is one; a line that says how many."""
    judge, again, total = judge_of(run.recipe["model"]), 0, 0
    for item, one in [(each, answer) for each in run.items for answer in completions_of(each)]:
        found, said, total = judge(run.asked[item["id"]], one["completion"]), one.get("outcome"), total + 1
        if "judge" in item or "not_judged" in (found, said):
            continue  # another judge's since, see `mm-cb judge`, or nobody's
        if found != said:
            raise UserError(
                f"`{run.folder / 'items.jsonl'}` calls the answer to `{one.get('image')}` ({_who(item)}) {said}, "
                f"judged again it is {found}. Do not use the run's numbers."
            )
        again += 1
    return f"{again} of {total} verdicts judged again, the same"


def _check_counts(run: _Run) -> None:
    """What is made of items and curves is what they give."""
    made = summaries(run.items, parts_of(run.folder), [*run.configs.values()], run.recipe.get("dtype", "float32"))
    for name, content in made.items():
        stated, again = read_json(run.folder / name), json.loads(json.dumps(content))
        if name == "protocol.json":  # beside it stand words for pages
            stated, again = stated.get("k") if isinstance(stated, dict) else None, again["k"]
        if name == "results.json":
            read_results(run.folder / name)  # each measurement is one
            for row in stated["measurements"]:
                row.get("counts", {}).pop("proxy", None)  # a label by `mm-cb judge`
        if stated != again:
            raise UserError(f"`{run.folder / name}` must say what the run holds; made again it differs. {_AGAIN}")


def _again(subject: Subject, folder: Path, pictures: Sequence[_Picture], same_arithmetic: bool) -> list[Row]:
    """Everything of these pictures of one attack again; those of one size go together."""
    files = [(read(folder, one.image), read(folder, clean_name(one.behavior.id))) for one in pictures]
    rows = []
    for places in by_size([clean.image for _, clean in files]):
        group, held = [pictures[i] for i in places], [files[i] for i in places]
        for one, found, (saved, clean) in zip(group, _answers(subject, folder, group, held), held, strict=True):
            other = found.completion != one.tried.completion
            wrong = _disagreements(one, found, saved, clean, dtype_of(subject.model))
            wrong += ["the model's answer is another one than the run stored"] * (other and same_arithmetic)
            numbers = found.linf, one.tried.loss or 0.0, found.loss or 0.0
            rows.append(Row(one.image, *numbers, tuple(wrong), other))
    return rows


def _answers(
    subject: Subject, folder: Path, group: Sequence[_Picture], files: Sequence[tuple[SavedPicture, SavedPicture]]
) -> list[Answer]:
    """What the attack's own code says of pictures of one size; files are the attacked and the clean one."""
    told, behaviors = [one.told for one in group], [one.behavior for one in group]
    prompts = [replace(one.behavior, prompt=one.told.get("sent", one.behavior.prompt)) for one in group]
    saved, clean = [one for one, _ in files], [one for _, one in files]
    asked = Asked(subject, behaviors, prompts, clean)
    target = TargetObjective(subject, prompts, images(clean))
    objective: Objective = target
    if told[0]["objective"] != TargetObjective.__name__:
        forced = [one["response"] for one in told]
        objective = make_objective(subject, prompts, images(clean), group[0].config, forced)
        if isinstance(objective, AdaptiveObjective):
            objective.weight = torch.tensor([_weight(one, folder) for one in group], device=subject.model.device)
    answers = judge_files(asked, saved, target, objective, group[0].config, lambda *_: "not_judged")
    with torch.no_grad():
        losses = target(torch.stack([one.pixels for one in clean]).to(subject.model.device)).tolist()
    return [replace(one, loss_clean=round(loss, 5)) for one, loss in zip(answers, losses, strict=True)]


def _weight(one: _Picture, folder: Path) -> float:
    if (weight := one.told["weight"]) is None:
        file = (folder / one.image).with_suffix(".json")
        raise UserError(f"`{file}` `weight` must be a number under {one.config.name}, got null. {_AGAIN}")
    return weight


def _disagreements(one: _Picture, found: Answer, saved: SavedPicture, clean: SavedPicture, dtype: str) -> list[str]:
    """In phrases, what is not as the run recorded it; of another answer the base's loss is not known."""
    threat, tried = one.config.threat, one.tried
    hashes = {
        "picture": (one.told["sha256"], saved.sha256),
        "clean picture": (one.told["clean_sha256"], clean.sha256),
        "answer": (one.told["completion_sha256"], text_sha256(tried.completion)),
    }
    wrong = [f"the {n} is another one than its JSON has (SHA-256)" for n, (told, now) in hashes.items() if told != now]
    if one.config.entry.stays_in_threat and not (found.linf <= threat.levels and threat.holds(found.distance)):
        wrong.append(f"the picture is outside {threat.text} of {threat.levels}/255")
    run_wide = {key: getattr(one.config, key) for key in RUN_WIDE}
    if one.stated.annealing != one.config.annealing or replace(one.stated, **run_wide) != one.config:
        wrong.append("its JSON states other settings than run.json")
    other = found.completion != tried.completion
    for told in (tried.as_json(), one.told):
        wrong += disagreements(told, found.as_json(), other, dtype)
    return list(dict.fromkeys(wrong))


def _who(item: Item) -> str:
    return f"`{item.get('id')}` under {item.get('condition')}"


def _show(rows: Sequence[Row], unit: str, verdicts: str, same_arithmetic: bool, dtype: str) -> None:
    from rich.table import Table

    table = Table("picture or text", "epsilon", "loss recorded", "loss found", "verdict")
    for row in rows:
        verdict = "; ".join(row.disagreements) or "agrees"
        table.add_row(row.image, f"{row.epsilon}/255", f"{row.loss_recorded:.5f}", f"{row.loss_found:.5f}", verdict)
    console().print(table)
    agree, others = sum(not row.disagreements for row in rows), sum(row.other_answer for row in rows)
    share = "" if dtype == "float32" else f" or {tolerance(100, dtype):.2g} %, whichever is more"
    console().print(f"{agree} of {len(rows)} {unit} agree ({dtype} losses to {TOLERANCE:g}{share}; epsilon exactly)")
    note = "" if same_arithmetic else " (another device, or not float32: no disagreement)"
    console().print(f"{others} of {len(rows)} greedy answers differ when generated again{note}; {verdicts}")
