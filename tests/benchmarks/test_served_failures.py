"""What a server's failures do to a score: no letter is drawn for them, none is booked, nothing is paid twice."""

import json

import pytest
from PIL import Image

from mm_cb import cli
from mm_cb.core.runs import read_jsonl
from mm_cb.metrics.results import find, read_results
from tests.benchmarks.mmmu_stand_in import write
from tests.stub_server import (
    CUT,
    FAILED,
    FILTERED,
    HANG_UP,
    HTML,
    NO_CHOICE,
    NO_CREDIT,
    NOTHING,
    TORN,
    StubServer,
    error,
    says,
    user_text,
)

N = 6


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    async def no_time(seconds):
        pass

    monkeypatch.setattr("mm_cb.core.endpoint._sleep", no_time)


@pytest.fixture(params=["mmmu", "pope", "over-refusal"])
def benchmark(request, tmp_path):
    """Six questions, and the command without an address."""
    if request.param == "mmmu":
        data = write(tmp_path / "data", per_subject=N, subjects=["Art"])
        more = ["--subjects", "Art"]
    elif request.param == "pope":
        Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
        one = {"image": "a.png", "label": "yes"}
        data, more = tmp_path / "pope.json", []
        data.write_text(
            "".join(json.dumps({"question_id": n, "text": f"question {n}?", **one}) + "\n" for n in range(N))
        )
    else:
        data, more = tmp_path / "requests.jsonl", []
        data.write_text("".join(json.dumps({"id": str(n), "prompt": f"question {n}?"}) + "\n" for n in range(N)))
    return ["eval", request.param, "--model", "m", "--data", str(data), "--out", str(tmp_path / "run"), *more]


def run(benchmark, server, *more):
    return cli.run([*benchmark, "--endpoint", server.url, "--batch", "1", *more])


def whole(tmp_path, condition=None):
    measured = read_results(tmp_path / "run" / "results.json")
    conditions = [condition] if condition else [m.condition for m in measured]
    return next(m for c in conditions for m in measured if (m.condition, m.split) == (c, "all"))


@pytest.mark.parametrize(
    "trouble", [NO_CREDIT, error(429, "daily limit", retry_after="9999"), error(307, location="/v2")]
)
def test_a_failure_of_the_server_ends_the_run_and_the_same_command_goes_on(trouble, benchmark, tmp_path, capsys):
    with StubServer(lambda request, number: trouble if number == 3 else "A") as server:
        assert run(benchmark, server) == 2 and len(server.requests) == 4
        message = capsys.readouterr().err
        assert "3 of 6 answers are there and kept" in message and message.count("\n") == 1
        assert not (tmp_path / "run" / "results.json").exists()
        assert run(benchmark, server) == 0 and len(server.requests) == 7
    assert {item["completion"] for item in read_jsonl(tmp_path / "run" / "items.jsonl")} == {"A"}


@pytest.mark.parametrize(
    "trouble",
    [FAILED, HTML, NOTHING, NO_CHOICE, TORN, HANG_UP, error(500)]
    + [says(7), says(None), says(None, finish_reason="abort")],
)
@pytest.mark.parametrize("benchmark", ["pope"], indirect=True)
def test_what_fails_again_and_again_is_named_and_asked_by_the_next_start_alone(trouble, benchmark, tmp_path, capsys):
    bad, mended = [], False

    def answer(request, number):
        bad.append(user_text(request)) if number == 1 else None
        return trouble if not mended and user_text(request) in bad else "A"

    with StubServer(answer) as server:
        assert run(benchmark, server) == 2
        message = capsys.readouterr().err
        assert "1 of 6 requests failed" in message and "kept: run the same command again" in message
        assert len(read_jsonl(tmp_path / "run" / "parts" / "completions.jsonl")) == 5
        mended, before = True, len(server.requests)
        assert run(benchmark, server) == 0 and len(server.requests) - before == 1


@pytest.mark.parametrize(("trouble", "kind"), [(CUT, "cut"), (says("<think>so"), "cut"),
                                               (FILTERED, "refused"), (error(413), "refused")])  # fmt: skip
def test_what_was_not_answered_is_unscored_and_counted(trouble, kind, benchmark, tmp_path, capsys):
    with StubServer(lambda request, number: trouble if number == 1 else "(A) yes") as server:
        assert run(benchmark, server) == 0 and run(benchmark, server) == 0 and len(server.requests) == N
    out = " ".join(capsys.readouterr().out.split())
    assert out.count("CAUTION 1 requests have no answer") == 2 and ("--max-new-tokens" in out) == (kind == "cut")
    lost = [item for item in read_jsonl(tmp_path / "run" / "items.jsonl") if item.get("reason")]
    assert lost and {(i["reason"], i["score"], i["outcome"], i.get("gibberish")) for i in lost} == {
        (kind, None, None, None)
    }
    measured = [
        m for m in read_results(tmp_path / "run" / "results.json") if m.split == "all" and m.metric != "gibberish"
    ]
    for m in measured:
        assert m.n == N - 1 and m.counts["unscored"] == 1 and m.counts.get("fallback", 0) == 0, m


@pytest.mark.parametrize("silence", [says(""), says(" \n"), FILTERED, CUT])
@pytest.mark.parametrize("benchmark", ["mmmu", "pope"], indirect=True)
def test_points_for_silence_are_not_claimed(silence, benchmark, tmp_path, capsys):
    with StubServer(lambda request, number: silence if number else "(A) yes") as server:
        assert run(benchmark, server) == 0
    assert "of 6 answers are empty or missing, so that no official value is claimed" in " ".join(
        capsys.readouterr().out.split()
    )
    official, strict = whole(tmp_path, "official"), whole(tmp_path, "strict")
    assert official.value is None and official.ci95 is None and strict.value is not None
    lost = 0 if silence.body.find(b"stop") > 0 else N - 1
    assert official.counts["unscored"] == strict.counts["unscored"] == lost and strict.n == N - lost
    if not lost:
        assert strict.value <= 100 / N  # silence is wrong
    every = read_results(tmp_path / "run" / "results.json")
    assert all(m.value is None for m in every if m.condition == "official" and m.metric != "gibberish")


@pytest.mark.parametrize("benchmark", ["pope"], indirect=True)
def test_a_model_that_takes_no_temperature_is_not_to_be_asked_again(benchmark, capsys):
    trouble = error(400, "Unsupported value", fields={"param": "temperature"})
    with StubServer(lambda request, number: trouble) as server:
        assert run(benchmark, server) == 2
    said = capsys.readouterr().err
    assert "does not take the temperature 0" in said and "same command again" not in said and said.count("\n") == 1


@pytest.mark.parametrize(("empty", "told"), [(N, True), (N // 2 + 1, True), (N // 2, False), (0, False)])
@pytest.mark.parametrize("said", ["", " \n"])
def test_a_model_that_mostly_says_nothing_is_told(empty, told, said, benchmark, capsys):
    with StubServer(lambda request, number: said if number < empty else "(A) yes") as server:
        assert run(benchmark, server) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.count(f"{empty} of {N} answers are empty") == int(told)


def test_nothing_behind_a_thought_is_an_empty_answer(benchmark, tmp_path, capsys):
    for name, thought in (("silent", ""), ("thinks", "<think>so</think>")):
        benchmark[benchmark.index("--out") + 1] = str(tmp_path / name)
        with StubServer(lambda request, number, thought=thought: says(thought)) as server:
            assert run(benchmark, server) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert ("6 answers came with a thought in front of them" in said) == bool(thought)
        assert ("behind 6 of them the model stopped without an answer" in said) == bool(thought)
    items = [read_jsonl(tmp_path / name / "items.jsonl") for name in ("silent", "thinks")]
    assert {item.pop("thought") for item in items[1]} == {"<think>so</think>"} and items[0] == items[1]


def test_a_model_that_says_nothing_at_all_has_no_official_score(tmp_path, capsys):
    data = write(tmp_path / "data", per_subject=N, subjects=["Art"])
    command = ["eval", "mmmu", "--model", "m", "--data", str(data), "--out", str(tmp_path / "run"), "--subjects", "Art"]
    with StubServer(lambda request, number: "") as server:
        assert run(command, server) == 0
    measured = read_results(tmp_path / "run" / "results.json")
    assert find(measured, "base", "mmmu", "official").value is None
    assert find(measured, "base", "mmmu", "strict").value == 0


def test_answers_of_a_model_that_is_cut_in_its_thinking_are_asked_again_after_a_correction(benchmark, tmp_path, capsys):
    thinking = True
    with StubServer(lambda request, number: CUT if thinking else "A") as server:
        assert run(benchmark, server, "--max-new-tokens", "9") == 2
        message = capsys.readouterr().err
        assert "all 6 requests are without an answer" in message and "`--max-new-tokens` more than 9" in message
        thinking = False
        assert run(benchmark, server, "--max-new-tokens", "9") == 0 and len(server.requests) == 2 * N


def test_a_thought_is_scored_by_no_benchmark_and_kept_and_said_once(benchmark, tmp_path, capsys):
    answers = ["A", "yes", "no, sorry", "(B)", "I cannot help", "It is C."]
    thoughts = ["<think>(D), I cannot, no</think>\n\n", "", "[THINK]no, I cannot[/THINK]", "", "(A)\n</think>\n\n", ""]
    items = []
    for thinks in (False, True):
        benchmark[benchmark.index("--out") + 1] = str(tmp_path / f"run-{thinks}")
        with StubServer(lambda _, n, thinks=thinks: says(thinks * thoughts[n] + answers[n])) as server:
            assert run(benchmark, server) == 0
        items.append(read_jsonl(tmp_path / f"run-{thinks}" / "items.jsonl"))
        out = " ".join(capsys.readouterr().out.split())
        assert out.count("3 answers came with a thought in front of them, which is not scored") == int(thinks)
    kept = {item.pop("thought", "") for item in items[1]}
    assert items[0] == items[1] and kept == set(thoughts)
    stored = read_jsonl(tmp_path / "run-True" / "parts" / "completions.jsonl")
    assert [one.get("thought", "") + one["completion"] for one in stored] == [
        thought + answer for thought, answer in zip(thoughts, answers, strict=True)
    ]


def test_what_a_server_calls_a_refusal_is_one_whatever_its_words(tmp_path, capsys):
    data = tmp_path / "requests.jsonl"
    data.write_text("".join(json.dumps({"id": str(n), "prompt": f"question {n}?"}) + "\n" for n in range(N)))
    command = ["eval", "over-refusal", "--model", "m", "--data", str(data), "--out", str(tmp_path / "run")]

    def answer(request, number):
        return says(None, message={"refusal": "Rather not."}) if number % 2 else "Here is how to do it, step by step."

    with StubServer(answer) as server:
        assert run(command, server) == 0
        asked = len(server.requests)
        assert run(command, server) == 0 and len(server.requests) == asked
    outcomes = [item["outcome"] for item in read_jsonl(tmp_path / "run" / "items.jsonl")]
    assert sorted(outcomes) == ["compliance"] * (N // 2) + ["refusal"] * (N // 2)
