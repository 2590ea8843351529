"""Whether the records of a run are the ones that it wrote: each once, of what it asked, with the numbers it counted."""

import re
from collections.abc import Sequence
from pathlib import Path

from mm_cb.core.checked import read_records
from mm_cb.core.errors import UserError
from mm_cb.core.records import Completion, Item, Run
from mm_cb.data.behaviors_file import KEPT_AS, kept_behaviors
from mm_cb.inference.source import subject_name
from mm_cb.metrics.agreement import completions_of
from mm_cb.metrics.observations import refuse_repeats
from mm_cb.metrics.results import AGAIN, ITEMS, Measurement, measure, refuse_foreign

_MEASURES_NOTHING = ("train", "probe", "data build pairs", "data build calls")
_COMPLETIONS = Path("parts") / "completions.jsonl"
_TOLERANCE = 0.05
"""Percentage points between a number that is stored and the same one counted again."""


def refuse_unmeasured(folder: Path, run: Run) -> None:
    """Refuse a run that made something and measured nothing of it.

    Raises:
        UserError: Saying what to give instead.
    """
    if run["command"] in _MEASURES_NOTHING:
        how = f"mm-cb attack --model {run['recipe'].get('model', 'M')} --adapter {folder} ... --out runs/attack"
        by = f" (`{how}`)" if run["command"] == "train" else ""
        raise UserError(
            f"`{folder}` is a run of `mm-cb {run['command']}`, in which nothing is measured: give runs of `mm-cb "
            f"attack` or `mm-cb eval` on what it made{by}."
        )


def refuse_gone(folder: Path, *names: str) -> None:
    """Refuse a finished run that lacks a file which its command wrote.

    Raises:
        UserError: Naming the file, and what brings it back.
    """
    if gone := next((name for name in names if not (folder / name).is_file()), None):
        raise UserError(f"`{folder}` must hold {gone}, but there is none. {AGAIN}")


def whole_items(folder: Path, run: Run) -> list[Item]:
    """The records of a finished run's items.jsonl.

    Args:
        folder: The run's folder.
        run: Its run.json.

    Raises:
        UserError: If the run measures nothing, the file is missing, empty or damaged, a record comes twice or lacks a
            key, or the records are not of whom, or of what, the run asked.
    """
    refuse_unmeasured(folder, run)
    path = folder / ITEMS
    refuse_gone(folder, ITEMS)
    items = read_records(path, Item)
    if torn := _torn_line(path):
        raise UserError(f"{path}:{torn} is cut off in the middle: the file does not end there. {AGAIN}")
    if not items:
        raise UserError(f"`{path}` must hold what was measured, it is empty. {AGAIN}")
    try:
        refuse_repeats(items)
    except ValueError as error:
        raise UserError(f"`{path}`: {error} {AGAIN}") from error
    stored = run["command"] == "eval" and "model" not in run["recipe"]  # of `mm-cb score`: perhaps verdicts alone
    for number, item in enumerate(items, start=1):
        if not stored and not completions_of(item):
            raise UserError(f"{path}:{number} must hold an answer, `completion`; it lacks it. {AGAIN}")
    subjects = _subjects(run)
    if strange := [item["subject"] for item in items if item["subject"] not in (subjects or [item["subject"]])]:
        raise UserError(
            f"`{path}` must hold answers of {' and '.join(f'`{name}`' for name in subjects)}, as run.json says who was "
            f"asked; it holds some of `{strange[0]}`. {AGAIN}"
        )
    for what, wanted, found in (_asked(folder, run, items), _answered(folder, run, items)):
        absent, strange = sorted(wanted - found), sorted(found - wanted)
        if wanted and (absent or strange):
            wrong = f"lacks {len(absent)}, the first `{absent[0]}`" if absent else f"holds `{strange[0]}` beside them"
            raise UserError(f"`{path}` must hold the {len(wanted)} {what}; it {wrong}. {AGAIN}")
    return items


def unchanged_items(folder: Path, run: Run) -> list[Item]:
    """The same of a run on which other work rests: they must be those that its results.json was counted from.

    Raises:
        UserError: As `whole_items`, or if they were changed.
    """
    items = whole_items(folder, run)
    refuse_foreign(folder)
    return items


def _torn_line(path: Path) -> int:
    """The number of a last line without its end, which a stopped run leaves and a finished one never; 0 if none is."""
    *whole, last = path.read_bytes().split(b"\n")
    return len(whole) + 1 if last.strip() else 0


def _subjects(run: Run) -> list[str]:
    """Whose answers a run holds by its settings; none where they do not say it."""
    command, recipe = run["command"], run["recipe"]
    if named := recipe.get("subject"):
        return [str(named)]
    asked = {"attack": [recipe], "attack transfer": recipe.get("runs", [])}.get(command, [])
    return [
        subject_name(any(one.get(key) is not None for key in ("adapter", "base")), one.get("system"), one.get("probe"))
        for one in asked
        if "model" in one
    ]


def _asked(folder: Path, run: Run, items: Sequence[Item]) -> tuple[str, set[str], set[str]]:
    """Attack and behaviour of every record that an attack run must hold, and of those that it holds."""
    recipe = run["recipe"]
    if run["command"] != "attack" or not (folder / KEPT_AS).is_file():
        return "", set(), set()
    asked = [behavior.id for behavior in kept_behaviors(folder)]
    if isinstance(shard := recipe.get("shard"), str):
        if not re.fullmatch(r"[1-9]\d{0,8}/[1-9]\d{0,8}", shard):
            raise UserError(f"`{folder / 'run.json'}`: `shard` must be i/n, got `{shard}`.")
        index, _, count = shard.partition("/")
        asked = asked[int(index) - 1 :: int(count)]
    wanted = {f"{attack}/{id}" for attack in {item["condition"] for item in items} for id in asked}
    return f"behaviours of {KEPT_AS} under every attack", wanted, {f"{i['condition']}/{i['id']}" for i in items}


def _answered(folder: Path, run: Run, items: Sequence[Item]) -> tuple[str, set[str], set[str]]:
    """The keys of the answers that an evaluation stored as they came, and those that its records stand for."""
    store = folder / _COMPLETIONS
    if run["command"] != "eval" or not store.is_file():
        return "", set(), set()
    wanted = {record["key"] for record in read_records(store, Completion)}
    found = {key if (key := str(item["id"])) in wanted else f"{item['condition']}/{key}" for item in items}
    return f"answers of {_COMPLETIONS}", wanted, found


def refuse_contradiction(folder: Path, items: list[Item], stored: Sequence[Measurement], seed: int) -> None:
    """Refuse a run whose results.json is not what its records give, or states an interval beside its own value.

    Raises:
        UserError: Naming the first such number.
    """
    for m in stored:
        low, high = m.ci95 or (0.0, 0.0)
        if m.ci95 and m.value is not None and not low - _TOLERANCE <= m.value <= high + _TOLERANCE:
            raise UserError(
                f"`{folder / 'results.json'}`: {_told(m)} is {m.value:g}, outside its own interval {low:g} to "
                f"{high:g}. {AGAIN}"
            )
    pairs = sorted({(m.subject, m.paired_with) for m in stored if m.paired_with is not None})
    try:
        counted = {m.address: m for m in measure(items, pairs=pairs, seed=seed)}
    except ValueError as error:
        raise UserError(f"`{folder / ITEMS}`: {error} {AGAIN}") from error
    held, own = {m.address: m for m in stored}, {item["metric"] for item in items}
    for address in sorted(held.keys() | counted.keys()):
        there, here = held.get(address), counted.get(address)
        if (there is None or here is None) and address[1] not in own:
            continue  # derived, as other versions do it
        if there is None or here is None or not _same(there, here):
            raise UserError(
                f"results.json and {ITEMS} of `{folder}` must agree, but {_told(there or here)} is {_value(there)} "
                f"there and {_value(here)} counted again. {AGAIN}"
            )
    refuse_foreign(folder)


def _same(one: Measurement, other: Measurement) -> bool:
    if one.value is None or other.value is None:
        return (one.value, one.n) == (other.value, other.n)
    return one.n == other.n and abs(one.value - other.value) <= _TOLERANCE


def _told(m: Measurement | None) -> str:
    assert m is not None
    return f"`{m.subject}`, {m.metric}, {m.condition}, {m.split}"


def _value(m: Measurement | None) -> str:
    return "absent" if m is None else f"{'none' if m.value is None else f'{m.value:.4g}'} (n = {m.n})"
