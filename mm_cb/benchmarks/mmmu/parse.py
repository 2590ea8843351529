"""MMMU's official answer rules: what a response says, as a letter or as pieces of text and numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

from mm_cb.benchmarks.mmmu.protocol import protocol

AnswerPiece = str | float

_FEWEST_WORDS = 6
"""From so many white-space tokens on, an option's text counts as its letter."""
_THOUSANDS = re.compile(r"-?\b\d{1,3}(?:,\d{3})+\b")
_SCIENTIFIC = re.compile(r"-?\d+(?:\.\d+)?[eE][+-]?\d+")
_PLAIN = re.compile(r"-?(?:\d*\.\d+|\d+\b)(?![eE][+-]?\d|[,\d])")


def parse_multiple_choice(response: str, all_choices: Sequence[str], index2ans: Mapping[str, str]) -> str | None:
    """The letter that a response chooses, or None where the official evaluator would draw one at random.

    Letters in brackets come first, then letters between blanks, then (from six words on) the options' texts; of several
    the one that is mentioned last, ties to the first option. Unlike a person it takes ``A or B`` for B, the pronoun "I"
    for the ninth option, and finds nothing in ``B) red``, ``**B**`` or a lower-case letter.

    Args:
        response: The model's text, unchanged.
        all_choices: The question's letters, in order.
        index2ans: Letter -> text of the option.

    Source:
        MMMU-Benchmark/MMMU, ``mmmu/utils/eval_utils.py``. Deviation: the random letter is drawn by `score`.
    """
    for mark in protocol().stripped:
        response = response.strip(mark)
    text = f" {response} "
    for form in ("({})", " {} "):
        last = {letter: text.rfind(form.format(letter)) for letter in all_choices}
        if found := _furthest_right(last):
            return found
    if len(text.split()) < _FEWEST_WORDS:
        return None
    lowered = text.lower()
    return _furthest_right({letter: lowered.rfind(option.lower()) for letter, option in index2ans.items()})


def says_plainly(response: str, letter: str, index2ans: Mapping[str, str]) -> bool:
    """Whether a parsed letter stands in the response, or its option's text does in whole words.

    The official rule also finds an option ``h`` inside any word, so that long random text earns points by itself.
    """
    if parse_multiple_choice(response, list(index2ans), {}) is not None:
        return True
    text = index2ans[letter].strip().lower()
    return bool(text) and re.search(rf"(?<!\w){re.escape(text)}(?!\w)", response.lower()) is not None


def _furthest_right(positions: Mapping[str, int]) -> str | None:
    """The letter with the largest position, the first one on a tie; -1 stands for nowhere."""
    best = max(positions, key=lambda letter: positions[letter], default=None)
    return best if best is not None and positions[best] >= 0 else None


def parse_open(response: str) -> list[AnswerPiece]:
    """What an open response may be saying: tails of its lines, and every number in them.

    Returns:
        Lower-case strings and floats rounded to two decimals, in order of appearance, without repeats. A string of one
        character comes as two, with a blank before and behind it.

    Source:
        As `parse_multiple_choice`. Deviation: none but the order, which is arbitrary there and never matters.
    """
    tails = _tails(response)
    numbers = [
        found for tail in tails for pattern in (_THOUSANDS, _SCIENTIFIC, _PLAIN) for found in pattern.findall(tail)
    ]
    return list(dict.fromkeys(piece for text in [*tails, *numbers] for piece in normalise(text)))


def normalise(text: str) -> list[AnswerPiece]:
    """A number as a float with two decimals, anything else in lower case: ``"1,234.567"`` -> ``[1234.57]``."""
    text = text.strip()
    try:
        return [round(float(text.replace(",", "")), 2)]
    except ValueError:
        lowered = text.lower()
    return [f" {lowered}", f"{lowered} "] if len(lowered) == 1 else [lowered]


def _tails(response: str) -> list[str]:
    """What follows the cue words, line by line; the whole response if no cue stands in it.

    The official rule also cuts at a full stop before a capital, but only after lower-casing, so it never does.
    """
    text = response.strip().strip(".").lower()
    lines = text.split("\n")
    found = []
    for number, line in enumerate(lines, start=1):
        cues = protocol().cues + ((protocol().last_line_cue,) if number == len(lines) else ())
        tail = _shortest_tail(line, cues)
        if tail and tail not in protocol().trivial:
            found.append(tail)
    return found or [text]


def _shortest_tail(line: str, cues: Sequence[str]) -> str:
    """The shortest text behind the last occurrence of a cue; an empty one gives way to the next cue's."""
    shortest = ""
    for cue in cues:
        if cue in line:
            tail = line.rpartition(cue)[2].strip()
            if not shortest or len(tail) < len(shortest):
                shortest = tail
    return shortest


def right_letter(answer: str | Sequence[str], letter: str | None) -> bool:
    """Whether a letter is the answer (or one of several)."""
    return letter in ([answer] if isinstance(answer, str) else answer)


def right_open(answer: str | Sequence[str], pieces: Sequence[AnswerPiece]) -> bool:
    """Whether any string piece holds a string answer, or any number equals a numeric one.

    A numeric answer is never looked for inside a string. Of several answers any counts.
    """
    answers = [piece for text in ([answer] if isinstance(answer, str) else answer) for piece in normalise(text)]
    for piece in pieces:
        if isinstance(piece, str):
            if any(isinstance(wanted, str) and wanted in piece for wanted in answers):
                return True
        elif piece in answers:
            return True
    return False
