"""Completions that are no answer in any language: nothing, one thing over and over, or blindly drawn characters."""

import math
import re
from collections import Counter

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


def degenerate(completion: str) -> str | None:
    """``empty``, ``noise``, ``repetition`` or None.

    Repetition: one piece repeated in a row makes up at least half of the text (and 20 characters), or of 40 words or
    more fewer than a fifth are distinct. Noise: 100 or more visible ASCII characters whose frequencies are nearly equal
    (keys and base64 are taken for it as well). Incoherent words are not found this way: that takes a language model's
    likelihood.
    """
    text = completion.strip()[:_READ]
    if not text:
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
    """Whether the visible ASCII characters are about equally frequent; other scripts say nothing here."""
    counts = Counter(character for character in completion.strip()[:_READ] if "!" <= character <= "~")
    n = counts.total()
    if n < _ENOUGH_CHARACTERS:
        return False
    return math.log2(n) - sum(count * math.log2(count) for count in counts.values()) / n >= _BLIND_BITS
