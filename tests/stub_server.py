"""An OpenAI-compatible server on this machine that answers as a test tells it to, misbehaving ones included."""

from __future__ import annotations

import json
import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass(frozen=True)
class Reply:
    body: bytes = b""
    status: int = 200
    content_type: str = "application/json"
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    """Seconds of silence in front of the answer."""
    hang_up: bool = False
    """Whether the connection is closed without an answer."""
    endless: bytes = b""
    """Sent again and again in place of a body, until the caller goes away."""
    missing: int = 0
    """Bytes that the header promises beyond the body, before the connection is closed."""


def says(text: Any, **more: Any) -> Reply:
    message = {"role": "assistant", "content": text, **more.pop("message", {})}
    choice = {"index": 0, "message": message, "finish_reason": more.pop("finish_reason", "stop")}
    body = {"id": "x", "object": "chat.completion", "created": 0, "model": "stub", "choices": [choice]}
    return Reply(json.dumps(body).encode(), **more)


def error(status: int, message: str = "stub error", *, fields: dict[str, Any] | None = None, **headers: str) -> Reply:
    """An HTTP error; keyword arguments are headers, as in ``error(429, retry_after_ms="1")``."""
    named = {key.replace("_", "-"): value for key, value in headers.items()}
    return Reply(json.dumps({"error": {"message": message, **(fields or {})}}).encode(), status, headers=named)


HTML = Reply(b"<html><body>Please log in</body></html>", content_type="text/html")
BROKEN_JSON = Reply(b'{"choices": [{"message": {"conte')
NOTHING = Reply(b"")
NO_CHOICE = Reply(b'{"choices": []}')
HANG_UP = Reply(hang_up=True)
NO_CREDIT = error(402, "Insufficient credits")
DRIP = Reply(endless=b"\n")
TORN = Reply(b'{"choices": [', missing=99)
CUT = says("", finish_reason="length", message={"reasoning_content": "let me think"})
"""The limit of tokens came while the model was thinking."""
FAILED = says("half an ans", finish_reason="error")
FILTERED = says("half an ans", finish_reason="content_filter")


MAY_PASS = {
    **{str(code): error(code, retry_after_ms="1") for code in (402, 408, 409, 429, 500, 503)},
    **{"hang up": HANG_UP, "HTML": HTML, "broken": BROKEN_JSON, "nothing": NOTHING, "no choice": NO_CHOICE},
    **{"error in 200": Reply(b'{"error": {"message": "overloaded"}}'), "list": Reply(b"[]"), "null": Reply(b"null")},
    **{"failed": says("", finish_reason="error"), "failed late": says("no, i", finish_reason="error")},
    **{"7": says(7), "no text": says(None)},
}
"""What is no answer, and may be one the next time."""
FINAL = {
    "400": error(400),
    "filtered": says(None, finish_reason="content_filter"),
    "cut": says("", finish_reason="length", message={"reasoning_content": "let me think"}),
}
"""What a question is done with, though it has no answer."""


def misbehaving(good: str, seed: int, log: dict[str, list[str]]) -> Callable[[dict[str, Any], int], Reply]:
    """A third of the answers are good; ``log``: question (up to ``" :"``) → what it was sent, in order."""

    def answer(request: dict[str, Any], _: int) -> Reply:
        question = user_text(request).partition(" :")[0]
        rng = random.Random(f"{seed} {question} {len(log[question])}")
        kind = rng.choice(["good"] * 8 + list(MAY_PASS) if rng.random() < 0.9 else list(FINAL))
        log[question].append(kind)
        return says(good) if kind == "good" else {**MAY_PASS, **FINAL}[kind]

    return answer


def user_text(request: dict[str, Any]) -> str:
    """The text parts of a request's last message."""
    content = request["messages"][-1]["content"]
    return content if isinstance(content, str) else "".join(p["text"] for p in content if p["type"] == "text")


class StubServer:
    """``with StubServer(answer) as server``: ``answer(request, number)`` gives a Reply or the text to say.

    Attributes:
        url: Base address for an Endpoint.
        requests: Bodies of all requests so far, in order of arrival.
        headers: Their headers.
        most_at_once: Largest number of requests that were open at the same time.
    """

    def __init__(self, answer: Callable[[dict[str, Any], int], Reply | str]) -> None:
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.most_at_once = 0
        self._open = 0
        self._answer = answer
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        self._server.handle_error = lambda *_: None  # callers that go away are what some tests are about
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> StubServer:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with stub._lock:
                    number = len(stub.requests)
                    stub.requests.append(request)
                    stub.headers.append({name.lower(): value for name, value in self.headers.items()})
                    stub._open += 1
                    stub.most_at_once = max(stub.most_at_once, stub._open)
                try:
                    if self.path != "/v1/chat/completions":
                        reply: Reply | str = error(404, "no such path")
                    else:
                        reply = stub._answer(request, number)
                    self._send(says(reply) if isinstance(reply, str) else reply)
                finally:
                    with stub._lock:
                        stub._open -= 1

            def _send(self, reply: Reply) -> None:
                time.sleep(reply.delay)
                if reply.hang_up:
                    self.close_connection = True
                    return
                self.send_response(reply.status)
                for name, value in reply.headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Type", reply.content_type)
                if not reply.endless:
                    self.send_header("Content-Length", str(len(reply.body) + reply.missing))
                self.end_headers()
                self.close_connection = self.close_connection or bool(reply.endless or reply.missing)
                try:
                    self.wfile.write(reply.body)
                    while reply.endless:
                        self.wfile.write(reply.endless)
                        time.sleep(0.005 if len(reply.endless) < 1024 else 0)
                except OSError:
                    pass  # the caller went away, as it should when the answer is late

            def log_message(self, *_: object) -> None:
                pass

        return Handler
