"""One request on its way to a chat server and back, within limits of time and size."""

from __future__ import annotations

import asyncio
import json
import re
import time
import warnings
from collections.abc import AsyncIterator
from functools import partial
from typing import Any
from urllib.parse import SplitResult, quote, urlsplit
from urllib.request import getproxies, proxy_bypass

from mm_cb.core.chat_replies import Trouble, read_answer, read_error
from mm_cb.core.errors import UserError, one_line
from mm_cb.core.records import JsonObject
from mm_cb.core.thoughts import AnswerText

WHOLE = 5
"""A reply may take so many times the longest silence: some servers send blanks while they think, none may for ever.
Once it has begun, the rest may take the longest silence: it is written at once."""
SAID_AFTER = 1.5
"""So many times the longest silence a reply may be under way in silence towards the user."""
LARGEST = 16 * 2**20
"""Bytes of a reply."""
_NO_WORD = 8
"""Characters of a key that no text of ours or a server's holds by chance inside a word."""
_BROKEN_OFF = ("RemoteProtocolError", "ReadError", "WriteError")
"""What the library calls the end of a connection that was there."""
_SECRET = 16
"""Characters of a key that no answer holds by chance; local servers take short ones (``EMPTY``), which are words."""


class MissingExtraError(UserError, ImportError):
    """The package behind an optional extra is not installed."""


def open_client(url: str, key: str | None, timeout: float) -> Any:
    """The library's client; it neither tries again nor follows a redirection, which would carry prompts elsewhere.

    Raises:
        MissingExtraError: If the ``judge`` extra is not installed.
        UserError: If the library takes the address or a proxy of the environment for none.
    """
    try:
        import openai
    except ImportError as e:
        raise MissingExtraError("an endpoint needs the `judge` extra: pip install -e '.[judge]'") from e
    try:
        hooks: Any = {"response": [partial(_read_within_limit, key, timeout)]}
        transport = openai.DefaultAsyncHttpxClient(timeout=timeout, follow_redirects=False, event_hooks=hooks)
        return openai.AsyncOpenAI(
            base_url=url, api_key=key or "none", timeout=timeout, max_retries=0, http_client=transport
        )
    except Exception as e:  # there is an exception of its own for every part of an address
        raise UserError(
            f"the endpoint {url} cannot be asked: {one_line(str(e))}; correct the address, or HTTP_PROXY and its like "
            "in the environment."
        ) from e


async def reply_to(client: Any, request: JsonObject, timeout: float) -> AnswerText:
    """The answer in the reply to one request.

    Raises:
        Trouble: If there is none.
    """
    import openai

    whole = timeout * WHOLE
    said = asyncio.get_running_loop().call_later(timeout * SAID_AFTER, _say_slow, str(client.base_url), whole)
    try:
        async with asyncio.timeout(whole):
            response = await client.chat.completions.with_raw_response.create(**request)
        return read_answer(response.http_response.content)
    except TimeoutError as e:
        raise _dripping(whole) from e
    except openai.APIStatusError as e:
        reply = e.response
        raise read_error(reply.status_code, reply.content, reply.headers, now=time.time()) from e
    except openai.APITimeoutError as e:
        raise Trouble("slow", f"said nothing for {timeout:g} s; ask for less, or ask a quicker server") from e
    except openai.APIConnectionError as e:
        raise _no_connection(e.__cause__, str(client.base_url)) from e
    except (openai.OpenAIError, UnicodeError) as e:
        raise Trouble("broken", f"cannot be asked this, or its reply cannot be read: {e}") from e
    finally:
        said.cancel()


def _say_slow(url: str, whole: float) -> None:
    warnings.warn(
        f"the endpoint {url.rstrip('/')} sends its reply in drips; a reply is given up after {whole:g} s.", stacklevel=2
    )


def _dripping(seconds: float) -> Trouble:
    reason = f"sends its reply in drips, which did not come to an end within {seconds:g} s; ask another server"
    return Trouble("slow", reason, tries=2)


async def _read_within_limit(key: str | None, timeout: float, response: Any) -> None:
    """Read a reply, whatever its status, no further than `LARGEST`, and not for ever: the library has no such limit.

    Some servers and gateways repeat the key, in an error or with the whole request. It is taken out here, before
    anything is quoted, cut or kept.
    """
    body, begun, clock = bytearray(), None, asyncio.get_running_loop().time
    async for part in _parts_of(response):
        body += part
        begun = clock() if begun is None and part.strip() else begun
        if begun is not None and clock() - begun > timeout:
            raise _dripping(timeout)
        if len(body) > LARGEST:
            raise Trouble("broken", f"sends a reply of more than {LARGEST // 2**20} MB", tries=1)
    hidden = bytes(body)
    if key and (len(key) >= _SECRET or response.status_code >= 300):
        hidden = without_key(hidden, key)
        for name, value in response.headers.items():
            response.headers[name] = without_key(value.encode(), key).decode()
    response._content = hidden  # where the library looks for what has been read


async def _parts_of(response: Any) -> AsyncIterator[bytes]:
    """The pieces of a reply.

    Raises:
        Trouble: If it breaks off.
    """
    try:
        async for part in response.aiter_bytes():
            yield part
    except Exception as e:
        if type(e).__name__ not in _BROKEN_OFF:
            raise
        reason = f"breaks off in the middle of its reply ({_said(e)}); see to the server, and to what is before it"
        raise Trouble("broken", reason) from e


def without_key(text: bytes, key: str) -> bytes:
    """Text with ``[key]`` in place of the key, also as JSON, JSON inside JSON and addresses write it.

    One of few characters, which stand in many words, is looked for as a word of its own.
    """
    inside = json.dumps(key)[1:-1]
    spelled = [key, inside, json.dumps(inside)[1:-1], inside.replace("/", r"\/"), quote(key, safe=""), quote(key)]
    for written in sorted(spelled, key=len, reverse=True):
        found = re.escape(written.encode())
        text = re.sub(found if len(key) >= _NO_WORD else rb"(?<!\w)" + found + rb"(?!\w)", b"[key]", text)
    return text


def _no_connection(cause: BaseException | None, url: str) -> Trouble:
    if isinstance(cause, Trouble):
        return cause
    said = _said(cause)
    if type(cause).__name__ == "DecodingError":  # there was a reply: not in the coding that its header names
        return Trouble("broken", f"must answer chats in JSON, got what cannot be unpacked ({said})", foreign=True)
    if "SSL" in said.upper() or "CERTIFICATE" in said.upper():
        advice = "write http:// for a server without TLS, or name its certificate in SSL_CERT_FILE"
        return Trouble("down", f"cannot be reached safely ({said}); {advice}", tries=1)
    parts = urlsplit(url)
    if proxy := _proxy_of(parts):
        advice = f"see to the proxy, or add {parts.hostname} to NO_PROXY"
        return Trouble("down", f"cannot be reached by the proxy that the environment names, {proxy} ({said}); {advice}")
    if type(cause).__name__ in _BROKEN_OFF:
        advice = "see what the server says of it, and that it is one for chats"
        return Trouble("down", f"takes a request and closes the connection without a reply ({said}); {advice}")
    tls = ", or write http:// if it is one without TLS" if parts.scheme == "https" else ""
    return Trouble("down", f"cannot be reached ({said}); start the server or correct the address{tls}")


def _said(error: BaseException | None) -> str:
    """What an error says, or the first of those behind it that says anything; else what it is."""
    behind = error
    while behind is not None:
        if text := str(behind):
            return text
        behind = behind.__cause__ or behind.__context__
    return f"{type(error).__name__}, without a reason"


def _proxy_of(parts: SplitResult) -> str | None:
    """The proxy that the environment names for an address, without its password, and where it is named."""
    if parts.hostname is None or proxy_bypass(parts.hostname):
        return None
    for kind in (parts.scheme, "all"):
        if named := getproxies().get(kind):
            return f"`{named.rpartition('@')[2].rpartition('//')[2]}` of {kind.upper()}_PROXY"
    return None
