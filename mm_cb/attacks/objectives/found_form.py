"""The form of an answer and words for it as the attacked model itself gives them away: nobody tells them."""

from __future__ import annotations

import re
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from PIL.Image import Image

from mm_cb.attacks.objectives.form import FormObjective
from mm_cb.attacks.objectives.target import encode
from mm_cb.data.behaviors_file import FORM, GAP, HARMLESS, Behavior
from mm_cb.inference.cached_chunks import chunks
from mm_cb.inference.subjects import Subject

_PIECES = re.compile(r"\w+|[^\w\s]")
_AT_ONCE = 32


class FoundFormObjective(FormObjective):
    """`FormObjective` with a form and words that the attacker finds out by himself.

    The model is asked a behaviour's ``harmless`` requests. Form: what stands behind the opening in these answers, with
    a gap wherever two of them differ. Words: all of its vocabulary that it says in none of these answers, that no
    request holds, and that it does not say to the clean request. So the attacker is told an opening and no more.

    Source:
        Ours. What an answer looks like, a breaker does not keep to itself: it answers harmless requests in that form.
    """

    def __init__(
        self, subject: Subject, behaviors: Sequence[Behavior], pictures: Sequence[Image], **settings: Any
    ) -> None:
        """Ask, and write each form behind its opening.

        Warns:
            UserWarning: If the answers to a behaviour's harmless requests have no form in common, as those of a model
                that a breaker broke: one word of any stands for it.
        """
        heard: dict[tuple[str, ...], list[str]] = {}
        told = []
        for behavior, picture in zip(behaviors, pictures, strict=True):
            if behavior.harmless not in heard:
                asked = [replace(behavior, prompt=one, messages=()) for one in behavior.harmless]
                heard[behavior.harmless] = _answers(subject, asked, None)
            refused = _answers(subject, [behavior], picture)
            told.append(_with_form(subject, behavior, heard[behavior.harmless], refused))
        if lost := [one for one in told if one.form is not None and one.form.text == GAP]:
            warnings.warn(
                f"{lost[0].named}: no two answers to its `{HARMLESS}` requests hold `{lost[0].target[-1]}`, the end of "
                f"its target, and go on alike but for some words (so of {len(lost)} behaviours): no form was found, "
                "and one word is asked for in its place; name requests that the model answers as the target begins.",
                stacklevel=2,
            )
        super().__init__(subject, told, pictures, **settings)


def _answers(subject: Subject, asked: Sequence[Behavior], picture: Image | None) -> list[str]:
    """What the attacked model says."""
    with subject.active() as model:
        return [
            answer
            for part in chunks(asked, _AT_ONCE)
            for answer in model.generate(encode(subject, part, [picture] * len(part), None), 64)
        ]


def _with_form(subject: Subject, behavior: Behavior, heard: Sequence[str], refused: Sequence[str]) -> Behavior:
    """The behaviour as if a file had told the form and the words."""
    text = _common([answer.partition(behavior.target[-1])[2].strip() for answer in heard])
    if text is None:
        text = GAP
    said = " ".join([*heard, *refused, *behavior.harmless, behavior.prompt, behavior.target, text]).lower()
    form = {"text": text, "words": _others(subject, behavior, text, {*_PIECES.findall(said)})}
    return replace(behavior, extra={**behavior.extra, FORM: form})


def _common(texts: Sequence[str]) -> str | None:
    """The first of the texts that have the commonest number of words, with gaps where two of them differ."""
    split = [_PIECES.findall(text) for text in texts if text]
    if not split:
        return None
    ((length, _),) = Counter(map(len, split)).most_common(1)
    alike = [pieces for pieces in split if len(pieces) == length]
    differs = [len({*place}) > 1 for place in zip(*alike, strict=True)]
    first = next(text for text in texts if len(_PIECES.findall(text)) == length)
    places = iter(differs)
    form = _PIECES.sub(lambda found: GAP if next(places) else found.group(), first)
    return form if any(differs) and not all(differs) else None


def _others(subject: Subject, behavior: Behavior, text: str, said: set[str]) -> list[str]:
    """The words of the vocabulary that are none of those said, and as many tokens in a gap as most of them."""
    tokenizer = subject.model.processor.tokenizer
    pieces = (tokenizer.decode([token]).strip() for token in range(len(tokenizer)))
    words = sorted(
        {word for word in pieces if len(word) > 1 and word.isalpha() and word.islower() and word not in said}
    )
    filled = [f"{behavior.target} {text.replace(GAP, word)}" for word in words]
    counts: list[int] = []
    for part in chunks(filled, _AT_ONCE):
        inputs = encode(subject, [behavior] * len(part), [None] * len(part), part)
        counts += inputs.completion_mask.sum(dim=1).tolist()
    usual = Counter(counts).most_common(1)[0][0]
    return [word for word, count in zip(words, counts, strict=True) if count == usual]
