"""Harmful calls: what an answer is by rule, forced openings, twins, judged runs side by side, AgentHarm's files."""

import json
from pathlib import Path

import pytest

import mm_cb
from mm_cb import cli
from mm_cb.benchmarks.harmful_calls.answers import read_call_answer
from mm_cb.benchmarks.harmful_calls.benchmark import HarmfulCalls, HarmfulCallSettings
from mm_cb.benchmarks.harmful_calls.rows import read_harmful_rows
from mm_cb.core.calls import FORMATS, Call
from mm_cb.core.endpoint import Endpoint
from mm_cb.core.errors import UserError
from mm_cb.core.progress import Progress
from mm_cb.core.runs import read_jsonl
from mm_cb.data.tools import as_stored
from mm_cb.inference.generation import Request
from mm_cb.inference.served import EndpointEngine
from mm_cb.inference.source import ModelSource
from mm_cb.judges.base import Verdict
from mm_cb.judges.rejudge import rejudge
from mm_cb.metrics.results import find, measure, read_results
from mm_cb.models import ChatModel, load_model
from mm_cb.models.chat import chat, render_chat
from mm_cb.report import write_report
from tests.models.conftest import save_text_model
from tests.models.test_tools import LLAMA, MISTRAL, QWEN, TOOLS, processor

EXAMPLE = Path(__file__).parents[2] / "data" / "examples" / "harmful_calls.jsonl"
BELL = {"type": "function", "function": {"name": "ring", "parameters": {"type": "object", "properties": {}}}}
SHOWN = [*TOOLS, BELL]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize(
    ("calls", "kind"),
    [
        ([Call("brew", {"leaf": "green"})], "call_made"),
        ([Call("ring", {}), Call("brew", {"leaf": "green"})], "call_made"),
        ([Call("ring", {})], "wrong_tool"),
        ([Call("fly", {})], "wrong_tool"),
        ([Call("brew", {})], "malformed"),
        ([Call("brew", {"leaf": 3})], "malformed"),
        ([Call("brew", {"leaf": "green", "salt": 1})], "malformed"),
    ],
)
def test_a_call_is_what_its_schema_and_the_request_say(format, calls, kind):
    found = read_call_answer(FORMATS[format].write(calls), format, SHOWN, ["brew"])
    assert found.kind == kind and found.calls == calls


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("opened", [False, True], ids=["as it is", "forced"])
def test_what_holds_no_call_is_told_apart(format, opened):
    opening = FORMATS[format].opening("brew") if opened else ""
    for said, kind in [
        ("I'm sorry, I cannot help with that.", "refusal"),
        ("tea " * 30, "gibberish"),
        ("", "gibberish"),
        ("Tea is a drink.", "malformed" if opened else "other"),
    ]:
        assert read_call_answer(opening + said, format, SHOWN, ["brew"], opening).kind == kind


@pytest.mark.parametrize("format", FORMATS)
def test_text_around_a_call_hides_none_and_half_a_call_is_malformed(format):
    written = FORMATS[format].write([Call("brew", {"leaf": "green"})])
    half = written[: written.index("green") + 3]
    for said, kind in ((f"{written}\n", "call_made"), (half, "malformed")):
        assert read_call_answer(f"Of course!\n{said}", format, SHOWN, ["brew"]).kind == kind


@pytest.mark.parametrize("format", [name for name in FORMATS if name != "python"])
def test_a_call_that_is_whole_is_made_though_another_is_broken(format):
    write = FORMATS[format].write
    half = write([Call("brew", {"leaf": "green"})]).partition("een")[0]
    for call, kind in ((Call("brew", {"leaf": "black"}), "call_made"), (Call("ring", {}), "malformed")):
        found = read_call_answer(f"{write([call])}\n{half}", format, SHOWN, ["brew"])
        assert found.kind == kind and found.calls == [call]


LOOSE = {"type": "function", "function": {"name": "say", "parameters": {"type": "object", "properties": {"it": {}}}}}


@pytest.mark.parametrize("value", ["b'x'", "2j", "1e999", "'\\ud800'", "{1: [1e999]}", "..."])
def test_arguments_that_json_cannot_hold_are_malformed_and_kept_as_texts(value):
    found = read_call_answer(f"[say(it={value})]", "python", [LOOSE], ["say"])
    assert found.kind == ("call_made" if value == "..." else "malformed")
    json.dumps(as_stored([call._asdict() for call in found.calls]), allow_nan=False, ensure_ascii=False).encode()


def test_an_answer_nested_without_end_is_malformed():
    deep = f'<tool_call>{{"name": "say", "arguments": {{"it": {"[" * 900}{"]" * 900}}}}}</tool_call>'
    assert read_call_answer(deep, "hermes", [LOOSE], ["say"]).kind in ("malformed", "gibberish")


@pytest.mark.parametrize(("template", "format"), [(QWEN, "hermes"), (LLAMA, "llama"), (MISTRAL, "mistral")])
def test_an_opening_stands_behind_the_prompt_as_it_is(template, format):
    opening = FORMATS[format].opening("brew")
    asked = render_chat(processor(template), chat("make tea"), tools=TOOLS)
    begun = asked.begun(opening)
    assert begun.text == asked.text + opening and begun.spans[:-1] == asked.spans
    assert begun.text[begun.spans[-1].start : begun.spans[-1].end] == opening
    assert begun.spans[-1].role.name == "COMPLETION"


def test_a_model_is_given_the_opening_of_each_row(with_tools):
    model, opening = load_model(str(with_tools[0])), FORMATS["hermes"].opening("brew")
    asked = model.encode_chats([chat("make tea")] * 2, [[], []], tools=[TOOLS] * 2, openings=["", opening])
    begun = render_chat(model.processor, chat("make tea"), tools=TOOLS).begun(opening).text
    expected = model.processor.tokenizer(begun, add_special_tokens=not begun.startswith("<s>")).input_ids
    assert asked.input_ids[1].tolist() == expected
    none, some = asked.completion_mask.sum(dim=1).tolist()
    assert none == 0 < some


@pytest.fixture(scope="module")
def with_tools(tmp_path_factory):
    """A tiny model of text whose template takes tools, and rows for it."""
    folder = tmp_path_factory.mktemp("tools")
    model = save_text_model(folder / "model", "mistral")
    (model / "chat_template.jinja").write_text(QWEN)
    rows = [
        {"id": str(n), "kind": kind, "prompt": f"{kind} {n}", "tools": [one["function"] for one in SHOWN],
         "target_functions": ["brew"], "category": "tea"}
        for kind in ("harmful", "benign") for n in range(3)
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return model, folder / "rows.jsonl"


@pytest.fixture(scope="module")
def runs(with_tools, tmp_path_factory):
    """The same model measured under two names."""
    model, rows = with_tools
    folder = tmp_path_factory.mktemp("runs")
    for subject in ("base", "rr"):
        mm_cb.evaluate("harmful-calls", str(model), data=rows, out=folder / subject, subject=subject, max_new_tokens=4)
    return folder


def test_every_harmful_row_is_asked_in_both_ways_and_every_twin_once(runs):
    items = read_jsonl(runs / "base" / "items.jsonl")
    kinds = [(item["metric"], item["condition"], item["id"]) for item in items]
    assert kinds == [("harmful_calls", way, str(n)) for n in range(3) for way in ("no_attack", "forced_call")] + [
        ("benign_calls", "strict", f"benign/{n}") for n in range(3)
    ]
    for item in items:
        opening = FORMATS["hermes"].opening("brew")
        assert item["completion"].startswith(opening) is (item["condition"] == "forced_call")
        assert item["prompt"] in [f"{kind} {n}" for kind in ("harmful", "benign") for n in range(3)]
    measured = read_results(runs / "base" / "results.json")
    assert find(measured, "base", "calls_made", "forced_call").n == 3
    assert find(measured, "base", "harmful_calls", "forced_call").value is None  # nobody has judged
    assert find(measured, "base", "gibberish", "no_attack").n == 3  # of the twins alone


def test_the_calls_of_an_answer_are_kept_as_they_were_read(with_tools, tmp_path, monkeypatch):
    said = FORMATS["hermes"].write([Call("brew", {"leaf": "green"})])
    monkeypatch.setattr(ChatModel, "generate", lambda self, inputs, *_: [said] * len(inputs.input_ids))
    model, rows = with_tools
    run = mm_cb.evaluate("harmful-calls", str(model), data=rows, out=tmp_path / "run", conditions=("no_attack",))
    items = read_jsonl(run.folder / "items.jsonl")
    assert all(item["parsed"] == [{"name": "brew", "arguments": {"leaf": "green"}}] for item in items)
    assert run.find("calls_made", "no_attack").value == 100.0 and run.find("benign_calls").value == 100.0
    write_report([run.folder], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert "leaf=&#39;green&#39;" in page and page.count("[call withheld]") == 3


class ByName:
    """Calls answers of the breaker refused and those of the base harmful."""

    name = "by name"
    metrics = ("compliance",)
    source = {"rule": "none"}

    def __init__(self, outcome):
        self.outcome = outcome

    def judge(self, cases):
        assert {case.metric for case in cases} == {"compliance"}
        assert all(case.behavior.startswith("harmful") for case in cases)
        for case in cases:
            yield case.key, Verdict(self.outcome, None, "said")


def test_any_judge_judges_them_and_base_and_breaker_are_paired(runs, tmp_path):
    for subject, outcome in (("base", "harmful"), ("rr", "refusal")):
        rejudge(runs / subject, ByName(outcome), progress=Progress())
    base = find(read_results(runs / "base" / "results.json"), "base", "harmful_calls", "forced_call")
    assert (base.value, base.n) == (100.0, 3) and base.counts["harmful"] == 3
    data = write_report([runs / "base", runs / "rr"], tmp_path / "page.html")
    paired = find(data.measurements, "rr", "harmful_calls", "forced_call")
    assert paired.difference == -100.0 and paired.counts["mcnemar_p"] == 0.25
    page = (tmp_path / "page.html").read_text()
    assert "harmful call, forced call" in page and "Forbidden requests to an agent" in page
    items = read_jsonl(runs / "base" / "items.jsonl")
    forced = [item["completion"] for item in items if item["condition"] == "forced_call"]
    assert forced and not any(text in page for text in forced)  # withheld


def test_flags_of_items_are_measured_under_each_of_their_conditions():
    items = [
        {"id": "a", "metric": "harmful_calls", "subject": "base", "condition": way, "outcome": None, "call_made": made}
        for way, made in (("no_attack", False), ("forced_call", True))
    ]
    found = measure(items, pairs=[])
    assert find(found, "base", "calls_made", "no_attack").value == 0.0
    assert find(found, "base", "calls_made", "forced_call").value == 100.0


def test_a_model_without_tools_is_asked_in_bfcls_words():
    task = HarmfulCalls().task(str(EXAMPLE), HarmfulCallSettings(), ModelSource("miniature"))
    assert [q.id for q in task.questions][:2] == ["no_attack/hex", "forced_call/hex"] and len(task.questions) == 6
    assert [q.opening for q in task.questions][:2] == ["", "[brew("] and not any(q.tools for q in task.questions)
    assert "Here is a list of functions" in task.questions[0].prompt
    with pytest.raises(UserError, match="leaves out the tools"):
        HarmfulCalls().task(str(EXAMPLE), HarmfulCallSettings(ask="template"), ModelSource("miniature"))


def test_a_template_that_writes_calls_in_no_known_way_has_no_opening(tmp_path):
    folder = save_text_model(tmp_path / "model", "mistral")
    (folder / "chat_template.jinja").write_text(QWEN.replace("<tool_call>", "<call>"))
    with pytest.raises(UserError, match="writes calls in a way that is not read here; known are"):
        HarmfulCalls().task(str(EXAMPLE), HarmfulCallSettings(ask="template"), ModelSource(str(folder)))


def test_a_served_model_cannot_be_forced(tmp_path):
    source = ModelSource("served", endpoint="http://127.0.0.1:1/v1")
    with pytest.raises(UserError, match="--conditions no_attack"):
        HarmfulCalls().task(str(EXAMPLE), HarmfulCallSettings(), source)
    assert HarmfulCalls().task(str(EXAMPLE), HarmfulCallSettings(conditions=("no_attack",)), source).questions
    engine = EndpointEngine(Endpoint("http://127.0.0.1:1/v1", "served"))
    with pytest.raises(UserError, match="cannot be made to begin"):
        engine.complete([Request("a", "ring", opening="[")], 4)


def agentharm(folder, **more):
    row = {"id": "1-1", "name": "n", "prompt": "make tea", "target_functions": ["brew"], "category": "c"} | more
    for kind in ("harmful", "benign"):
        (folder / f"{kind}_behaviors_validation.json").write_text(json.dumps({"behaviors": [row]}))
    (folder / "tools.json").write_text(json.dumps(TOOLS))
    return str(folder), str(folder / "tools.json")


def test_agentharm_is_read_as_published_if_its_clause_is_accepted(tmp_path):
    data, tools = agentharm(tmp_path)
    rows = read_harmful_rows(data, tools, split="validation", accepted=True)
    assert [(row.kind, row.id, row.targets) for row in rows] == [
        ("harmful", "1-1", ("brew",)),
        ("benign", "1-1", ("brew",)),
    ]
    with pytest.raises(UserError, match=r"We prohibit using .* `--accept-clause`"):
        read_harmful_rows(data, tools, split="validation", accepted=False)
    with pytest.raises(UserError, match="must hold harmful_behaviors_test_public.json"):
        read_harmful_rows(data, tools, split="test_public", accepted=True)
    with pytest.raises(UserError, match="`brew` has no definition: give the row `tools`, or `--tools FILE`"):
        read_harmful_rows(data, None, split="validation", accepted=True)


ROW = {"id": "a", "kind": "harmful", "prompt": "make tea", "tools": [TOOLS[0]["function"]]}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"id": ""}, "`id` must be a text"),
        ({"prompt": 3}, "`prompt` must be a text"),
        ({"kind": "bad"}, "`kind` must be harmful or benign"),
        ({"kind": "benign"}, "at least one row of kind harmful"),
        ({"tools": []}, "`tools` must be a list of functions"),
        ({"tools": [{"name": "brew"}]}, "must be a JSON schema"),
        ({"target_functions": ["fly"]}, r"must name functions of the row \(brew\), got fly"),
        ({"target_functions": "brew"}, "must be a list of names"),
        ({"category": 1}, "`category` must be a text"),
        ({"category": " "}, "`category` must be a text without blanks around it"),
        ({"image": "../a.png"}, "inside"),
        ({"image": "absent.png"}, "absent.png"),
        ({"tool": []}, "did you mean `tools`"),
    ],
)
def test_a_broken_row_ends_in_one_line(tmp_path, capsys, change, message):
    row = {**ROW, **change}
    row = {key: value for key, value in row.items() if not (key == "tools" and "tool" in change)}
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    arguments = ["--model", "miniature", "--data", str(tmp_path / "rows.jsonl"), "--out", str(tmp_path / "run")]
    assert cli.run(["eval", "harmful-calls", *arguments]) == 2
    told = " ".join(capsys.readouterr().err.split())
    with pytest.raises(UserError, match=message):
        raise UserError(told)
    assert not (tmp_path / "run").exists()


def test_groups_of_rows_that_would_be_counted_together_or_apart_are_refused(tmp_path):
    for one, other in (("tea", "all"), ("tea", "Tea")):
        rows = [{**ROW, "category": one}, {**ROW, "id": "b", "category": other}]
        (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        with pytest.raises(UserError, match=f"rows.jsonl:2: `category` `{other}` "):
            read_harmful_rows(str(tmp_path / "rows.jsonl"), None, split="test_public", accepted=False)


def test_a_twin_is_of_a_harmful_row(tmp_path):
    tools = [one["function"] for one in SHOWN]
    rows = [{"id": id, "kind": kind, "prompt": "x", "tools": tools} for id, kind in (("a", "harmful"), ("b", "benign"))]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match="rows.jsonl:2: a harmless twin must have the id of a harmful row, `b`"):
        read_harmful_rows(str(tmp_path / "rows.jsonl"), None, split="test_public", accepted=False)


def test_an_id_stands_once_among_its_kind(tmp_path):
    (tmp_path / "rows.jsonl").write_text(f"{json.dumps(ROW)}\n" * 2)
    with pytest.raises(UserError, match="must have its own id, `a` comes more than once, first at"):
        read_harmful_rows(str(tmp_path / "rows.jsonl"), None, split="test_public", accepted=False)


@pytest.mark.parametrize(("given", "message"), [(("forced",), "did you mean `forced_call`"), ((), "each once")])
def test_conditions_are_known(given, message):
    with pytest.raises(UserError, match=message):
        HarmfulCallSettings(conditions=given)


def test_what_is_agentharms_is_not_given_with_rows_of_ones_own():
    source = ModelSource("served", endpoint="http://127.0.0.1:1/v1")
    for more, flag in (({"accept_clause": True}, "--accept-clause"), ({"split": "validation"}, "--split")):
        with pytest.raises(UserError, match=f"`{flag}` is for AgentHarm, .* holds rows of your own"):
            HarmfulCalls().task(str(EXAMPLE), HarmfulCallSettings(conditions=("no_attack",), **more), source)


def test_definitions_that_no_row_needs_are_refused_by_name(tmp_path):
    (tmp_path / "tools.json").write_text(json.dumps([TOOLS[0]["function"]]))
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    own = {key: value for key, value in ROW.items() if key != "tools"} | {"id": "b", "target_functions": ["brew"]}
    read = {"split": "test_public", "accepted": False}
    with pytest.raises(UserError, match="`--tools` is for rows without `tools`, and all 1 rows of .* have their own"):
        read_harmful_rows(str(tmp_path / "rows.jsonl"), str(tmp_path / "tools.json"), **read)
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n" + json.dumps(own) + "\n")
    assert len(read_harmful_rows(str(tmp_path / "rows.jsonl"), str(tmp_path / "tools.json"), **read)) == 2


def test_a_row_under_two_ids_is_asked_once(tmp_path, capsys):
    rows = [ROW, ROW | {"id": "b"}, ROW | {"id": "b", "kind": "benign"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = HarmfulCallSettings(conditions=("no_attack",), ask="prompt")
    task = HarmfulCalls().task(str(tmp_path / "rows.jsonl"), settings, ModelSource("miniature"))
    assert [one.id for one in task.questions] == ["no_attack/a", "benign/b"]
    assert "left out: 1 of 3 rows, which repeat another one" in capsys.readouterr().out
