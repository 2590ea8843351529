"""Model text and file contents on their way to a page: no control characters, no bidirectional tricks, no surprises."""

from __future__ import annotations

import re
import unicodedata
from typing import TYPE_CHECKING, Any

from mm_cb.core.records import Item
from mm_cb.metrics.observations import BESIDE
from mm_cb.metrics.table import judged_as

if TYPE_CHECKING:
    from markupsafe import Markup

_KEPT = "\n\t"
_TICKED = re.compile("`([^`]+)`")
_FLAG = re.compile(r"--[\w-]+")
_REMOVED = ("Cc", "Cf", "Cs", "Co")


def clean_text(value: Any) -> str:
    """Text without control, format (zero-width, bidirectional), surrogate and private characters; line ends are kept.

    Escaping for HTML is the template's work, this removes what escaping leaves in.
    """
    text = "" if value is None else str(value)
    if text.isascii() and text.isprintable():
        return text
    text = text.replace("\r\n", "\n").replace("\r", "\n")
    return "".join(c for c in text if c in _KEPT or unicodedata.category(c) not in _REMOVED)


def code(value: Any) -> Markup:
    """Clean, escaped text in which what stands in back-ticks is set as code, its flags never broken over two lines."""
    from markupsafe import Markup, escape

    def marked(found: re.Match[str]) -> str:
        return "<code>" + _FLAG.sub(r"<span>\g<0></span>", found[1]) + "</code>"

    return Markup(_TICKED.sub(marked, str(escape(clean_text(value)))))


def shorten(value: Any, limit: int = 600) -> str:
    """Clean text cut at ``limit`` characters, with a mark that says how much is missing."""
    text = clean_text(value)
    return text if len(text) <= limit else f"{text[:limit].rstrip()} … ({len(text) - limit} more characters)"


def shown_completion(item: Item, *, show: bool) -> str:
    """What a report shows of a completion: everything (``show``: a fictional world), or nothing that may be harmful."""
    text = clean_text(item.get("completion"))
    if not show and _dictated(item):
        return f"[withheld: {len(text.split())} words, not judged for harm]"
    if show or (item.get("outcome") not in ("harmful", "not_judged") and not _unjudged_behaviour(item)):
        return shorten(text) or "(empty answer)"
    verdict = str(item.get("outcome") or "not_judged").replace("_", " ")
    return f"[withheld: {len(text.split())} words, {verdict}]"


def _unjudged_behaviour(item: Item) -> bool:
    return judged_as(item["metric"]) == "compliance" and item.get("outcome") is None


def _dictated(item: Item) -> bool:
    """Whether an answer to a benign request may be what an attacked picture was made to bring about."""
    pressed = item["condition"].startswith(BESIDE)
    return pressed and item.get("outcome") not in ("refusal", "gibberish")
