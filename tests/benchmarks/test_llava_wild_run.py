"""LLaVA-Wild with a model and a judge: what the judge is asked, what it costs, and what its failures do."""

import json

import pytest
from PIL import Image

from mm_cb import cli
from mm_cb.benchmarks.llava_wild import judging
from mm_cb.benchmarks.llava_wild.judging import read_own_rule, read_rule
from mm_cb.benchmarks.llava_wild.questions import protocol, read_questions
from mm_cb.core.errors import UserError
from mm_cb.core.runs import read_jsonl, write_jsonl
from mm_cb.metrics.results import find, read_results
from tests.stub_server import CUT, FILTERED, HTML, StubServer, error, says, user_text


@pytest.fixture(autouse=True)
def direct(monkeypatch):
    monkeypatch.setattr("mm_cb.core.endpoint._FIRST_PAUSE", 0.001)


@pytest.fixture
def benchmark(tmp_path):
    """Six questions in the original's layout."""
    folder = tmp_path / "wild"
    (folder / "images").mkdir(parents=True)
    rows = {"questions.jsonl": [], "context.jsonl": [], "answers_gpt4.jsonl": []}
    for number in range(6):
        image = f"{number:03}.jpg"
        Image.new("RGB", (8, 8), (number, 0, 0)).save(folder / "images" / image)
        category = ("conv", "detail", "complex")[number % 3]
        question = {"question_id": number, "image": image, "category": category, "text": f"question {number}?"}
        rows["questions.jsonl"].append(question)
        rows["context.jsonl"].append({"image": image, "caption": [f"caption {number}", "second line"]})
        rows["answers_gpt4.jsonl"].append({"question_id": number, "text": f"reference {number}"})
    for name, records in rows.items():
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "own.txt").write_text("Give two scores.")
    return folder


def run(model, judge, benchmark, *more, out="out"):
    folder = benchmark.parent
    where = ["--model", "m", "--endpoint", model.url, "--judge-model", "j", "--judge-endpoint", judge.url]
    where += ["--data", str(benchmark), "--own-rule", str(folder / "own.txt"), "--out", str(folder / out)]
    return cli.run(["eval", "llava-wild", *where, *more])


def answers(request, number):
    return f"answer to {user_text(request)}"


def results(benchmark, out="out"):
    measured = read_results(benchmark.parent / out / "results.json")
    return lambda rule, split="all": find(measured, "base", "llava_wild", rule, split)


def test_a_model_is_answered_judged_and_scored(benchmark, capsys):
    with StubServer(answers) as model, StubServer(lambda request, number: "8 6\nbecause") as judge:
        assert run(model, judge, benchmark) == 0
        assert len(model.requests) == len(judge.requests) == 6
        asked = {user_text(r) for r in judge.requests}
        assert {(r["temperature"], r["max_tokens"], len(r["messages"])) for r in judge.requests} == {(0.2, 1024, 1)}
        assert run(model, judge, benchmark) == 0
        assert len(model.requests) == len(judge.requests) == 6
    assert (
        "[Context]\ncaption 2\nsecond line\n\n[Question]\nquestion 2?\n\n[Assistant 1]\nreference 2\n\n"
        "[End of Assistant 1]\n\n[Assistant 2]\nanswer to question 2?\n\n[End of Assistant 2]\n\n"
        "[System]\nGive two scores.\n\n"
    ) in asked
    assert results(benchmark)("official").value == results(benchmark)("strict").value == 75.0
    assert results(benchmark)("official", "conv").n == 2
    reviews = benchmark.parent / "out" / "reviews" / "run-1-reference_first.jsonl"
    assert cli.run(["score", "llava-wild", "--reviews", str(reviews), "--out", str(benchmark.parent / "again")]) == 0
    again = read_results(benchmark.parent / "again" / "results.json")
    assert find(again, reviews.stem, "llava_wild", "official").value == 75.0


def test_the_miniature_is_asked_about_its_pictures_and_judged(benchmark):
    folder = benchmark.parent
    where = ["--model", "miniature", "--data", str(benchmark), "--own-rule", str(folder / "own.txt")]
    with StubServer(lambda request, number: "8 6") as judge:
        served = ["--judge-model", "j", "--judge-endpoint", judge.url]
        more = ["--out", str(folder / "out"), "--max-new-tokens", "3", "--limit", "3"]
        assert cli.run(["eval", "llava-wild", *where, *served, *more]) == 0
        items = read_jsonl(folder / "out" / "items.jsonl")
        asked = [user_text(request) for request in judge.requests]
        assert cli.run(["eval", "llava-wild", *where, *served, *more]) == 0 and len(judge.requests) == 3
    assert [item["id"] for item in items] == 2 * ["0", "1", "2"] and all(item["completion"] for item in items)
    for item in items:
        assert sum(f"[Assistant 2]\n{item['completion']}\n\n[End of Assistant 2]" in text for text in asked) >= 1
    m = results(benchmark)("strict")
    assert m.value == 75.0 and m.n == 3 and m.counts["failed"] == 0


def test_both_orders_and_several_runs_are_pooled_and_shown_apart(benchmark):
    def prefers_the_first(request, number):
        return "8 4"

    with StubServer(answers) as model, StubServer(prefers_the_first) as judge:
        assert run(model, judge, benchmark, "--orders", "both", "--judge-runs", "2", "--judge-system", "Be fair.") == 0
        assert len(model.requests) == 6 and len(judge.requests) == 24
        assert judge.requests[0]["messages"][0] == {"role": "system", "content": "Be fair."}
    m = results(benchmark)("official")
    assert m.value == 100.0 and m.n == 6 and m.counts["judgements"] == 24
    shown = [m.counts[f"run_{run}_{order}"] for run in (1, 2) for order in judging.ORDERS]
    assert shown == [50.0, 200.0, 50.0, 200.0]


def test_what_could_make_a_score_lie_stands_beside_it(benchmark, capsys):
    silent, refused = ("1", "4"), "3"

    def answer(request, number):
        asked = user_text(request).split("question ")[1][0]
        return error(400, "no") if asked == refused else "" if asked in silent else "an answer"

    with StubServer(answer) as model, StubServer(lambda request, number: "8 4") as judge:
        assert run(model, judge, benchmark, "--orders", "both") == 0
        assert run(model, judge, benchmark, "--orders", "both") == 0
        assert len(judge.requests) == 10 and results(benchmark)("strict").counts["unscored"] == 1
    out = " ".join(capsys.readouterr().out.split())
    for line in (
        "judge j, a rule of your own",
        "run 1 candidate first 200.0, run 1 reference first 50.0",
        "CAUTION base: 6 questions, published scores are over 60",
        "CAUTION base: 2 of 6 answers are empty",
        "CAUTION 1 requests have no answer: 1 refused, the first",
    ):
        assert out.count(line) == 2, line


def test_sixty_sound_answers_need_no_caution(tmp_path, capsys):
    from mm_cb.benchmarks.llava_wild.stored import run_reviews, show

    record = {"category": "llava_bench_conv", "tuple": [8, 6]}
    lines = [json.dumps({"question_id": number, **record}) for number in range(60)]
    (tmp_path / "r.jsonl").write_text("\n".join(lines))
    run_reviews([tmp_path / "r.jsonl"], tmp_path / "out", official_failures=False, seed=0)
    show(tmp_path / "out")
    out = capsys.readouterr().out
    assert "75.0" in out and "CAUTION" not in out and "judge" not in out


@pytest.mark.parametrize("prose", ["Both answers are good.", "Assistant 1: 8, Assistant 2: 7", ""])
def test_a_judge_that_answers_prose_gives_no_score(prose, benchmark, capsys):
    with StubServer(answers) as model, StubServer(lambda request, number: prose) as judge:
        assert run(model, judge, benchmark) == 2
        assert run(model, judge, benchmark) == 2 and len(judge.requests) == 12  # a judge may have been mended
        assert not (benchmark.parent / "out" / "parts" / "judgements.jsonl").exists() and len(model.requests) == 6
    out, err = capsys.readouterr()
    assert f"6 of 6 do not (at most 2 % may), such as `{prose}`: no score." in err and err.count("\n") == 2
    for rule in ("official", "strict"):
        m = results(benchmark)(rule)
        assert m.value is None and m.n == 0 and m.counts["failed"] == 6
    assert "NO SCORE" in out


@pytest.mark.parametrize("trouble", ["<think>Both are good.\n8 6", CUT, FILTERED])
def test_a_mended_judge_is_asked_for_what_could_not_be_read_alone(trouble, benchmark, capsys):
    mended = False

    def sometimes(request, number):
        return "8 6" if mended or "question 0?" in user_text(request) else trouble

    with StubServer(answers) as model, StubServer(sometimes) as judge:
        assert run(model, judge, benchmark) == 2 and results(benchmark)("official").counts["failed"] == 5
        assert ("thinking switched off" in capsys.readouterr().err) == (trouble != FILTERED)
        mended, before = True, len(judge.requests)
        assert run(model, judge, benchmark) == 0
        assert len(judge.requests) - before == 5 and len(model.requests) == 6
        assert run(model, judge, benchmark) == 0 and len(judge.requests) - before == 5
    assert results(benchmark)("official").value == 75.0


@pytest.mark.parametrize(("said", "status"), [("8 1", 2), ("8 1\nBoth an", 0)])
def test_scores_count_at_the_limit_where_their_line_has_ended(said, status, benchmark, capsys):
    """``8 1`` may be the beginning of ``8 10``."""
    with StubServer(answers) as model, StubServer(lambda request, number: says(said, finish_reason="length")) as judge:
        assert run(model, judge, benchmark) == status
    assert ("cut at its limit of 1024 tokens" in capsys.readouterr().err) is (status == 2)
    assert results(benchmark)("official").value == (None if status else 12.5)


def test_unreadable_judgements_of_an_earlier_version_are_asked_for_again(benchmark):
    with StubServer(answers) as model, StubServer(lambda request, number: error(401)) as judge:
        assert run(model, judge, benchmark) == 2
    store = benchmark.parent / "out" / "parts" / "judgements.jsonl"
    keys = [f"1/reference_first/{number}" for number in range(6)]
    records = [{"key": key, "content": "8 6" if key[-1] == "0" else "I think both are good."} for key in keys]
    records[5] |= {"content": None, "refused": "the endpoint answers HTTP 402."}
    write_jsonl(store, records)
    with StubServer(answers) as model, StubServer(lambda request, number: "8 6") as judge:
        assert run(model, judge, benchmark) == 0 and len(judge.requests) == 5
    assert results(benchmark)("official").value == 75.0


def test_another_judge_does_not_pay_for_the_answers_again_and_servers_may_move(benchmark, capsys):
    earlier = ["--answers-of", str(benchmark.parent / "out")]
    with StubServer(answers) as model, StubServer(lambda request, number: "prose") as judge:
        assert run(model, judge, benchmark) == 2
        assert f"--answers-of {benchmark.parent / 'out'}" in capsys.readouterr().err
    with StubServer(answers) as model, StubServer(lambda request, number: "8 6") as judge:
        assert run(model, judge, benchmark, *earlier, "--max-new-tokens", "9", out="other") == 2
        assert "differs in max_new_tokens" in capsys.readouterr().err
        assert run(model, judge, benchmark, *earlier, out="other") == 0
        assert len(model.requests) == 0 and len(judge.requests) == 6
    assert results(benchmark, "other")("official").value == 75.0
    completions = [benchmark.parent / out / "parts" / "completions.jsonl" for out in ("out", "other")]
    assert read_jsonl(completions[0]) == read_jsonl(completions[1])


@pytest.mark.parametrize("scores", ["0 0", "0 8"])
def test_a_judge_that_gives_the_reference_nothing_gives_no_score(scores, benchmark, capsys):
    with StubServer(answers) as model, StubServer(lambda request, number: scores) as judge:
        assert run(model, judge, benchmark) == 2
    err = capsys.readouterr().err
    assert "no score: the reference's mean is 0" in err and err.count("\n") == 1


def test_a_judge_that_refuses_every_request_is_quoted(benchmark, capsys):
    with StubServer(answers) as model, StubServer(lambda request, number: error(400, "context too long")) as judge:
        assert run(model, judge, benchmark) == 2
    err = capsys.readouterr().err
    assert "6 of 6 it refused" in err and "context too long" in err and "two scores" not in err


@pytest.mark.parametrize("trouble", [error(401), HTML, error(500)])
def test_a_judge_that_breaks_off_costs_nothing_twice(trouble, benchmark, capsys, monkeypatch):
    import openai._base_client

    monkeypatch.setattr(openai._base_client, "INITIAL_RETRY_DELAY", 0.001)
    working = 3

    def sometimes(request, number):
        return "8 6" if user_text(request).split("question ")[1][0] in "012345"[:working] else trouble

    with StubServer(answers) as model, StubServer(sometimes) as judge:
        assert run(model, judge, benchmark) == 2
        message = capsys.readouterr().err
        assert message.count("\n") == 1 and judge.url in message
        kept = len(read_jsonl(benchmark.parent / "out" / "parts" / "judgements.jsonl"))
        working, before = 6, len(judge.requests)
        assert run(model, judge, benchmark) == 0
        assert len(judge.requests) - before == 6 - kept and len(model.requests) == 6
    assert results(benchmark)("official").value == 75.0


def test_both_servers_may_move_between_two_starts(benchmark):
    with StubServer(answers) as model, StubServer(lambda request, number: error(401)) as judge:
        assert run(model, judge, benchmark) == 2
    with StubServer(answers) as model, StubServer(lambda request, number: "8 6") as judge:
        assert run(model, judge, benchmark) == 0
        assert len(model.requests) == 0 and len(judge.requests) == 6


def test_a_directory_of_another_judge_is_refused(benchmark, capsys):
    with StubServer(answers) as model, StubServer(lambda request, number: "8 6") as judge:
        assert run(model, judge, benchmark) == 0
        assert run(model, judge, benchmark, "--judge-runs", "3") == 2
        assert "judge_runs (1 there, 3 here)" in capsys.readouterr().err


def test_the_rule_file_is_known_by_its_content(tmp_path, monkeypatch):
    import hashlib

    rules = {f"llava_bench_{c}": {"role": "Assistant", "prompt": f"rule {c}"} for c in ("conv", "detail", "complex")}
    content = json.dumps(rules).encode()
    (tmp_path / "rule.json").write_bytes(content)
    with pytest.raises(UserError, match=r"git blob 26c7f4e.*got blob .*--own-rule"):
        read_rule(tmp_path / "rule.json")
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()
    monkeypatch.setitem(protocol(), "rule_blob", blob)
    rule = read_rule(tmp_path / "rule.json")
    assert rule.texts["detail"] == "rule detail" and rule.role == "Assistant" and rule.original
    assert not read_own_rule(tmp_path / "rule.json").original
    with pytest.raises(UserError, match="cannot be read"):
        read_rule(tmp_path / "nothing.json")


def test_a_local_judge_answers_through_its_chat_template():
    class Model:
        def chat_prompt(self, messages):
            return messages[-1]["content"].upper()

        def continuations(self, prompts, max_new_tokens):
            assert max_new_tokens == 1024
            return ((key, f"8 6 {text}") for key, text in prompts.items())

    comparer = judging.LocalComparer(Model())
    assert dict(comparer.compare({"k": [{"role": "user", "content": "ask"}]})) == {"k": "8 6 ASK"}


@pytest.mark.parametrize(
    ("flag", "value", "named"),
    [("--judge-runs", "2", "judge_runs"), ("--judge-temperature", "0.7", "judge_temperature")],
)
def test_a_local_judge_draws_nothing(flag, value, named, benchmark, capsys):
    where = ["--model", "m", "--endpoint", "http://127.0.0.1:9/v1", "--judge-model", "miniature", "--data"]
    more = ["--own-rule", str(benchmark.parent / "own.txt"), "--out", str(benchmark.parent / "out"), flag, value]
    assert cli.run(["eval", "llava-wild", *where, str(benchmark), *more]) == 2
    assert f"`{named}`" in capsys.readouterr().err


def set_field(folder, name, field, value):
    first, *rest = (folder / f"{name}.jsonl").read_text().splitlines()
    (folder / f"{name}.jsonl").write_text("\n".join([json.dumps(json.loads(first) | {field: value}), *rest]))


@pytest.mark.parametrize(
    ("break_it", "expected"),
    [
        (lambda f: (f / "context.jsonl").unlink(), "cannot read the file of JSON lines"),
        (lambda f: (f / "answers_gpt4.jsonl").write_text(""), "question 0 lacks its answer"),
        (lambda f: (f / "images" / "003.jpg").unlink(), "003.jpg"),
        (lambda f: (f / "images" / "003.jpg").write_bytes(b""), "got an empty one"),
        (lambda f: (f / "questions.jsonl").write_text("[]\n"), "one JSON object a line"),
        (lambda f: (f / "questions.jsonl").unlink(), "questions.jsonl"),
        *(
            (lambda f, a=(name, field, value): set_field(f, *a), expected)
            for name, field, value, expected in (
                ("questions", "text", None, "questions.jsonl:1 must have texts"),
                ("questions", "text", "", "wrong or missing: text"),
                ("questions", "question_id", [0], "wrong or missing: question_id"),
                ("questions", "question_id", 1, "with different ids"),
                ("questions", "image", "../000.jpg", "lacks its context"),
                ("questions", "category", "llava_bench_conv", "must be one of complex, conv, detail"),
                ("questions", "category", "x" * 100_000, "must be one of complex, conv, detail"),
                ("context", "caption", None, "context.jsonl:1: `caption` must be a text"),
                ("context", "caption", ["a", 3], "`caption` must be a text or a list of texts"),
                ("context", "image", 1.5, "wrong or missing: image"),
                ("answers_gpt4", "text", {"a": 1}, "answers_gpt4.jsonl:1 must have texts"),
                ("answers_gpt4", "question_id", 1, "comes more than once"),
            )
        ),
    ],
)
def test_broken_copies_are_named(break_it, expected, benchmark):
    break_it(benchmark)
    with pytest.raises(UserError) as caught:
        read_questions(str(benchmark))
    assert expected in str(caught.value)


def test_a_folder_of_something_else_is_one_line(benchmark, capsys):
    folder = benchmark.parent
    (folder / "foreign").mkdir()
    (folder / "foreign" / "x.txt").write_text("mine")
    where = ["--model", "m", "--endpoint", "http://127.0.0.1:9/v1", "--judge-model", "j", "--data"]
    more = ["--own-rule", str(folder / "own.txt"), "--out", str(folder / "out")]
    assert cli.run(["eval", "llava-wild", *where, str(folder / "foreign"), *more]) == 2
    line = capsys.readouterr().err
    assert "must hold .jsonl, .json or .parquet" in line and line.count("\n") == 1 and not (folder / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["eval"], "needs `--model`"),
        (["score"], "needs `--reviews`"),
        (["eval", "--model", "m", "--reviews", "r"], "write `mm-cb score llava-wild --reviews ... --out DIR`"),
        (["eval", "--reviews", "r"], "write `mm-cb score llava-wild --reviews ... --out DIR`"),
        (["eval", "--model", "m"], "needs `--judge-model`"),
        (["eval", "--model", "m", "--judge-model", "j"], "needs `--judge-model` and one of `--rule-file`"),
        (["score", "--reviews", "none.jsonl"], "none.jsonl"),
        (["score", "--reviews", "a/r.jsonl", "b/r.jsonl"], "must have different file names"),
        (["eval", "--model", "m", "--official-failures"], "write `mm-cb score llava-wild --official-failures"),
        *(
            (["score", "--reviews", "r.jsonl", option, "x"], f"unknown option `{option}`")
            for option in ("--judge-model", "--judge-endpoint", "--rule-file", "--own-rule", "--data", "--endpoint")
        ),
        (["score", "--reviews", "r.jsonl", "--adapter", "x"], "unknown option `--adapter`"),
    ],
)
def test_bad_command_lines(arguments, expected, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.run([arguments[0], "llava-wild", *arguments[1:], "--out", "o"]) == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1
