"""Behaviours files: what an attack asks for, with which picture, and what it pushes the model to say."""

from __future__ import annotations

import os
import re
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from mm_cb.core.closing import say
from mm_cb.core.embedded import embedded
from mm_cb.core.errors import UserError
from mm_cb.core.file_kinds import BEHAVIORS, refuse_items
from mm_cb.core.files import dumps
from mm_cb.core.folding import is_blank
from mm_cb.core.names import Ids, refuse_groups
from mm_cb.core.provenance import available_memory_bytes
from mm_cb.core.reading import Line, json_lines, label_of, refuse_replaced, refuse_typos, shown
from mm_cb.core.records import JsonObject, Message
from mm_cb.core.sizes import told_size
from mm_cb.data.alike import content_of, once_each, repeats_note
from mm_cb.data.pictures import open_picture, path_inside
from mm_cb.data.target_calls import CALL, OPENING, TOOLS, TargetCall, read_shown_tools, read_target_call

KEPT_AS = "behaviors.jsonl"
"""The copy of the file that an attack's run directory keeps: what was asked, to be held against what is there."""

_REQUIRED = ("id", "prompt", "target")
_LABELS = ("category", "split")
_OPTIONAL = ("image", *_LABELS)
FACTS = "facts"
"""What an answer gives away, without a sentence around it: the text that `pgd_facts` forces."""
FORM = "form"
"""How an answer is said, with gaps, and words of which some belong into them: what `pgd_form` is told."""
GAP = "___"
HARMLESS = "harmless"
"""Requests that a model answers, whose answers look as the forbidden one does: what `pgd_form_found` asks."""
_UNDERSCORES = re.compile(r"__+|(?<!\w)_(?!\w)")
"""What somebody may mean by a gap; one inside a word is a part of it."""
_CALLS = (CALL, TOOLS)
_COPIES_ONCE, _COPIES = 20, 12
"""Float copies of a picture in an attack, once and per row of a batch. Measured at 1400 x 1400 on a small model, as the
most memory that a run of ``pgd`` takes beyond one at 84 x 84: 28 copies in a batch of 1, 36 in one of 2."""


class Form(NamedTuple):
    """How an answer is said, and what may stand in its gaps."""

    text: str
    """With `GAP` where a word belongs."""
    words: tuple[str, ...]

    def filled(self, word: str) -> str:
        """The text with one word in every gap."""
        return self.text.replace(GAP, word)


@dataclass(frozen=True)
class Behavior:
    """One line of a behaviours file."""

    id: str
    prompt: str
    target: str
    image: Path | None
    """None stands for a grey canvas."""
    category: str = "all"
    split: str = "all"
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the line, for the judge (what a made-up world's exact rules need)."""
    messages: tuple[Message, ...] = ()
    """The chat that is sent in place of the prompt, the user's turn last; never in a file of behaviours."""
    where: str = field(default="", compare=False, repr=False)
    """File and line; empty for one that is from no file."""

    @property
    def named(self) -> str:
        """How error lines begin that are about it: file and line, and its id."""
        return f"{self.where}{': ' * bool(self.where)}behaviour {self.id!r}"

    @property
    def call(self) -> TargetCall | None:
        """The call that stands for the target; its text is then written by whoever knows the model."""
        return None if CALL not in self.extra else read_target_call(self.extra[CALL])

    @property
    def tools(self) -> tuple[JsonObject, ...]:
        """JSON schemas of functions that the model is shown."""
        return tuple(self.extra.get(TOOLS) or ())

    @property
    def facts(self) -> str | None:
        """What an answer gives away, in the attacker's own form; None if the file does not say it."""
        return self.extra.get(FACTS)

    @property
    def form(self) -> Form | None:
        """How an answer is said, and words of which some belong into it; None if the file does not say it."""
        told = self.extra.get(FORM)
        return None if told is None else Form(told["text"], tuple(told["words"]))

    @property
    def harmless(self) -> tuple[str, ...]:
        """Requests that a model answers, and begins to answer as the target begins; none if the file names none."""
        return tuple(self.extra.get(HARMLESS) or ())

    @property
    def opening(self) -> str:
        """What an answer begins with where the attacker writes its beginning: of a call up to its arguments."""
        return str(self.extra.get(OPENING) or self.target)


def behaviors_path(named: Path) -> Path:
    """The behaviours file that a path or an embedded model's name stands for; a file of that name comes first."""
    guest = None if named.exists() else embedded(named)
    return named if guest is None or guest.behaviors is None else guest.behaviors


def refuse_absent(path: Path) -> None:
    """Refuse a behaviours file that is not there, with what one holds.

    Raises:
        UserError: If it is not.
    """
    if not os.path.lexists(path):
        raise UserError(
            f"the behaviours file `{path}` is not there; write one, a JSON object a line with id, prompt and target: "
            "docs/formats.md."
        )


def read_behaviors(path: Path) -> list[Behavior]:
    """Read a behaviours file and open every picture it names.

    Raises:
        UserError: If the file or a picture is missing or broken, a line is not as expected (file and line number), an
            id comes twice, or a picture lies outside the file's folder.
    """
    behaviors, lines, ids = list[Behavior](), list[Line](), Ids("behaviour")
    refuse_absent(path)
    for line in json_lines(path, "behaviours"):
        refuse_items(line.values, BEHAVIORS, line.where)
        behavior = parse_behavior(line, path)
        refuse_replaced(line.values, line.where)
        ids.take(behavior.id, line.where)
        behaviors.append(behavior)
        lines.append(line)
    if not behaviors:
        raise UserError(f"`{path}` must hold at least one behaviour, it is empty.")
    refuse_groups(lines, _LABELS)
    return behaviors


def asked_once(behaviors: Sequence[Behavior]) -> list[Behavior]:
    """The behaviours without those that repeat an earlier one but for its id and group, which is said."""

    def content(one: Behavior) -> Hashable:
        return content_of([one.prompt, one.target, dumps(one.extra)], one.image)

    kept = once_each(behaviors, content)
    if note := repeats_note(behaviors, kept, "behaviours"):
        same = {content(one): one for one in reversed(kept)}
        again = next(one for one in behaviors if same[content(one)] is not one)
        say(f"{note}: `{again.id}` is `{same[content(again)].id}` ({again.where})")
    return kept


def kept_behaviors(folder: Path) -> list[Behavior]:
    """What a run asked, from the copy of its behaviours file; pictures are the run's own, so none is named.

    Raises:
        UserError: If a line is not as expected.
    """
    kept = []
    for where, record in json_lines(folder / KEPT_AS, "behaviours"):
        one = parse_behavior(Line(where, record | dict.fromkeys(_OPTIONAL)), folder)
        labels = {key: record[key] for key in _LABELS if isinstance(record.get(key), str)}  # once blank ones, too
        kept.append(replace(one, **labels, extra={**record, "image": None, **one.extra}))
    return kept


def parse_behavior(line: Line, path: Path) -> Behavior:
    """One line of a behaviours file.

    Raises:
        UserError: If it is not as expected, or its picture cannot be read.
    """
    where, record = line
    if "messages" in record and "prompt" not in record:
        raise UserError(
            f"{where} has `messages`, as training rows have; a behaviour has {', '.join(_REQUIRED)}: docs/formats.md."
        )
    refuse_typos(record, (*_OPTIONAL, *_CALLS, FACTS, FORM), where)
    needed = [key for key in _REQUIRED if not (key == "target" and CALL in record and "target" not in record)]
    wrong = [key for key in needed if not isinstance(record.get(key), str) or is_blank(record[key])]
    if wrong:
        raise UserError(f"{where} must have non-empty texts for {needed}, wrong or missing: {wrong}.")
    if FACTS in record and not (isinstance(record[FACTS], str) and not is_blank(record[FACTS])):
        raise UserError(f"{where}: `{FACTS}` must be a non-empty text, got {shown(record[FACTS])}; leave it out.")
    if FORM in record:
        _refuse_form(record[FORM], where)
    if HARMLESS in record:
        _refuse_harmless(record[HARMLESS], where)
    extra = {key: value for key, value in record.items() if key not in (*_REQUIRED, *_OPTIONAL)}
    try:
        if TOOLS in record:
            extra[TOOLS] = read_shown_tools(record)
        if CALL in record:
            read_target_call(record[CALL], extra.get(TOOLS) or ())
    except ValueError as error:
        raise UserError(f"{where}: {error}.") from error
    return Behavior(
        id=record["id"],
        prompt=record["prompt"],
        target=record.get("target", ""),
        image=_picture(record.get("image"), path, where),
        category=label_of(record, "category", where),
        split=label_of(record, "split", where),
        extra=extra,
        where=where,
    )


def _refuse_form(form: Any, where: str) -> None:
    """Refuse a form without a gap, with a gap that is written otherwise, or without words to choose from.

    Raises:
        UserError: Saying what is expected.
    """
    told: dict[str, Any] = form if isinstance(form, dict) and len(form) == 2 else {}
    text, words = told.get("text"), told.get("words", ())
    listed = isinstance(words, list) and all(isinstance(w, str) and not is_blank(w) and GAP not in w for w in words)
    gapped = isinstance(text, str) and GAP in text
    if not (gapped and listed and len({*words}) == len(words) > 1):
        raise UserError(
            f"{where}: `{FORM}` must hold `text`, an answer with `{GAP}` in its gaps, and `words`, two or more that "
            f"differ, of which some belong into them; got {shown(form)}; leave it out."
        )
    if odd := next((run for told in (text, *words) for run in _UNDERSCORES.findall(told) if run != GAP), None):
        raise UserError(
            f"{where}: a gap of `{FORM}` is `{GAP}`, three underscores, got `{odd}`, which would be a part of the "
            "text; write three, or none."
        )


def _refuse_harmless(requests: Any, where: str) -> None:
    """Refuse what are not two or more requests.

    Raises:
        UserError: Saying what is expected.
    """
    listed = isinstance(requests, list) and all(isinstance(one, str) and not is_blank(one) for one in requests)
    if not listed or len({*requests}) < 2:
        raise UserError(
            f"{where}: `{HARMLESS}` must hold two or more requests that the model answers, a text each; got "
            f"{shown(requests)}; leave it out."
        )


def _picture(name: Any, path: Path, where: str) -> Path | None:
    if name is None:
        return None
    try:
        picture = path_inside(path.parent.resolve(), name)
    except ValueError as error:
        raise UserError(f"{where}: {error}.") from error
    open_picture(picture, where)
    return picture


def refuse_too_large(behaviors: Sequence[Behavior], batch: int) -> None:
    """Refuse pictures of which one batch would not fit into memory as float pixels, gradients and kept copies.

    To be called with the model in memory, since what is free is what counts. Pictures of one size go together.

    Raises:
        UserError: If a batch of pictures needs more memory than is free.
    """
    available = available_memory_bytes()
    sizes: dict[tuple[int, int], list[Path]] = {}
    for behavior in behaviors:
        if behavior.image is not None:
            sizes.setdefault(open_picture(behavior.image).size, []).append(behavior.image)
    for (width, height), files in sizes.items():
        together = min(batch, len(files))
        needed = 3 * width * height * 4 * (_COPIES_ONCE + together * _COPIES)
        if needed > available:
            raise UserError(
                f"picture `{files[0]}` ({width} x {height}) needs about {told_size(needed)} in a batch of "
                f"{together}, {told_size(available)} of memory are free. Make it smaller, or set `--batch 1`."
            )


def grey_canvas(size: tuple[int, int]) -> Image.Image:
    """The picture of a behaviour that has none: mid-grey, ``size`` = (height, width)."""
    return Image.new("RGB", (size[1], size[0]), (128, 128, 128))
