"""Calls as text: what is written is read back, text around them changes nothing, what is malformed is no call."""

import contextlib
import json
import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mm_cb.core import python_calls
from mm_cb.core.calls import FORMATS, Call, NotCalls

CALLS = (
    [Call("ring_bell", {"times": 3})],
    [Call("kettle.brew", {"leaf": 'it\'s "green"', "minutes": -2.5, "milk": True, "cup": None})],
    [
        Call("plan", {"beds": [["peas", "beans"], []], "size": {"length": 2.0, "in": {"m": 1}}}),
        Call("stop", {"now": 1}),
    ],
    [Call("ring_bell", {"times": n}) for n in range(4)],
    [Call("say", {"text": '}] </tool_call> [TOOL_CALLS] {"name": "x", "parameters": {}} ; \n\\ é 茶'})],
)
JSON = [name for name in FORMATS if name != "python"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("calls", CALLS, ids=range(len(CALLS)))
def test_what_is_written_is_read_back(format, calls):
    assert FORMATS[format].read(FORMATS[format].write(calls)).calls == calls


@pytest.mark.parametrize("format", JSON)
@pytest.mark.parametrize("calls", CALLS, ids=range(len(CALLS)))
def test_text_around_calls_is_kept_apart(format, calls):
    said = FORMATS[format].read(f"I will do that.\n{FORMATS[format].write(calls)}\n Done.")
    assert said == (calls, "I will do that. Done.")


@pytest.mark.parametrize("format", JSON)
@pytest.mark.parametrize("text", ["", "No tool helps.", "a [list] and a {set}", "1 < 2; b"])
def test_text_alone_holds_no_call(format, text):
    assert FORMATS[format].read(text) == ([], text)


@pytest.mark.parametrize("format", JSON)
@pytest.mark.parametrize(
    "broken",
    [
        lambda text: text[: text.rindex("}") - 1],  # cut off
        lambda text: text.replace("3", "03"),
        lambda text: text.replace("3", "NaN"),
        lambda text: text.replace('"times": 3', '"times": 3, "times": 4'),
        lambda text: text.replace('{"times": 3}', '"{}"'),
        lambda text: text.replace('"ring_bell"', "7"),
        lambda text: text.replace("3", "[" * 5000),
    ],
    ids=["cut", "number", "nan", "twice", "string", "name", "deep"],
)
def test_what_begins_a_call_and_is_none_is_told(format, broken):
    with pytest.raises(NotCalls):
        FORMATS[format].read(broken(FORMATS[format].write([Call("ring_bell", {"times": 3})])))


def test_tags_that_decoding_takes_away_are_not_needed():
    """Mistral's and Llama's tags are special tokens; the end tag behind the last call may lie behind the cut."""
    call = [Call("ring_bell", {"times": 3})]
    assert (
        FORMATS["mistral"].read('[{"name": "ring_bell", "arguments": {"times": 3}, "id": "call00000"}]').calls == call
    )
    assert FORMATS["llama"].read('<|python_tag|>{"name": "ring_bell", "parameters": {"times": 3}}<|eom_id|>') == (
        call,
        "",
    )
    listed = '[{"name": "a", "parameters": {}}, {"name": "b", "parameters": {"n": 1}}]'
    assert FORMATS["llama"].read(listed) == ([Call("a", {}), Call("b", {"n": 1})], "")
    assert FORMATS["hermes"].read('<tool_call>\n{"arguments": {"times": 3}, "name": "ring_bell"}').calls == call


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("[f(a=1)]", [("f", {"a": 1})]),
        ("f(a=1), g.h(b='x')", [("f", {"a": 1}), ("g.h", {"b": "x"})]),
        ("```\n[f(a=1)]\n```", [("f", {"a": 1})]),
        (
            "[f(a=true, b=-2, c=(1, 2), d={'k': [1.5]})]",
            [("f", {"a": "true", "b": -2, "c": (1, 2), "d": {"k": [1.5]}})],
        ),
        ("[f(1, a=2)]", [("f", {"a": 2})]),
        ("[f(a=g(b=1), c=h(2), d=x[0], e=2*3+1)]", [("f", {"a": {"g": {"b": 1}}, "c": "h(2)", "d": "x[0]", "e": 7})]),
        ("[f()]", [("f", {})]),
        ("[]", []),
        ("Sure: [f(a=1)]", None),
        ("[f(a=1)", [("f", {"a": 1})]),
        ("f(a=1) and more", None),
        ("[f(a=x.y)]", None),
        ("[f(a=f'{1}')]", None),
        ("[1, 2]", None),
        ("[f(a=1, a=2)]", [("f", {"a": 2})]),
        ("[f(a=2 ** 99999999)]", None),
        ("[f(a='a' * 99999999)]", None),
        ("[f(a='%99999999d' % 1)]", None),
        ("[f(a=__import__('os').getcwd() + 'x')]", None),
        ("[f(a={[]: 1})]", None),
        ("[f(a=" + "(" * 5000 + ")]", None),
        ("", []),
        ("\0", None),
    ],
)
def test_calls_in_python(text, calls):
    if calls is None:
        with pytest.raises(NotCalls):
            python_calls.read(text)
    else:
        assert python_calls.read(text) == calls


def test_the_first_version_takes_a_call_without_named_arguments_for_none_and_keeps_backticks():
    assert python_calls.read("\n\n[f(a=1,\nb=2)]", version=1) == [("f", {"a": 1, "b": 2})]
    for text in ("[f({'a': 1})]", "`[f(a=1)]`"):
        assert python_calls.read(text)
        with pytest.raises(NotCalls):
            python_calls.read(text, version=1)


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("calls", CALLS, ids=range(len(CALLS)))
def test_an_opening_is_how_a_call_begins(format, calls):
    """What stands behind it in a call completes it to that call, of the same way of writing."""
    opening, written = FORMATS[format].opening(calls[0].name), FORMATS[format].write(calls[:1])
    assert written.startswith(opening) and not opening[-1].isspace()
    completed = opening + written.removeprefix(opening)
    assert FORMATS[format].read(completed).calls == calls[:1]
    if format == "python":
        with pytest.raises(NotCalls):
            FORMATS[format].read(opening + "I will not.")
    else:
        with pytest.raises(NotCalls):
            FORMATS[format].read(opening + " I will not.")


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("Sure, I will: brew(leaf='a) b', minutes=3). Done.", [("brew", {"leaf": "a) b", "minutes": 3})]),
        ("First brew(leaf=, then brew(leaf='x') twice", [("brew", {"leaf": "x"})]),
        ("brew(leaf='x'), kettle.brew(leaf='y')", [("brew", {"leaf": "x"}), ("kettle.brew", {"leaf": "y"})]),
        ("my.brew(leaf='x')", []),
        ("The brew is ready.", []),
        ("", []),
        ("brew(leaf='x'", None),
        ("brew(" * 3000, None),
    ],
)  # fmt: skip
def test_calls_in_a_text_are_found_by_their_functions(text, calls):
    if calls is None:
        with pytest.raises(NotCalls):
            python_calls.within(text, ["brew", "kettle.brew", ""])
    else:
        assert python_calls.within(text, ["brew", "kettle.brew", ""]) == calls


@pytest.mark.parametrize("format", JSON)
@pytest.mark.parametrize("whole", [[Call("ring", {"times": 3})], [Call("a", {}), Call("b", {"c": "d"})]], ids=len)
@pytest.mark.parametrize("cut", [3, 14])
def test_a_broken_call_hides_none_that_is_whole(format, whole, cut):
    """An agent that carries out what it reads has done so by then, or goes on behind the broken one."""
    written, rest = FORMATS[format].write(whole), FORMATS[format].write([Call("c", {"text": "x" * 20})])
    broken = rest[: rest.index("xxx") + cut]
    for text in (f"{written}\n{broken}", f"{broken}\n{written}"):
        with pytest.raises(NotCalls) as told:
            FORMATS[format].read(text)
        assert list(told.value.calls) == whole


def test_calls_in_several_blocks_and_with_a_type_in_front_are_all_read():
    two = [Call("a", {"n": 1}), Call("b", {})]
    apart = " ".join(FORMATS["mistral"].write([call]) for call in two)
    assert FORMATS["mistral"].read(apart).calls == two
    typed = '{"type": "function", "name": "a", "parameters": {"n": 1}}'
    assert FORMATS["llama"].read(f"{typed}; {FORMATS['llama'].write(two[1:])}") == (two, "")
    with pytest.raises(NotCalls):
        FORMATS["llama"].read(typed[:-3])


def test_numbers_that_nobody_can_write_out_are_no_arguments():
    huge = "0x" + "f" * 5000
    for number in (huge, f"-{huge}", f"[{huge}] + [1]", f"[{{{huge}}}] + [1]", "7 ** 3000 * 7 ** 3000"):
        with pytest.raises(NotCalls):
            python_calls.read(f"[f(a={number})]")


@pytest.mark.parametrize("rest", [', {"name": "c", "argum', ', {"name": 3}]', ', {"name": 3}, 1]', "", ",", " ,]"])
def test_a_list_that_is_cut_off_or_holds_what_is_no_call_keeps_those_that_are(rest):
    whole = [Call("a", {"n": [1]}), Call("b", {})]
    with pytest.raises(NotCalls) as told:
        FORMATS["mistral"].read(FORMATS["mistral"].write(whole).removesuffix("]") + rest)
    assert list(told.value.calls) == whole


@pytest.mark.parametrize(
    ("text", "whole"),
    [
        ('{"name": 3}, {"name": "b", "arguments": {}}]', [Call("b", {})]),
        ('{"name": "b", "arguments": {}} and so on', []),
    ],
)
def test_a_call_behind_one_that_is_none_is_kept_and_one_that_runs_into_text_is_not(text, whole):
    with pytest.raises(NotCalls) as told:
        FORMATS["mistral"].read(f"[TOOL_CALLS] [{text}")
    assert list(told.value.calls) == whole


BROKEN = ['{"name": "c", "arguments": {"x": oops}}', '{"name": "c", "arguments": {"x": }', "{name: c}", "oops", ""]
BROKEN += ['{"name": "c" "arguments": {}}', '{"name": "c", "argu', '{"name": "c", "arguments": {}} oops']
BROKEN += ['{"name": "c", "arguments": ' + "[" * 200]


@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("times", [1, 3])
def test_what_is_broken_in_the_middle_of_a_list_hides_no_call_behind_it(broken, times):
    whole = [Call("a", {"n": [1]}), Call("b", {"t": "u"})]
    first, last = (json.dumps({"name": call.name, "arguments": call.arguments}) for call in whole)
    for begins in ("[TOOL_CALLS] ", ""):
        for ends in ("]", ""):
            text = f"{begins}[{first}, {', '.join([broken] * times)}, {last}{ends}"
            with pytest.raises(NotCalls) as told:
                FORMATS["mistral"].read(text)
            assert list(told.value.calls) == whole, text


HOSTILE = [
    "f(",
    "f()",
    "f(a=(",
    "f(1 )",
    "f(a='",
    "f('(",
    'f("',
    "f(a=[",
    ")",
    "f(f()",
    "f(a=1 b)",
    "f(\\",
    "f(" + "'" * 3,
]


@pytest.mark.parametrize("again", HOSTILE)
def test_a_long_answer_takes_no_longer_than_its_length(again):
    for text in (again * 4000, again * 2000 + ")" * 2000, again * 2000 + "'" + ")" * 2000):
        begun = time.process_time()
        with contextlib.suppress(NotCalls):
            python_calls.within(text, ["f", "g"])
        assert time.process_time() - begun < 3, text[:40]


PIECES = [*HOSTILE, "x", ", ", "'", '"', "b=2", "]", "}", "{", " "]


@given(st.lists(st.sampled_from(PIECES), max_size=12).map("".join))
@settings(max_examples=300, deadline=None)
def test_a_call_in_a_text_ends_at_the_first_bracket_at_which_it_is_one(text):
    found, place = [], 0
    while begun := re.compile(r"(?<![\w.])f\(").search(text, place):
        place = begun.end()
        for close in re.finditer(r"\)", text[begun.end() :]):
            with contextlib.suppress(NotCalls):
                found += python_calls.read(text[begun.start() : begun.end() + close.end()])
                place = begun.end() + close.end()
                break
    try:
        calls = python_calls.within(text, ["f"])
    except NotCalls:
        calls = []
    assert calls == found


@pytest.mark.parametrize("format", JSON)
def test_what_stands_inside_a_call_is_none_wherever_it_is_cut_off(format):
    inner = {"name": "b", "arguments": {"t": "u"}, "parameters": {}}
    text = FORMATS[format].write([Call("a", {"steps": [inner, [inner]], "last": "{}"})])
    for cut in range(text.rindex('"{}"') + 5):
        try:
            calls = FORMATS[format].read(text[:cut]).calls
        except NotCalls as error:
            calls = list(error.calls)
        assert calls == [], text[:cut]


@pytest.mark.parametrize("format", JSON)
def test_a_text_that_never_ends_hides_no_call_behind_it(format):
    whole = [Call("b", {"t": "u"})]
    begun, write = FORMATS[format].opening("a"), FORMATS[format].write
    with pytest.raises(NotCalls) as told:
        FORMATS[format].read(f'{begun} {{"x": "I will. {write(whole)}')
    assert list(told.value.calls) == whole
