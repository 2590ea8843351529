"""Mixtures: several sources as one sequence of examples, fixed by the seed, read row by row when asked for."""

import random
import warnings
from array import array
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from mm_cb.core.errors import UserError
from mm_cb.core.hub import Repository
from mm_cb.data.examples import Example, Modality, SetName
from mm_cb.data.formats import Skip
from mm_cb.data.scan import Scan, note_of_repeats
from mm_cb.data.sources import STRICT, UNMENDABLE, OpenSource, RowFault, Rules, Source, count_reasons, open_source

RowKind = tuple[SetName, Modality]

_WARNED = ("missing image", "empty turn", "too long", *UNMENDABLE)
_REMEDIES = {
    "missing image": "; leave such rows out: add `data.skip_missing_images=true`",
    "too long": "; raise `training.max_length`, or leave them out: add `data.skip_too_long=true`",
}


class Mixture(Sequence[Example]):
    """The examples of all sources, each as often as its weight says.

    The i-th example depends on the sources, the seed and i alone, not on who reads it or in which order; what is held
    in memory is the places of the rows. Pictures are paths, or encoded bytes, until `Example.open_images`.

    Attributes:
        inputs: Every data file and repository that is read, for a run's record.
        skipped: For each source, how many rows were left out and why.
    """

    def __init__(self, parts: Sequence["Part"], seed: int) -> None:
        """Line the sources up."""
        self._parts = parts
        self._ends = list(accumulate(len(part) for part in parts))
        self._seed = seed
        self.inputs: list[Path | Repository] = [one for part in parts for one in part.opened.inputs]
        self.skipped: dict[str, Counter[str]] = {part.opened.key: part.skipped for part in parts}

    def __len__(self) -> int:
        """Examples in one pass over the mixture."""
        return self._ends[-1]

    def __getitem__(self, index: Any) -> Any:
        """The example at a place of the mixture."""
        if not 0 <= index < len(self):
            raise IndexError(f"the mixture has {len(self)} examples, there is none at {index}")
        number = bisect_right(self._ends, index)
        return self._parts[number].example(index - (self._ends[number - 1] if number else 0), self._seed)

    def kinds(self) -> Iterator[RowKind]:
        """Set and modality of every example in order, known without reading any again."""
        for part in self._parts:
            yield from part.kinds()

    def rows(self) -> Iterator[tuple[int, int]]:
        """Source and row of every example in order: a row that comes several times has them all in common."""
        for number, part in enumerate(self._parts):
            yield from ((number, row) for row in part.rows())


class Part:
    """One source's share of a mixture."""

    def __init__(self, opened: OpenSource, usable: Mapping[int, RowKind], skipped: Counter[str], seed: int) -> None:
        """Take every usable row, or a sample, ``weight`` times; of a fraction, a seeded sample."""
        self.opened = opened
        self.skipped = skipped
        rows = opened.kept(list(usable), seed)
        self._kinds = [usable[row] for row in rows]
        self._rows = array("L", rows)
        passes, fraction = divmod(opened.source.weight, 1)
        some = max(round(fraction * len(rows)), 0 if passes else 1)
        self._rest = sorted(random.Random(f"weight {seed} {opened.key}").sample(range(len(rows)), some))
        self._whole = int(passes) * len(rows)

    def __len__(self) -> int:
        """Examples of this source in one pass over the mixture."""
        return self._whole + len(self._rest)

    def kinds(self) -> Iterator[RowKind]:
        """Set and modality of every example of this part."""
        for place in range(len(self)):
            yield self._kinds[self._number(place)]

    def rows(self) -> Iterator[int]:
        """The row behind every example of this part."""
        for place in range(len(self)):
            yield self._rows[self._number(place)]

    def _number(self, place: int) -> int:
        """Which of the rows stands at a place."""
        return place % len(self._rows) if place < self._whole else self._rest[place - self._whole]

    def example(self, place: int, seed: int) -> Example:
        """The example at a place of this part, its request removed if the dice say so."""
        turn, row = place // len(self._rows), self._rows[self._number(place)]
        example = self.opened.example(row)
        share = self.opened.source.remove_request
        if share and random.Random(f"request {seed} {self.opened.key} {row} {turn}").random() < share:
            return without_request(example)
        return example


def load_examples(sources: Sequence[Source], seed: int, rules: Rules = STRICT) -> Mixture:
    """Read every row of the sources once, to know which can be used, and line them up as one sequence.

    Args:
        sources: What to mix.
        seed: Decides samples (`Source.limit`, fractions of `Source.weight`) and which requests are removed.
        rules: Which rows are left out and counted, instead of stopping.

    Returns:
        The examples, read again from disk whenever they are asked for.

    Raises:
        UserError: If a source is not there (says how to get it), a row cannot be used (file and line; see `Scan`), or
            nothing is left of a source.
    """
    if not sources:
        raise UserError("`data` must name at least one data source.")
    again: list[tuple[object, object]] = []
    scan = Scan(rules, lambda example, place: again.append((example.place, place)))
    mixture = Mixture([_part(one, seed, scan) for one in open_sources(sources)], seed)
    if told := note_of_repeats(again):
        warnings.warn(f"{told}, or give their source a `weight`. `mm-cb data check` counts them.", stacklevel=2)
    return mixture


def open_sources(sources: Sequence[Source]) -> list[OpenSource]:
    """Find all sources; files of equal names in different folders get different keys.

    Raises:
        UserError: If one is not there, or is named twice for the same set.
    """
    refuse_repeated(sources)
    opened: list[OpenSource] = []
    for source in sources:
        one = open_source(source)
        same = sum(other.key.partition("#")[0] == one.key for other in opened)
        one.key += f"#{same + 1}" if same else ""
        opened.append(one)
    return opened


def refuse_repeated(sources: Sequence[Source]) -> None:
    """Make sure that no source is named twice for the same set.

    Raises:
        UserError: If one is.
    """
    named = Counter((source.name, source.set) for source in sources)
    repeated = [name for (name, _), count in named.items() if count > 1]
    if repeated:
        raise UserError(f"the data source `{repeated[0]}` is named twice; name it once, with `weight`.")


def without_request(example: Example) -> Example:
    """The first exchange with nothing asked: what the model would say by itself is rerouted or kept, too.

    Source:
        Released trainer, whose Llama-3 template is filled with an empty instruction for half of the rows. Pictures
        stay (our choice); a chat that shows one later than in its first turn is left as it is, and so is one with an
        operator's text or tools.
    """
    if example.tools or example.messages[0]["role"] != "user":
        return example
    user, assistant = example.messages[0], example.messages[1]
    parts = [] if isinstance(user["content"], str) else user["content"]
    pictures = [part for part in parts if part["type"] == "image"]
    if len(pictures) < len(example.images):
        return example
    emptied = [*pictures, {"type": "text", "text": ""}] if pictures else ""
    return replace(example, id=f"{example.id}:no-request", messages=[{**user, "content": emptied}, assistant])


def _part(opened: OpenSource, seed: int, scan: Scan) -> Part:
    """The rows of a source that can be used; the first that must not be there is an error."""
    usable: dict[int, RowKind] = {}
    skipped: Counter[str] = Counter()
    for index, outcome in scan.outcomes(opened):
        if isinstance(outcome, Skip):
            skipped[outcome.reason] += 1
        elif isinstance(outcome, RowFault):
            raise UserError(
                f"{opened.where(index)}: {outcome.message}{_REMEDIES.get(outcome.kind, '')}. `mm-cb data check` finds "
                "all such rows."
            )
        else:
            usable[index] = (outcome.set, outcome.modality)
    if not usable:
        raise UserError(nothing_left(opened, skipped))
    if fault := scan.refusals.fault():
        raise UserError(f"{fault}.")
    for _, said in scan.warnings():
        warnings.warn(f"{said}.", stacklevel=3)
    if listed := ", ".join(f"{skipped[kind]} with {kind}" for kind in _WARNED if skipped[kind]):
        warnings.warn(f"`{opened.source.name}`: rows left out: {listed}; see `mm-cb data check`.", stacklevel=3)
    return Part(opened, usable, skipped, seed)


def nothing_left(opened: OpenSource, skipped: Counter[str]) -> str:
    """What is said of a source without a usable row."""
    return f"the data source `{opened.source.name}` holds no example ({count_reasons(skipped) or 'no rows'})."
