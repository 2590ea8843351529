"""Rows of tool calls: two models asked, schemas held, too close requests dropped, nothing paid for twice."""

import json

import pytest

from mm_cb import cli
from mm_cb.core.calls import FORMATS, Call
from mm_cb.core.endpoint import Endpoint
from mm_cb.core.errors import UserError
from mm_cb.core.files import read_jsonl
from mm_cb.data.built_calls import CallRecipe, build_calls, parse_calls, parse_request, read_functions
from mm_cb.data.mixture import load_examples
from mm_cb.data.sources import Source
from tests.stub_server import Reply, StubServer

ASK, DO = "Write {request: ...} over these: {functions}", "Carry out by {functions} this: {request}"
COUNT = 4


def definition(number):
    inner = {"type": "object", "properties": {"leaf": {"type": "string"}}, "required": ["leaf"]}
    return {"name": f"brew{number}", "description": "Brews tea.", "parameters": inner}


@pytest.fixture
def functions(tmp_path):
    lines = [json.dumps({"tools": [definition(number)]}) for number in range(COUNT)]
    (tmp_path / "functions.jsonl").write_text("\n".join([*lines, lines[0]]) + "\n")
    return tmp_path / "functions.jsonl"


def said(request):
    return str(request["messages"][-1]["content"])


def well(request, number):
    """Writes a request that names its function, and calls the function of a request that it is given."""
    text = said(request)
    which = next(f"brew{n}" for n in range(COUNT) if f'"brew{n}"' in text)
    if text.startswith("Write"):
        return f'Here: {{"request": "please make the tea of {which} tonight"}}'
    assert text.endswith(f"please make the tea of {which} tonight")
    return f"[{which}(leaf='green')]"


def build(functions, out, server, evaluated=(), **fields):
    endpoint = Endpoint(server.url, "m", retries=1, timeout=5.0, concurrency=2)
    recipe = CallRecipe("asks", "does", ASK, DO, **fields)
    return build_calls(functions, out, recipe, requester=endpoint, executor=endpoint, evaluated=evaluated)


def test_functions_become_rows_that_training_reads(functions, tmp_path):
    with StubServer(well) as server:
        built = build(functions, tmp_path / "out", server)
    rows = list(load_examples([Source(str(built.path))], 0))
    assert built.rows == len(rows) == built.functions == COUNT and not built.rejected and not built.left
    for number, row in enumerate(rows):
        assert row.set == "circuit_breaker" and row.tools[0]["function"]["name"] == f"brew{number}"
        assert row.messages[1]["tool_calls"] == [Call(f"brew{number}", {"leaf": "green"})]
    origins = read_jsonl(tmp_path / "out" / "provenance.jsonl")
    assert {(one["requester"], one["executor"], one["attempt"]) for one in origins} == {("asks", "does", 1)}


def test_rows_for_a_template_without_tools_are_what_the_benchmark_asks(functions, tmp_path):
    from mm_cb.data.prompt_mode import prompt_mode

    with StubServer(well) as server:
        built = build(functions, tmp_path / "out", server, style="prompt", set="retain")
    first = next(iter(load_examples([Source(str(built.path))], 0)))
    asked, answered = first.messages
    assert asked["content"] == prompt_mode([definition(0)], "please make the tea of brew0 tonight")
    assert FORMATS["python"].read(answered["content"]).calls == [Call("brew0", {"leaf": "green"})]
    assert first.set == "retain" and not first.tools


def test_what_is_evaluated_stays_out(functions, tmp_path):
    with StubServer(well) as server:
        built = build(functions, tmp_path / "out", server, evaluated=["please make the tea of nobody"], attempts=2)
    assert built.rows == 0 and built.rejected == {"too close to what is evaluated": 2 * COUNT}


def test_a_run_that_is_stopped_asks_for_nothing_twice(functions, tmp_path):
    seen = []

    def broken(request, number):
        seen.append(said(request))
        return well(request, number) if len(seen) <= COUNT + 1 else Reply(hang_up=True)

    with StubServer(broken) as server:
        built = build(functions, tmp_path / "out", server)
        assert built.left and built.rows < COUNT
    paid = [one for one in seen[: COUNT + 1]]
    later = []

    def again(request, number):
        later.append(said(request))
        return well(request, number)

    with StubServer(again) as server:
        assert build(functions, tmp_path / "out", server).rows == COUNT
    assert not set(paid) & set(later) and len(later) == 2 * COUNT - len(paid)
    with StubServer(again) as server:
        assert build(functions, tmp_path / "out", server).rows == COUNT
    assert len(later) == 2 * COUNT - len(paid)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("I cannot help.", "no JSON object with a request"),
        ('{"request": " "}', "empty request"),
        ('{"request": 3}', "no JSON object with a request"),
        ('{"request": "a\\ud83d"}', "holds what is no character"),
        ('```json\n{"request": " tea "}\n```', ("tea",)),
    ],
)
def test_a_request_is_read_or_told_why_not(answer, expected):
    assert parse_request(answer) == expected


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("[brew0(leaf='a'), brew0(leaf='b')]", [Call("brew0", {"leaf": "a"}), Call("brew0", {"leaf": "b"})]),
        ("I cannot help.", "no call that can be read"),
        ("[]", "no call"),
        ("[brew0()]", "a call that its schema forbids"),
        ("[fly(leaf='a')]", "a call that its schema forbids"),
    ],
)
def test_calls_are_read_or_told_why_not(answer, expected):
    assert parse_calls(answer, "python", [{"type": "function", "function": definition(0)}]) == expected


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"request_template": "no place"}, "the request template must hold {functions}"),
        ({"request_template": "{functions} {request}"}, "the request template must not hold {request}"),
        ({"call_template": "{functions}"}, "the call template must hold {request}"),
        ({"style": "tool"}, "unknown style `tool`"),
        ({"format": "xml"}, "unknown format `xml`"),
        ({"attempts": 0}, "attempts"),
    ],
)
def test_a_recipe_that_cannot_work_is_refused(change, message):
    fields = {"requester": "a", "executor": "b", "request_template": ASK, "call_template": DO} | change
    with pytest.raises(UserError, match=message):
        CallRecipe(**fields)


def test_lines_without_functions_are_named(tmp_path):
    (tmp_path / "f.jsonl").write_text('{"tools": [{"name": "a"}]}\n')
    with pytest.raises(UserError, match=r"f\.jsonl:1: .*must be a JSON schema"):
        read_functions(tmp_path / "f.jsonl")
    (tmp_path / "f.jsonl").write_text("\n")
    with pytest.raises(UserError, match="it is empty"):
        read_functions(tmp_path / "f.jsonl")


def test_the_command_builds_and_says_what_next(functions, tmp_path, capsys):
    for name, text in (("ask.txt", ASK), ("do.txt", DO), ("e.jsonl", '{"prompt": "something else"}\n')):
        (tmp_path / name).write_text(text)
    with StubServer(well) as server:
        given = ["--functions", functions, "--request-template", tmp_path / "ask.txt", "--requester", "m"]
        given += ["--call-template", tmp_path / "do.txt", "--requester-url", server.url, "--out", tmp_path / "out"]
        assert cli.run(["data", "build", "calls", *map(str, given), "--evaluation", str(tmp_path / "e.jsonl")]) == 0
    assert f"rows: {COUNT} of {COUNT}" in capsys.readouterr().out
    assert cli.run(["report", str(tmp_path / "out")]) == 2 and "nothing is measured" in capsys.readouterr().err
