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

from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.config_files import AttackRecipe, from_artefact, from_recipe, read_recipe
from mm_cb.attacks.outputs import parts_of, summaries
from mm_cb.attacks.records import Answer, AnswerRecord, Artefact, attacked, make_item
from mm_cb.attacks.run import judge_of
from mm_cb.attacks.shards import Shard
from mm_cb.attacks.verify_answers import AGAIN, Recorded, RecordedPicture, Row, pictures_again, texts_again
from mm_cb.core.checked import read_json, read_record
from mm_cb.core.closing import cut_path, say
from mm_cb.core.errors import UserError
from mm_cb.core.progress import Progress, console
from mm_cb.core.reading import json_lines
from mm_cb.core.records import Item
from mm_cb.core.runs import read_run
from mm_cb.core.terminal import columns
from mm_cb.data.behaviors_file import KEPT_AS, Behavior, kept_behaviors
from mm_cb.data.prompts_file import KEPT_AS as PROMPTS
from mm_cb.data.prompts_file import read_prompts
from mm_cb.inference.cached_chunks import chunks
from mm_cb.inference.source import source_again
from mm_cb.inference.subjects import load_subject
from mm_cb.inference.tolerance import TOLERANCE, dtype_of, tolerance
from mm_cb.metrics.agreement import completions_of
from mm_cb.metrics.observations import starts_with
from mm_cb.metrics.results import read_results
from mm_cb.metrics.whole import whole_items

_NUMBERS = 38
"""Columns of the table beside the name of a picture."""


@dataclass(frozen=True)
class _Run:
    """A run as its files state it."""

    folder: Path
    recipe: AttackRecipe
    configs: Mapping[str, AttackConfig]
    asked: Mapping[str, Behavior]
    items: list[Item]

    @property
    def greedy(self) -> list[Recorded]:
        """The answers that were not drawn at random."""
        told = [(item, one) for item in self.items for one in _tries(item) if not one.sample]
        return [Recorded(self.configs[item["condition"]], self.asked[item["id"]], one) for item, one in told]


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
    texts, unseen = _texts(run)
    pictures, verdicts = _pictures(run, wanted=not texts and not unseen), _check_verdicts(run)
    sent = folder / PROMPTS
    prompts = read_prompts(sent, [b.id for b in kept_behaviors(folder)]) if sent.exists() else None
    source = source_again(folder, read_run(folder), "give `--{}`: where it lies here", device, model, adapter, base)
    subject = load_subject(source, run.items[0]["subject"], next(iter(run.configs.values())).image_backend)
    as_run = run.recipe.get("device"), run.recipe.get("dtype", "float32")
    same_arithmetic = as_run == (device.partition(":")[0], "float32")
    rows: list[Row] = []
    with Progress() as progress:
        task = progress.task("verify", total=len(pictures) + len(texts))
        for name, config in run.configs.items():
            for group in chunks([one for one in pictures if one.config.name == name], config.batch):
                rows += pictures_again(subject, folder, group, same_arithmetic)
                task.advance(len(group))
            own = [one for one in texts if one.config.name == name]
            for number in sorted({one.answer.restart for one in own}):
                for some in chunks([one for one in own if one.answer.restart == number], config.batch):
                    rows += texts_again(subject, prompts, some, same_arithmetic)
                    task.advance(len(some))
    unit = "pictures and texts" if texts else "pictures"
    _show(rows, unit, verdicts, same_arithmetic, dtype_of(subject.model))
    if unseen:
        say(f"not asked again: {unseen} of {unseen + len(texts)} answers to texts, beside pictures of yours")
    if wrong := [row for row in rows if row.disagreements]:
        raise UserError(
            f"`{folder}`: `{wrong[0].image}` does not hold what the run recorded: {'; '.join(wrong[0].disagreements)} "
            f"({len(wrong)} of {len(rows)} {unit} disagree). {AGAIN}"
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
            f"under {other[0][0]}. {AGAIN}"
        )
    for item in run.items:
        there: Mapping[str, Any] = item
        config, behavior = run.configs[item["condition"]], run.asked[item["id"]]
        pictured = item.get("clean_image", "") is not None
        made: Mapping[str, Any] = make_item(item["subject"], config, behavior, _tries(item), pictured=pictured)
        own = {"candidates", *(("prefix_emitted", "stopped_early") if "judge" in item else ())}  # by verdicts of then
        if wrong := [key for key, value in made.items() if key not in own and there.get(key, value) != value]:
            raise UserError(
                f"`{path}`: {_who(item)} has another {wrong[0]} than its candidates and run.json give. {AGAIN}"
            )


def _tries(item: Item) -> list[Answer]:
    """An item's candidates as the answers that they were made from."""
    told: list[AnswerRecord] = [
        {"loss_clean": item["loss_clean"], "prefix_emitted": False, **one, "id": item["id"]}
        for one in item.get("candidates") or ()
    ]
    tries = [Answer.from_json(one) for one in told]
    return [replace(one, prefix_emitted=starts_with(one.completion, item["target"])) for one in tries]


def _pictures(run: _Run, *, wanted: bool) -> list[RecordedPicture]:
    """The attacked pictures, which are those that the items name; ``wanted`` = there must be some."""
    named = [one for one in run.greedy if one.answer.image is not None]
    found = {path.relative_to(run.folder).as_posix() for path in (run.folder / "images").glob("*/**/*.png")}
    if wanted and not found:
        raise UserError(f"`{run.folder}` must hold attacked pictures under images/, there are none to verify.")
    if other := sorted(found ^ {one.name for one in named}):
        raise UserError(f"`{run.folder}`: images/ and items.jsonl must hold the same pictures, see `{other[0]}`.")
    pictures = []
    for one in named:
        told = read_record((run.folder / one.name).with_suffix(".json"), Artefact)
        stated = from_artefact(told["attack"], told.get("protocol", {}))
        pictures.append(RecordedPicture(**vars(one), told=told, stated=stated))
    if pictures and any("start" in one.told for one in pictures) != pictures[0].config.chain:
        raise UserError(f"`{run.folder}`: run.json and the JSON beside its pictures differ in `chain`. {AGAIN}")
    return pictures


def _texts(run: _Run) -> tuple[list[Recorded], int]:
    """The greedy answers to what left no picture, and how many of them cannot be had again.

    These are answers to prompts beside a user's picture, which the run does not keep. A relaxation's are not looked at.
    """
    kept = json_lines(run.folder / KEPT_AS, "behaviours")
    beside = {record["id"] for _, record in kept if record.get("image") is not None}
    texts = [one for one in run.greedy if one.answer.image is None and not one.config.entry.relaxation]
    again = [one for one in texts if not (one.config.entry.imported and one.behavior.id in beside)]
    return again, len(texts) - len(again)


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
            raise UserError(f"`{run.folder / name}` must say what the run holds; made again it differs. {AGAIN}")


def _who(item: Item) -> str:
    return f"`{item.get('id')}` under {item.get('condition')}"


def _show(rows: Sequence[Row], unit: str, verdicts: str, same_arithmetic: bool, dtype: str) -> None:
    from rich.table import Table

    table = Table("picture or text", "epsilon", "recorded", "found", "verdict", box=None, pad_edge=False)
    for row in rows:
        verdict = "; ".join(row.disagreements) or "agrees"
        name, losses = (
            cut_path(str(row.image), columns() - _NUMBERS),
            (f"{row.loss_recorded:.5f}", f"{row.loss_found:.5f}"),
        )
        table.add_row(name, f"{row.epsilon}/255", *losses, verdict)
    console().print(table)
    agree, others = sum(not row.disagreements for row in rows), sum(row.other_answer for row in rows)
    share = "" if dtype == "float32" else f" or {tolerance(100, dtype):.2g} %, whichever is more"
    say(f"{agree} of {len(rows)} {unit} agree ({dtype} losses to {TOLERANCE:g}{share}; epsilon exactly)")
    note = "" if same_arithmetic else " (another device, or not float32: no disagreement)"
    say(f"{others} of {len(rows)} greedy answers differ when generated again{note}; {verdicts}")
