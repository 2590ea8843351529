"""Preflight: read all that a run will read, and say what is wrong with it before the run does."""

import hashlib
import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from mm_cb.core.files import file_sha256
from mm_cb.data.contamination import Contamination
from mm_cb.data.examples import Example
from mm_cb.data.formats import Skip
from mm_cb.data.mixture import open_sources
from mm_cb.data.pictures import PictureError, open_picture
from mm_cb.data.sources import Fault, OpenSource, Source

if TYPE_CHECKING:
    from mm_cb.core.progress import Progress

SHOWN = 5
ERRORS = ("broken row", "repeated id", "empty turn", "missing image", "corrupt image", "in both sets", "contaminated")
WARNINGS = ("duplicate", "too long")
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
    """

    used: dict[str, Counter[str]] = field(default_factory=dict)
    skipped: dict[str, Counter[str]] = field(default_factory=dict)
    problems: dict[str, Problem] = field(default_factory=dict)
    images: int = 0

    def add(self, kind: str, message: Where) -> None:
        """Count a problem; its message is made only if it is among the first."""
        problem = self.problems.setdefault(kind, Problem())
        problem.count += 1
        if len(problem.first) < SHOWN:
            problem.first.append(message())

    @property
    def has_errors(self) -> bool:
        """Whether a run would stop, or would not measure what it says."""
        return any(kind in self.problems for kind in ERRORS)


@dataclass(frozen=True)
class Limits:
    """What examples are held against.

    Attributes:
        behaviors: Prompts of the behaviours that the model will be tested with.
        length: Counts the tokens (or words) of a text.
        max_length: Examples with more are reported.
        unit: What ``length`` counts.
    """

    behaviors: Sequence[str] = ()
    length: Callable[[str], int] = lambda text: len(text.split())
    max_length: int = 1024
    unit: str = "words"


def check_sources(
    sources: Sequence[Source], limits: Limits, *, seed: int = 0, progress: "Progress | None" = None
) -> Report:
    """Check data sources row by row, as `mm_cb.data.mixture.load_examples` reads them.

    Raises:
        UserError: If a source cannot be opened at all.
    """
    report = Report()
    examiner = _Examiner(report, limits)
    for opened in open_sources(sources):
        task = progress.task(opened.key, len(opened.rows)) if progress else None
        skipped = report.skipped.setdefault(opened.key, Counter())
        usable: list[int] = []
        for index, outcome in opened.examine():
            if isinstance(outcome, Skip):
                skipped[outcome.reason] += 1
            elif isinstance(outcome, Fault):
                report.add(outcome.kind, _fault_at(opened, index, outcome))
            else:
                usable.append(index)
            if task:
                task.advance()
        _check_rows(opened, opened.kept(usable, seed), examiner, progress)
    examiner.open_images(progress)
    return report


def check_examples(examples: Iterable[Example], limits: Limits, name: str) -> Report:
    """Check examples that are made in memory."""
    report = Report()
    examiner = _Examiner(report, limits)
    for number, example in enumerate(examples):
        examiner.examine(example, name, partial("{} example {}".format, name, number))
    examiner.open_images(None)
    return report


def _fault_at(opened: OpenSource, index: int, fault: Fault) -> Where:
    return lambda: f"{opened.where(index)}: {fault.message}"


def _joined(where: Where, message: str) -> str:
    return f"{where()}: {message}"


def _check_rows(opened: OpenSource, rows: Sequence[int], examiner: "_Examiner", progress: "Progress | None") -> None:
    task = progress.task(f"{opened.key}, texts", len(rows)) if progress else None
    own_ids = opened.form.set is None
    for index in rows:
        example = opened.read(index)
        assert isinstance(example, Example), f"row {index} of {opened.key} changed while it was read"
        examiner.examine(example, opened.key, partial(opened.where, index), own_ids)
        if task:
            task.advance()


class _Examiner:
    """Holds examples against each other and against the limits."""

    def __init__(self, report: Report, limits: Limits) -> None:
        self._report = report
        self._limits = limits
        self._contamination = Contamination(limits.behaviors) if limits.behaviors else None
        self._first: dict[bytes, tuple[list[Path | str], tuple[str, Where]]] = {}
        self._others: dict[bytes, dict[tuple[str, ...], tuple[str, Where]]] = {}
        self._ids: dict[str, Where] = {}
        self._compared: dict[bytes, str] = {}
        self._pictures: dict[Path, Where] = {}

    def examine(self, example: Example, source: str, where: Where, own_ids: bool = True) -> None:
        """Everything but the pictures' contents."""
        self._report.used.setdefault(source, Counter())[f"{example.set} {example.modality}"] += 1
        if own_ids:
            first = self._ids.setdefault(example.id, where)
            if first is not where:
                self._report.add("repeated id", lambda: f"{where()}: the id `{example.id}` was used at {first()}")
        if not all(self._is_whole(image, where) for image in example.images):
            return
        self._compare_with_others(example, where)
        texts = list(_texts(example))
        length = sum(map(self._limits.length, texts))
        if length > self._limits.max_length:
            limit = self._limits
            self._report.add("too long", lambda: f"{where()}: {length} {limit.unit}, more than {limit.max_length}")
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
                        self._report.add("corrupt image", partial(_joined, where, fault))
                    if task:
                        task.advance()

    def _is_whole(self, image: Image.Image | Path | bytes, where: Where) -> bool:
        """Whether a picture in memory can be shown to a model; files are noted for later."""
        if isinstance(image, Path):
            self._pictures.setdefault(image, where)
            return True
        if (fault := _decode(image)) is not None:
            self._report.add("corrupt image", partial(_joined, where, fault))
        return fault is None

    def _compare_with_others(self, example: Example, where: Where) -> None:
        """Equal texts with equal pictures, by content; files are hashed only where texts are equal."""
        folded = "\0".join(" ".join(text.lower().split()) for text in _texts(example))
        digest = hashlib.blake2b(folded.encode("utf-8", "replace"), digest_size=16).digest()
        pictures = [image if isinstance(image, Path) else _pixels(image) for image in example.images]
        if digest not in self._first:
            self._first[digest] = pictures, (example.set, where)
            return
        shown, row = self._first[digest]
        alike = self._others.setdefault(digest, {tuple(map(_content, shown)): row})
        content = tuple(map(_content, pictures))
        if content not in alike:
            alike[content] = example.set, where
            return
        set_name, first = alike[content]
        kind = "duplicate" if set_name == example.set else "in both sets"
        self._report.add(kind, lambda: f"{where()}: the same as {first()}")

    def _compare_with_behaviors(self, example: Example, where: Where) -> None:
        if self._contamination is None:
            return
        for message in example.messages[::2]:
            text = " ".join(_message_texts(message))
            digest = hashlib.blake2b(text.encode("utf-8", "replace"), digest_size=16).digest()
            if digest not in self._compared:
                match = self._contamination.match(text)
                found = f"BLEU {match.bleu:.2f} with behaviour {match.behavior + 1}" if match else ""
                self._compared[digest] = found
            if found := self._compared[digest]:
                self._report.add("contaminated", partial(_joined, where, found))


def _decode(picture: Image.Image | Path | bytes) -> str | None:
    """Why a picture cannot be shown to a model; None if it can."""
    try:
        open_picture(picture)
    except PictureError as error:
        return str(error)
    return None


def _pixels(picture: Image.Image | bytes) -> str:
    """A name for what is shown of a picture in memory."""
    image = open_picture(picture)
    return hashlib.blake2b(image.tobytes(), digest_size=8).hexdigest() + str(image.size)


@cache
def _content(picture: Path | str) -> str:
    """A name for what a picture file holds; a file that cannot be read is told from others by its path."""
    if isinstance(picture, str):
        return picture
    try:
        return file_sha256(picture)
    except OSError:
        return str(picture)


def _texts(example: Example) -> Iterator[str]:
    for message in example.messages:
        yield from _message_texts(message)


def _message_texts(message: dict[str, Any]) -> Iterator[str]:
    content = message["content"]
    if isinstance(content, str):
        yield content
    else:
        yield from (part["text"] for part in content if part["type"] == "text")
