"""A model behind an OpenAI-compatible address: concurrent chat requests that end in an answer or a named failure."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from mm_cb.core.errors import UserError, one_line
from mm_cb.core.limits import LIMITS

if TYPE_CHECKING:
    from PIL.Image import Image

API_KEY = "MM_CB_API_KEY"
"""Environment variable that holds the key of the endpoint; keys are read from nowhere else, and never stored."""

REFUSED = "refused"
"""The kind of failure of one request alone that the server answers in so many words."""
_HOPELESS = ("key", "missing")
"""Failures that every further request would meet as well; so does ``down``, while the server has never been reached."""
_GIVE_UP = 16
"""So many failures of the server in a row, without one answer, end a run."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
_QUOTED = 200

Key = TypeVar("Key", bound=Hashable)
Message = Mapping[str, Any]


class EndpointError(UserError):
    """The endpoint gave no answer; what it has answered before is kept."""


class MissingExtraError(UserError, ImportError):
    """The package behind an optional extra is not installed."""


@dataclass(frozen=True)
class EndpointFailure:
    """One request without an answer."""

    kind: str
    """``down``, ``key``, ``missing``, ``slow``, ``busy``, ``server``, ``broken`` (no chat completion in the answer) or
    ``refused`` (this request alone: too long, filtered, no images taken)."""
    reason: str
    """One printable line without the key."""


class Endpoint:
    """An OpenAI-compatible chat server (vLLM, Ollama, hosted).

    Attributes:
        url: Base address, without ``/chat/completions``.
        model: The name that the server knows the model by.
    """

    def __init__(
        self,
        url: str,
        model: str,
        *,
        api_key: str | None = None,
        timeout: float = 60,
        retries: int = 5,
        concurrency: int = 8,
    ) -> None:
        """Describe the endpoint; nothing is sent.

        Args:
            url: For example ``http://localhost:8000/v1``.
            model: Model name.
            api_key: Key, or None for the environment's ``MM_CB_API_KEY`` (local servers need none).
            timeout: Longest silence of the server in seconds.
            retries: Further tries after a failure that may pass: silence, 408, 409, 429 (its Retry-After is kept), 5xx,
                and answers that are no chat completion.
            concurrency: Requests under way at the same time.

        Raises:
            UserError: If the address is not plain http(s), or holds a password or a query, or a number is out of range.
        """
        for name, value in (("timeout", timeout), ("retries", retries), ("concurrency", concurrency)):
            LIMITS[name].refuse(name, value)
        self.url = _base_address(url)
        self.model = model
        self._key = api_key if api_key is not None else os.environ.get(API_KEY) or None
        self._timeout = timeout
        self._retries = retries
        self._concurrency = concurrency
        self._reached = False

    def chat(self, messages: Sequence[Message], *, max_tokens: int, temperature: float) -> str:
        """The answer to one chat; the empty string is an answer.

        Raises:
            EndpointError: If there is none after all retries.
            MissingExtraError: If the ``judge`` extra is not installed.
        """
        ((_, answer),) = self.map([("", messages)], max_tokens=max_tokens, temperature=temperature)
        if isinstance(answer, EndpointFailure):
            raise EndpointError(answer.reason)
        return answer

    def map(
        self, requests: Iterable[tuple[Key, Sequence[Message]]], *, max_tokens: int, temperature: float
    ) -> Iterator[tuple[Key, str | EndpointFailure]]:
        """Answers to many chats, each as soon as it is there; ``requests`` is read only as far as there is room.

        Keep each answer before asking for the next one: then nothing that was paid for is lost. Not for use inside a
        running event loop.

        Raises:
            EndpointError: If no further request can succeed (server never reached, key refused, no such model), or 16
                in a row failed on the server's side. A connection that breaks off costs its own request alone.
            MissingExtraError: If the ``judge`` extra is not installed.
        """
        fixed = {"model": self.model, "max_tokens": max_tokens, "temperature": temperature}
        waiting = iter(requests)
        under_way: dict[asyncio.Task[str | EndpointFailure], Key] = {}
        failed_in_row, hopeless = 0, ""
        with asyncio.Runner() as runner:  # its end cancels what is still under way
            client = self._client()
            while True:
                while not hopeless and len(under_way) < self._concurrency and (request := next(waiting, None)):
                    question = self._ask(client, {**fixed, "messages": list(request[1])})
                    under_way[runner.get_loop().create_task(question)] = request[0]
                if not under_way:
                    break
                done, _ = runner.run(_first(under_way))
                for task in done:
                    key, answer = under_way.pop(task), task.result()
                    down = isinstance(answer, EndpointFailure) and answer.kind == "down"
                    self._reached |= not down
                    if isinstance(answer, EndpointFailure) and answer.kind != REFUSED:
                        failed_in_row += 1
                        never = down and not self._reached
                        if answer.kind in _HOPELESS or never or failed_in_row >= _GIVE_UP:
                            hopeless = hopeless or answer.reason  # nothing more is asked, what is under way is awaited
                    else:
                        failed_in_row = 0
                    yield key, answer
            runner.run(client.close())
        if hopeless:
            raise EndpointError(hopeless)

    def _client(self) -> Any:
        try:
            import openai
        except ImportError as e:
            raise MissingExtraError("an endpoint needs the `judge` extra: pip install 'mm-cb[judge]'") from e
        return openai.AsyncOpenAI(
            base_url=self.url, api_key=self._key or "none", timeout=self._timeout, max_retries=self._retries
        )

    async def _ask(self, client: Any, request: dict[str, Any]) -> str | EndpointFailure:
        """One request. The library retries what fails on the way; answers that hold no completion are ours to retry."""
        import openai

        broken = ""
        for attempt in range(self._retries + 1):
            if attempt:
                await asyncio.sleep(min(_FIRST_PAUSE * 2 ** (attempt - 1), _LONGEST_PAUSE))
            try:
                response = await client.chat.completions.with_raw_response.create(**request)
                return completion_of(response.http_response.content)
            except _BrokenAnswer as e:
                broken = str(e)
            except _Filtered:
                return EndpointFailure(REFUSED, f"the endpoint {self.url} filtered the answer.")
            except openai.OpenAIError as e:
                return self._failure(e)
        return EndpointFailure("broken", self._clean(f"the endpoint {self.url} must answer chats in JSON, {broken}."))

    def _failure(self, error: Any) -> EndpointFailure:
        import openai

        tries = f"{self._retries + 1} tries"
        if isinstance(error, openai.APITimeoutError):
            kind, reason = "slow", f"said nothing for {self._timeout:g} s ({tries}); raise the timeout or ask for less"
        elif isinstance(error, openai.APIConnectionError):
            cause = str(error.__cause__ or "") or "no connection"
            kind, reason = "down", f"cannot be reached ({cause}; {tries}); start the server or correct the address"
        elif isinstance(error, openai.AuthenticationError | openai.PermissionDeniedError):
            state = "refuses the key in" if self._key else "wants a key: put it into"
            kind, reason = "key", f"{state} the environment variable {API_KEY} (HTTP {error.status_code})"
        elif isinstance(error, openai.NotFoundError):
            reason = f"knows no model `{self.model}` or has no such path (most addresses end in /v1): {error}"
            kind = "missing"
        elif isinstance(error, openai.APIStatusError):
            code = error.status_code
            kind = "busy" if code == 429 else "server" if code >= 500 or code in (408, 409) else REFUSED
            reason = f"answers HTTP {code}: {error}" + ("" if kind == REFUSED else f" ({tries})")
        else:
            kind, reason = "broken", f"gave an answer that cannot be read: {error}"
        return EndpointFailure(kind, self._clean(f"the endpoint {self.url} {reason}."))

    def _clean(self, text: str) -> str:
        text = text.replace(self._key, "[key]") if self._key else text
        return one_line(text if len(text) <= 3 * _QUOTED else text[: 3 * _QUOTED] + "...")


class _BrokenAnswer(Exception):
    """An answer with status 200 that holds no chat completion."""


class _Filtered(Exception):
    """An answer that the server's own content filter took away."""


def completion_of(body: bytes) -> str:
    """The text of the first choice; a choice without text (a model that ended at once) is the empty string.

    Raises:
        _BrokenAnswer: If there is no choice; the message says what came.
        _Filtered: If the server's content filter left nothing of it.
    """
    text = body.decode("utf-8", "replace").strip()
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError) as e:
        came = "an HTML page" if text[:1] == "<" else "nothing" if not text else f"`{text[:_QUOTED]}`"
        raise _BrokenAnswer(f"got {came}") from e
    try:
        choice = answer["choices"][0]
        message = choice["message"]
        content = message.get("content") or message.get("refusal") or ""
        if isinstance(content, list):
            content = "".join(part.get("text") or "" for part in content)
        filtered = not content and choice.get("finish_reason") == "content_filter"
    except (LookupError, TypeError, AttributeError) as e:
        raise _BrokenAnswer(f"got no choice in `{text[:_QUOTED]}`") from e
    if filtered:
        raise _Filtered
    if not isinstance(content, str):
        raise _BrokenAnswer(f"got a content of type {type(content).__name__}")
    return content


def user_message(text: str, images: Sequence[Image] = ()) -> dict[str, Any]:
    """A user's turn, the images in front of the text; see `image_part` and `text_part` for any other order."""
    return {"role": "user", "content": [*(image_part(image) for image in images), text_part(text)]}


def text_part(text: str) -> dict[str, Any]:
    """A piece of text in a message's content."""
    return {"type": "text", "text": text}


def image_part(image: Image) -> dict[str, Any]:
    """A picture in a message's content: a PNG inside a data URL, so that the server sees exactly these pixels."""
    buffer = io.BytesIO()
    image.convert("RGB").save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


async def _first(tasks: Iterable[asyncio.Task[Any]]) -> Any:
    return await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


def _base_address(url: str) -> str:
    try:
        parts = urlsplit(url.strip())
        plain = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
    except ValueError:
        parts, plain = None, None
    if parts is None or not plain or parts.query or parts.fragment:
        raise UserError(
            "an endpoint must be a plain address such as http://localhost:8000/v1, without password, query or fragment "
            f"(the key belongs into {API_KEY}); got another one."
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}"
