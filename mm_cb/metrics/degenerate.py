"""Completions that are no answer in any language: nothing, one thing over and over, or blindly drawn characters."""

import math
import re
from collections import Counter

from mm_cb.core.folding import is_blank

_READ = 4000
"""Characters that are looked at; a model that loops does so from early on."""
_LOOP = re.compile(r"(.{1,80}?)\1{3,}", re.DOTALL)
"""A piece of up to 80 characters, four times or more in a row."""
_SHORTEST_LOOP = 20
_MANY_WORDS = 40
_DISTINCT = 0.2
_ENOUGH_CHARACTERS = 100
_BLIND_BITS = 5.75
"""Entropy per character, in bits, from which nobody wrote a text. English has about 4.2; of 5190 published answers to
MMMU-Pro and 1800 to MMMU, formulas and tables included, none reaches 5.51, program text stays below 5.6; 400 characters
drawn blindly from a keyboard have 6.3, 400 letters and digits 5.8."""
_ENOUGH_LETTERS = 60
_BLIND_MATCHES = 0.042
"""Chance that two letters of a text are the same, case left out, below which it counts as drawn blindly. English has
0.067; of 645 published answers to MMMU with so many letters and 17,897 pieces of documentation and program text none is
below 0.044. Blindly drawn letters have 1/26 = 0.038: four of five draws of 80 characters fall below, of 200 nearly all.
So does a short text made to use every letter, such as a row of pangrams."""
_LETTERS_SHARE = 0.8
"""Of all visible characters, from which the letters speak for the text; names inside another script do not."""


def degenerate(completion: str) -> str | None:
    """``empty``, ``noise``, ``repetition`` or None.

    Repetition: one piece repeated in a row makes up at least half of the text (and 20 characters), or of 40 words or
    more fewer than a fifth are distinct. Noise: 100 or more visible ASCII characters, or 60 or more letters, whose
    frequencies are nearly equal (keys and base64 are taken for it as well). Incoherent words are not found this way:
    that takes a language model's likelihood.
    """
    text = completion.strip()[:_READ]
    if is_blank(text):
        return "empty"
    if is_noise(text):
        return "noise"
    longest = max((loop.end() - loop.start() for loop in _LOOP.finditer(text)), default=0)
    if longest >= max(_SHORTEST_LOOP, len(text) / 2):
        return "repetition"
    words = text.lower().split()
    if len(words) >= _MANY_WORDS and len(set(words)) < _DISTINCT * len(words):
        return "repetition"
    return None


def is_noise(completion: str) -> bool:
    """Whether the visible ASCII characters, or the letters, are about equally frequent; other scripts say nothing."""
    counts = Counter(character for character in completion.strip()[:_READ] if "!" <= character <= "~")
    n = counts.total()
    visible = sum(not character.isspace() for character in completion.strip()[:_READ])
    return (n >= _ENOUGH_CHARACTERS and _bits(counts) >= _BLIND_BITS) or _letters_are_blind(counts, visible)


def _letters_are_blind(counts: Counter[str], visible: int) -> bool:
    letters: Counter[str] = Counter()
    for character, times in counts.items():
        if character.isalpha():
            letters[character.lower()] += times
    n = letters.total()
    if n < max(_ENOUGH_LETTERS, _LETTERS_SHARE * visible):
        return False
    return sum(times * (times - 1) for times in letters.values()) / (n * (n - 1)) < _BLIND_MATCHES


def _bits(counts: Counter[str]) -> float:
    n = counts.total()
    return math.log2(n) - sum(count * math.log2(count) for count in counts.values()) / n
