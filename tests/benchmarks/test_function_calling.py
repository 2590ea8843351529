"""Function calling: BFCL's rules on awkward answers, what stands apart from what, both versions' files, bad files."""

import json
import re
import runpy
import sys
from pathlib import Path

import pytest

import mm_cb
from mm_cb import cli
from mm_cb.benchmarks.function_calling.benchmark import (
    CallSettings,
    FunctionCalling,
    StoredCalls,
    made_questions,
    scored,
)
from mm_cb.benchmarks.function_calling.questions import read_asked, tools
from mm_cb.benchmarks.function_calling.rules import Expected, call_fault, fault
from mm_cb.core.endpoint import Endpoint
from mm_cb.core.errors import UserError
from mm_cb.core.python_calls import read
from mm_cb.core.runs import read_jsonl
from mm_cb.inference.generation import Request
from mm_cb.inference.served import EndpointEngine
from mm_cb.inference.source import ModelSource
from mm_cb.inference.unanswered import is_error_text
from mm_cb.metrics.results import find, read_results
from tests.models.conftest import save_text_model
from tests.models.test_tools import QWEN

ROOT = Path(__file__).parents[2]
CALLS = ROOT / "data" / "examples" / "calls"
ANSWERS = CALLS.parent / "call_answers.jsonl"
SCHEMA = {
    "s": {"type": "string"},
    "i": {"type": "integer"},
    "f": {"type": "float"},
    "b": {"type": "boolean"},
    "ls": {"type": "array", "items": {"type": "string"}},
    "lf": {"type": "array", "items": {"type": "float"}},
    "t": {"type": "tuple", "items": {"type": "integer"}},
    "d": {"type": "dict"},
    "ld": {"type": "array", "items": {"type": "dict"}},
    "any": {"type": "any"},
}


def verdict(written, possible, required=(), version=4):
    (call,) = read(f"[f({written})]")
    return call_fault(call, Expected("f", required, SCHEMA, possible), version)


@pytest.mark.parametrize(
    ("written", "possible", "expected"),
    [
        ("s='April 1, 2024'", {"s": ["april 1,2024"]}, None),
        ("s='it`s'", {"s": ["its"]}, "wrong_value"),
        ("s='a\\'b'", {"s": ['A"B']}, None),
        ("i=True", {"i": [1]}, "wrong_type"),
        ("b=1", {"b": [True]}, "wrong_type"),
        ("i=1.0", {"i": [1]}, "wrong_type"),
        ("f=1", {"f": [1.0]}, None),
        ("f='1'", {"f": [1.0]}, "wrong_type"),
        ("lf=[1, 2]", {"lf": [[1.0, 2.0]]}, "wrong_type"),
        ("lf=[1, 2]", {"lf": [[1, 2]]}, None),
        ("ls=['A b', 'c.']", {"ls": [["ab", "C"]]}, None),
        ("ls=['c', 'ab']", {"ls": [["ab", "c"]]}, "wrong_value"),
        ("ls=('ab',)", {"ls": [["ab"]]}, "wrong_type"),
        ("ls=[]", {"ls": [["ab"], ""]}, None),
        ("t=(1, 2)", {"t": [[1, 2]]}, None),
        ("t=[1, 2]", {"t": [[1, 2]]}, None),
        ("any=5", {"any": ["5"]}, "wrong_type"),
        ("any=5", {"any": [5]}, None),
        ("i=days", {"i": ["days"]}, None),
        ("i=Days", {"i": ["days"]}, "wrong_value"),
        ("i=3", {"i": ["days"]}, "wrong_value"),
        ("i=3", {"i": ["", 3]}, None),
        ("d={'k': 'A b'}", {"d": [{"k": ["ab"]}]}, None),
        ("d={'K': 'ab'}", {"d": [{"k": ["ab"]}]}, "wrong_value"),
        ("d={}", {"d": [{"k": ["ab", ""]}]}, None),
        ("d={}", {"d": [{"k": ["ab"]}]}, "wrong_value"),
        ("d={'k': 1, 'z': 2}", {"d": [{"k": [1]}]}, "wrong_value"),
        ("ld=[{'k': 1}, {'k': 2}]", {"ld": [[{"k": [1]}, {"k": [2]}]]}, None),
        ("ld=[{'k': 2}, {'k': 1}]", {"ld": [[{"k": [1]}, {"k": [2]}]]}, "wrong_value"),
        ("ld=[{'k': 1}]", {"ld": [[{"k": [1]}, {"k": [2]}]]}, "wrong_value"),
        ("s='a'", {"s": ["a"], "i": [1]}, "missing"),
        ("s='a'", {"s": ["a"], "i": [1, ""]}, None),
        ("s='a', i=1", {"s": ["a"]}, "unexpected"),
        ("s='a', zzz=1", {"s": ["a"], "zzz": [1]}, "unexpected"),
        ("s='a', **more", {"s": ["a"]}, "unexpected"),
    ],
)
def test_arguments(written, possible, expected):
    assert verdict(written, possible) == expected


def test_required_comes_before_what_may_be_omitted():
    assert verdict("s='a'", {"s": ["a"], "i": [1, ""]}, required=["i"]) == "missing"


def test_the_first_version_wants_every_key_and_looks_into_dictionaries():
    omitted, nested = {"d": [{"k": ["ab", ""]}]}, {"d": [{"k": {"in": [1]}}]}
    assert verdict("d={}", omitted, version=1) == "wrong_value"
    assert verdict("d={'k': {'in': 1}}", nested, version=1) is None
    assert verdict("d={'k': {'in': 2}}", nested, version=1) == "wrong_value"


@pytest.mark.parametrize(
    ("said", "parallel", "expected"),
    [
        ("[f(i=1), f(i=2)]", True, None),
        ("[f(i=2), f(i=1)]", True, None),
        ("[f(i=1), f(i=1)]", True, "wrong_value"),
        ("[f(i=1)]", True, "wrong_count"),
        ("[f(i=1), f(i=2)]", False, "wrong_count"),
        ("[]", False, "wrong_count"),
        ("[g(i=1)]", False, "wrong_name"),
    ],
)
def test_lists_of_calls(said, parallel, expected):
    asked = [Expected("f", ["i"], SCHEMA, {"i": [n]}) for n in ((1, 2) if parallel else (1,))]
    assert fault(read(said), asked, parallel=parallel) == expected


def right(said, id):
    (question,) = (q for q in FunctionCalling().questions(str(CALLS), CallSettings()) if q.id == id)
    return {rule: score.value for rule, score in FunctionCalling().score(question, said).items()}


@pytest.mark.parametrize(
    ("said", "official", "strict"),
    [
        ("No function helps.", 1, 1),
        ("[]", 1, 1),
        ("[ring_bell(times=1)]", 0, 0),
        ("the the the the the the the the the the the the", 1, 0),
        ("", 1, 0),
    ],
)
def test_broken_text_is_no_restraint(said, official, strict):
    assert right(said, "irrelevance_0") == {"official": official, "strict": strict}


def test_relevance_is_any_call():
    assert right("[x()]", "live_relevance_0-0-0")["strict"] == 1 and right("Hm.", "live_relevance_0-0-0")["strict"] == 0


def test_answers_to_no_question_are_said(tmp_path):
    lines = ANSWERS.read_text().splitlines()
    more = tmp_path / "more.jsonl"
    more.write_text("\n".join([*lines, '{"id": "simple_python_999", "result": "[]"}']))
    with pytest.warns(UserWarning, match=rf"1 of {len(lines) + 1} answers .* `simple_python_999`: they are not scored"):
        stored = StoredCalls(answers=str(more))
        FunctionCalling().score_stored(stored, tmp_path / "run", data=str(CALLS), subject="base", seed=0)


def test_stored_answers_are_scored_without_a_model_and_kinds_stand_apart(tmp_path):
    stored = StoredCalls(answers=str(ANSWERS))
    FunctionCalling().score_stored(stored, tmp_path / "run", data=str(CALLS), subject="base", seed=0)
    found = {
        name: find(read_results(tmp_path / "run" / "results.json"), "base", name, "strict")
        for name in ("function_calling", "function_calling_mean", "function_calling_live", "function_calling_undecoded")
    }
    values = {name: m.value for name, m in found.items()}
    assert values == {
        "function_calling": 50.0,
        "function_calling_mean": 62.5,  # 1/2, 1, 1, 0
        "function_calling_live": 0.0,
        "function_calling_undecoded": pytest.approx(100 / 6),
    }
    counts = found["function_calling"].counts
    assert counts["undecoded"] == 1 and counts["wrong_count"] == 1 and counts["wrong_value"] == 1
    kinds = {item["id"]: item["metric"] for item in read_jsonl(tmp_path / "run" / "items.jsonl")}
    assert kinds["irrelevance_0"] == "irrelevance" and kinds["live_relevance_0-0-0"] == "relevance"


def test_dots_become_underscores_where_that_is_said():
    ids = {q.id: q for q in made_questions(str(CALLS), "hermes", template=True, underscores=True)}
    question = ids["multiple_0"]
    assert question.tools[1]["function"]["name"] == "library_lend"
    for name, value in (("library_lend", 1), ("library.lend", 0)):
        call = {"name": name, "arguments": {"title": "the wind in the willows", "days": 14}}
        said = f"<tool_call>\n{json.dumps(call)}\n</tool_call>"
        assert scored(question.reference, question.category, said).value == value


def test_tools_are_json_schemas():
    asked = {one.id: one for one in read_asked(str(CALLS))}["simple_python_1"]
    parameters = tools(asked, underscores=False)[0]["function"]["parameters"]
    assert parameters["type"] == "object" and parameters["properties"]["size"]["type"] == "object"
    assert parameters["properties"]["size"]["properties"]["width"]["type"] == "number"


V1 = {"id": "parallel_function_0", "question": "Ring twice and once.", "function": None}
BELL = {"name": "bell", "parameters": {"type": "dict", "properties": {"n": {"type": "integer"}}, "required": ["n"]}}


def write(folder, row, truth):
    (folder / "possible_answer").mkdir(exist_ok=True)
    (folder / "q.json").write_text(json.dumps(row) + "\n")
    (folder / "possible_answer" / "q.json").write_text(json.dumps({"id": row["id"], "ground_truth": truth}) + "\n")
    return str(folder)


def test_the_first_versions_files(tmp_path):
    data = write(tmp_path, {**V1, "function": BELL}, {"bell_1": {"n": [2]}, "bell_2": {"n": [1]}})
    (question,) = FunctionCalling().questions(data, CallSettings())
    assert scored(question.reference, question.category, "\n\n[bell(n=1), bell(n=2)]").value == 1
    assert "Ring twice and once.\n Note that" in question.prompt and str([BELL]) in question.prompt


GOOD = {"id": "simple_python_0", "question": [[{"role": "user", "content": "Ring."}]], "function": [BELL]}
TRUTH = [{"bell": {"n": [1]}}]


@pytest.mark.parametrize(
    ("change", "truth", "message"),
    [
        ({"id": "x"}, TRUTH, "must begin with its category"),
        ({"id": "simple_0"}, TRUTH, "rows of v2 or v3"),
        ({"question": "Ring."}, TRUTH, "list of one list of turns"),
        ({"question": [[{"role": "tool", "content": "a"}]]}, TRUTH, "turns of system, user or assistant"),
        ({"question": [[{"role": "user", "content": ""}]]}, TRUTH, "`content` must be a text"),
        ({"function": []}, TRUTH, "list of definitions"),
        ({"function": [{"name": "bell"}]}, TRUTH, "JSON schema with `properties`"),
        ({"function": [{"name": "bell", "parameters": {"properties": {"n": {"type": "int"}}}}]}, TRUTH, "got 'int'"),
        (
            {"function": [{"name": "bell", "parameters": {"properties": {"n": {"type": "array"}}}}]},
            TRUTH,
            "type of its items",
        ),
        ({"function": [{"name": "bell", "parameters": {"properties": {}, "required": ["n"]}}]}, TRUTH, "must name its"),
        ({}, [{"gong": {"n": [1]}}], r"one of the question's functions \(bell\), got `gong`"),
        ({}, [{"bell": {"n": 1}}], "list of possible values"),
        ({}, {"bell": {"n": [1]}}, "list of objects with one function"),
        ({}, [*TRUTH, *TRUTH], "must hold one call, got 2"),
        ({"id": "simple_java_0"}, TRUTH, "all of it is left out: Java"),
    ],
)
def test_a_broken_row_names_its_file_and_line(tmp_path, change, truth, message):
    data = write(tmp_path, {**GOOD, **change}, truth)
    with pytest.raises(UserError, match=message) as error:
        FunctionCalling().questions(data, CallSettings())
    assert re.search(r"q\.json:1: |left out", str(error.value))


def test_files_that_lack_their_answers_or_are_of_another_version(tmp_path):
    write(tmp_path, GOOD, TRUTH)
    (tmp_path / "possible_answer" / "q.json").unlink()
    with pytest.raises(UserError, match="must have its right calls in .*possible_answer"):
        read_asked(str(tmp_path))
    (tmp_path / "q.json").rename(tmp_path / "BFCL_v3_simple.json")
    with pytest.raises(UserError, match="v1 or v4, it is of v3"):
        read_asked(str(tmp_path))
    with pytest.raises(UserError, match="there is none"):
        read_asked(str(tmp_path / "nothing"))


def test_bfcls_own_folders_are_taken_as_they_are(tmp_path, capsys):
    """Beside what is scored lie files of other categories, some of which hold no rows; answers lie deeper."""
    for name in ("BFCL_v4_format_sensitivity.json", "BFCL_v4_memory.json", "BFCL_v4_simple_java.json"):
        (tmp_path / name).write_text("{\n}")
    (tmp_path / "possible_answer").mkdir()
    for folder, row in ((tmp_path, GOOD), (tmp_path / "possible_answer", {"id": GOOD["id"], "ground_truth": TRUTH})):
        (folder / "BFCL_v4_simple_python.json").write_text(json.dumps(row))
    said = tmp_path / "result" / "M"
    for folder in ("non_live", "agentic/memory/kv/memory_snapshot"):
        (said / folder).mkdir(parents=True)
    (said / "non_live" / "BFCL_v4_simple_python_result.json").write_text(
        json.dumps({"id": GOOD["id"], "result": "[bell(n=1)]"})
    )
    (said / "agentic" / "memory" / "kv" / "memory_snapshot" / "customer_final.json").write_text("[\n]")
    (said / "agentic" / "BFCL_v4_web_search_base_result.json").write_text("[]")
    command = [
        "score",
        "function-calling",
        "--data",
        str(tmp_path),
        "--answers",
        str(said),
        "--out",
        str(tmp_path / "r"),
    ]
    assert cli.run(command) == 0, capsys.readouterr().err
    assert [item["id"] for item in read_jsonl(tmp_path / "r" / "items.jsonl")] == [GOOD["id"]]


def test_v1s_folder_is_taken_as_it_is(tmp_path):
    """Its file of chats has no ids."""
    (tmp_path / "gorilla_openfunctions_v1_test_chatable.json").write_text(json.dumps({"question": "hello"}))
    row = {**GOOD, "id": "relevance_0", "question": "hello"}
    (tmp_path / "gorilla_openfunctions_v1_test_relevance.json").write_text(json.dumps(row))
    assert [asked.id for asked in read_asked(str(tmp_path))] == ["relevance_0"]


@pytest.mark.parametrize(
    ("wrong", "code", "told"),
    [
        (["simple_python_1"], 0, "2 of 2 alike, 1 right"),
        ([2], 0, "2 of 2 alike, 1 right"),  # v1 counts answers from one
        (["simple_python_0"], 1, "simple_python_1: ours False, BFCL True"),
    ],
)
def test_our_verdicts_beside_bfcls_own(tmp_path, capsys, monkeypatch, wrong, code, told):
    """The script that shows the parity; score files have no line end behind the last line."""
    counts = {"correct_count": 1, "total_count": 2}
    (tmp_path / "BFCL_v4_simple_python_score.json").write_text(
        "\n".join(json.dumps(line) for line in (counts, *({"id": one} for one in wrong)))
    )
    monkeypatch.setattr(sys, "argv", ["bfcl.py", "--data", str(CALLS), "--pair", "M", str(ANSWERS), str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(ROOT / "scripts" / "benchmarks" / "bfcl.py"), run_name="__main__")
    assert ended.value.code == code and told in capsys.readouterr().out


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ([], "must answer every question"),
        ([{"id": "simple_python_0", "result": [{"bell": "{}"}]}], "must be the model's text, got list"),
        ([{"id": "simple_python_0", "result": "a"}] * 2, "answered once"),
        ([{"id": "x", "result": "a"}], "must begin with its category"),
        ([{"id": "simple_python_0", "result": "a", "completion": "b"}], "must be one text, they differ"),
    ],
)
def test_broken_stored_answers_end_in_one_line(tmp_path, capsys, lines, message):
    data = write(tmp_path, GOOD, TRUTH)
    answers = tmp_path / "possible_answer" / "said.jsonl"
    answers.write_text("".join(json.dumps(line) + "\n" for line in lines))
    arguments = ["--data", data, "--answers", str(answers), "--out", str(tmp_path / "run")]
    assert cli.run(["score", "function-calling", *arguments]) == 2
    told = capsys.readouterr().err.strip()
    assert message in " ".join(told.split()) and not (tmp_path / "run").exists()


def test_answers_to_some_categories_alone_are_told_which_to_score(tmp_path):
    some = [line for line in ANSWERS.read_text().splitlines() if "irrelevance_0" not in line]
    (tmp_path / "some.jsonl").write_text("\n".join(some) + "\n")
    stored = StoredCalls(answers=str(tmp_path / "some.jsonl"))
    with pytest.raises(UserError, match="none of `irrelevance`.*`--data` the file of a category that is answered"):
        FunctionCalling().score_stored(stored, tmp_path / "run", data=str(CALLS), subject="base", seed=0)


def test_a_served_model_is_asked_in_the_benchmarks_own_words():
    source = ModelSource("served", endpoint="http://127.0.0.1:1/v1")
    task = FunctionCalling().task(str(CALLS), CallSettings(), source)
    assert not any(q.tools for q in task.questions) and "Here is a list of functions" in task.questions[0].prompt
    with pytest.raises(UserError, match="--ask prompt"):
        FunctionCalling().task(str(CALLS), CallSettings(ask="template"), source)


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory):
    """A tiny model of text whose template takes tools."""
    folder = save_text_model(tmp_path_factory.mktemp("tools") / "model", "mistral")
    (folder / "chat_template.jinja").write_text(QWEN)
    return folder


def test_a_model_is_asked_by_its_own_template_where_that_takes_tools(with_tools, tmp_path):
    run = mm_cb.evaluate("function-calling", str(with_tools), data=CALLS, out=tmp_path / "run", max_new_tokens=2)
    item = {item["id"]: item for item in read_jsonl(run.folder / "items.jsonl")}["simple_python_0"]
    assert item["prompt"].startswith("Brew me green tea") and item["reference"]["format"] == "hermes"
    assert run.find("function_calling_undecoded").value == 100.0


def test_a_served_model_is_shown_no_tools_in_silence():
    engine = EndpointEngine(Endpoint("http://127.0.0.1:1/v1", "served"))
    with pytest.raises(UserError, match="without tools"):
        engine.complete([Request("a", "ring", tools=({"type": "function"},))], 4)


def test_a_template_that_leaves_tools_out_is_refused_or_gone_round(tmp_path):
    folder = str(save_text_model(tmp_path / "model", "mistral"))
    source = ModelSource(folder)
    assert (
        "Here is a list of functions" in FunctionCalling().task(str(CALLS), CallSettings(), source).questions[0].prompt
    )
    with pytest.raises(UserError, match="leaves out the tools"):
        FunctionCalling().task(str(CALLS), CallSettings(ask="template"), source)


def test_answers_that_are_read_in_another_format_name_it(tmp_path, capsys):
    where = ["score", "function-calling", "--data", str(CALLS), "--answers", str(ANSWERS)]
    assert cli.run([*where, "--out", str(tmp_path / "python")]) == 0
    assert "CAUTION" not in capsys.readouterr().err
    with pytest.warns(UserWarning, match=r"not one of the 6 .* `--format hermes`; `--format python` reads [1-6]"):
        assert cli.run([*where, "--format", "hermes", "--out", str(tmp_path / "hermes")]) == 0
    nothing = tmp_path / "nothing.jsonl"
    nothing.write_text("".join(json.dumps(one | {"result": "Hm."}) + "\n" for one in read_jsonl(ANSWERS)))
    with pytest.warns(UserWarning, match="no other format reads one either"):
        assert cli.run([*where[:-1], str(nothing), "--out", str(tmp_path / "nothing")]) == 0


def test_a_category_that_cannot_be_read_is_named_beside_others_that_can(tmp_path):
    where = ["score", "function-calling", "--data", str(CALLS), "--out", str(tmp_path / "run"), "--answers"]
    called = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
    rows = [one | ({"result": called} if one["id"].startswith("parallel") else {}) for one in read_jsonl(ANSWERS)]
    (tmp_path / "mixed.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.warns(UserWarning, match=r"CAUTION not one of .* parallel.*`--format hermes` reads 2"):
        assert cli.run([*where, str(tmp_path / "mixed.jsonl")]) == 0


ERRORS = (
    "Error during inference: 429 Too Many Requests",
    "Error code: 503 - {'error': 'overloaded'}",
    "Traceback (most recent call last): ...",
)


@pytest.mark.parametrize("text", ERRORS)
def test_an_error_text_is_no_answer(text, tmp_path, capsys):
    where = ["score", "function-calling", "--data", str(CALLS), "--out", str(tmp_path / "run"), "--answers"]
    rows = read_jsonl(ANSWERS)
    lost = {rows[0]["id"], *(row["id"] for row in rows if row["id"].startswith("irrelevance"))}
    broken = [row | ({"result": text} if row["id"] in lost else {}) for row in rows]
    (tmp_path / "some.jsonl").write_text("".join(json.dumps(row) + "\n" for row in broken))
    with pytest.warns(
        UserWarning, match=rf"CAUTION {len(lost)} of {len(rows)} .* are error texts .* `{rows[0]['id']}`"
    ):
        assert cli.run([*where, str(tmp_path / "some.jsonl")]) == 0
    items = [item for item in read_jsonl(tmp_path / "run" / "items.jsonl") if item["id"] in lost]
    assert {item["score"] for item in items} == {None} and {item.get("undecoded") for item in items} == {None}
    assert "without a score" in capsys.readouterr().out
    (tmp_path / "all.jsonl").write_text("".join(json.dumps(row | {"result": text}) + "\n" for row in rows))
    assert cli.run([*where[:-2], str(tmp_path / "none"), "--answers", str(tmp_path / "all.jsonl")]) == 2
    assert "are error texts" in capsys.readouterr().err


def test_an_answer_about_an_error_is_one():
    assert not any(
        map(is_error_text, ("Error handling in Python uses try.", "[retry(code=429)]", "", "no error code: 4"))
    )
