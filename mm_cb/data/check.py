"""Preflight: read all that a run will read, and say what is wrong with it before the run does."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from PIL import Image

from mm_cb.data.contamination import Contamination, Match, Tested
from mm_cb.data.examples import Example, Modality, SetName
from mm_cb.data.formats import FORMATS, Skip
from mm_cb.data.mixture import Mixture, Part, RowKind, nothing_left, open_sources
from mm_cb.data.pictures import PictureError, open_picture
from mm_cb.data.scan import Scan, judged, message_texts, texts_of
from mm_cb.data.sources import STRICT, UNMENDABLE, OpenSource, RowFault, Rules, Source

if TYPE_CHECKING:
    from mm_cb.core.progress import Progress

SHOWN = 5
ERRORS: tuple[str, ...] = (
    *(
        "broken row",
        "repeated id",
        "missing image",
        "corrupt image",
        "in both sets",
        "too long",
        *UNMENDABLE,
    ),
)
ERRORS += ("no example", "missing rows", "contaminated", "refusals")
WARNINGS = ("duplicate", "longer", "some refusals", "unknown tokens", "unreadable image", "not checked")
Where = Callable[[], str]


@dataclass
class Problem:
    """One kind of problem: how often, and the first offenders."""

    count: int = 0
    first: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What a check found.

    Attributes:
        used: Source → ``"set modality"`` → how many examples.
        skipped: Source → reason → rows left out by rule.
        problems: Kind (of `ERRORS` or `WARNINGS`) → how often and where first.
        images: Different picture files that were opened.
        mixture: What training would draw from, unless a row stops it.
        own: Whether every source holds rows of our format.
    """

    used: dict[str, Counter[str]] = field(default_factory=dict)
    skipped: dict[str, Counter[str]] = field(default_factory=dict)
    problems: dict[str, Problem] = field(default_factory=dict)
    images: int = 0
    mixture: Mixture | None = None
    own: bool = True

    def add(self, kind: str, message: Where) -> None:
        """Count a problem; its message is made only if it is among the first."""
        problem = self.problems.setdefault(kind, Problem())
        problem.count += 1
        if len(problem.first) < SHOWN:
            problem.first.append(message())

    @property
    def complete(self) -> list[Modality]:
        """The modalities of which both sets have examples: what can be trained on."""
        kinds = {kind for counts in self.used.values() for kind in counts}
        return [one for one in get_args(Modality) if all(f"{name} {one}" in kinds for name in get_args(SetName))]

    @property
    def has_errors(self) -> bool:
        """Whether a run would stop, or would not measure what it says."""
        return any(kind in self.problems for kind in ERRORS)


@dataclass(frozen=True)
class Limits:
    """What examples are held against.

    Attributes:
        behaviors: What the behaviours ask that the model will be tested with.
        max_length: Examples with more tokens are reported: training cuts them.
        tokens: Counts those of a text; None = as the model of the rules does, in words where none is known here.
    """

    behaviors: Sequence[Tested] = ()
    max_length: int = 1024
    tokens: Callable[[str], int] | None = None


def check_sources(
    sources: Sequence[Source],
    limits: Limits,
    *,
    seed: int = 0,
    rules: Rules = STRICT,
    progress: "Progress | None" = None,
) -> Report:
    """Check data sources row by row: `Scan` judges them, as it does for `mm_cb.data.mixture.load_examples`.

    Raises:
        UserError: If a source cannot be opened at all.
    """
    report = Report()
    examiner = _Examiner(report, limits, rules)
    scan = Scan(rules, examiner.note_duplicate)
    parts = []
    for opened in open_sources(sources):
        report.own &= opened.form is FORMATS["own"]
        task = progress.task(opened.key, len(opened.rows)) if progress else None
        skipped = report.skipped.setdefault(opened.key, Counter())
        usable: dict[int, RowKind] = {}
        sampled = opened.source.limit is not None
        faults = 0
        for index, outcome in scan.outcomes(opened):
            if isinstance(outcome, Skip):
                skipped[outcome.reason] += 1
            elif isinstance(outcome, RowFault):
                report.add(outcome.kind, partial(_fault_at, opened, index, outcome))
                faults += 1
            else:
                usable[index] = (outcome.set, outcome.modality)
                if not sampled:
                    examiner.examine(outcome, opened.key, partial(opened.where, index))
            if task:
                task.advance()
        if not usable:
            if not faults:
                report.add("no example", partial(nothing_left, opened, skipped))
            continue
        if fault := scan.refusals.fault():
            report.add("refusals", partial(str, fault))
        else:
            for kind, said in scan.warnings():
                report.add(kind, partial(str, said))
        if sampled:
            _check_rows(opened, opened.kept(list(usable), seed), examiner, progress)
        parts.append(Part(opened, usable, skipped, seed))
    examiner.open_images(progress)
    if parts and not report.has_errors:
        report.mixture = Mixture(parts, seed)
    return report


def check_examples(examples: Sequence[Example], limits: Limits, name: str, rules: Rules = STRICT) -> Report:
    """Check examples that are made in memory."""
    report = Report()
    examiner = _Examiner(report, limits, rules)
    scan = Scan(rules, examiner.note_duplicate)
    for place, outcome in judged(examples, name, scan, rules):
        if isinstance(outcome, RowFault):
            report.add(outcome.kind, partial("{}: {}".format, place, outcome.message))
        else:
            examiner.examine(outcome, name, partial(str, place))
    examiner.open_images(None)
    return report


def _fault_at(opened: OpenSource, index: int, fault: RowFault) -> str:
    return f"{opened.where(index)}: {fault.message}"


def _words(text: str) -> int:
    return len(text.split())


def _joined(where: Where, message: str) -> str:
    return f"{where()}: {message}"


def _check_rows(opened: OpenSource, rows: Sequence[int], examiner: "_Examiner", progress: "Progress | None") -> None:
    """Examine a sample, which is known only when all rows have been judged."""
    task = progress.task(f"{opened.key}, texts", len(rows)) if progress else None
    for index in rows:
        examiner.examine(opened.example(index), opened.key, partial(opened.where, index))
        if task:
            task.advance()


class _Examiner:
    """Holds examples against the limits, and opens their pictures."""

    def __init__(self, report: Report, limits: Limits, rules: Rules) -> None:
        self._report = report
        self._limits = limits
        self._length = limits.tokens or (rules.fit.length if rules.fit else _words)
        self._unit = "words" if self._length is _words else "tokens"
        self._contamination = Contamination([one.prompt for one in limits.behaviors]) if limits.behaviors else None
        self._unreadable = "unreadable image" if rules.skip_missing_images else "corrupt image"
        self._compared: dict[bytes, str] = {}
        self._pictures: dict[Path, Where] = {}

    def note_duplicate(self, example: Example, place: object) -> None:
        """Count an example that its own set holds already."""
        self._report.add("duplicate", lambda: f"{example.place}: the same as {place}")

    def examine(self, example: Example, source: str, where: Where) -> None:
        """Everything but the pictures' contents."""
        self._report.used.setdefault(source, Counter())[f"{example.set} {example.modality}"] += 1
        if not all(self._is_whole(image, where) for image in example.images):
            return
        length = sum(map(self._length, texts_of(example)))
        if length > self._limits.max_length:
            message = f"{length} {self._unit}, more than {self._limits.max_length}: training cuts it"
            self._report.add("longer", partial(_joined, where, message))
        self._compare_with_behaviors(example, where)

    def open_images(self, progress: "Progress | None") -> None:
        """Decode every picture file once, several at a time."""
        self._report.images += len(self._pictures)
        task = progress.task("pictures", len(self._pictures)) if progress and self._pictures else None
        with ThreadPoolExecutor() as pool:
            waiting = iter(self._pictures.items())
            while chunk := list(itertools.islice(waiting, 1000)):
                for (_, where), fault in zip(chunk, pool.map(_decode, (path for path, _ in chunk)), strict=True):
                    if fault is not None:
                        self._report.add(self._unreadable, partial(_joined, where, fault))
                    if task:
                        task.advance()

    def _is_whole(self, image: Image.Image | Path | bytes, where: Where) -> bool:
        """Whether a picture in memory can be shown to a model; files are noted for later."""
        if isinstance(image, Path):
            self._pictures.setdefault(image, where)
            return True
        if (fault := _decode(image)) is not None:
            self._report.add(self._unreadable, partial(_joined, where, fault))
        return fault is None

    def _compare_with_behaviors(self, example: Example, where: Where) -> None:
        if self._contamination is None:
            return
        for message in (turn for turn in example.messages if turn["role"] == "user"):
            text = " ".join(message_texts(message))
            digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
            if digest not in self._compared:
                match = self._contamination.match(text)
                self._compared[digest] = "" if match is None else self._close(match)
            if found := self._compared[digest]:
                self._report.add("contaminated", partial(_joined, where, found))

    def _close(self, match: Match) -> str:
        place = self._limits.behaviors[match.behavior].place
        return f"too close to behaviour {place}, BLEU {match.bleu:.2f}; leave one of the two out"


def _decode(picture: Image.Image | Path | bytes) -> str | None:
    """Why a picture cannot be shown to a model; None if it can."""
    try:
        open_picture(picture)
    except PictureError as error:
        return str(error)
    return None
