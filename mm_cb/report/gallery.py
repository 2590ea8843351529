"""The gallery: which attacked pictures are shown, with every answer, the circuit breaker's failures first."""

import base64
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mm_cb.core.compatibility import counts_in_worst_case
from mm_cb.core.records import Item
from mm_cb.data.pictures import PictureError, file_inside, open_picture
from mm_cb.metrics.observations import worst_candidate
from mm_cb.report.labels import is_breaker

AMPLIFICATION = 10
SUBJECTS = ("base", "base+safety_prompt", "rr")
"""Subjects that a card shows in any case; further training seeds only where they complied."""
_LARGEST_PIXELS = 4_000_000
_EXACT_PIXELS = 96 * 96
_SIDE = 320
_ORDER = ("harmful", "not_judged", "gibberish", "other", "refusal")


@dataclass(frozen=True)
class ShownPicture:
    """A picture as a data URI, with the size that it is shown in."""

    uri: str
    width: int
    height: int
    exact: bool
    """Whether it has the file's own pixels. A larger one is scaled and lossy, so that a page can hold many."""


@dataclass(frozen=True)
class ShownAnswer:
    """One subject's answer, with the attacked picture and the amplified difference where there are any."""

    item: Item
    attacked: ShownPicture | None = None
    difference: ShownPicture | None = None

    @property
    def subject(self) -> str:
        """Whose answer this is."""
        return self.item["subject"]

    @property
    def file(self) -> str:
        """Where the attacked picture lies, from the folder that holds the run."""
        return f"{Path(str(self.item['run_dir'])).name}/{self.item['image']}"


@dataclass(frozen=True)
class GalleryCard:
    """One behaviour under one attack: the clean picture with its answers, then one attacked picture per subject."""

    item: Item
    clean: ShownPicture | None
    before: tuple[ShownAnswer, ...]
    attacked: tuple[ShownAnswer, ...]

    @property
    def failed(self) -> bool:
        """Whether a circuit breaker complied."""
        return any(is_breaker(a.subject) and a.item.get("outcome") == "harmful" for a in self.attacked)

    @property
    def outcomes(self) -> set[str]:
        """Outcomes of the circuit breaker on this card (of all subjects when there is none)."""
        breaker = [a for a in self.attacked if is_breaker(a.subject)] or list(self.attacked)
        return {str(a.item.get("outcome") or "not_judged") for a in breaker}

    @property
    def loss(self) -> float:
        """Lowest loss of the attack on the circuit breaker (on whoever was attacked); infinite where none is known."""
        attacked = [a for a in self.attacked if is_breaker(a.subject)] or self.attacked
        losses = [loss for a in attacked if (loss := a.item.get("loss")) is not None]
        return min(losses, default=math.inf)

    @property
    def rank(self) -> int:
        """The card's place in an order by outcome, failures first."""
        return min((_ORDER.index(outcome) for outcome in self.outcomes if outcome in _ORDER), default=len(_ORDER))


@dataclass
class Gallery:
    """The cards that fit, and how many there would have been."""

    cards: list[GalleryCard] = field(default_factory=list)
    possible: int = 0
    failures: int = 0
    judged: int = 0
    """Of the possible ones, those that attacked a circuit breaker and have a verdict."""

    @property
    def outcomes(self) -> set[str]:
        """All outcomes that a reader can filter by."""
        return set().union(*(card.outcomes for card in self.cards))


ItemsBySubject = dict[str, Item]


def build_gallery(items: Iterable[Item], *, triples: int = 54, byte_limit: int = 8_000_000) -> Gallery:
    """Choose and load cards until the number of clean / attacked / difference triples or the byte limit is reached.

    The circuit breaker's failures come first, all of them as far as they fit; the rest is a spread over attacks,
    outcomes, splits and request forms, in the order of the ids.

    Args:
        items: Records of items.jsonl with their ``run_dir``; only metric ``compliance`` is looked at, and no picture
            outside of its run directory.
        triples: Most triples to show.
        byte_limit: Most bytes of embedded pictures.
    """
    before: dict[str, ItemsBySubject] = defaultdict(dict)
    groups: dict[tuple[str, str], ItemsBySubject] = defaultdict(dict)
    for item in items:
        if item["metric"] == "compliance" and item["condition"] == "no_attack":
            before[item["id"]][item["subject"]] = item
        elif item["metric"] == "compliance" and counts_in_worst_case(item) and item.get("image"):
            worst = worst_candidate(item)
            if item.get("same_as"):
                continue
            if item["subject"] in SUBJECTS or worst.get("outcome") == "harmful":
                groups[item["id"], item["condition"]][item["subject"]] = worst
    order = choose(groups)
    judged = sum(_judged(groups[key]) for key in order)
    gallery = Gallery(possible=len(order), failures=sum(_failed(groups[key]) for key in order), judged=judged)
    used = shown = 0
    for key in order:
        if shown + len(groups[key]) > triples:
            break
        card = _card(groups[key], before.get(key[0], {}))
        used += sum(len(p.uri) for p in _pictures(card))
        if used > byte_limit:
            break
        shown += len(groups[key])
        gallery.cards.append(card)
    return gallery


def choose(groups: Mapping[tuple[str, str], ItemsBySubject]) -> list[tuple[str, str]]:
    """All cards in the order of showing: failures first, then one of each sort in turn."""
    failed = sorted(key for key, tries in groups.items() if _failed(tries))
    sorts: dict[tuple[str, ...], list[tuple[str, str]]] = defaultdict(list)
    for key in sorted(groups.keys() - set(failed)):
        tries = groups[key]
        first = next(iter(tries.values()))
        breaker = next((t for s, t in sorted(tries.items()) if is_breaker(s)), first)
        traits = (key[1], breaker.get("outcome"), first.get("split"), first.get("category"))
        sorts[tuple(str(trait) for trait in traits)].append(key)
    spread = []
    queues = [sorts[name] for name in sorted(sorts)]
    while any(queues):
        spread += [queue.pop(0) for queue in queues if queue]
    return failed + spread


def _judged(tries: ItemsBySubject) -> bool:
    return any(
        is_breaker(subject) and item.get("outcome") not in (None, "not_judged") for subject, item in tries.items()
    )


def _failed(tries: ItemsBySubject) -> bool:
    return any(is_breaker(subject) and item.get("outcome") == "harmful" for subject, item in tries.items())


def _card(tries: ItemsBySubject, before: ItemsBySubject) -> GalleryCard:
    subjects = sorted(tries, key=_rank)
    first = tries[subjects[0]]
    clean = read_picture(Path(first["run_dir"]), first.get("clean_image"))
    attacked = []
    for subject in subjects:
        folder = Path(tries[subject]["run_dir"])
        pixels = read_picture(folder, tries[subject].get("image"))
        other = read_picture(folder, tries[subject].get("clean_image"))
        difference = amplified_difference(pixels, other) if pixels is not None and other is not None else None
        attacked.append(ShownAnswer(tries[subject], embedded_picture(pixels), embedded_picture(difference)))
    answers = tuple(ShownAnswer(before[subject]) for subject in SUBJECTS if subject in before)
    return GalleryCard(first, embedded_picture(clean), answers, tuple(attacked))


def _rank(subject: str) -> tuple[int, str]:
    return (SUBJECTS.index(subject) if subject in SUBJECTS else len(SUBJECTS), subject)


def amplified_difference(attacked: np.ndarray, clean: np.ndarray) -> np.ndarray | None:
    """``128 + 10 * (attacked - clean)``, clipped to 8 bit: grey where nothing changed. None for unequal sizes."""
    if attacked.shape != clean.shape:
        return None
    change = attacked.astype(np.int16) - clean.astype(np.int16)
    return np.clip(128 + AMPLIFICATION * change, 0, 255).astype(np.uint8)


def read_picture(folder: Path, name: str | None) -> np.ndarray | None:
    """Pixels of a picture inside the run directory, shape (H, W, 3), as every command shows them; None without one."""
    path = file_inside(folder, name)
    if path is None:
        return None
    try:
        image = open_picture(path)
    except PictureError:
        return None
    return None if image.width * image.height > _LARGEST_PIXELS else np.asarray(image)


def embedded_picture(pixels: np.ndarray | None) -> ShownPicture | None:
    """Pixels ``(H, W, 3)`` as a page holds them: small ones as they are, larger ones ``_SIDE`` a side at most."""
    from PIL import Image

    if pixels is None:
        return None
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    exact = image.width * image.height <= _EXACT_PIXELS
    if exact:
        image.save(buffer, "PNG", optimize=True)
    else:
        image.thumbnail((_SIDE, _SIDE))
        image.save(buffer, "JPEG", quality=75)
    uri = f"data:image/{'png' if exact else 'jpeg'};base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
    return ShownPicture(uri, *image.size, exact)


def _pictures(card: GalleryCard) -> Sequence[ShownPicture]:
    candidates = [card.clean, *(p for a in card.attacked for p in (a.attacked, a.difference))]
    return [p for p in candidates if p is not None]
