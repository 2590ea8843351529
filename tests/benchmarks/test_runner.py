"""The one runner, with a benchmark of this test: what a run belongs to, what is asked again and what is not."""

import dataclasses
import json
from dataclasses import dataclass

import pytest
from PIL import Image

import mm_cb
from mm_cb.benchmarks import registry
from mm_cb.benchmarks.base import Benchmark, Question, Score
from mm_cb.benchmarks.settings import AskSettings, setting
from mm_cb.core.errors import UserError
from mm_cb.core.runs import read_jsonl
from mm_cb.metrics import table
from mm_cb.metrics.table import Metric, metric
from mm_cb.report.kept import changes
from tests.attacks.helpers import save_adapter
from tests.stub_server import StubServer, error, user_text


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    for module, name in ((registry, "_BENCHMARKS"), (table, "_METRICS")):
        monkeypatch.setattr(module, name, dict(getattr(module, name)))


@dataclass(frozen=True)
class CountSettings(AskSettings):
    hint: str = setting("", "Text behind a question.")
    speed: int = setting(1, "How fast.", identity=False)


class Count(Benchmark):
    """Says of three numbers whether they were repeated; the answer "?" cannot be scored."""

    name, title, about, needs = "count", "Count", "numbers said again", "nothing"
    metrics = (Metric("count", "count", "share of right answers"),)
    settings = CountSettings

    def __init__(self, folder):
        self.folder = folder

    def questions(self, data, settings):
        Image.open(self.folder / "a.png").verify()
        return [
            Question(str(n), f"{n}{settings.hint}", (self.folder / "a.png",), str(n), "odd" if n % 2 else "even")
            for n in range(3)
        ]

    def score(self, question, completion):
        if completion == "?":
            return Score(None, reason="no answer")
        return Score(float(question.reference in completion), counts={"long": int(len(completion) > 3)})


@pytest.fixture
def count(tmp_path):
    Image.new("RGB", (8, 6), (1, 2, 3)).save(tmp_path / "a.png")
    return Count(tmp_path)


def run(benchmark, server, out, **more):
    return mm_cb.evaluate(benchmark, "m", endpoint=server.url, data="d", out=out, **more)


def test_items_measurements_and_files(count, tmp_path):
    with StubServer(lambda request, number: "?" if user_text(request) == "1" else "0 and more") as server:
        found = run(count, server, tmp_path / "out", subject="rr")
        assert server.requests[0]["messages"][0]["content"][0]["type"] == "image_url"
    items = {item["id"]: item for item in read_jsonl(tmp_path / "out" / "items.jsonl")}
    assert [(items[n]["score"], items[n].get("reason")) for n in "012"] == [
        (1.0, None),
        (None, "no answer"),
        (0.0, None),
    ]
    assert found.find("count").value == 50 and found.find("count").n == 2
    assert found.find("count").counts["long"] == 2 and found.find("count").counts["unscored"] == 1
    assert found.find("count", split="odd").n == 0 and found.find("count", split="even").n == 2
    assert found.subject == "rr" and items["0"]["subject"] == "rr"
    (spent,) = read_jsonl(tmp_path / "out" / "timings.jsonl")
    assert spent["stage"] == "Count rr" and not (tmp_path / "out" / "checks.json").exists()
    assert [one["name"] for one in json.loads((tmp_path / "out" / "metrics.json").read_text())] == ["count"]


@pytest.mark.parametrize("scores", [{}, {"official": Score(1.0), "strict": Score(0.0)}])
def test_rules_are_the_same_for_every_answer(scores, count, tmp_path, monkeypatch):
    plain = count.score
    monkeypatch.setattr(count, "score", lambda question, said: scores if said == "both" else plain(question, said))
    with StubServer(lambda request, number: "both" if user_text(request) == "1" else "0") as server:
        with pytest.raises(UserError, match=r"`count`: `score` must .* got strict, and for question `1`"):
            run(count, server, tmp_path / "out")
        monkeypatch.setattr(count, "score", plain)  # mended: what was answered is not asked again
        assert run(count, server, tmp_path / "out").find("count").n == 3 and len(server.requests) == 3


def test_a_value_outside_its_range_is_the_users_to_fix(count, tmp_path, monkeypatch):
    monkeypatch.setattr(count, "score", lambda question, completion: Score(7))
    with (
        StubServer(lambda request, number: "0") as server,
        pytest.raises(UserError, match=r"`count`: .* in 0\.\.1 or None, got 7 for question `0`"),
    ):
        run(count, server, tmp_path / "out")


def test_a_metric_that_no_score_would_fill_is_refused(count, tmp_path):
    idle = type("Idle", (Count,), {"metrics": (*Count.metrics, Metric("count_yes", "yes"))})
    with pytest.raises(ValueError, match="first metric, `count`; .* `count_yes` has neither"):
        registry.register_benchmark(idle(tmp_path))
    assert "count_yes" not in table._METRICS


def test_nothing_is_asked_twice_and_what_does_not_decide_results_may_change(count, tmp_path):
    out = tmp_path / "out"
    with StubServer(lambda request, number: "0" if number < 1 else error(401)) as server:
        with pytest.raises(UserError):
            run(count, server, out, batch=1)
    with StubServer(lambda request, number: "0") as server:
        for _ in range(2):
            run(count, server, out, batch=3, speed=9)
            assert len(server.requests) == 2
        with pytest.raises(UserError, match=r"different in: .*hint"):
            run(count, server, out, hint="?")
        with pytest.raises(UserError, match="seed"):
            run(count, server, out, seed=1)
        Image.new("RGB", (8, 6), (3, 2, 1)).save(tmp_path / "a.png")
        with pytest.raises(UserError, match="questions_sha256"):
            run(count, server, out)
        assert len(server.requests) == 2


def test_the_first_questions_of_a_trial(count, tmp_path):
    with StubServer(lambda request, number: "0") as server:
        assert run(count, server, tmp_path / "out", limit=2).find("count").n == 2


def test_a_question_that_a_server_refuses_is_unscored(count, tmp_path):
    with StubServer(lambda request, number: error(400, "no") if user_text(request) == "2" else "0") as server:
        found = run(count, server, tmp_path / "out")
    assert found.find("count").n == 2 and found.find("count").counts["unscored"] == 1
    assert found.find("gibberish", "no_attack").counts == {"gibberish": 0, "unscored": 1}


@pytest.mark.parametrize(
    ("questions", "expected"),
    [
        ([], "at least one question"),
        ([Question("a", "x"), Question("a", "y")], "`a` comes again"),
        ([Question("a", "x", category="c"), Question("b", "y", split="c")], "`a`: `category` `c` is a `split` too"),
    ],
)
def test_questions_that_are_none_or_share_an_id(questions, expected, count, tmp_path, monkeypatch):
    monkeypatch.setattr(count, "questions", lambda data, settings: questions)
    with StubServer(lambda request, number: "0") as server, pytest.raises(UserError, match=expected):
        run(count, server, tmp_path / "out")
    assert not server.requests and not (tmp_path / "out").exists()


def test_stored_answers_to_questions_that_share_an_id_are_refused(count, tmp_path, monkeypatch):
    monkeypatch.setattr(count, "questions", lambda data, settings: [Question("a", "x"), Question("a", "y")])
    (tmp_path / "answers.jsonl").write_text('{"id": "a", "completion": "0"}\n')
    stored = count.stored(answers=str(tmp_path / "answers.jsonl"))
    with pytest.raises(UserError, match="`a` comes again"):
        count.score_stored(stored, tmp_path / "out", data="d", subject="base", seed=0)
    assert not (tmp_path / "out").exists()


def test_a_benchmark_needs_data_a_metric_and_its_lines(count, tmp_path):
    with pytest.raises(UserError, match="benchmark `count` needs `--data`: nothing"):
        mm_cb.evaluate(count, "m", endpoint="http://127.0.0.1:9/v1", out=tmp_path / "out")
    for lacking in ({"metrics": ()}, {"about": ""}):
        broken = type("Broken", (Count,), lacking)(tmp_path)
        with pytest.raises(ValueError, match="a benchmark must have"):
            registry.register_benchmark(broken)
    with pytest.raises(UserError, match="unknown benchmark `counts`, did you mean `count`"):
        registry.register_benchmark(count)
        mm_cb.evaluate("counts", "m", out=tmp_path / "out")


def test_settings_check_themselves():
    with pytest.raises(UserError, match="`batch` must be a whole number from 1 to 4,096"):
        CountSettings(batch=0)
    assert CountSettings(hint="x").identity() == {"max_new_tokens": 128, "limit": 0, "hint": "x"}
    assert [field.name for field in dataclasses.fields(CountSettings)][-1] == "speed"


def test_a_metric_that_is_better_when_lower_loses_when_it_rises():
    table.register_metric(Metric("slips", "slips", higher_is_better=False))
    pair = [
        {"metric": "slips", "condition": "strict", "id": "1", "subject": subject, "score": score}
        for subject, score in (("base", 0.0), ("rr", 1.0))
    ]
    worse, better = changes(pair)
    assert [one.shift for one in worse] == [-1.0] and not better and metric("slips").worse((0.5, 1))


def test_an_adapter_that_does_nothing_is_flagged_in_items_and_fails_a_check(count, tmp_path, capsys):
    adapter = save_adapter(tmp_path / "adapter", seed=0)
    config = json.loads((adapter / "adapter_config.json").read_text())
    for alpha, idle in ((config["lora_alpha"], False), (0, True)):
        (adapter / "adapter_config.json").write_text(json.dumps({**config, "lora_alpha": alpha}))
        out = tmp_path / f"run-{alpha}"
        mm_cb.evaluate(count, "miniature", adapter, data="d", out=out, max_new_tokens=2)
        assert [item.get("adapter_changes_nothing", False) for item in read_jsonl(out / "items.jsonl")] == [idle] * 3
        assert (out / "checks.json").exists() == idle == ("changes no logit" in capsys.readouterr().out)
    (failed,) = json.loads((out / "checks.json").read_text())
    assert failed["name"] == "rr: adapter changes the model" and not failed["passed"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"benchmark": 3}, "`benchmark` must be a name or a Benchmark, got int"),
        ({"model": None}, "`model` must be a hub id"),
        ({"device": 0}, "`device` must be a text such as cpu or cuda:0"),
        ({"adapter": ""}, "`adapter` must be the path of a folder, got an empty text"),
        ({"out": None}, "`out` must be the path of a run directory, got NoneType"),
        ({"data": ["a"]}, "`data` must be the path of the questions.* got list"),
    ],
)
def test_arguments_of_another_type_are_one_sentence(given, message, tmp_path):
    from mm_cb import evaluate

    usual = {"benchmark": "over-refusal", "model": "miniature", "out": tmp_path / "run"}
    with pytest.raises((TypeError, UserError), match=message):
        evaluate(**{**usual, **given})
    assert not (tmp_path / "run").exists()
