"""An endpoint's answers and failures, against a server that misbehaves."""

import base64
import io
import socket
import subprocess
import sys
import time

import pytest
from PIL import Image

from mm_cb.core.endpoint import API_KEY, Endpoint, EndpointError, EndpointFailure, image_part, text_part, user_message
from mm_cb.core.errors import UserError
from tests.stub_server import BROKEN_JSON, HANG_UP, HTML, NO_CHOICE, NOTHING, Reply, StubServer, error, says, user_text

ASK = [{"role": "user", "content": "hello"}]
SETTINGS = {"max_tokens": 8, "temperature": 0.0}


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv(API_KEY, raising=False)
    monkeypatch.setattr("mm_cb.core.endpoint._FIRST_PAUSE", 0.001)
    import openai._base_client

    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)


def ask(server, **options):
    return Endpoint(server.url, "m", **{"retries": 2, "timeout": 5, **options}).chat(ASK, **SETTINGS)


def failure(server, **options):
    with pytest.raises(EndpointError) as caught:
        ask(server, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_request_says_what_was_asked_and_the_answer_comes_back():
    with StubServer(lambda request, number: "hi\nthere ") as server:
        assert ask(server) == "hi\nthere "
    (request,) = server.requests
    assert request == {"model": "m", "messages": ASK, "max_tokens": 8, "temperature": 0.0}
    assert server.headers[0]["authorization"] == "Bearer none"


@pytest.mark.parametrize(
    "trouble", [error(429, retry_after_ms="1"), error(500), error(503), HANG_UP, HTML, BROKEN_JSON, NOTHING, NO_CHOICE]
)
def test_what_may_pass_is_tried_again(trouble):
    with StubServer(lambda request, number: trouble if number < 2 else "at last") as server:
        assert ask(server) == "at last"
    assert len(server.requests) == 3


def test_retry_after_is_kept():
    with StubServer(lambda request, number: "ok" if number else error(429, retry_after="0.3")) as server:
        start = time.monotonic()
        assert ask(server) == "ok"
    assert time.monotonic() - start >= 0.3


@pytest.mark.parametrize(
    ("trouble", "expected", "tries"),
    [
        (error(429, retry_after_ms="1"), "HTTP 429", 3),
        (error(500, "out of memory"), "out of memory", 3),
        (HTML, "got an HTML page", 3),
        (BROKEN_JSON, "conte`", 3),
        (NOTHING, "got nothing", 3),
        (NO_CHOICE, "no choice", 3),
        (Reply(b'{"choices": [{"message": {"content": 7}}]}'), "type int", 3),
        (error(400, "too many images"), "too many images", 1),
        (error(404, "no model m"), "knows no model `m`", 1),
        (error(401), f"wants a key: put it into the environment variable {API_KEY}", 1),
        (says(None, finish_reason="content_filter"), "filtered the answer", 1),
        (Reply(delay=1.0), "said nothing for 0.1 s (3 tries)", 3),
    ],
)
def test_what_does_not_pass_is_one_line(trouble, expected, tries):
    with StubServer(lambda request, number: trouble) as server:
        assert expected in failure(server, timeout=0.1 if trouble.delay else 5)
        assert len(server.requests) == tries


def test_a_server_that_is_down_and_one_that_is_slow_are_told_apart():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match="cannot be reached .*start the server"):
            Endpoint(url, "m", retries=1).chat(ASK, **SETTINGS)


@pytest.mark.parametrize(
    ("reply", "text"),
    [(says(""), ""), (says(None), ""), (says([{"type": "text", "text": "a"}, {"type": "x"}]), "a")],
)
def test_an_empty_answer_is_an_answer(reply, text):
    with StubServer(lambda request, number: reply) as server:
        assert ask(server) == text
    assert len(server.requests) == 1


def test_the_key_comes_from_the_environment_and_is_never_shown(monkeypatch):
    monkeypatch.setenv(API_KEY, "sk-secret")
    with StubServer(lambda request, number: error(401, "bad key sk-secret")) as server:
        assert "sk-secret" not in (text := failure(server)) and API_KEY in text
    assert server.headers[0]["authorization"] == "Bearer sk-secret"
    with StubServer(lambda request, number: error(500, "key sk-secret \x1b[2J")) as server:
        text = failure(server, retries=0)
    assert "sk-secret" not in text and "[key]" in text and "\x1b" not in text


def test_requests_run_at_the_same_time_and_are_read_no_further_than_needed():
    read = []

    def requests():
        for key in range(20):
            read.append(key)
            yield key, [{"role": "user", "content": str(key)}]

    def answer(request, number):
        return says(user_text(request) * 2, delay=0.05)

    with StubServer(answer) as server:
        answers = {}
        for key, text in Endpoint(server.url, "m", concurrency=4).map(requests(), **SETTINGS):
            answers[key] = text
            assert len(read) <= len(answers) + 4
    assert answers == {key: str(key) * 2 for key in range(20)}
    assert server.most_at_once == 4


def test_one_refused_request_does_not_end_the_others():
    def answer(request, number):
        return error(400, "too long") if user_text(request) == "3" else "ok"

    with StubServer(answer) as server:
        requests = [(key, [{"role": "user", "content": str(key)}]) for key in range(6)]
        answers = dict(Endpoint(server.url, "m").map(requests, **SETTINGS))
    assert isinstance(answers.pop(3), EndpointFailure) and set(answers.values()) == {"ok"} and len(answers) == 5


@pytest.mark.parametrize(("trouble", "asked"), [(error(401), 5), (error(404), 5), (HTML, 4 + 16), (error(400), 30)])
def test_a_hopeless_endpoint_is_not_asked_on(trouble, asked):
    kept = []
    with StubServer(lambda request, number: "ok" if number < 4 else trouble) as server:
        answers = Endpoint(server.url, "m", retries=0, concurrency=1).map(((k, ASK) for k in range(30)), **SETTINGS)
        try:
            kept.extend(answers)
        except EndpointError:
            assert asked < 30
    assert [text for _, text in kept[:4]] == ["ok"] * 4 and len(server.requests) == asked


def test_what_is_under_way_when_a_failure_ends_the_run_is_not_lost():
    def answer(request, number):
        return says("late", delay=0.3) if user_text(request) == "0" else error(401)

    got = {}
    with StubServer(answer) as server:
        requests = [(key, [{"role": "user", "content": str(key)}]) for key in range(50)]
        with pytest.raises(EndpointError, match="wants a key"):
            for key, text in Endpoint(server.url, "m", concurrency=2).map(requests, **SETTINGS):
                got[key] = text
        assert got[0] == "late" and len(server.requests) < 5


def test_a_closed_map_stops_at_once():
    with StubServer(lambda request, number: says("ok", delay=0.0 if number == 0 else 30)) as server:
        answers = Endpoint(server.url, "m", concurrency=2).map([(k, ASK) for k in range(9)], **SETTINGS)
        start = time.monotonic()
        next(answers)
        answers.close()
        assert time.monotonic() - start < 5


def test_pictures_arrive_as_the_pixels_that_were_sent():
    picture = Image.effect_noise((5, 3), 90).convert("RGB")
    url = image_part(picture)["image_url"]["url"]
    head, _, data = url.partition(",")
    assert head == "data:image/png;base64"
    assert Image.open(io.BytesIO(base64.b64decode(data))).tobytes() == picture.tobytes()
    assert user_message("t", [picture])["content"] == [image_part(picture), text_part("t")]


@pytest.mark.parametrize(
    "url", ["localhost:8000", "ftp://x/v1", "http://", "http://me:pw@x/v1", "http://x/v1?key=1", "//["]
)
def test_addresses_that_are_none_or_hold_secrets_are_refused(url):
    with pytest.raises(UserError, match="must be a plain address") as caught:
        Endpoint(url, "m")
    assert "pw" not in str(caught.value).replace("password", "")


@pytest.mark.parametrize(
    "url", ["http://h:1/v1", "http://h:1/v1/", "http://h:1/v1/chat/completions", " http://h:1/v1 "]
)
def test_the_base_address_is_found_in_what_people_write(url):
    assert Endpoint(url, "m").url == "http://h:1/v1"


@pytest.mark.parametrize("options", [{"timeout": 0}, {"retries": -1}, {"concurrency": 0}])
def test_numbers_are_checked(options):
    with pytest.raises(ValueError, match="must be"):
        Endpoint("http://h/v1", "m", **options)


def test_the_extra_is_asked_for_by_name():
    code = """
import sys
sys.modules["openai"] = None
from mm_cb.core.endpoint import Endpoint
try:
    Endpoint("http://127.0.0.1:9/v1", "m").chat([], max_tokens=1, temperature=0)
except ImportError as error:
    print(error)
print([name for name in ("torch", "PIL") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "pip install -e '.[judge]'" in done.stdout and done.stdout.endswith("[]\n")
