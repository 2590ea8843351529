"""Texts as a reader sees them: what looks the same is the same."""

import unicodedata

_LOOKS = str.maketrans(
    "аеорсухіјѕԁһԛԝАВЕКМНОРСТУХІЈЅαοριυνκΑΒΕΖΗΙΚΜΝΟΡΤΥΧ’‘‛“”‐‑‒–—",
    "aeopcyxijsdhqwABEKMHOPCTYXIJSaopiuvkABEZHIKMNOPTYX'''\"\"-----",
)
"""Letters of other scripts, and marks, that are drawn as these are."""


def as_drawn(text: str) -> str:
    """A text without what is not drawn (zero widths, soft hyphens, marks of direction), in one form of every letter.

    ASCII is left as it is.
    """
    if text.isascii():
        return text
    drawn = (one for one in unicodedata.normalize("NFKC", text) if unicodedata.category(one) != "Cf")
    return "".join(one for one in drawn if not "\ufe00" <= one <= "\ufe0f").translate(_LOOKS)


def is_blank(text: str) -> bool:
    """Whether nothing of a text is drawn."""
    return not text.strip() or not as_drawn(text).strip()


def folded(text: str) -> str:
    """The same for comparing: one case, single blanks, no full stop or question mark at the end."""
    once = as_drawn(text).casefold()
    plain = " ".join(as_drawn(once).casefold().split())  # one case may bring forth another script's letter
    return plain.rstrip(" .!?。！？") or plain
