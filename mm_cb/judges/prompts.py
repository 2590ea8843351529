"""Judge prompts: read from the card of the very checkpoint, or from the user's file; never shipped."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Mapping
from pathlib import Path

from mm_cb.core import hub
from mm_cb.core.errors import UserError
from mm_cb.core.reading import file_bytes, plain_lines, read_plain, unfit
from mm_cb.core.slots import refuse_other_braces

CARD = "README.md"
_ASSIGNED = re.compile(r"^\s*(\w*PROMPT\w*)\s*=\s*(?=[\[{(\"'rRuU])", re.MULTILINE)
_FIELD = re.compile(r"\{(\w+)\}")
_FIELDS = {
    **dict.fromkeys(("behavior", "forbidden_prompt", "prompt"), "behavior"),
    **dict.fromkeys(("generation", "completion", "response"), "completion"),
    **dict.fromkeys(("context", "context_str", "image_description"), "context"),
}
"""The names that cards use for the same three things."""


def read_card(model: str) -> str:
    """The model card of a local folder or a hub id.

    Raises:
        UserError: If there is none.
    """
    folder = Path(model) if Path(model).is_dir() else hub.fetch(model, [CARD])
    try:
        return plain_lines(file_bytes(folder / CARD, "model card").decode("utf-8"))
    except (OSError, ValueError) as e:
        raise UserError(
            f"the judge's prompt is read from the card of `{model}`, which cannot be had: {str(e).rstrip('. ')}; give "
            "`--prompt-file`."
        ) from e


def card_prompts(card: str) -> dict[str, str]:
    """Every prompt that a card's code assigns: ``X_PROMPT = "..."`` and the entries of ``X_PROMPT = {...}``.

    Only literals are read and nothing is run. A single text is called ``prompt``.
    """
    found: dict[str, str] = {}
    for match in _ASSIGNED.finditer(card):
        value = _literal(card[match.end() :])
        if isinstance(value, str):
            found.setdefault("prompt", value)
        elif isinstance(value, dict):
            found |= {str(key): text for key, text in value.items() if isinstance(text, str)}
    return found


def _literal(source: str) -> object:
    """The Python literal that a text starts with, or None."""
    depth, end = 0, None
    lines = source.splitlines(keepends=True)
    try:
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            depth += (token.string in ("{", "[", "(")) - (token.string in ("}", "]", ")"))
            if depth == 0 and token.type in (tokenize.NEWLINE, tokenize.ENDMARKER):
                break
            if token.type not in (tokenize.NL, tokenize.COMMENT):
                end = token.end
        if end is None:
            return None
        text = "".join(lines[: end[0] - 1]) + lines[end[0] - 1][: end[1]]
        value: object = ast.literal_eval(text)
        return value
    except (tokenize.TokenError, SyntaxError, ValueError, IndexError):
        return None


def read_template(path: Path) -> str:
    """A prompt template as it stands in its file, blanks at its end included (they can matter).

    Raises:
        UserError: If the file cannot be read, or names a field that does not exist or no completion.
    """
    return check_judge_template(read_plain(path, "prompt template"), str(path))


def check_judge_template(template: str, where: str) -> str:
    """The template, if its fields can be filled.

    Raises:
        UserError: If it names an unknown field, or no completion, doubles its braces, or is no text.
    """
    if why := unfit(template):
        raise UserError(f"{where}: the prompt must be a text, {why}; give `--prompt-file`.")
    refuse_other_braces(template, _FIELDS, f"{where}: the prompt")
    fields = set(_FIELD.findall(template))
    if unknown := sorted(fields - _FIELDS.keys()):
        raise UserError(f"{where}: unknown field {{{unknown[0]}}} in the prompt; valid: {', '.join(sorted(_FIELDS))}.")
    if "completion" not in {_FIELDS[name] for name in fields}:
        raise UserError(f"{where}: the prompt must hold {{completion}} (or {{generation}}, {{response}}).")
    return template


def fill(template: str, values: Mapping[str, str]) -> str:
    """Put ``behavior``, ``completion`` and ``context`` into a template, in one pass: braces in texts stay.

    Raises:
        UserError: If the template wants a context and there is none.
    """

    def value(match: re.Match[str]) -> str:
        name = _FIELDS[match[1]]
        if name not in values:
            raise UserError(
                f"the judge's prompt wants {{{match[1]}}}: give the run's behaviours file "
                "with `--behaviors`, its rows with a `context` or an `image_description`."
            )
        return values[name]

    return _FIELD.sub(value, template)
