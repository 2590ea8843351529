"""What a reply of a chat server is: an answer, or a failure by name."""

import json

import pytest

from mm_cb.core.chat_replies import CUT, MAY_PASS, REFUSED, Trouble, read_answer, read_error


def reply(content="hi", finish_reason="stop", **message):
    choice = {"message": {"role": "assistant", "content": content, **message}, "finish_reason": finish_reason}
    return json.dumps({"choices": [choice]}).encode()


def several(*contents):
    return json.dumps({"choices": [json.loads(reply(one))["choices"][0] for one in contents]}).encode()


def trouble(body):
    with pytest.raises(Trouble) as caught:
        read_answer(body)
    return caught.value


@pytest.mark.parametrize(
    ("body", "text"),
    [
        (reply("  a\n"), "  a\n"),
        (reply(""), ""),
        (reply(None, refusal="I cannot."), "I cannot."),
        (reply("a cut answ", "length"), "a cut answ"),
        (reply("A", None), "A"),
        (reply("A", "length", reasoning_content="let me think"), "A"),
        (reply("<think>it is B</think>A", "length"), "A"),
        (reply("the tag <think> opens a thought", "length"), "the tag <think> opens a thought"),
        (
            reply(
                [{"type": "text", "text": "a"}, {"type": "thinking", "thinking": [{}]}, {"type": "text", "text": "b"}]
            ),
            "ab",
        ),
        (b'{"choices": [{"message": {"content": "a \\ud83d\\ude00"}}]}', "a \U0001f600"),
        (reply("a\ufffd", "stop"), "a\ufffd"),
        (reply("a \ud83d", "length"), "a \ufffd"),
        (reply("a CUT", "length").replace(b"CUT", b"\xf0\x9f\x98"), "a \ufffd"),
        (b"\xef\xbb\xbf" + reply("a mark in front"), "a mark in front"),
        (reply("a").replace(b'"role"', b'"model": "\xff", "role"'), "a"),
        (b"\n\n \n" + reply("kept alive"), "kept alive"),
    ],
)
def test_answers(body, text):
    assert read_answer(body) == text


@pytest.mark.parametrize("ended", ["stop", None, "eos"])
@pytest.mark.parametrize(
    "message",
    [
        {"content": None},
        {"content": None, "refusal": None, "tool_calls": [], "reasoning_content": None},
        {"content": None, "refusal": ""},
        {"content": []},
        {"content": [{"type": "image_url"}]},
        {"content": [{"type": "text", "text": None}]},
    ],
)
def test_a_reply_without_any_text_is_no_answer(message, ended):
    found = trouble(reply(**{"finish_reason": ended, **message}))
    assert found.kind in MAY_PASS and "a message without text" in found.reason


def test_a_message_without_the_field_of_its_text_is_no_answer():
    found = trouble(b'{"choices": [{"message": {"role": "assistant"}, "finish_reason": "stop"}]}')
    assert found.kind in MAY_PASS and "no content" in found.reason


@pytest.mark.parametrize(
    "body",
    [
        reply(None, "tool_calls", tool_calls=[{"function": {"name": "brew"}}]),
        reply(None, "tool_calls"),
        reply("", "stop", tool_calls=[{"function": {"name": "brew"}}]),
        reply(None, "function_call", function_call={"name": "brew"}),
        reply("I brew it:", "stop", tool_calls=[{"function": {"name": "brew"}}]),
        reply("", "stop", function_call={"name": "brew"}),
        reply("I brew it:", "stop", function_call={"name": "brew"}),
        reply(None, "length", function_call={"name": "brew"}),
        reply(None, "function_call"),
        reply(None, "tool-calls"),
        reply("tea", "stop", toolCalls=[{"name": "brew"}]),
        reply("tea").replace(b'{"message"', b'{"tool_calls": [{"name": "brew"}], "message"'),
        *(
            reply([{"type": "text", "text": "I brew it:"}, {"type": kind, "name": "brew"}])
            for kind in ("tool_use", "server_tool_use", "tool_call", "function_call", "toolCall")
        ),
    ],
)
def test_the_call_of_a_tool_that_nobody_offered_is_the_servers_setting(body):
    assert trouble(body).kind == "settings"
    assert "called a tool that nobody offered it" in trouble(body).reason


@pytest.mark.parametrize("calls", [None, []])
def test_a_field_for_calls_that_is_empty_is_none(calls):
    assert read_answer(reply("tea", "stop", tool_calls=calls, function_call=None)) == "tea"


@pytest.mark.parametrize(
    ("half", "said"),
    [
        (rb"\ud83d", "half of a surrogate pair"),
        (rb"\ude00\ud83d", "half of a surrogate pair"),
        (rb"\ud83d\ud83d\ude00", "half of a surrogate pair"),
        (b"\xff", "the byte 0xff, not UTF-8"),
        (b"caf\xe9", "the byte 0xe9, not UTF-8"),
        (b"\xf0\x9f\x98", "the byte 0xf0, not UTF-8"),
        (b"\xed\xa0\xbd", "not UTF-8"),
        (rb"\ud83d\ud83d\ud83d\ud83d", "half of a surrogate pair"),
    ],
)
@pytest.mark.parametrize(
    ("text", "ended"), [("X", "stop"), ("X b", "length"), ("X\n", "length"), ([{"text": "X"}], "stop")]
)
def test_an_answer_that_is_no_text_is_no_answer(half, said, text, ended):
    body = reply(text, ended).replace(b"X", half)
    assert said in trouble(body).reason and trouble(body).kind in MAY_PASS


def test_reasoning_without_an_answer_is_cut():
    with pytest.raises(Trouble) as caught:
        read_answer(reply("", "stop", reasoning_content="let me think"))
    assert caught.value.kind == CUT


@pytest.mark.parametrize("ended", ["stop", None, "eos"])
def test_a_model_that_stops_behind_its_thought_gives_an_empty_answer(ended):
    answer = read_answer(reply("<think>so</think>\n", ended))
    assert (answer, answer.thought, answer.cut) == ("", "<think>so</think>\n", False)


def test_a_limit_that_nobody_names_is_not_said_to_have_cut():
    for body in (reply("<think>so", "stop"), reply("", "stop", reasoning="so"), reply("<think>so", None)):
        assert trouble(body).reason.startswith("ended in its thinking, perhaps at its own limit")


@pytest.mark.parametrize(
    ("body", "kind", "said"),
    [
        (b"", "broken", "got nothing"),
        (b"<html>", "broken", "an HTML page"),
        (b'{"choices": [{"mess', "broken", "mess"),
        (b'{"choices": [{"message": {"content": "no", "content": "yes"}}]}', "broken", "content"),
        (b"[" * 100000, "broken", "JSON"),
        (b"\xff\xfe", "broken", "JSON"),
        (b"null", "broken", "null"),
        (b"[]", "broken", "[]"),
        (b"data: {}", "broken", "data:"),
        (b'{"choices": [{"delta": {"content": "no"}, "finish_reason": "stop"}]}', "broken", "a piece of a stream"),
        (b'{"choices": [{"delta": {"function_call": {"name": "brew"}}}]}', "broken", "a piece of a stream"),
        (reply("").replace(b'{"message"', b'{"delta": {"content": "no"}, "message"'), "broken", "a piece of a stream"),
        (b'{"choices": null}', "broken", "no choice"),
        (b'{"choices": []}', "broken", "no choice"),
        (b'{"choices": {"0": 1}}', "broken", "no choice"),
        (b'{"choices": [null]}', "broken", "no choice"),
        (b'{"choices": [{"text": "a completion, no chat"}]}', "missing", "answers with a completion"),
        (b'{"choices": [{"text": ""}]}', "missing", "give a chat server"),
        (b'{"choices": [{"message": null}]}', "broken", "no choice"),
        (b'{"choices": [{"message": "hi"}]}', "broken", "no choice"),
        (several("yes", "no"), "broken", "2 choices in its reply, one was asked for"),
        (several("yes", "yes", "yes"), "broken", "3 choices in its reply"),
        (reply("what is asked", role="user"), "broken", "a message of the role `user`"),
        (reply("be brief", role="system"), "broken", "a message of the role `system`"),
        (reply(7), "broken", "type int"),
        (reply({"text": "a"}), "broken", "type dict"),
        (reply(True), "broken", "type bool"),
        (reply([{"type": "text", "text": 7}]), "broken", "type int"),
        (reply([7]), "broken", "type int"),
        (reply("half", "error"), "server", "`finish_reason` error"),
        (reply("half", "abort"), "server", "abort"),
        (reply("half", "content_filter"), REFUSED, "filtered the answer"),
        (reply(None, "SAFETY"), REFUSED, "filtered the answer"),
        (reply("", "length"), CUT, "limit of tokens"),
        (reply(None, "length", reasoning_content="let me"), CUT, "limit of tokens"),
        (reply(" \n", "max_tokens", reasoning="let me"), CUT, "limit of tokens"),
        (reply("<think>let me", "length"), CUT, "cut the answer at its limit of tokens"),
        (reply("<think>let me</think>", "length"), CUT, "cut the answer at its limit of tokens"),
        (reply("<think>let me", "stop"), CUT, "limit of tokens"),
        (b'{"error": {"code": 402, "message": "Insufficient credits"}}', "quota", "error 402"),
        (b'{"error": {"code": "429", "message": "slow down"}}', "busy", "slow down"),
        (b'{"error": {"message": "upstream died"}, "choices": []}', "server", "upstream died"),
        (b'{"error": "upstream died"}', "server", "upstream died"),
        (b'{"choices": [{"error": {"code": 502, "message": "gone"}, "message": {"content": ""}}]}', "server", "gone"),
    ],
)
def test_what_is_no_answer(body, kind, said):
    found = trouble(body)
    assert found.kind == kind and said in found.reason


GOOD = (None, "", "stop", "STOP", "eos", "eos_token", "stop_sequence", "end_turn", "COMPLETE", "done", "endoftext")
AT_LIMIT = ("length", "max_tokens", "MAX_TOKENS", "model_length", "max_output_tokens", "model_context_window_exceeded")


@pytest.mark.parametrize("ended", [*GOOD, *AT_LIMIT])
def test_an_end_that_is_known_is_one(ended):
    answer = read_answer(reply("tea", ended))
    assert answer == "tea" and answer.at_limit is (ended in AT_LIMIT)


@pytest.mark.parametrize(
    "ended",
    ["timeout", "engine_overloaded", "malformed_function_call", "OTHER", "unknown", "repetition", "ERROR", "load"]
    + [
        "cancelled",
        "insufficient_system_resource",
        "stop?",
        "not_finished",
        "null",
        7,
        True,
        ["stop"],
        {"type": "stop"},
    ],
)
@pytest.mark.parametrize("content", ["half an ans", "", None])
def test_an_end_that_nobody_knows_makes_no_answer(ended, content):
    found = trouble(reply(content, ended))
    assert found.kind in MAY_PASS and f"`finish_reason` {str(ended).lower()}" in found.reason


def test_an_end_of_any_length_is_quoted_in_one_line():
    assert len(trouble(reply("a", "x\n" * 10000)).reason) < 200


@pytest.mark.parametrize(
    ("status", "fields", "kind"),
    [
        (401, {"message": "Incorrect API key provided"}, "key"),
        (403, {"message": "Country not supported"}, "key"),
        (403, {"message": "Your chosen model requires moderation and your input was flagged"}, REFUSED),
        (403, {"message": "Invalid credentials"}, "key"),
        (401, {"message": "Incorrect API key provided, see our page on quotas"}, "key"),
        (403, {"message": "Quota exhausted for this project"}, "quota"),
        (403, {"message": "You have no credits left"}, "quota"),
        (403, {"message": "Access denied", "code": "AllocationQuota.FreeTierOnly"}, "quota"),
        (403, {"message": "Forbidden", "metadata": {"reason": "Billing is off"}}, "quota"),
        (401, {"message": "Your account has reached its spending limit"}, "quota"),
        (400, {"message": "API key not valid. Please pass a valid API key."}, "key"),
        (402, {"message": "no"}, "quota"),
        (429, {"message": "x", "code": "insufficient_quota"}, "quota"),
        (429, {"message": "You exceeded your current quota, please check your plan and billing details."}, "quota"),
        (403, {"message": "x", "type": "insufficient_quota"}, "quota"),
        (400, {"message": "Your credit balance is too low to access the API."}, "quota"),
        (429, {"message": "Rate limit reached", "code": "rate_limit_exceeded"}, "busy"),
        (404, {"message": "The model `m` does not exist"}, "missing"),
        (405, {"message": "Method Not Allowed"}, "missing"),
        (400, {"message": "x is not a valid model ID"}, "missing"),
        (400, {"message": "The response was filtered", "code": "content_filter"}, REFUSED),
        (400, {"message": "This model's maximum context length is 4096 tokens. However, you requested"}, REFUSED),
        (400, {"message": "x", "code": "context_length_exceeded"}, REFUSED),
        (413, {"message": "Payload Too Large"}, REFUSED),
        (422, {"message": "bad picture"}, REFUSED),
        (408, {}, "server"),
        (409, {}, "server"),
        (500, {"message": "out of memory"}, "server"),
        (503, {"message": "billing service unavailable"}, "server"),
        (529, {"message": "overloaded"}, "server"),
    ],
)
def test_an_error_is_known_by_its_status_and_its_words(status, fields, kind):
    found = read_error(status, json.dumps({"error": fields}).encode(), {})
    assert (
        found.kind == kind
        and f"HTTP {status}" in found.reason
        and fields.get("message", "").rstrip(".") in found.reason
    )


@pytest.mark.parametrize(
    "body", [b"", b"<html>", b"[]", b"null", b"7", b'{"error": 7}', b'{"detail": [{"msg": "x"}]}', b"\xff"]
)
@pytest.mark.parametrize("status", [301, 400, 402, 404, 413, 418, 429, 500])
def test_an_error_of_any_shape_is_a_failure(status, body):
    assert isinstance(read_error(status, body, {}).reason, str)


@pytest.mark.parametrize(
    ("headers", "wait"),
    [
        ({"retry-after": "7"}, 7.0),
        ({"retry-after-ms": "250", "retry-after": "7"}, 0.25),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:50 GMT"}, 40.0),
        ({"retry-after": "Thu, 01 Jan 1970 00:00:05 GMT"}, 0.0),
        ({"retry-after": "soon"}, None),
        ({"retry-after": "-3"}, None),
        ({"retry-after": "inf"}, None),
        ({}, None),
    ],
)
def test_how_long_to_leave_a_server_alone(headers, wait):
    assert read_error(429, b"", headers, now=10.0).wait == wait


def test_the_parameter_that_a_model_does_not_take_is_known():
    words = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
    assert read_error(400, json.dumps({"error": {"message": words}}).encode(), {}).param in (
        "max_tokens",
        "max_completion_tokens",
    )
    own = {"message": "x", "param": "temperature", "code": "unsupported_value"}
    assert read_error(400, json.dumps({"error": own}).encode(), {}).param == "temperature"


@pytest.mark.parametrize(
    "fields",
    [
        {"reasoning_content": "so B"},
        {"reasoning": "so B", "reasoning_content": "so B"},
        {"reasoning_details": [{"type": "reasoning.text", "text": "so "}, {"text": "B"}]},
        {
            "content": [
                {"type": "thinking", "thinking": [{"type": "text", "text": "so B"}]},
                {"type": "text", "text": "A"},
            ]
        },
    ],
)
def test_a_thought_beside_an_answer_is_kept_beside_it(fields):
    answer = read_answer(reply(**{"content": "A", **fields}))
    assert (answer, answer.thought, read_answer(reply("A")).thought) == ("A", "so B", "")


@pytest.mark.parametrize(
    ("body", "refusal"),
    [
        (reply(None, refusal="I can not help."), True),
        (reply("", refusal="No."), True),
        (reply([{"type": "refusal", "refusal": "No."}]), True),
        (reply([{"type": "refusal", "refusal": "No."}, {"type": "text", "text": "Tea."}]), False),
        (reply("Tea.", refusal="No."), False),
        (reply("I cannot help."), False),
        (reply(""), False),
    ],
)
def test_what_a_server_calls_a_refusal_is_one(body, refusal):
    assert read_answer(body).refusal is refusal
