"""Training rows with tools: what is read, what is refused, and what of a row counts."""

import json
from types import SimpleNamespace

import pytest
import torch

from mm_cb.core.calls import Call
from mm_cb.core.errors import UserError
from mm_cb.data.mixture import load_examples, without_request
from mm_cb.data.records import Records
from mm_cb.data.scan import texts_of
from mm_cb.data.sources import Source
from mm_cb.data.tools import read_calls, read_tools
from mm_cb.models import TextModel
from mm_cb.training.masks import loss_mask
from mm_cb.training.planning.samples import marked
from tests.data.conftest import read_examples
from tests.models.test_tools import QWEN, processor

TOOLS = [
    {
        "name": "brew",
        "description": "Brews tea.",
        "parameters": {
            "type": "object",
            "properties": {
                "leaf": {"type": "string", "enum": ["green", "black"]},
                "minutes": {"type": "number"},
                "steps": {"type": "array", "items": {"type": "integer"}},
            },
            "required": ["leaf"],
        },
    }
]
ROW = {
    "id": "a",
    "messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "make tea"},
        {"role": "assistant", "tool_calls": [{"name": "brew", "arguments": {"leaf": "green", "minutes": 3}}]},
        {"role": "tool", "content": "done"},
        {"role": "assistant", "content": "It is ready."},
    ],
    "images": [],
    "set": "retain",
    "tools": TOOLS,
}


@pytest.fixture
def file(tmp_path):
    return tmp_path / "examples.jsonl"


@pytest.mark.parametrize("content", [None, ""])
def test_a_call_may_say_that_no_text_stands_beside_it(file, content):
    turns = [{**turn, "content": content} if "tool_calls" in turn else turn for turn in ROW["messages"]]
    write(file, ROW, {**ROW, "id": "b", "messages": turns})
    plain, said = read_examples(file)
    assert list(texts_of(plain)) == list(texts_of(said))


def write(file, *rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def changed(turn=None, call=None, tool=None, **more):
    row = json.loads(json.dumps(ROW))
    if turn:
        row["messages"][turn[0]] |= turn[1]
    if call:
        row["messages"][2]["tool_calls"][0] |= call
    if tool:
        row["tools"][0] |= tool
    return row | more


def test_a_row_with_tools_is_read_in_both_ways(file):
    write(file, ROW)
    (example,) = read_examples(file)
    assert example.messages[2]["tool_calls"] == [Call("brew", {"leaf": "green", "minutes": 3})]
    assert example.tools == [{"type": "function", "function": TOOLS[0]}]
    wrapped = changed(tools=[{"type": "function", "function": TOOLS[0]}])
    write(file, wrapped)
    assert read_examples(file)[0].tools == example.tools
    assert Records([ROW])[0].tools == example.tools
    assert Records([ROW])[0].messages[2]["tool_calls"] == example.messages[2]["tool_calls"]


def brew(**arguments):
    return {"arguments": arguments}


def schema(**parameters):
    return {"parameters": {"type": "object", **parameters}}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (changed(call={"name": "boil"}), r"one of the row's tools \(brew\), got 'boil'"),
        (changed(call=brew()), "must give `leaf`, which its schema requires"),
        (changed(call=brew(leaf="green", cup=1)), r"its parameters \(leaf, minutes, steps\), got `cup`"),
        (changed(call=brew(leaf=3)), "`leaf` .* of type string, got 3"),
        (changed(call=brew(leaf="red")), "must be one of"),
        (changed(call=brew(leaf="green", minutes="3")), "of type number, got '3'"),
        (changed(call=brew(leaf="green", minutes=True)), "of type number, got True"),
        (changed(call=brew(leaf="green", steps=[1, "2"])), "an item of .* of type integer, got '2'"),
        (changed(call={"arguments": "{}"}), "a call must be an object"),
        (changed(call={"id": "x"}), "a call must be an object"),
        (changed(turn=(2, {"tool_calls": []})), "list of calls that is not empty"),
        (changed(turn=(4, {"tool_calls": 3})), "list of calls that is not empty"),
        (changed(turn=(4, {"tool_call": [{}]})), "must stand in `tool_calls`, got the key 'tool_call'"),
        (changed(turn=(4, {"function_call": {}})), "must stand in `tool_calls`"),
        (changed(turn=(1, {"tool_calls": []})), "only the assistant's turns can hold `tool_calls`"),
        (changed(turn=(3, {"role": "user"})), "behind a turn with calls one of role tool"),
        (changed(messages=ROW["messages"][:4]), "end with the assistant"),
        (changed(messages=ROW["messages"][:1]), "end with the assistant"),
        (
            changed(messages=[*ROW["messages"][:3], *ROW["messages"][3:4] * 2, ROW["messages"][4]]),
            "one of role tool for",
        ),
        (changed(messages=[ROW["messages"][1], ROW["messages"][3], ROW["messages"][4]]), "one of role tool for"),
        (changed(turn=(3, {"content": [{"type": "image"}]})), "only the user's turns can hold image"),
        (changed(tools=[]), "list of functions that is not empty"),
        (changed(tools=None), "none: give `tools`"),
        (changed(tools=TOOLS * 2), "`brew` comes again"),
        (changed(tools=[{"name": "brew"}]), "JSON schema of type `object`"),
        (changed(tools=["brew"]), "tool 1 must be an object with a `name`"),
        (changed(tool=schema(properties={"leaf": {"type": "dict"}})), "got 'dict'; JSON schemas say `object`"),
        (changed(tool=schema(properties={"leaf": "string"})), "must be a JSON schema, an object"),
        (changed(tool=schema(properties={"leaf": {"$ref": "#"}})), "must say its schema itself, got the reference '#'"),
        (changed(tool=schema(properties={"leaf": {"type": "array", "items": {"type": "int"}}})), "the items of `leaf`"),
        (changed(tool=schema(properties={}, required=["leaf"])), "must name its properties"),
        (changed(tool=schema(properties={"leaf": {"enum": "green"}})), "`enum` of `leaf` .* list"),
        (changed(tool=schema(properties={"leaf": {"anyOf": {"type": "string"}}})), "`anyOf` of `leaf` .* list"),
        (changed(tool=schema(properties={"leaf": {"oneOf": [{"type": "str"}]}})), "JSON schemas say `string`"),
        (changed(tool=schema(properties={"leaf": {"required": "a"}})), "`required` of `leaf` .* list"),
        (changed(tool=schema(properties={"leaf": {"required": [["a"]]}})), "`required` of `leaf` .* list of texts"),
        (changed(tool=schema(properties={"leaf": {"enum": []}})), "`enum` of `leaf` .* list that is not empty"),
        (changed(tool=schema(anyOf={"required": ["leaf"]})), "`anyOf` of tool `brew` .* list"),
        (changed(tool={"parameters": {"type": "dict", "properties": {}}}), "JSON schema of type `object`"),
    ],
)
def test_a_broken_row_names_file_and_line(file, row, message):
    write(file, {**ROW, "id": "b"}, row)
    with pytest.raises(UserError, match=rf"examples\.jsonl:2: .*{message}"):
        read_examples(file)


EITHER = {"anyOf": [{"type": "string"}, {"type": "null"}]}
BOX = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}


@pytest.mark.parametrize(
    ("held", "value", "fits"),
    [
        (EITHER, "green", True),
        (EITHER, None, True),
        (EITHER, 3, False),
        ({"oneOf": [EITHER, BOX]}, {"n": 1}, True),
        ({"allOf": [{"type": "number"}, {"enum": [1, 2]}]}, 3, False),
        ({"enum": [1]}, True, False),
        ({"enum": [1]}, 1.0, True),
        (BOX, {}, False),
        (BOX, {"n": 2.0}, True),
        (BOX, {"n": 2.5}, False),
        (BOX, {"n": True}, False),
    ],
)
def test_arguments_are_what_their_schemas_say_at_every_depth(held, value, fits):
    tools = read_tools([{"name": "f", **schema(properties={"a": held})}])
    told = [{"name": "f", "arguments": {"a": value}}]
    if fits:
        assert read_calls(told, tools)
    else:
        with pytest.raises(ValueError, match=r"`(a|n)`"):
            read_calls(told, tools)


def test_parameters_may_demand_one_of_several():
    either = {"anyOf": [{"required": ["a"]}, {"required": ["b"]}]}
    tools = read_tools([{"name": "f", **schema(properties={"a": {}, "b": {}}, **either)}])
    assert read_calls([{"name": "f", "arguments": {"b": 1}}], tools)
    with pytest.raises(ValueError, match="a call of `f` must fit .*anyOf"):
        read_calls([{"name": "f", "arguments": {}}], tools)


def test_rows_of_other_formats_do_not_lose_their_calls(file):
    write(file, {"messages": ROW["messages"], "tools": TOOLS})
    with pytest.raises(UserError, match="must be a row of our own"):
        list(load_examples([Source(str(file))], 0))


def test_rows_that_differ_in_calls_alone_differ():
    other = changed(call=brew(leaf="black"))
    assert list(texts_of(Records([ROW])[0])) != list(texts_of(Records([other])[0]))
    assert without_request(Records([ROW])[0]) == Records([ROW])[0]


def test_what_counts_is_shown_by_its_mask():
    model, example = TextModel(SimpleNamespace(device=torch.device("cpu")), processor(QWEN)), Records([ROW])[0]
    shown = {mask: marked(model, example, {"text": mask}) for mask in ("tool_call", "completion", "user_and_assistant")}
    counted = {mask: [part.partition("⟧")[0].strip() for part in text.split("⟦")[1:]] for mask, text in shown.items()}
    call = '<tool_call>\n{"name": "brew", "arguments": {"leaf": "green", "minutes": 3}}\n</tool_call></s>'
    assert counted["tool_call"] == [call]
    assert counted["completion"] == [call, "It is ready.</s>"]
    assert counted["user_and_assistant"] == ["make tea", call, "done", "It is ready.</s>"]
    plain = model.encode(["make tea"], [None], completions=["no"])
    with pytest.raises(ValueError, match="`tool_call` must select a token in every row"):
        loss_mask(plain, "tool_call")
