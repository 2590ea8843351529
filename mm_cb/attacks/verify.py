"""``mm-cb attack verify``: the numbers of a run again, from its pictures, their JSON and the model.

Of every picture: its hash, its distance from the clean one, its losses and the greedy answer, as the attack had them.
Of the run: the verdicts, by the exact judge where the model has one, and everything that is counted over items. A run
that somebody rewrote consistently is an honest run of what it then states.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from mm_cb.attacks.checks import BALL
from mm_cb.attacks.config import AttackConfig
from mm_cb.attacks.config_files import AttackRecipe, from_recipe, read_recipe
from mm_cb.attacks.outputs import parts_of, summaries
from mm_cb.attacks.records import Answer, AnswerRecord, Artefact, Facts, Flags, attacked, make_item
from mm_cb.attacks.run import judge_of
from mm_cb.attacks.verify_answers import AGAIN, Recorded, Verified, answers_again
from mm_cb.core.checked import read_json, read_list, read_record
from mm_cb.core.closing import cut_path, say
from mm_cb.core.errors import UserError
from mm_cb.core.progress import Progress, print_whole
from mm_cb.core.reading import json_lines, shown
from mm_cb.core.records import Check, Item
from mm_cb.core.runs import UNSEALED, finished_run, read_run, unwritten
from mm_cb.core.seal import refuse_changed
from mm_cb.core.terminal import columns
from mm_cb.data.behaviors_file import KEPT_AS, Behavior, kept_behaviors
from mm_cb.data.prompts_file import KEPT_AS as PROMPTS
from mm_cb.data.prompts_file import read_prompts
from mm_cb.inference.cached_chunks import chunks
from mm_cb.inference.source import source_again
from mm_cb.inference.subjects import load_subject
from mm_cb.inference.tolerance import TOLERANCE, dtype_of, tolerance
from mm_cb.judges.base import NOT_JUDGED
from mm_cb.judges.stored_verdicts import refuse_other_verdicts
from mm_cb.metrics.agreement import completions_of
from mm_cb.metrics.observations import rank, starts_with
from mm_cb.metrics.results import read_results, refuse_foreign
from mm_cb.metrics.whole import refuse_gone, whole_items

_SETTLED = (
    *("split", "category", "prompt", "target", "seed", "clean_image", "prefix_emitted", "stopped_early"),
    *(*Flags.__annotations__, *Facts.__annotations__, "benign_target"),
)
"""What an item says that follows from the run's settings, its behaviour and its answers."""
_NUMBERS = 38
"""Columns of the table beside the name of a picture."""


@dataclass(frozen=True)
class _StatedRun:
    """A run as its files state it."""

    folder: Path
    recipe: AttackRecipe
    configs: Mapping[str, AttackConfig]
    asked: Mapping[str, Behavior]
    items: list[Item]


def verify_run(
    folder: str | Path,
    *,
    model: str | None = None,
    adapter: str | None = None,
    base: str | None = None,
    device: str = "cpu",
) -> list[Verified]:
    """Verify a run and print a table.

    Args:
        folder: A finished run of ``mm-cb attack``.
        model: Where its model lies here; None = where the run found it.
        adapter: Where its adapter lies here.
        base: Where the base of a breaker without adapter lies here.
        device: Torch device.

    Raises:
        UserError: If something disagrees (the first is named), the folder holds nothing to verify, the run has not
            ended, or another command writes into it.
    """
    folder = Path(folder)
    with unwritten(folder):
        return _verified(folder, model, adapter, base, device)


def _verified(folder: Path, model: str | None, adapter: str | None, base: str | None, device: str) -> list[Verified]:
    run = _read(folder)
    answers, unseen = _answers(run)
    verdicts = _check_verdicts(run)
    refuse_foreign(folder)
    sent = folder / PROMPTS
    prompts = read_prompts(sent, list(run.asked)) if sent.exists() else None
    source = source_again(folder, read_run(folder), "give `--{}`: where it lies here", device, model, adapter, base)
    subject = load_subject(source, run.items[0]["subject"], next(iter(run.configs.values())).image_backend)
    as_run = run.recipe.get("device"), run.recipe.get("dtype", "float32")
    same_arithmetic = as_run == (device.partition(":")[0], "float32")
    rows: list[Verified] = []
    with Progress() as progress:
        task = progress.task("verify", total=len(answers))
        for group in _groups(answers, run.configs):
            rows += answers_again(subject, folder, prompts, group, same_arithmetic)
            task.advance(len(group))
    texts = sum(one.told is None for one in answers)
    unit = "pictures and texts" if texts else "pictures"
    _show(rows, unit, verdicts, same_arithmetic, dtype_of(subject.model))
    if unseen:
        say(f"not asked again: {unseen} of {unseen + texts} answers to texts, beside pictures of yours")
    if wrong := [row for row in rows if row.disagreements]:
        raise UserError(
            f"`{folder}`: `{wrong[0].image}` does not hold what the run recorded: {'; '.join(wrong[0].disagreements)} "
            f"({len(wrong)} of {len(rows)} {unit} disagree). {AGAIN}"
        )
    _check_counts(run)
    return rows


def _read(folder: Path) -> _StatedRun:
    recipe, content = read_recipe(read_run(folder), folder), finished_run(folder)
    whole = content.get("schema", UNSEALED) != UNSEALED
    refuse_gone(folder, "protocol.json", KEPT_AS)
    refuse_changed(read_record(protocol := folder / "protocol.json", dict), f"`{protocol}`", needed=whole)
    asked = {b.id: b for b in kept_behaviors(folder)}
    run = _StatedRun(
        folder, recipe, from_recipe(recipe, content["seed"]), asked, attacked(whole_items(folder, content), folder)
    )
    path = folder / "items.jsonl"
    if other := run.configs.keys() ^ {item["condition"] for item in run.items}:
        raise UserError(f"`{path}` and run.json must hold the same attacks, see {min(other)}. {AGAIN}")
    for item in run.items:
        if item["id"] not in run.asked:
            raise UserError(f"`{path}`: {_who(item)} is of no behaviour of behaviors.jsonl. {AGAIN}")
        worst = min(item["candidates"] or (), key=rank)
        if any(item.get(key) != worst.get(key) for key in ("outcome", "completion", "image", "loss")):
            raise UserError(f"`{path}`: {_who(item)} must be the worst of its candidates, it is another. {AGAIN}")
        _check_settled(run, item, whole=whole)
    return run


def _check_settled(run: _StatedRun, item: Item, *, whole: bool) -> None:
    """Hold an item to the settings that it was made with; earlier versions lack keys (``whole`` is false)."""
    config, behavior = run.configs[item["condition"]], run.asked[item["id"]]
    again: Mapping[str, object] = make_item(
        item["subject"],
        config,
        behavior,
        list(_tries(item)),
        target_outcome=item.get("target_outcome", NOT_JUDGED),
        pictured=item.get("clean_image") is not None,
    )
    for key in _SETTLED:
        stated, found = item.get(key), again.get(key)
        if stated != found and (whole or key in item) and not (key == "stopped_early" and "judge" in item):
            raise UserError(
                f"`{run.folder / 'items.jsonl'}`: `{key}` of {_who(item)} is {shown(stated)}, by the run's settings it "
                f"is {shown(found)}. {AGAIN}"
            )


def _answers(run: _StatedRun) -> tuple[list[Recorded], int]:
    """Greedy answers to pictures and to texts, and how many of the latter cannot be had again.

    These are answers to prompts beside a user's picture, which the run does not keep. A relaxation's are not looked at.
    """
    kept = json_lines(run.folder / KEPT_AS, "behaviours")
    beside = {record["id"] for _, record in kept if record.get("image") is not None}
    answers, unseen = list[Recorded](), 0
    for item in run.items:
        config = run.configs[item["condition"]]
        for one in _tries(item):
            if one.sample or (one.image is None and config.entry.relaxation):
                continue
            if one.image is None and config.entry.imported and item["id"] in beside:
                unseen += 1
                continue
            file = one.image and str(Path(one.image).with_suffix(".json"))
            if file:
                refuse_gone(run.folder, file, str(one.image))
            told = read_record(run.folder / file, Artefact) if file else None
            answers.append(Recorded(config, run.asked[item["id"]], one, told))
    if not answers and not unseen:
        raise UserError(f"`{run.folder}` must hold attacked pictures or answers to texts, there are none to verify.")
    return answers, unseen


def _tries(item: Item) -> Iterator[Answer]:
    """An item's candidates as the answers that they were made from."""
    for one in item["candidates"] or ():
        told: AnswerRecord = {"loss_clean": item["loss_clean"], "prefix_emitted": False, **one, "id": item["id"]}
        answer = Answer.from_json(told)
        yield replace(answer, prefix_emitted=starts_with(answer.completion, item["target"]))


def _groups(answers: Sequence[Recorded], configs: Mapping[str, AttackConfig]) -> Iterator[list[Recorded]]:
    """What is asked in one batch: answers under one attack, to pictures or to texts of one run."""
    alike: dict[tuple[str, int], list[Recorded]] = {}
    for one in answers:
        alike.setdefault((one.config.name, -1 if one.told else one.answer.restart), []).append(one)
    for (name, _), group in alike.items():
        yield from chunks(group, configs[name].batch)


def _check_verdicts(run: _StatedRun) -> str:
    """Hold the run's own verdicts to the exact judge, where there is one; a line that says how many."""
    judge = judge_of(run.recipe["model"])
    refuse_other_verdicts(run.folder, run.items)

    def agrees(item: Item, what: str, text: str, said: str | None) -> bool:
        found = judge(run.asked[item["id"]], text)
        if "judge" in item or NOT_JUDGED in (found, said):
            return False  # another judge's since, see `mm-cb judge`, or nobody's
        if found != said:
            raise UserError(
                f"`{run.folder / 'items.jsonl'}` calls {what} {said}, judged again it is {found}. Do not use the run's "
                "numbers."
            )
        return True

    for item in run.items:
        target = run.asked[item["id"]].target
        agrees(item, f"the target of {_who(item)}", target, item.get("target_outcome", NOT_JUDGED))
    again = [
        agrees(item, f"the answer to `{one.get('image')}` ({_who(item)})", one["completion"], one.get("outcome"))
        for item in run.items
        for one in completions_of(item)
    ]
    return f"{sum(again)} of {len(again)} verdicts judged again, the same"


def _check_counts(run: _StatedRun) -> None:
    """What is made of items and curves is what they give."""
    made = summaries(run.items, parts_of(run.folder), [*run.configs.values()], run.recipe.get("dtype", "float32"))
    for name, content in made.items():
        stated, again = read_json(run.folder / name), json.loads(json.dumps(content))
        if name == "protocol.json":  # beside it stand words for pages
            stated, again = stated.get("k") if isinstance(stated, dict) else None, again["k"]
        if name == "checks.json":  # earlier versions counted clean pictures among the attacked ones
            held = any(one["name"] == BALL for one in again)
            kept = [one for one in read_list(run.folder / name, Check) if held or one["name"] != BALL]
            stated, again = ([{**one, "value": ""} for one in rows] for rows in (kept, again))
        if name == "results.json":
            read_results(run.folder / name)  # each measurement is one
            stated = {key: stated[key] for key in again}  # beside these it names what it is of, see `refuse_foreign`
            for row in stated["measurements"]:
                row.get("counts", {}).pop("proxy", None)  # a label by `mm-cb judge`
        if stated != again:
            raise UserError(f"`{run.folder / name}` must say what the run holds; made again it differs. {AGAIN}")


def _who(item: Item) -> str:
    return f"`{item.get('id')}` under {item.get('condition')}"


def _show(rows: Sequence[Verified], unit: str, verdicts: str, same_arithmetic: bool, dtype: str) -> None:
    from rich.table import Table

    table = Table("picture or text", "epsilon", "recorded", "found", "verdict", box=None, pad_edge=False)
    for row in rows:
        verdict, name = "; ".join(row.disagreements) or "agrees", cut_path(str(row.image), columns() - _NUMBERS)
        table.add_row(name, f"{row.epsilon}/255", f"{row.loss_recorded:.5f}", f"{row.loss_found:.5f}", verdict)
    print_whole(table)
    agree, others = sum(not row.disagreements for row in rows), sum(row.other_answer for row in rows)
    share = "" if dtype == "float32" else f" or {tolerance(100, dtype):.2g} %, whichever is more"
    say(f"{agree} of {len(rows)} {unit} agree ({dtype} losses to {TOLERANCE:g}{share}; epsilon exactly)")
    note = "" if same_arithmetic else " (another device, or not float32: no disagreement)"
    say(f"{others} of {len(rows)} greedy answers differ when generated again{note}; {verdicts}")
