"""An endpoint's answers and failures, against a server that misbehaves."""

import base64
import io
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
import warnings
from urllib.parse import quote

import pytest
from PIL import Image

from mm_cb.core.endpoint import (
    API_KEY,
    Endpoint,
    EndpointError,
    EndpointFailure,
    UnfitModelError,
    image_part,
    text_part,
    user_message,
)
from mm_cb.core.errors import UserError
from tests.stub_server import (
    BROKEN_JSON,
    CUT,
    DRIP,
    FAILED,
    FILTERED,
    HANG_UP,
    HTML,
    NO_CHOICE,
    NO_CREDIT,
    NOTHING,
    TORN,
    Reply,
    StubServer,
    error,
    says,
    user_text,
)

ASK = [{"role": "user", "content": "hello"}]
SETTINGS = {"max_tokens": 8, "temperature": 0.0}


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setattr("mm_cb.core.endpoint._sleep", no_time)


async def no_time(seconds):
    """A pause that takes none."""


@pytest.fixture
def pauses(monkeypatch):
    """The pauses that were made, none of which takes time."""
    made = []

    async def noted(seconds):
        made.append(seconds)

    monkeypatch.setattr("mm_cb.core.endpoint._sleep", noted)
    return made


def ask_all(server, count=30, **options):
    """Answers by key, and what ended them."""
    requests = [(key, [{"role": "user", "content": str(key)}]) for key in range(count)]
    answers, ended = {}, ""
    try:
        for key, answer in Endpoint(server.url, "m", **{"retries": 0, "concurrency": 1, **options}).map(
            requests, **SETTINGS
        ):
            answers[key] = answer
    except EndpointError as e:
        ended = str(e)
    return answers, ended


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
    "trouble",
    [
        error(429, retry_after_ms="1"),
        error(500),
        error(503),
        HANG_UP,
        TORN,
        HTML,
        BROKEN_JSON,
        NOTHING,
        NO_CHOICE,
        FAILED,
        says(None),
    ],
)
def test_what_may_pass_is_tried_again(trouble):
    with StubServer(lambda request, number: trouble if number < 2 else "at last") as server:
        assert ask(server) == "at last"
    assert len(server.requests) == 3


def test_pauses_grow_and_a_server_that_names_one_gets_it(pauses):
    asked = [error(500), error(429, retry_after="7"), error(503), "ok"]
    with StubServer(lambda request, number: asked[number]) as server:
        assert ask(server, retries=3) == "ok"
    assert pauses == [0.5, 7.0, 2.0]


def test_a_pause_that_is_too_long_ends_the_run(pauses):
    with StubServer(
        lambda request, number: "ok" if number < 2 else error(429, "daily limit", retry_after="3600")
    ) as server:
        answers, ended = ask_all(server, retries=5)
    assert list(answers.values())[:2] == ["ok", "ok"] and len(server.requests) == 3 and pauses == []
    assert "pause of 3600 s: run the same command again" in ended


@pytest.mark.parametrize("trouble", [NO_CREDIT, error(429, "x", fields={"code": "insufficient_quota"})])
def test_no_credit_ends_the_run_at_once_and_what_was_answered_stays(trouble, pauses):
    with StubServer(lambda request, number: "ok" if number < 4 else trouble) as server:
        answers, ended = ask_all(server, retries=5)
    assert [a for a in answers.values() if isinstance(a, str)] == ["ok"] * 4 and len(server.requests) == 5
    assert "credit" in ended and pauses == []


def test_requests_that_wait_for_another_try_do_not_outlive_hope(monkeypatch):
    import asyncio

    async def for_ever(seconds):
        await asyncio.sleep(3600)

    monkeypatch.setattr("mm_cb.core.endpoint._sleep", for_ever)
    with StubServer(lambda request, number: NO_CREDIT if user_text(request) == "2" else error(500)) as server:
        answers, ended = ask_all(server, retries=5, concurrency=3)
    assert list(answers) == [2] and "HTTP 402" in ended and len(server.requests) == 3


def test_the_limit_of_tokens_is_named_as_the_server_wants_it_from_then_on():
    words = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."

    def answer(request, number):
        return error(400, words) if "max_tokens" in request else str(request["max_completion_tokens"])

    with StubServer(answer) as server:
        answers, ended = ask_all(server, 5)
        assert answers == dict.fromkeys(range(5), "8") and not ended and len(server.requests) == 6


@pytest.mark.parametrize("parameter", ["model", "max_completion_tokens"])
def test_a_setting_that_the_model_does_not_take_ends_the_run(parameter):
    trouble = error(400, f"Unsupported value: {parameter}", fields={"param": parameter})
    with StubServer(lambda request, number: trouble) as server:
        _, ended = ask_all(server)
    assert f"does not take `{parameter}`" in ended and len(server.requests) <= 2


ONLY_ITS_OWN = [
    error(400, "Unsupported value", fields={"param": "temperature"}),
    error(
        400, "Unsupported value: 'temperature' does not support 0 with this model. Only the default (1) is supported."
    ),
    error(400, "invalid temperature: only 1 is allowed for this model"),
    error(400, "`temperature` is deprecated for this model."),
    error(422, "temperature: may only be set to 1 when thinking is enabled"),
]


@pytest.mark.parametrize("trouble", ONLY_ITS_OWN)
def test_a_model_that_takes_only_a_temperature_of_its_own_is_refused_by_that_name(trouble):
    with StubServer(lambda request, number: trouble) as server, pytest.raises(UnfitModelError) as caught:
        dict(Endpoint(server.url, "m").map([("a", ASK)], **SETTINGS))
    assert "does not take the temperature 0" in str(caught.value) and len(server.requests) == 1
    assert "take a model or a server that takes it" in str(caught.value) and "same command" not in str(caught.value)


@pytest.mark.parametrize("body", [b"", b'{"choices": [', says("whole").body])
def test_a_reply_that_breaks_off_is_not_a_server_that_cannot_be_reached(body):
    with StubServer(lambda request, number: Reply(body, missing=50)) as server:
        said = failure(server)
        assert (
            "breaks off in the middle of its reply" in said and "(3 tries)" in said and "start the server" not in said
        )
    with StubServer(lambda request, number: HANG_UP) as server:
        said = failure(server)
        assert "closes the connection without a reply" in said and "cannot be reached" not in said


def test_a_redirection_is_named_and_not_followed():
    moved = Reply(b"", 308, headers={"Location": "https://elsewhere.example/v1/chat?token=1"})
    with StubServer(lambda request, number: moved) as server:
        text = failure(server)
    assert "`https://elsewhere.example/v1/chat`" in text and "token" not in text and len(server.requests) == 1


def test_a_reply_that_never_ends_is_left(monkeypatch):
    with StubServer(lambda request, number: DRIP) as server, pytest.warns(UserWarning, match="given up after 0.5 s"):
        said = failure(server, timeout=0.1, retries=5)
        assert "did not come to an end within 0.5 s" in said and "(2 tries)" in said and len(server.requests) == 2
    begun = Reply(endless=b'{"choices": [')
    with StubServer(lambda request, number: begun if number else says("ok")) as server, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        answers, _ = ask_all(server, count=3, timeout=0.1)
        slow = [a for a in answers.values() if isinstance(a, EndpointFailure)]
        assert slow and {a.kind for a in slow} == {"slow"} and "within 0.1 s" in slow[0].reason
    monkeypatch.setattr("mm_cb.core.chat_transport.LARGEST", 2**20)
    for status in (200, 500):
        with StubServer(lambda request, number, s=status: Reply(status=s, endless=b"x" * 2**16)) as server:
            assert "more than 1 MB" in failure(server) and len(server.requests) == 1


def test_a_model_that_only_thinks_is_not_asked_for_ever():
    with StubServer(lambda request, number: CUT) as server:
        answers, ended = ask_all(server)
    assert {a.kind for a in answers.values()} == {"cut"} and len(server.requests) == 16
    assert "limit of tokens" in ended and "thinking switched off" in ended
    with StubServer(lambda request, number: CUT if number else "ok") as server:
        answers, ended = ask_all(server)
    assert len(answers) == 30 and not ended


def test_an_error_in_reading_the_requests_loses_nothing_that_is_under_way():
    def requests():
        yield from ((key, ASK) for key in range(3))
        raise UserError("picture 3 is broken")

    answers = {}
    with (
        StubServer(lambda request, number: says("ok", delay=0.05)) as server,
        pytest.raises(UserError, match="picture 3"),
    ):
        for key, answer in Endpoint(server.url, "m", concurrency=8).map(requests(), **SETTINGS):
            answers[key] = answer
    assert answers == dict.fromkeys(range(3), "ok")


def test_a_server_without_tls_and_one_that_is_no_name_are_told():
    with StubServer(lambda request, number: "ok") as server:
        endpoint = Endpoint(server.url.replace("http:", "https:"), "m", retries=3)
        with pytest.raises(EndpointError, match="cannot be reached safely .*write http://"):
            endpoint.chat(ASK, **SETTINGS)
    with pytest.raises(EndpointError, match="cannot be reached .*correct the address"):
        Endpoint("http://no-such-host.invalid/v1", "m", retries=0).chat(ASK, **SETTINGS)


@pytest.mark.parametrize("key", ["sk-\u00e9", "two words", "a\nb"])
def test_a_key_that_is_none_is_named_and_not_shown(key, monkeypatch):
    monkeypatch.setenv(API_KEY, key)
    with pytest.raises(UserError, match=API_KEY) as caught:
        Endpoint("http://h/v1", "m")
    assert key not in str(caught.value)
    monkeypatch.setenv(API_KEY, "sk-ends-in-a-line-feed\n")
    Endpoint("http://h/v1", "m")


def test_a_proxy_that_is_none_is_one_line(monkeypatch):
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setenv("HTTP_PROXY", "ftp://proxy:1")
    with pytest.raises(UserError, match="cannot be asked: .*HTTP_PROXY"):
        Endpoint("http://h/v1", "m").chat(ASK, **SETTINGS)


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
        (error(404, "no model m"), "cannot be asked for `m`", 1),
        (error(401), f"wants a key: put it into the environment variable {API_KEY}", 1),
        (says(None, finish_reason="content_filter"), "filtered the answer", 1),
        (FILTERED, "filtered the answer", 1),
        (FAILED, "ended its answer with `finish_reason` error (3 tries)", 3),
        *(
            (says("whole", finish_reason=end), f"`finish_reason` {end} (3 tries)", 3)
            for end in ("other", "x" * 20, "7")
        ),
        (NO_CREDIT, "answers HTTP 402: Insufficient credits", 1),
        (CUT, "cut the answer at its limit of tokens", 1),
        (error(400, "maximum context length is 9"), "more than it takes at once", 1),
        (Reply(delay=1.0), "said nothing for 0.1 s", 3),
    ],
)
def test_what_does_not_pass_is_one_line(trouble, expected, tries):
    with StubServer(lambda request, number: trouble) as server:
        assert expected in failure(server, timeout=0.1 if trouble.delay else 5)
        assert len(server.requests) == tries


def test_a_server_whose_every_answer_ends_in_an_unknown_way_is_left(pauses):
    with StubServer(lambda request, number: says("whole", finish_reason="other")) as server:
        asked, found = ((key, ASK) for key in itertools.count()), []
        with pytest.raises(EndpointError, match="`finish_reason` other"):
            found.extend(Endpoint(server.url, "m", retries=2, concurrency=4).map(asked, **SETTINGS))
        assert len(server.requests) <= 3 * (16 + 4)


def test_a_server_that_is_down_and_one_that_is_slow_are_told_apart():
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{held.getsockname()[1]}/v1"
        with pytest.raises(EndpointError, match="cannot be reached .*start the server"):
            Endpoint(url, "m", retries=1).chat(ASK, **SETTINGS)


@pytest.mark.parametrize(
    ("reply", "text"),
    [(says(""), ""), (says(" \n"), " \n"), (says([{"type": "text", "text": "a"}, {"type": "x"}]), "a")],
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


@pytest.mark.parametrize("key", ["e", "e7", "abc-1", "s/t+u"])
@pytest.mark.parametrize("status", [200, 401, 500])
def test_a_short_key_is_taken_out_as_a_word_and_leaves_the_others_readable(key, status, monkeypatch):
    said = f"the server x{key} y refused Bearer {key}, key={key}"
    monkeypatch.setenv(API_KEY, key)
    with StubServer(lambda request, number: error(status, said)) as server:
        text = failure(server, retries=0)
    assert f"the server x{key} y refused Bearer [key], key=[key]" in text and "endpoint" in text


UNPACKED = Reply(b"plain", headers={"Content-Encoding": "gzip"})
KEY = "sk-proj/with\\special+characters"


def test_a_key_is_taken_out_of_whatever_a_server_sends(monkeypatch):
    monkeypatch.setenv(API_KEY, KEY)
    quoted = (KEY, KEY.replace("\\", "\\\\"), quote(KEY), quote(KEY, safe=""))
    said = [front + written for front in ("", "x" * 190, "x" * 390) for written in quoted]  # cut at 200 and at 400
    bodies = [body for text in said for body in (text, json.dumps({"error": {"message": text}}))]
    with StubServer(lambda request, number: Reply(bodies[number].encode(), 400)) as server:
        answers, ended = ask_all(server, len(bodies))
    assert len(answers) == len(bodies) and not ended
    reasons = [answer.reason for answer in answers.values()]
    for status in (200, 401, 403, 404, 500):
        with StubServer(lambda request, number, status=status: Reply(bodies[5].encode(), status)) as server:
            reasons.append(failure(server, retries=0))
    assert not [text for text in reasons if "special" in text or "sk-pro" in text]


def test_a_key_in_an_answer_or_an_address_is_taken_out_but_a_word_stays(monkeypatch):
    monkeypatch.setenv(API_KEY, KEY)
    moved = Reply(b"", 308, headers={"Location": f"https://elsewhere.example/{quote(KEY)}"})
    with StubServer(lambda request, number: moved if number else f"you sent {KEY}") as server:
        assert ask(server) == "you sent [key]" and "[key]" in failure(server)
    monkeypatch.setenv(API_KEY, "EMPTY")
    with StubServer(lambda request, number: "the box is EMPTY") as server:
        assert ask(server) == "the box is EMPTY"


@pytest.mark.parametrize("reply", [HTML, BROKEN_JSON, NOTHING, NO_CHOICE, Reply(b'"pong"'), UNPACKED])
@pytest.mark.parametrize("concurrency", [1, 8])
def test_what_never_was_a_chat_server_is_left_at_once(reply, concurrency, pauses):
    with StubServer(lambda request, number: reply) as server:
        answers, ended = ask_all(server, retries=5, concurrency=concurrency)
    assert "times in a row; give the address of a chat server" in ended and sum(pauses) <= 20
    assert len(server.requests) <= max(3, 2 * concurrency) and not [a for a in answers.values() if isinstance(a, str)]


def test_a_chat_server_behind_which_another_page_appears_is_asked_on_for_a_while(pauses):
    with StubServer(lambda request, number: "ok" if number in (0, 12) else HTML) as server:
        answers, ended = ask_all(server, 3, retries=20)
    assert list(answers.values())[:2] == ["ok", "ok"] and "16 times in a row" in ended
    assert len(server.requests) == 1 + 12 + 16


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
    "url",
    [
        "localhost:8000",
        "ftp://x/v1",
        "http://",
        "http://me:pw@x/v1",
        "http://x/v1?key=1",
        "http://h:secret/v1",
        "http://h:/v1",
        "http://a b/v1",
    ],
)
def test_addresses_that_are_none_or_hold_secrets_are_refused(url):
    with pytest.raises(UserError, match="must be a plain address") as caught:
        Endpoint(url, "m")
    assert ":secret" not in str(caught.value)
    assert "pw" not in str(caught.value).replace("password", "")


@pytest.mark.parametrize("url", ["127.0.0.1:8765/v1", "localhost:8000", "//h/v1", "h/v1", "ftp://h/v1", "", "http//h"])
def test_an_address_without_its_beginning_says_so(url):
    with pytest.raises(UserError, match="does not begin with http:// or https://: write it in front"):
        Endpoint(url, "m")


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://", "got one without a host"),
        ("http:///v1", "got one without a host"),
        ("http:/h/v1", "got one without a host"),
        ("http://me:pw@x/v1", "got one with a password"),
        ("http://x/v1?key=1", "got one with a query"),
        ("http://x/v1#a", "got one with a fragment"),
        ("http://a b/v1", "got one with a blank in its host"),
        ("http://h:secret/v1", "got one with a port that is no number"),
        ("http://h:99999/v1", "the port of an endpoint must be a number from 1 to 65535, got 99999"),
        ("http://h:0/v1", "from 1 to 65535, got 0"),
        ("http://[::1]:70000/v1", "from 1 to 65535, got 70000"),
        ("http://[::1/v1", r"IPv6 address has it in brackets, such as http://\[::1\]:8000/v1"),
        ("//[", "in brackets"),
    ],
)
def test_a_part_of_an_address_that_is_wrong_is_named(url, message):
    with pytest.raises(UserError, match=message):
        Endpoint(url, "m")


@pytest.mark.parametrize("url", ["http://[::1]:8000/v1", "http://[::1]/v1", "http://h:65535/v1"])
def test_addresses_in_brackets_and_the_last_port_are_taken(url):
    assert Endpoint(url, "m").url == url


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_proxy_that_does_not_answer_is_named_without_its_password(name, monkeypatch):
    monkeypatch.setenv("NO_PROXY", "localhost")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        place = f"127.0.0.1:{held.getsockname()[1]}"
        monkeypatch.setenv(name, f"http://me:hidden@{place}")
        with pytest.raises(
            EndpointError, match=f"by the proxy .*`{place}` of {name.upper()}.*add h.invalid to NO_PROXY"
        ) as caught:
            Endpoint("http://h.invalid/v1", "m", retries=0).chat(ASK, **SETTINGS)
        assert "hidden" not in str(caught.value)
        monkeypatch.setenv("NO_PROXY", "h.invalid")
        with pytest.raises(EndpointError, match="start the server or correct the address") as caught:
            Endpoint("http://h.invalid/v1", "m", retries=0).chat(ASK, **SETTINGS)
        assert "proxy" not in str(caught.value)


def test_a_server_that_hangs_up_on_tls_is_said_to_be_perhaps_one_without(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up():
            server.accept()[0].close()

        thread = threading.Thread(target=hang_up)
        thread.start()
        with pytest.raises(EndpointError, match="cannot be reached.* write http://"):
            Endpoint(f"https://127.0.0.1:{server.getsockname()[1]}/v1", "m", retries=0).chat(ASK, **SETTINGS)
        thread.join()


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


def test_a_model_that_the_server_names_otherwise_is_said_once_with_counts_and_kept():
    with StubServer(lambda request, number: user_text(request)) as server:
        endpoint = Endpoint(server.url, "m", concurrency=1)
        with pytest.warns(UserWarning, match="was asked for `m`, .* its answers are from `stub` \\(2 answers\\)"):
            found = dict(endpoint.map([(i, ASK) for i in range(2)], max_tokens=8, temperature=0.0))
        assert [answer.served for answer in found.values()] == ["stub", "stub"]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            endpoint.chat(ASK, max_tokens=8, temperature=0.0)
            assert Endpoint(server.url, "stub").chat(ASK, max_tokens=8, temperature=0.0).served == ""
