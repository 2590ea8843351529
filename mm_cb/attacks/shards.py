"""Job arrays: each process attacks its own part of the behaviours; a last one gathers the parts into one run."""

from __future__ import annotations

import os
import re
import shutil
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from mm_cb.attacks.config_files import from_recipe, read_recipe
from mm_cb.attacks.outputs import summaries, write_outputs
from mm_cb.attacks.records import attacked
from mm_cb.core.errors import UserError
from mm_cb.core.records import Item, RecipeFields
from mm_cb.core.runs import RunDirectory, read_run, write_bytes
from mm_cb.data.behaviors_file import Behavior
from mm_cb.metrics.whole import unchanged_items

FOLDER = "shards"
_NAME = re.compile(r"\d{4}-of-\d{4}")
_DIGITS, _MOST = 4, 9_999
_WAIT_SECONDS = 30.0
"""For whatever else may hold the run; each other shard that starts at the same moment may take a second more."""


@dataclass(frozen=True)
class Shard:
    """Part ``index`` (from 1) of ``count``."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """``"2/8"`` -> the second of eight; ``"auto"`` -> as `launched` finds it.

        Raises:
            UserError: If it is not i/n with 1 <= i <= n.
        """
        if text == "auto":
            return launched(os.environ)
        index, _, count = text.partition("/")
        digits = text.isascii() and index.isdecimal() and count.isdecimal()
        if not digits or len(index) > _DIGITS or len(count) > _DIGITS or not 1 <= int(index) <= int(count):
            raise UserError(
                f"`--shard` must be i/n with i in 1..n, such as 2/8, and n at most {_MOST:,}: each part is a process, "
                f"with a folder; got `{text:.40}`."
            )
        return cls(int(index), int(count))

    def part(self, behaviors: Sequence[Behavior]) -> list[Behavior]:
        """Every ``count``-th behaviour from the ``index``-th on: the same in every process.

        Raises:
            UserError: If nothing is left for this shard.
        """
        mine = list(behaviors[self.index - 1 :: self.count])
        if not mine:
            raise UserError(f"`--shard {self}` is empty: there are only {len(behaviors)} behaviours.")
        return mine

    def __str__(self) -> str:
        return f"{self.index}/{self.count}"


def launched(environment: Mapping[str, str]) -> Shard:
    """The part of this process, from what started it: ``accelerate launch``, ``torchrun``, or a Slurm job array.

    Raises:
        UserError: If none of them did, or it is not one of as many processes as there are.
    """
    try:
        if "WORLD_SIZE" in environment:
            place, count, told = int(environment["RANK"]), int(environment["WORLD_SIZE"]), "RANK and WORLD_SIZE"
        else:
            first, step = (int(environment.get(f"SLURM_ARRAY_TASK_{n}", d)) for n, d in (("MIN", "0"), ("STEP", "1")))
            place = (int(environment["SLURM_ARRAY_TASK_ID"]) - first) // max(step, 1)
            count, told = int(environment["SLURM_ARRAY_TASK_COUNT"]), "SLURM_ARRAY_TASK_*"
    except (KeyError, ValueError) as error:
        raise UserError(
            "`--shard auto` needs a process started by `accelerate launch`, `torchrun` or a Slurm job array; give i/n."
        ) from error
    if not 0 <= place < count:
        raise UserError(
            f"`--shard auto` must find a place among the processes, but {told} say {place + 1} of {count}; number a "
            "job array without gaps, or give i/n."
        )
    return Shard.parse(f"{place + 1}/{count}")


def launched_device(device: str) -> str:
    """The GPU of this process where a launcher starts several on one machine: ``cuda`` -> ``cuda:1``."""
    rank = os.environ.get("LOCAL_RANK", "")
    return f"cuda:{rank}" if device == "cuda" and rank.isdecimal() else device


@contextmanager
def shard_runs(
    out: Path, recipe: RecipeFields, seed: int, inputs: Mapping[str, str], shard: Shard
) -> Iterator[RunDirectory]:
    """A run directory of its own for a shard, inside the whole run's, which is claimed for this recipe first.

    Shards start at the same moment: one that finds the whole run locked by another waits for it.
    """
    whole = RunDirectory(out, "attack", recipe, seed, inputs=inputs)
    name = f"{shard.index:04d}-of-{shard.count:04d}"
    run = RunDirectory(out / FOLDER / name, "attack", {**recipe, "shard": str(shard)}, seed, inputs=inputs)
    with _waited_for(whole, shard.count):
        if whole.finished:
            raise UserError(f"`{out}` has been gathered already; its results are in results.json.")
        begun = [path for path in _found(out) if (path / "run.json").is_file()]
        if others := {int(path.name.rpartition("-")[2]) for path in begun} - {shard.count}:
            raise UserError(
                f"`--shard {shard}` divides the run otherwise than the shards in `{out / FOLDER}` do, of which there "
                f"are {min(others)}: give a shard i/{min(others)}, or another `--out`."
            )
        run.open()
    try:
        with run:
            yield run
    except BaseException:
        with _waited_for(whole, shard.count):
            whole.abandon()
        raise


def _waited_for(whole: RunDirectory, shards: int) -> RunDirectory:
    """The whole run's folder, made or seen to belong to this recipe, and locked as soon as no other shard holds it."""
    deadline = time.monotonic() + _WAIT_SECONDS + shards
    while True:
        try:
            return whole.open()
        except UserError as error:
            if "another mm-cb process" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.2)


def gather(out: Path, behaviors: Sequence[Behavior]) -> bool:
    """Put finished shards together as one run; False when there are none. A part without behaviours is finished.

    Nothing is written before everything was read.

    Raises:
        UserError: If shards are missing, not finished or damaged, or of several divisions.
    """
    if not (found := _found(out)):
        return False
    _refuse_unfinished(out, found, len(behaviors))
    items: list[Item] = []
    pictures: dict[Path, Path] = {}
    for path in found:
        items += attacked(unchanged_items(path, read_run(path)), path)
        pictures |= {file.relative_to(path): file for file in sorted((path / "images").rglob("*")) if file.is_file()}
    run, parts = read_run(out), _parts(found)
    recipe = read_recipe(run, out)
    configs = from_recipe(recipe, run["seed"])
    order, place = ({name: i for i, name in enumerate(names)} for names in ([b.id for b in behaviors], configs))
    for item in items:
        if item["id"] not in order:
            raise UserError(f"`{out / FOLDER}` must hold the behaviours of the run, `{item['id']}` is none of them.")
        if item["condition"] not in place:
            raise UserError(f"`{out / FOLDER}` must hold the attacks of the run, {item['condition']} is none of them.")
        if (image := item.get("image")) is not None and Path(image) not in pictures:
            raise UserError(f"`{out / FOLDER}` must hold the picture `{image}` that an item names; there is none.")
    items.sort(key=lambda item: (place[item["condition"]], order[item["id"]]))
    more = summaries(items, parts, [*configs.values()], recipe.get("dtype", "float32"))
    shutil.rmtree(out / "parts", ignore_errors=True)
    for name, file in [*pictures.items(), *((Path("parts", name), file) for name, file in parts.items())]:
        write_bytes(out / name, file.read_bytes())
    write_outputs(out, items, more)
    return True


def _found(out: Path) -> list[Path]:
    """The folders of a run's shards."""
    return sorted(path for path in (out / FOLDER).glob("*-of-*") if _NAME.fullmatch(path.name) and path.is_dir())


def _refuse_unfinished(out: Path, found: Sequence[Path], behaviors: int) -> None:
    counts = {int(path.name.rpartition("-")[2]) for path in found}
    if len(counts) > 1:
        raise UserError(f"`{out / FOLDER}` holds shards of several divisions ({sorted(counts)}); delete all but one.")
    (count,) = counts
    done = {int(path.name[:4]) for path in found if (path / "run.json").is_file() and read_run(path).get("ended")}
    missing = [f"{i}/{count}" for i in range(1, min(count, behaviors) + 1) if i not in done]
    if missing:
        raise UserError(
            f"`{out}` cannot be gathered, these shards are not finished: {', '.join(missing[:10])}. Run them with "
            "`--shard`."
        )


def _parts(found: Sequence[Path]) -> dict[str, Path]:
    """The parts of all shards, side by side under names of their own."""
    numbers: dict[str, int] = defaultdict(int)
    parts = {}
    for part in (part for shard in found for part in sorted((shard / "parts").glob("*.json"))):
        stem = part.stem.rpartition("-")[0]
        parts[f"{stem}-{numbers[stem]:04d}.json"] = part
        numbers[stem] += 1
    return parts
