"""A model behind an OpenAI-compatible address: concurrent chat requests that end in an answer or a named failure."""

from __future__ import annotations

import asyncio
import base64
import io
import os
import re
import warnings
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from mm_cb.core.chat_replies import CUT, HOPELESS, MAY_PASS, QUOTED, REFUSED, UNANSWERED, Trouble
from mm_cb.core.chat_transport import open_client, reply_to, without_key
from mm_cb.core.errors import UserError, one_line
from mm_cb.core.limits import LIMITS
from mm_cb.core.records import JsonObject, Message
from mm_cb.core.thoughts import AnswerText

__all__ = [
    *("API_KEY", "CUT", "REFUSED", "UNANSWERED", "Endpoint", "EndpointError", "EndpointFailure", "MissingExtraError"),
    *("UnfitModelError", "image_part", "text_part", "user_message"),
]

if TYPE_CHECKING:
    from PIL.Image import Image

API_KEY = "MM_CB_API_KEY"
"""Environment variable that holds the key of the endpoint; keys are read from nowhere else, and never stored, not even
where a server repeats them."""

_GIVE_UP = 16
"""So many failures of the server in a row, without one answer, end a run."""
_FOREIGN = 3
"""So many replies in a row that are none of a chat server's end a run, where none has been one yet."""
_FIRST_PAUSE, _LONGEST_PAUSE = 0.5, 8.0
_LONGEST_WAIT = 120.0
"""A server that asks for a longer pause is not waited for: the run ends, and goes on later."""
_PORT, _LAST_PORT = re.compile(r":([0-9]{1,100})$", re.ASCII), 65535
_LIMITS = ("max_tokens", "max_completion_tokens")
"""What servers call the longest answer; newer models want the second name."""

Key = TypeVar("Key", bound=Hashable)


class EndpointError(UserError):
    """The endpoint gave no answer; what it has answered before is kept."""


class UnfitModelError(EndpointError):
    """The endpoint's model cannot be asked as mm-cb asks, whatever is mended: the same command again meets the same."""


@dataclass(frozen=True)
class EndpointFailure:
    """One request without an answer."""

    kind: str
    """``refused`` (this request alone: too long, filtered, no images taken), ``cut`` (its answer ended at the limit of
    tokens before it had begun); of the server, all of which may pass: ``down``, ``slow``, ``busy``, ``server``,
    ``broken`` (no chat completion in the reply); and for every request alike: ``key``, ``missing``, ``quota``,
    ``settings``, ``unfit``."""
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
        timeout: float = 60,
        retries: int = 5,
        concurrency: int = 8,
    ) -> None:
        """Describe the endpoint, whose key is in the environment (local servers need none); nothing is sent.

        Args:
            url: For example ``http://localhost:8000/v1``.
            model: Model name.
            timeout: Longest silence of the server in seconds; a whole reply may take five times as long.
            retries: Further tries after a failure that may pass: silence, 408, 409, 429 (its Retry-After is kept up to
                two minutes), 5xx, replies that are no chat completion, answers that end in an error.
            concurrency: Requests under way at the same time.

        Raises:
            UserError: If the address is not plain http(s), or holds a password or a query, the key is no key, or a
                number is out of range.
        """
        self.url = _base_address(url)
        self.model = model
        self._key = _usable_key(os.environ.get(API_KEY))
        self._timeout = LIMITS["timeout"].number("timeout", timeout)
        self._retries = LIMITS["retries"].number("retries", retries)
        self._concurrency = LIMITS["concurrency"].number("concurrency", concurrency)
        self._reached = False
        self._limit = _LIMITS[0]
        self._names: Counter[str] = Counter()
        self._said_names = False

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
            EndpointError: If no further request can succeed (server never reached, no chat server, key refused, no such
                model, no credit left, a setting that the model does not take), 16 in a row failed on the server's side,
                or the first 16 were all cut before they had begun. A connection that breaks off costs its own request
                alone.
            MissingExtraError: If the ``judge`` extra is not installed.
            Exception: What reading ``requests`` raises, once what is under way has been answered.
        """
        fixed = {"model": self.model, "temperature": temperature}
        waiting = iter(requests)
        under_way: dict[asyncio.Task[str | EndpointFailure], Key] = {}
        self._outlook = _Outlook(self._reached)
        with asyncio.Runner() as runner:  # its end cancels what is still under way
            client = open_client(self.url, self._key, self._timeout)
            while True:
                while self._outlook.good and len(under_way) < self._concurrency:
                    try:
                        key, messages = next(waiting)
                    except StopIteration:
                        break
                    except Exception as e:  # the caller's, who gets it when nothing paid for can be lost
                        self._outlook.error = e
                        break
                    question = self._ask(client, {**fixed, "messages": list(messages)}, max_tokens)
                    under_way[runner.get_loop().create_task(question)] = key
                if not under_way:
                    break
                done, _ = runner.run(_first(under_way))
                for task in done:
                    key = under_way.pop(task)
                    if not task.cancelled():
                        self._outlook.add(task.result())
                        yield key, self._named(task.result())
            runner.run(client.close())
        self._say_names()
        self._reached = self._outlook.reached
        if self._outlook.error is not None:
            raise self._outlook.error

    def _named(self, answer: str | EndpointFailure) -> str | EndpointFailure:
        """Count the model that a server names; the one that was asked for needs no mention."""
        if isinstance(answer, AnswerText):
            self._names[answer.served or self.model] += 1
            answer.served = "" if answer.served == self.model else answer.served
        return answer

    def _say_names(self) -> None:
        """Say once which models answered, where their names are others than the one that was asked for."""
        if not self._said_names and set(self._names) - {self.model}:
            self._said_names = True
            told = ", ".join(f"`{name}` ({count} answers)" for name, count in self._names.most_common())
            warnings.warn(
                f"the endpoint {self.url} was asked for `{self.model}`, and says that its answers are from {told}: a "
                "route or a dated name is usual; else it is another model than the one that is named.",
                stacklevel=3,
            )

    async def _ask(self, client: Any, request: JsonObject, max_tokens: int) -> str | EndpointFailure:
        """One request, again where another try may end better."""
        for tries in range(1, self._retries + 2):
            try:
                return await self._reply(client, request, max_tokens)
            except Trouble as trouble:
                wait = trouble.wait or 0.0
                trouble = self._outlook.judged(trouble)
                enough = tries > self._retries or (trouble.tries is not None and tries >= trouble.tries)
                if enough or trouble.kind not in MAY_PASS or wait > _LONGEST_WAIT:
                    return self._failure(trouble, tries, max_tokens, request["temperature"])
                await self._outlook.pause(wait or min(_FIRST_PAUSE * 2 ** (tries - 1), _LONGEST_PAUSE))
        raise AssertionError("the last try returns")

    async def _reply(self, client: Any, request: JsonObject, max_tokens: int) -> str:
        limit = self._limit
        try:
            return await reply_to(client, {**request, limit: max_tokens}, self._timeout)
        except Trouble as trouble:
            if limit != _LIMITS[0] or trouble.param not in _LIMITS or _LIMITS[1] not in trouble.reason:
                raise
            self._limit = _LIMITS[1]  # for all that follow, too
            return await reply_to(client, {**request, self._limit: max_tokens}, self._timeout)

    def _failure(self, trouble: Trouble, tries: int, max_tokens: int, temperature: float) -> EndpointFailure:
        kind, reason = trouble.kind, trouble.reason
        if kind == "key":
            state = "refuses the key in" if self._key else "wants a key: put it into"
            reason = f"{state} the environment variable {API_KEY}: it {reason}"
        elif kind == "missing":
            reason = f"cannot be asked for `{self.model}`: it {reason}"
        elif kind == REFUSED and trouble.param == "temperature":
            kind = "unfit"
            reason = (
                f"does not take the temperature {temperature:g}, at which `{self.model}` must answer here: it {reason}"
                ". No option leaves it out, other answers would come of that; take a model or a server that takes it"
            )
        elif kind == REFUSED and trouble.param in (*_LIMITS, "model"):
            kind = "settings"
            reason = f"does not take `{trouble.param}` as it is asked: it {reason}"
        elif (trouble.wait or 0) > _LONGEST_WAIT:
            kind = "quota"
            reason += f"; it asks for a pause of {trouble.wait:.0f} s: run the same command again after it"
        elif kind == CUT:
            reason += f"; {max_tokens} are asked for: it needs more, by `--max-new-tokens` where the command "
            reason += "has that, or its thinking switched off where it is served"
        elif kind in MAY_PASS and tries > 1:
            reason += f" ({tries} tries)"
        return EndpointFailure(kind, self._clean(f"the endpoint {self.url} {reason}."))

    def _clean(self, text: str) -> str:
        text = without_key(text.encode(errors="replace"), self._key).decode() if self._key else text
        return one_line(text if len(text) <= 4 * QUOTED else text[: 4 * QUOTED] + "...")


class _Outlook:
    """What the answers so far say about those to come.

    Attributes:
        reached: Whether the server has ever been there.
        error: Why nothing more is asked.
    """

    def __init__(self, reached: bool) -> None:
        self.reached = reached
        self.error: Exception | None = None
        self._failed = self._cut = self._foreign = 0
        self._answered = False
        self._pausing: set[asyncio.Task[Any]] = set()

    @property
    def good(self) -> bool:
        """Whether to ask on."""
        return self.error is None

    def judged(self, trouble: Trouble) -> Trouble:
        """What a try has met, with what those before it say of it: a server may be none that chats."""
        self._foreign = self._foreign + 1 if trouble.foreign else 0
        if self._foreign < (_GIVE_UP if self._answered else _FOREIGN):
            return trouble
        advice = "give the address of a chat server, most end in /v1"
        return Trouble("missing", f"{trouble.reason}, {self._foreign} times in a row; {advice}")

    def add(self, answer: str | EndpointFailure) -> None:
        """Take one more answer in; past the point of hope, requests that wait for another try are given up."""
        if not isinstance(answer, EndpointFailure):
            self.reached = self._answered = True
            self._failed = self._foreign = 0
            return
        self.reached |= answer.kind != "down"
        self._failed = 0 if answer.kind in UNANSWERED else self._failed + 1
        self._cut += answer.kind == CUT
        never = answer.kind in HOPELESS or not self.reached
        if self.error is None and (never or self._failed >= _GIVE_UP or (self._cut >= _GIVE_UP and not self._answered)):
            self.error = (UnfitModelError if answer.kind == "unfit" else EndpointError)(answer.reason)
            for task in self._pausing:
                task.cancel()

    async def pause(self, seconds: float) -> None:
        """Wait for another try; ends the task if there will be none."""
        task = asyncio.current_task()
        assert task is not None
        self._pausing.add(task)
        if not self.good:
            raise asyncio.CancelledError
        await _sleep(seconds)
        self._pausing.discard(task)


async def _sleep(seconds: float) -> None:
    """Wait; tests put a clock of their own here."""
    await asyncio.sleep(seconds)


def _usable_key(key: str | None) -> str | None:
    key = (key or "").strip()
    if not all("!" <= character <= "~" for character in key):
        raise UserError(f"{API_KEY} must be a key of plain ASCII characters without blanks, got something else.")
    return key or None


def user_message(text: str, images: Sequence[Image] = ()) -> Message:
    """A user's turn, the images in front of the text; see `image_part` and `text_part` for any other order."""
    return {"role": "user", "content": [*(image_part(image) for image in images), text_part(text)]}


def text_part(text: str) -> Message:
    """A piece of text in a message's content."""
    return {"type": "text", "text": text}


def image_part(image: Image) -> Message:
    """A picture in a message's content: a PNG inside a data URL, so that the server sees exactly these pixels.

    Args:
        image: In mode RGB, as `mm_cb.data.pictures.open_picture` gives it.
    """
    buffer = io.BytesIO()
    assert image.mode == "RGB", f"a picture in mode {image.mode} has not been through the reader"
    image.save(buffer, "PNG")
    url = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return {"type": "image_url", "image_url": {"url": url}}


async def _first(tasks: Iterable[asyncio.Task[Any]]) -> Any:
    return await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)


def _base_address(url: str) -> str:
    try:
        parts = urlsplit(url.strip())
    except ValueError as e:  # brackets that do not close, or hold something else
        raise UserError(
            "an endpoint whose host is an IPv6 address has it in brackets, such as http://[::1]:8000/v1; got brackets "
            "that hold none."
        ) from e
    plain = parts.scheme in ("http", "https") and parts.hostname and "@" not in parts.netloc
    plain = plain and not any(character.isspace() for character in parts.netloc)
    if plain and (found := _PORT.search(parts.netloc)) and not 1 <= int(found[1]) <= _LAST_PORT:
        raise UserError(f"the port of an endpoint must be a number from 1 to {_LAST_PORT}, got {found[1]:.20}.")
    odd_port = not _PORT.search(parts.netloc) and ":" in parts.netloc.rpartition("]")[2]
    if not plain or odd_port or parts.query or parts.fragment:
        raise UserError(
            "an endpoint must be a plain address such as http://localhost:8000/v1, without password, query or fragment "
            f"(the key belongs into {API_KEY}); got one {_not_plain(parts)}."
        )
    path = parts.path.rstrip("/").removesuffix("/chat/completions").rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path}"


def _not_plain(parts: SplitResult) -> str:
    """What an address has or lacks that is none; nothing of it is quoted, it may hold a secret."""
    if parts.scheme not in ("http", "https"):
        return "that does not begin with http:// or https://: write it in front"
    if not parts.hostname:
        return "without a host"
    held = {"a password": "@" in parts.netloc, "a query": parts.query, "a fragment": parts.fragment}
    held["a blank in its host"] = any(character.isspace() for character in parts.netloc)
    return f"with {next((what for what, there in held.items() if there), 'a port that is no number')}"
