"""What a chat server's reply is: the model's answer, or a failure by name. The HTTP status alone does not tell."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any

from mm_cb.core.errors import one_line
from mm_cb.core.records import Message
from mm_cb.core.thoughts import FIELDS, AnswerText, answer_in, begins_with_thought, thought_beside

REFUSED = "refused"
"""This request alone is not answered, and the server says so: filtered, too long, too large."""
CUT = "cut"
"""This answer ended at the limit of tokens before it had begun: while the model was thinking, or in silence."""
UNANSWERED = (REFUSED, CUT)
"""Failures of one request alone, which the same request would meet again: no answer, and no fault to wait out."""
HOPELESS = ("key", "missing", "quota", "settings", "unfit")
"""Failures that every further request would meet as well."""
MAY_PASS = ("busy", "server", "broken", "slow", "down")
"""Failures of the server that another try may not meet."""

QUOTED = 200
_HALF_AT_END = re.compile("[\ud800-\udfff]{1,3}\\Z")
"""Half of a surrogate pair, or up to three bytes of a character of four."""
_ENDED = (
    *("", "stop", "stop_sequence", "stop_token", "eos", "eos_token", "endoftext", "end_turn"),
    *("complete", "completed", "done", "normal"),
)
"""Ends of a whole answer; many servers name none. An end that stands in no list here may be any failure."""
_FILTERED = (
    *("content_filter", "content_filtered", "sensitive", "safety", "recitation", "blocklist", "prohibited_content"),
    *("spii", "guardrail_intervened", "refusal"),
)
_AT_LIMIT = ("length", "max_tokens", "max_output_tokens", "model_length", "model_context_window_exceeded")

_QUOTA_CODES = {
    *("insufficient_quota", "billing_hard_limit_reached", "billing_not_active", "insufficient_credits"),
    *("insufficient_balance", "insufficient_funds", "payment_required", "credit_balance_too_low", "arrearage"),
}
_QUOTA = re.compile(
    r"insufficient (?:quota|credit|balance|fund)|credit balance|out of credits|(?:exceeded|used up) your "
    r"(?:current |monthly )?quota|billing|payment required|more credits",
    re.IGNORECASE,
)
_MONEY = re.compile(
    r"quota|\bcredits?\b|billing|\bbalance\b|payment|arrears|overdue|free[ _-]?tier|spend(?:ing)?[ _-]?(?:limit|cap)|"
    r"usage[ _-]?limit|subscription|\b(?:no|insufficient) funds\b|top[ -]?up",
    re.IGNORECASE,
)
"""What a refusal to come in (401, 403) is about where it is not the key."""
_FILTER = re.compile(
    r"content[ _-]?(?:filter|management|policy)|moderation|flagged|responsible ?ai|safety (?:system|filter)|"
    r"data_inspection_failed|inappropriate content",
    re.IGNORECASE,
)
_TOO_LONG = re.compile(
    r"context[ _-](?:length|window|size)|maximum context|(?:prompt|input|request|message)s? (?:is|are|was|were) too "
    r"(?:long|large)|too many (?:input |prompt )?tokens|(?:longer|larger) than the (?:maximum|model)",
    re.IGNORECASE,
)
_KEY = re.compile(r"api[ _-]?key[^.]{0,20}(?:not valid|invalid|expired)|(?:invalid|incorrect)[ _]api[ _-]?key", re.I)
_NO_MODEL = re.compile(
    r"model_not_found|(?:invalid|unknown) model|not a valid model|model\b.{0,80}(?:not found|not exist)", re.I
)


@dataclass(eq=False)
class Trouble(Exception):
    """A reply without an answer."""

    kind: str
    """See `mm_cb.core.endpoint.EndpointFailure`."""
    reason: str
    """What the server does, as the rest of a sentence that begins with its address."""
    wait: float | None = None
    """Seconds that the server asks to be left alone."""
    param: str | None = None
    """The parameter that the server names."""
    tries: int | None = None
    """More than so many in all would cost too much, although one might end better; None = as many as usual."""
    foreign: bool = False
    """Whether the reply is none of a chat server's, which a login page or another service gives for ever."""

    def __post_init__(self) -> None:
        """Keep what is quoted as a text that every file and terminal can hold."""
        self.reason = one_line(self.reason)


def read_answer(body: bytes) -> AnswerText:
    """The text of the one choice; the empty string is an answer (of a model that ended at once), no content is none.

    A thought in front of the text, or in a field of its own, is no part of it.

    A character that the limit of tokens has cut in two is U+FFFD, as it is in the answer of a model in this process.

    Raises:
        Trouble: If the reply holds no answer of the model, or one that is no text; says what came.
    """
    text = body.decode("utf-8-sig", "surrogateescape").strip()
    try:
        reply = json.loads(text, object_pairs_hook=_once)
    except (ValueError, RecursionError) as e:
        came = "an HTML page" if text[:1] == "<" else "nothing" if not text else f"`{text[:QUOTED]}`"
        raise _broken(came, foreign=True) from e
    if not isinstance(reply, dict):
        raise _broken(f"`{text[:QUOTED]}`", foreign=True)
    if reply.get("error"):  # gateways report another server's failure with status 200
        raise _error_inside(reply["error"])
    found = reply.get("choices")
    choices = found if isinstance(found, list) else []
    choice = choices[0] if choices else None
    message = choice.get("message") if isinstance(choice, dict) else None
    if isinstance(choice, dict) and message is None and isinstance(choice.get("text"), str):
        raise Trouble("missing", "answers with a completion (`text`), not with a chat's `message`; give a chat server")
    if isinstance(choice, dict) and choice.get("delta"):
        raise _broken("a piece of a stream (`delta`), where a whole answer was asked for", foreign=True)
    if not isinstance(choice, dict) or not isinstance(message, dict):
        raise _broken(f"no choice in `{text[:QUOTED]}`", foreign=True)
    if choice.get("error"):
        raise _error_inside(choice["error"])
    if len(choices) > 1:  # nobody knows which of them is the answer
        raise _broken(f"{len(choices)} choices in its reply, one was asked for")
    if (role := message.get("role")) in _ASKING:
        raise _broken(f"a message of the role `{role}`, which is no answer of the model")
    calls = {name: held for name, held in choice.items() if _CALL.fullmatch(name)}
    answer = _answer({**message, **calls}, str(choice.get("finish_reason") or "").lower())
    named = reply.get("model")
    answer.served = one_line(named)[:QUOTED] if isinstance(named, str) else ""
    return answer


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """An object of which no key comes twice: nobody knows which of two answers is the model's."""
    found = dict(pairs)
    if len(found) < len(pairs):
        raise ValueError("a key comes twice")
    return found


_ASKING = ("user", "system", "developer", "tool", "function")
"""Roles of those who ask a model, or tell it something."""
_CALL = re.compile(r"(?:server_|mcp_)?(?:tool|function)[_-]?(?:call|use)s?", re.IGNORECASE)
"""What servers call the call of a tool: as the end of an answer, as a field, as the type of a part."""


def _answer(message: Message, ended: str) -> AnswerText:
    if ended in _FILTERED:
        raise Trouble(REFUSED, f"filtered the answer (`finish_reason` {ended})")
    if _CALL.fullmatch(ended) or _has_call(message):
        raise Trouble(
            "settings",
            "called a tool that nobody offered it, in place of a whole answer: where it is served, switch off its own "
            "tools and what reads calls out of its answers (vLLM: --enable-auto-tool-choice)",
        )
    if ended not in (*_ENDED, *_AT_LIMIT):
        raise Trouble("server", f"ended its answer with `finish_reason` {ended[:80]}")
    content = _text(message.get("content")) or _text(message.get("refusal"))
    answer = answer_in(content, beside=thought_beside(message))
    thought = answer.cut or (not content.strip() and any(message.get(key) for key in FIELDS))
    if not answer.strip() and (thought or ended in _AT_LIMIT):
        how = "cut the answer at its" if ended in _AT_LIMIT else "ended in its thinking, perhaps at its own"
        raise Trouble(CUT, f"{how} limit of tokens, before it had begun")
    if not content.strip() and not isinstance(message.get("content"), str):
        held = "parts without one" if message.get("content") else "no content"
        raise _broken(f"a message without text, {held} (`finish_reason` {ended or 'none'})")
    thought_text = answer.thought.encode("utf-8", "replace").decode()
    cut = ended in _AT_LIMIT
    return AnswerText(_characters(answer, ended), thought_text, refusal=_refuses(message), at_limit=cut)


def _has_call(message: Message) -> bool:
    """Whether a message holds the call of a tool, in a field of its own or as a part of its content."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    named = [name for name, held in message.items() if held]
    named += [str(part.get("type")) for part in parts if isinstance(part, dict)]
    return any(map(_CALL.fullmatch, named))


def _refuses(message: Message) -> bool:
    """Whether a message has no words but those that it calls a refusal."""
    content = message.get("content")
    parts = content if isinstance(content, list) else []
    said = [part for part in parts if isinstance(part, dict) and (part.get("text") or part.get("refusal"))]
    if said:
        return all(part.get("refusal") and not part.get("text") for part in said)
    return not content and bool(_text(message.get("refusal")))


def _characters(content: str, ended: str) -> str:
    whole = _HALF_AT_END.sub("\N{REPLACEMENT CHARACTER}", content) if ended in _AT_LIMIT else content
    try:
        whole.encode()
    except UnicodeEncodeError as e:
        raise _broken(f"an answer that is no text: character {e.start + 1} is {_named(whole[e.start])}") from e
    return whole


def _named(half: str) -> str:
    """What stands for half of a surrogate pair, or for a byte that is not UTF-8."""
    escaped = 0xDC80 <= ord(half) <= 0xDCFF
    return f"the byte 0x{ord(half) - 0xDC00:02x}, not UTF-8" if escaped else f"half of a surrogate pair, {half!a}"


def _text(content: Any) -> str:
    """A message's content: a text, or a list of parts, of which texts and refusals count."""
    if content is None or isinstance(content, str):
        return content or ""
    if not isinstance(content, list):
        raise _broken(f"a content of type {type(content).__name__}")
    texts = []
    for part in content:
        held = part.get("text", part.get("refusal")) if isinstance(part, dict) else part
        if held is not None and not isinstance(held, str):
            raise _broken(f"a part of the content of type {type(held).__name__}")
        texts.append(held or "")
    return "".join(texts)


def unread(answer: str) -> str:
    """An answer that is not as it was asked for, as a message quotes it: its beginning, and what would help."""
    thinks = "; it thinks aloud: serve it with its thinking switched off, or kept apart from its answer"
    return f"`{one_line(answer)[:80]}`" + (thinks if begins_with_thought(answer) else "")


def _broken(came: str, *, foreign: bool = False) -> Trouble:
    return Trouble("broken", f"must answer chats in JSON, got {came}", foreign=foreign)


def _error_inside(error: Any) -> Trouble:
    code = error.get("code") if isinstance(error, dict) else None
    digits = str(code)
    status = int(digits) if digits.isascii() and digits.isdigit() and 400 <= int(digits[:4]) < 600 else 502
    return read_error(status, json.dumps({"error": error}).encode(), {}, inside=True)


def read_error(
    status: int, body: bytes, headers: Mapping[str, str], *, now: float = 0.0, inside: bool = False
) -> Trouble:
    """The failure that a reply with an error status means.

    Args:
        status: HTTP status, 3xx to 5xx.
        body: An error as JSON, or whatever came.
        headers: With names in lower case.
        now: Seconds since 1970, for a Retry-After that is a date.
        inside: Whether the error stood in a reply with status 200.
    """
    words, codes, param = _words(body)
    said = f"answers {'error' if inside else 'HTTP'} {status}" + (f": {words}" if words else "")
    if status < 400:
        place = headers.get("location", "").partition("?")[0]
        where = f"to `{place[:QUOTED]}`" if place else "somewhere else"
        return Trouble("missing", f"sends requests on {where} (HTTP {status}); give the address that answers itself")
    wait = _retry_after(headers, now)
    quota = Trouble("quota", f"{said}; see to its credit or wait, what was answered is kept")
    if status == 402 or codes & _QUOTA_CODES or (status < 500 and wait is None and _QUOTA.search(words)):
        return quota
    everything = f"{words} {' '.join(codes)}"
    filtered = _FILTER.search(everything) is not None
    if status in (408, 409, 425, 429) or (status >= 500 and not (inside and filtered)):
        return Trouble("busy" if status in (425, 429) else "server", said, wait)
    if status in (404, 405, 410):
        return Trouble("missing", f"has no such model or no such path (most addresses end in /v1): {said}")
    if status == 407:
        return Trouble("missing", f"{said}; a proxy in between wants a login: see HTTPS_PROXY and NO_PROXY")
    if filtered:
        return Trouble(REFUSED, f"{said} (a content filter)")
    if status in (401, 403) or _KEY.search(everything):
        whole = "" if body.lstrip()[:1] == b"<" or _KEY.search(everything) else body.decode("utf-8", "replace")
        return quota if _MONEY.search(whole) else Trouble("key", said)
    if _NO_MODEL.search(everything):
        return Trouble("missing", f"knows no such model: {said}")
    if status == 413 or _TOO_LONG.search(everything):
        return Trouble(REFUSED, f"{said} (more than it takes at once)")
    return Trouble(REFUSED, said, param=param or _named_parameter(words))


def _named_parameter(words: str) -> str | None:
    found = re.search(r"'?(max_completion_tokens|max_tokens|temperature)'?", words)
    return (
        found[1]
        if found
        and re.search(
            r"(?i)support|unrecogni|unknown|unexpected|not permitted|not allowed|must be|deprecated|only", words
        )
        else None
    )


def _words(body: bytes) -> tuple[str, set[str], str | None]:
    """What an error says, its codes in lower case, and the parameter it is about."""
    text = body.decode("utf-8", "replace").strip()
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return ("an HTML page" if text[:1] == "<" else text[:QUOTED]), set(), None
    error = content
    while isinstance(error, list) and error:
        error = error[0]
    if isinstance(error, dict) and error.get("error"):
        error = error["error"]
    if not isinstance(error, dict):
        return (error if isinstance(error, str) else text)[: 2 * QUOTED], set(), None
    inner = error.get("innererror")
    codes = [error.get(key) for key in ("code", "type", "status")] + [
        inner.get("code") if isinstance(inner, dict) else 0
    ]
    message = next((error[key] for key in ("message", "detail", "msg") if error.get(key)), text)
    message = message if isinstance(message, str) else json.dumps(message)
    param = error.get("param")
    named = {code.lower() for code in codes if isinstance(code, str)}
    return message[: 2 * QUOTED].rstrip(". "), named, param if isinstance(param, str) else None


def _retry_after(headers: Mapping[str, str], now: float) -> float | None:
    """Seconds; None where the header is missing or no time."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        value = headers.get(name, "")
        if re.fullmatch(r"\d{1,12}(\.\d{1,6})?", value.strip()):
            return float(value) / unit
    try:
        date = parsedate_to_datetime(headers.get("retry-after", ""))
    except (ValueError, TypeError, IndexError, OverflowError):
        return None
    return max(0.0, date.replace(tzinfo=date.tzinfo or datetime.UTC).timestamp() - now)
