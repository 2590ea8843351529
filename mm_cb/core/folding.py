"""Texts as a reader sees them: what looks the same is the same."""

import unicodedata

_LOOKS = str.maketrans(
    "аеорсухіјѕԁһԛԝАВЕКМНОРСТУХІЈЅαοριυνκΑΒΕΖΗΙΚΜΝΟΡΤΥΧ’‘‛“”‐‑‒–—",
    "aeopcyxijsdhqwABEKMHOPCTYXIJSaopiuvkABEZHIKMNOPTYX'''\"\"-----",
)
"""Letters of other scripts, and marks, that are drawn as these are."""


class _Glyphs(dict[int, int | None]):
    """What is drawn of every character, None where nothing is; each is looked up once."""

    def __missing__(self, code: int) -> int | None:
        hidden = unicodedata.category(chr(code)) == "Cf" or 0xFE00 <= code <= 0xFE0F
        self[code] = None if hidden else _LOOKS.get(code, code)
        return self[code]


_DRAWN = _Glyphs()


def as_drawn(text: str) -> str:
    """A text without what is not drawn (zero widths, soft hyphens, marks of direction), in one form of every letter.

    ASCII is left as it is.
    """
    return text if text.isascii() else unicodedata.normalize("NFKC", text).translate(_DRAWN)


def is_blank(text: str) -> bool:
    """Whether nothing of a text is drawn."""
    return not text.strip() or not as_drawn(text).strip()


def folded(text: str) -> str:
    """The same for comparing: one case, single blanks, no full stop or question mark at the end."""
    once = as_drawn(text).casefold()
    plain = " ".join(as_drawn(once).casefold().split())  # one case may bring forth another script's letter
    return plain.rstrip(" .!?。！？") or plain
