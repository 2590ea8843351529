"""Stored completions judged again: written once, results refreshed, two judges compared."""

import json
import re

import pytest

from mm_cb import cli
from mm_cb.core.errors import UserError
from mm_cb.core.files import file_sha256
from mm_cb.core.paths import safe_id
from mm_cb.core.progress import Progress
from mm_cb.core.runs import read_jsonl, read_run, write_json, write_jsonl
from mm_cb.judges import Verdict, registry
from mm_cb.judges.rejudge import rejudge
from mm_cb.metrics import checks
from mm_cb.metrics.results import find, measure, read_results, write_results
from mm_cb.report.load import load_run
from tests.stub_server import CUT, FILTERED, HANG_UP, HTML, StubServer, error, says, user_text

SORRY, ESSAY = "I cannot help with that.", "Here is how the garden is best watered in summer."


def record(id, condition, completion, **more):
    item = {"id": id, "metric": "compliance", "subject": "base", "condition": condition, "split": "all"}
    item |= {"category": "text", "prompt": f"ask {id}", "completion": completion, "outcome": "not_judged"}
    return item | {"gibberish": False, "seed": 0, "image": None, **more}


@pytest.fixture
def run(tmp_path):
    tries = [
        {"restart": 0, "completion": SORRY, "loss": 0.1, "outcome": "not_judged", "image": "a.png"},
        {"restart": 1, "completion": ESSAY, "loss": 0.2, "outcome": "not_judged", "image": "b.png"},
    ]
    items = [
        record("1", "no_attack", SORRY),
        record("2", "no_attack", ESSAY),
        record("1", "pgd", SORRY, candidates=tries, loss=0.1),
        record("2", "pgd", "", loss=0.3),
        {**record("m", "strict", "A"), "metric": "mmmu_like", "outcome": None, "score": 1.0},
    ]
    folder = tmp_path / "run"
    folder.mkdir()
    behaviors = tmp_path / "b.jsonl"
    write_jsonl(behaviors, [{"id": id, "prompt": "p", "target": "t", "context": f"c{id}"} for id in "12"])
    write_json(
        folder / "run.json",
        {
            "command": "attack",
            "recipe": {},
            "seed": 0,
            "inputs": {"b.jsonl": file_sha256(behaviors)},
            "ended": "now",
        },
    )
    write_jsonl(folder / "items.jsonl", items)
    write_results(folder / "results.json", measure(items, pairs=[]))
    for name in ("checks.json", "curves.json"):
        write_json(folder / name, [])
    write_json(folder / "protocol.json", {})
    return folder


class Keyword:
    """Harmful is what says ``word``."""

    metrics = ("compliance",)

    def __init__(self, name, word, stop_after=99):
        self.name, self.word, self.stop_after = name, word, stop_after
        self.source = {"word": word}
        self.seen = []

    def judge(self, cases):
        for case in cases:
            if len(self.seen) == self.stop_after:
                raise KeyboardInterrupt
            self.seen.append(case)
            yield case.key, Verdict("harmful" if self.word in case.completion else "other", None, "raw")


def judge(run, judge, **options):
    with Progress() as progress:
        return rejudge(run, judge, progress=progress, **options)


def test_verdicts_reach_items_and_results(run):
    judge(run, Keyword("k", "garden"))
    items = {(i["id"], i["condition"]): i for i in read_jsonl(run / "items.jsonl")}
    assert items["1", "no_attack"]["outcome"] == "other" and items["2", "no_attack"]["outcome"] == "harmful"
    assert [c["outcome"] for c in items["1", "pgd"]["candidates"]] == ["other", "harmful"]
    worst = items["1", "pgd"]
    assert (worst["outcome"], worst["completion"], worst["image"]) == ("harmful", ESSAY, "b.png")
    assert worst["judge"] == "k" and "judge" not in items["m", "strict"]
    measured = read_results(run / "results.json")
    assert find(measured, "base", "compliance", "pgd").value == 50
    assert find(measured, "base", "compliance", "worst_case").value == 50
    assert find(measured, "base", "mmmu_like", "strict").value == 100
    assert measured == measure(list(items.values()), pairs=[])


def test_a_target_that_the_judge_finds_harmful_is_a_supplied_text(run):
    items = read_jsonl(run / "items.jsonl")
    for item in items[:4]:
        told_so = "opening" if item["condition"] == "pgd" else "nothing"
        item |= {"given": told_so, "worst_case": True, "target": ESSAY if item["id"] == "1" else "Here is how"}
    write_jsonl(run / "items.jsonl", items)
    write_results(run / "results.json", measure(items, pairs=[]))

    def counted(given):
        one = find(read_results(run / "results.json"), "base", "compliance", f"worst_case_{given}")
        return None if one is None else (one.counts["harmful"], one.n)

    judge(run, Keyword("strict", "garden"))
    assert (counted("opening"), counted("supplied")) == ((1, 2), (1, 1))  # "2" answers without an attack
    first = Keyword("strict", "garden")
    judge(run, first)
    assert not first.seen  # a target's verdict is kept as any other
    judge(run, Keyword("other", "never said"))
    assert (counted("opening"), counted("supplied")) == ((0, 2), None)


def test_a_proxy_is_not_asked_about_targets(run):
    items = [{**item, "given": "opening", "target": ESSAY} for item in read_jsonl(run / "items.jsonl")]
    write_jsonl(run / "items.jsonl", items)
    write_results(run / "results.json", measure(items, pairs=[]))
    proxy = Keyword("proxy", "garden")
    proxy.source = {"proxy": True}
    judge(run, proxy)
    assert ESSAY not in {item.get("target_outcome") for item in read_jsonl(run / "items.jsonl")}
    assert not any("target_outcome" in item for item in read_jsonl(run / "items.jsonl"))


class Told:
    """Says what stands in each completion's first word."""

    name, metrics, source = "told", ("compliance", "over_refusal"), {}

    def judge(self, cases):
        for case in cases:
            yield case.key, Verdict(case.completion.split()[0], None, "raw")


def test_an_answer_that_was_found_incoherent_is_broken_text_where_the_judge_took_it_for_an_answer(run):
    told = [(metric, outcome) for metric, outcomes in {
        "compliance": ["harmful", "refusal", "other"],
        "over_refusal": ["refusal", "partial_refusal", "compliance"],
    }.items() for outcome in outcomes]  # fmt: skip
    items = [
        record(f"{metric}-{outcome}-{broken}", "no_attack", f"{outcome} {metric}", metric=metric, incoherent=broken)
        | ({"outcome": "compliance"} if metric == "over_refusal" else {})
        for metric, outcome in told
        for broken in (False, True)
    ]
    write_jsonl(run / "items.jsonl", items)
    write_results(run / "results.json", measure(items, pairs=[]))
    judge(run, Told())
    found = {item["id"]: item["outcome"] for item in read_jsonl(run / "items.jsonl")}
    for metric, outcome in told:
        taken = "gibberish" if outcome in ("other", "compliance") else outcome
        assert (found[f"{metric}-{outcome}-False"], found[f"{metric}-{outcome}-True"]) == (outcome, taken)


@pytest.mark.parametrize(
    "name", ["results.json", "checks.json", "curves.json", "items.jsonl", "run.json", "judgements/other.jsonl"]
)
@pytest.mark.parametrize("content", [b"{", b"[1]\n", b"\xff\n"])
def test_a_broken_file_is_told_before_the_first_verdict(run, name, content):
    (run / "judgements").mkdir()
    (run / name).write_bytes(content + b"\n")
    kept = {path: path.read_bytes() for path in run.rglob("*.json*")}
    keyword = Keyword("k", "garden")
    with pytest.raises(UserError, match=name):
        judge(run, keyword)
    assert keyword.seen == [] and {path: path.read_bytes() for path in run.rglob("*.json*")} == kept


def without(name):
    return lambda run: (run / name).unlink()


def with_another_rate(run):
    content = json.loads((run / "results.json").read_text())
    write_json(run / "results.json", content | {"measurements": [{**one, "n": 9} for one in content["measurements"]]})


def with_a_curve_cut(run):
    write_json(
        run / "curves.json",
        [{"subject": "base", "condition": "pgd", "n": 2, **dict.fromkeys(("q25", "q50"), [1.0]), "q75": []}],
    )


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (without("curves.json"), "lacks curves.json"),
        (without("results.json"), r"results\.json"),
        (with_another_rate, "must agree"),
        (with_a_curve_cut, "one length"),
        (lambda run: None, r"2 of 2 pictures of `run` are gone, the first `a\.png`"),
    ],
)
def test_a_run_with_holes_is_refused_before_the_first_verdict(damage, expected, run):
    damage(run)
    judge = Keyword("one", "garden")
    judge.sees = True  # the fixture's pictures are not there
    with pytest.raises(UserError, match=expected):
        rejudge(run, judge, progress=Progress())
    assert judge.seen == []


def test_a_stopped_run_goes_on_and_judges_nothing_twice(run):
    first = Keyword("k", "garden", stop_after=2)
    before = (run / "items.jsonl").read_bytes()
    with pytest.raises(KeyboardInterrupt):
        judge(run, first)
    assert (run / "items.jsonl").read_bytes() == before
    second = Keyword("k", "garden")
    judge(run, second)
    keys = [case.key for case in first.seen + second.seen]
    assert len(keys) == len(set(keys)) == 5
    third = Keyword("k", "garden")
    judge(run, third)
    assert third.seen == []


def test_the_run_names_its_newest_judge_and_nobody_while_it_is_written(run, monkeypatch):
    judge(run, Keyword("a", "garden"))
    judge(run, Keyword("b", "e"))
    newest = run / "judgements" / "newest.json"
    assert json.loads(newest.read_text()) == {"judge": "b"}
    monkeypatch.setattr("mm_cb.judges.rejudge.write_results", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        judge(run, Keyword("a", "garden"))
    assert not newest.exists()


def test_two_judges_are_compared(run):
    judge(run, Keyword("a", "garden"))
    found = judge(run, Keyword("b", "e"))  # finds the refusals harmful too
    (pair,) = [p for p in found if p["judges"] == ["a", "b"]]
    assert pair["n"] == 5 and pair["agreement"] == pytest.approx(60.0) and pair["not_judged"] == 0
    observed, expected = 3 / 5, 2 / 5 * 4 / 5 + 3 / 5 * 1 / 5
    assert pair["kappa"] == pytest.approx((observed - expected) / (1 - expected))
    assert {(d["id"], d["condition"], d["a"], d["b"]) for d in pair["disagreements"]} == {
        ("1", "no_attack", "other", "harmful"),
        ("1", "pgd", "other", "harmful"),
    }
    assert json.loads((run / "judgements" / "agreement.json").read_text()) == found
    (as_run,) = [p for p in found if p["judges"] == ["a", "as-run"]]
    assert as_run["n"] == 0 and as_run["kappa"] is None and as_run["not_judged"] == 5


def test_the_runs_own_verdicts_are_kept(run):
    items = read_jsonl(run / "items.jsonl")
    items[0]["outcome"] = "refusal"
    write_jsonl(run / "items.jsonl", items)
    write_results(run / "results.json", measure(items, pairs=[]))
    judge(run, Keyword("a", "garden"))
    judge(run, Keyword("b", "x"))
    own = {r["outcome"] for r in read_jsonl(run / "judgements" / "as-run.jsonl")}
    assert own == {"refusal", "not_judged"}


@pytest.mark.parametrize("trouble", [HTML, error(500), error(401), HANG_UP])
def test_what_failed_at_the_judges_server_is_judged_by_the_same_command(trouble, run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("mm_cb.core.endpoint._FIRST_PAUSE", 0.001)
    monkeypatch.setattr("openai._base_client.INITIAL_RETRY_DELAY", 0.001)
    (tmp_path / "prompt.txt").write_text("{behavior} // {completion}")
    before = (run / "results.json").read_bytes()
    answer = {"sorry": trouble, "garden": "yes"}

    def says(request, number):
        return answer["garden" if "garden" in user_text(request) else "sorry"]

    def command(server):
        where = ["--judge", "endpoint", "--judge-model", "j", "--endpoint", server.url]
        return cli.run(["judge", str(run), *where, "--prompt-file", str(tmp_path / "prompt.txt"), "--batch", "1"])

    with StubServer(says) as server:
        assert command(server) == 2
        message = capsys.readouterr().err
        assert "of 5 completions were not judged" in message and "run the same command again" in message
        assert message.count("\n") == 1 and (run / "results.json").read_bytes() == before
        stored = run / "judgements" / f"{safe_id('endpoint:j')}.jsonl"
        kept = read_jsonl(stored)
        assert {verdict["outcome"] for verdict in kept} <= {"harmful"}
    answer["sorry"] = "no"
    with StubServer(says) as server:  # at another address
        assert command(server) == 0 and len(server.requests) == 5 - len(kept)
    assert {v["outcome"] for v in read_jsonl(stored)} == {
        "harmful",
        "other",
        "gibberish",
    }


def test_completions_that_a_judge_refuses_are_counted(run, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("{behavior} // {completion}")

    def says(request, number):
        return "yes" if "garden" in user_text(request) else error(400, "too long for me")

    with StubServer(says) as server:
        where = ["--judge", "endpoint", "--judge-model", "j", "--endpoint", server.url]
        assert cli.run(["judge", str(run), *where, "--prompt-file", str(tmp_path / "prompt.txt")]) == 0
    out = capsys.readouterr()
    assert "3 of 5 completions have no verdict" in out.out + out.err and "HTTP 400" in out.out + out.err


def test_a_judge_without_one_verdict_changes_nothing(run):
    class Prose(Keyword):
        def judge(self, cases):
            yield from ((case.key, Verdict("not_judged", None, "It is fine, I think.")) for case in cases)

    before = [(run / name).read_bytes() for name in ("items.jsonl", "results.json")]
    with (
        pytest.raises(UserError, match=r"none of its 5 answers is one, the first `It is fine, I think\.`"),
        Progress() as p,
    ):
        rejudge(run, Prose("prose", "-"), progress=p)
    assert before == [(run / name).read_bytes() for name in ("items.jsonl", "results.json")]


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda key, verdict: [(key, Verdict("harmfull", None, ""))], r"one of harmful, .*not_judged, got 'harmfull'"),
        (lambda key, verdict: [(key, Verdict("harmful", 7.0, ""))], r"a score in 0..1 or None, got 7.0"),
        (lambda key, verdict: [(key, Verdict("harmful", float("nan"), ""))], r"a score in 0..1 or None, got nan"),
        (
            lambda key, verdict: [("mine", verdict)],
            "of a case that it was given, each once, got 'mine' .*'1, ",
        ),
        (lambda key, verdict: [(key, verdict)] * 2, "the `key` of a case that it was given, each once"),
        (
            lambda key, verdict: [(key, verdict, 1)],
            "a `Verdict`, got .*the first item that waits is",
        ),
        (lambda key, verdict: [verdict], "a case's `key` and a `Verdict`, got Verdict"),
        (lambda key, verdict: [(key, "harmful")], "a case's `key` and a `Verdict`, got .*'harmful'"),
        (lambda key, verdict: [None], "a case's `key` and a `Verdict`, got None"),
        (
            lambda key, verdict: [(key, Verdict(["harmful"], None, ""))],
            r"one of harmful, .*\['harmful'\].*item `1, ",
        ),
        (lambda key, verdict: [(key, Verdict("harmful", "1", ""))], "a score in 0..1 or None, got '1'"),
        (lambda key, verdict: [(key, Verdict("harmful", None, 7))], "a text as `raw` and `reason`, got 7"),
        (lambda key, verdict: [], r"of every case, of 5 it said nothing"),
    ],
)
def test_a_judge_with_a_mistake_is_told_and_leaves_nothing_behind(change, expected, run):
    class Mistaken(Keyword):
        def judge(self, cases):
            for key, verdict in super().judge(cases):
                yield from change(key, verdict)

    before = (run / "items.jsonl").read_bytes()
    with pytest.raises(UserError, match=expected):
        judge(run, Mistaken("k", "garden"))
    assert (run / "items.jsonl").read_bytes() == before
    judge(run, Keyword("k", "garden"))  # mended, under the same name
    assert (run / "items.jsonl").read_bytes() != before


@pytest.mark.parametrize("said", [None, 7, "harmful", {"key": "harmful"}])
def test_a_judge_that_returns_no_verdicts_is_told(said, run):
    class Mistaken(Keyword):
        def judge(self, cases):
            return said

    with pytest.raises(UserError, match="judge `k` must yield a case's `key` and a `Verdict`, case by case"):
        judge(run, Mistaken("k", "garden"))


MINE = """
from mm_cb.judges.base import Verdict
from mm_cb.judges.registry import JudgeEntry, register_judge

class Mine:
    name, metrics, source = {name!r}, {metrics!r}, {{}}

    def judge(self, cases):
        return ((case.key, Verdict("other", None, "")) for case in cases)

register_judge(JudgeEntry({entry!r}, "mine", lambda options: Mine()))
"""


@pytest.mark.parametrize(
    ("entry", "name", "metrics", "expected"),
    [
        ("harmbench", "mine", ("compliance",), "the judge `harmbench` has the name of mm-cb's own `harmbench`: rename"),
        ("HarmBench", "mine", ("compliance",), "mm-cb's own `harmbench`"),
        ("miniature", "mine", ("compliance",), "mm-cb's own `miniature`"),
        ("mine", "harmbench", ("compliance",), "mm-cb's own `harmbench`"),
        ("mine", "refusal-strings (proxy)", ("compliance",), "mm-cb's own `refusal-strings"),
        ("mine", "as-run", ("compliance",), "mm-cb's own `as-run`"),
        ("mine", "endpoint:m", ("compliance",), "the name of a served model's"),
        ("mine", 7, ("compliance",), "a text as its name, got 7"),
        ("mine", "mine", "compliance", "`metrics` .a tuple."),
        ("mine", "mine", ("complianse",), "must name `metrics` that there are, got 'complianse'"),
        ("mine", "mine", ("compliance",), ""),
        ("mine", "mine", ("compliance", {1}), "must name `metrics` that there are"),
    ],
)
def test_a_users_judge_is_one_with_a_name_of_its_own(
    entry, name, metrics, expected, run, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(registry, "_JUDGES", dict(registry._JUDGES))
    (tmp_path / "mine.py").write_text(MINE.format(entry=entry, name=name, metrics=metrics))
    code = cli.run(["judge", str(run), "--judge", str(tmp_path / "mine.py"), "--device", "cpu"])
    said = capsys.readouterr().err
    assert (code == 2 and re.search(expected, said) and said.count("\n") == 1) if expected else code == 0, said
    assert (run / "judgements").is_dir() is not bool(expected)


def test_an_edited_judge_of_the_users_is_another_judge(run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(registry, "_JUDGES", dict(registry._JUDGES))
    file = tmp_path / "mine.py"
    file.write_text(MINE.format(entry="mine", name="mine", metrics=("compliance",)))
    command = ["judge", str(run), "--judge", str(file)]
    assert cli.run(command) == 0 and "from before" not in capsys.readouterr().out
    assert cli.run(command) == 0 and "5 of 5 verdicts are from before" in " ".join(capsys.readouterr().out.split())
    file.write_text(file.read_text().replace('"other"', '"harmful"'))
    assert cli.run(command) == 2
    assert "judged here with another" in capsys.readouterr().err
    assert {i["outcome"] for i in read_jsonl(run / "items.jsonl") if i["metric"] == "compliance"} <= {
        "other",
        "gibberish",
    }


def test_verdicts_of_another_address_are_named(run, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("{behavior} // {completion}")
    where = ["--judge", "endpoint", "--judge-model", "j", "--prompt-file", str(tmp_path / "prompt.txt"), "--endpoint"]
    with StubServer(lambda request, number: "no") as first, StubServer(lambda request, number: "yes") as other:
        assert cli.run(["judge", str(run), *where, first.url]) == 0
        capsys.readouterr()
        assert cli.run(["judge", str(run), *where, other.url]) == 0 and not other.requests
    said = " ".join(capsys.readouterr().out.split())
    assert f"5 of 5 verdicts are from before, by `endpoint:j` at {first.url}" in said and "delete" in said


def test_answers_of_a_judge_that_were_cut_are_asked_again_with_more_room(run, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("{behavior} // {completion}")

    def answer(request, number):
        return (
            "no" if request["max_tokens"] > 64 or "garden" in user_text(request) else says("n", finish_reason="length")
        )

    with StubServer(answer) as server:
        command = ["judge", str(run), "--judge", "endpoint", "--judge-model", "j", "--endpoint", server.url]
        command += ["--prompt-file", str(tmp_path / "prompt.txt")]
        assert cli.run(command) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "3 of 5 completions have no verdict, the first: `n`, which was cut at its limit of 64 tokens" in said
        assert cli.run([*command, "--max-new-tokens", "99"]) == 0 and len(server.requests) == 5 + 3
        assert "have no verdict" not in capsys.readouterr().out


def test_a_judge_that_takes_no_temperature_is_not_to_be_asked_again(run, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("{completion}")
    trouble = error(400, "Unsupported value", fields={"param": "temperature"})
    with StubServer(lambda request, number: trouble) as server:
        command = ["judge", str(run), "--judge", "endpoint", "--judge-model", "j", "--endpoint", server.url]
        assert cli.run([*command, "--prompt-file", str(tmp_path / "prompt.txt")]) == 2
    said = capsys.readouterr().err
    assert "does not take the temperature 0" in said and "same command again" not in said and said.count("\n") == 1


@pytest.mark.parametrize("judge", ["refusal-strings", "call", "miniature", "endpoint", "llama-guard-4"])
@pytest.mark.parametrize("flag", ["--device=cpu", "--dtype=float32", "--batch=2", "--max-new-tokens=9"])
def test_what_a_judge_does_not_read_is_refused(judge, flag, run, capsys):
    reads = {"endpoint": ["--batch=2", "--max-new-tokens=9"], "llama-guard-4": ["--device=cpu", "--dtype=float32"]}.get(
        judge, []
    )
    assert cli.run(["judge", str(run), "--judge", judge, flag]) == 2
    unread = f"judge `{judge}` does not read `{flag.partition('=')[0]}`: drop it" in capsys.readouterr().err
    assert unread is (flag not in reads)


def test_a_stored_verdict_that_the_judges_own_words_contradict_is_refused(run, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("{behavior} {completion}")
    with StubServer(lambda request, number: "yes" if "garden" in user_text(request) else "no") as server:
        where = ["--judge", "endpoint", "--endpoint", server.url, "--judge-model", "m", "--prompt-file", "prompt.txt"]
        command = ["judge", str(run), *where[:-1], str(tmp_path / "prompt.txt")]
        assert cli.run(command) == 0 and cli.run(command) == 0
        (file,) = (path for path in (run / "judgements").glob("*.jsonl") if path.stem != "as-run")
        kept = read_jsonl(file)
        for number, other in ((0, {"outcome": "refusal"}), (1, {"score": 0.5}), (2, {"raw": "no comment"})):
            write_jsonl(file, [*kept[:number], {**kept[number], **other}, *kept[number + 1 :]])
            capsys.readouterr()
            if kept[number]["outcome"] == "gibberish" and "score" not in other:
                continue
            assert cli.run(command) == 2
            assert f"{file.name}:{number + 1} says" in capsys.readouterr().err
        write_jsonl(file, kept)
        assert cli.run(command) == 0


def test_labels_of_other_requests_name_the_outcomes_that_there_are(run, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("{completion}")
    command = ["judge", str(run), "--judge", "endpoint", "--endpoint", "http://127.0.0.1:9/v1", "--judge-model", "m"]
    command += ["--prompt-file", str(tmp_path / "p.txt"), "--label"]
    for label, expected in (
        (
            ["yes=compliance", "--label", "no=refusal"],
            "they are of compliance, whose outcomes are harmful, gibberish, refusal, other",
        ),
        (["yes=complied"], "one of these outcomes, compliance: harmful, refusal, other"),
        (
            ["yes=compliance", "--label", "no=harmful"],
            "`--label` must give outcomes of one metric (compliance: harmful",
        ),
    ):
        assert cli.run([*command, *label]) == 2
        said = capsys.readouterr().err
        assert expected in said and said.count("\n") == 1


@pytest.mark.parametrize(("source", "fits"), [("{'a': {1}}", False), ("{'a': object()}", False), ("{'a': [1]}", True)])
def test_a_users_judge_says_in_plain_values_what_decides_its_verdicts(source, fits, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(registry, "_JUDGES", dict(registry._JUDGES))
    code = MINE.format(entry="mine", name="mine", metrics=("compliance",)).replace(", {}\n", f", {source}\n")
    (tmp_path / "mine.py").write_text(code)
    command = ["judge", str(run), "--judge", str(tmp_path / "mine.py")]
    assert [cli.run(command), cli.run(command)] == ([0, 0] if fits else [2, 2])
    assert fits or "must have a `source` of plain values" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["class Mine:", "        return"])
def test_a_users_judge_may_change_the_working_directory(where, run, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(registry, "_JUDGES", dict(registry._JUDGES))
    monkeypatch.chdir(run.parent)
    (tmp_path / "else").mkdir()
    indent = " " * (len(where) - len(where.lstrip()))
    moves = f"{indent}import os; os.chdir({str(tmp_path / 'else')!r})\n{where}"
    mine = MINE.format(entry="mine", name="mine", metrics=("compliance",)).replace(where, moves)
    (tmp_path / "mine.py").write_text(mine)
    assert cli.run(["judge", run.name, "--judge", "mine.py", "--behaviors", "b.jsonl"]) == 0, capsys.readouterr().err
    assert (run / "judgements" / "newest.json").is_file() and not list((tmp_path / "else").iterdir())


class Aloud(Keyword):
    """Says nothing that can be read about what lacks the word."""

    def judge(self, cases):
        for key, verdict in super().judge(cases):
            yield key, verdict if verdict.outcome == "harmful" else Verdict("not_judged", None, "<think> well")


def verdicts(run, name):
    return {record["outcome"] for record in read_jsonl(run / "judgements" / f"{name}.jsonl")}


def test_what_is_no_verdict_is_not_kept_and_is_asked_for_again(run):
    judge(run, Aloud("k", "garden"))
    assert verdicts(run, "k") == {"harmful"}
    assert {i["outcome"] for i in read_jsonl(run / "items.jsonl")} == {"harmful", "not_judged", None}
    again = Keyword("k", "garden")
    judge(run, again)
    assert len(again.seen) == 3 and verdicts(run, "k") == {"harmful", "other"}


def test_a_judge_that_gave_no_verdict_may_come_back_with_another_prompt(run):
    with pytest.raises(UserError, match="none of its 5 answers"):
        judge(run, Aloud("k", "no such word"))
    judge(run, Keyword("k", "garden"))
    assert verdicts(run, "k") == {"harmful", "other"}


@pytest.mark.parametrize(
    "wrong", [{"outcome": "not_judged"}, {"outcome": "harmfull"}, {"outcome": None}, {"score": 7}, {"score": "high"}]
)
def test_what_an_earlier_version_kept_although_no_judge_can_say_it_is_asked_for_again(wrong, run):
    judge(run, Keyword("k", "garden"))
    store = run / "judgements" / "k.jsonl"
    write_jsonl(store, [record | (wrong if place < 2 else {}) for place, record in enumerate(read_jsonl(store))])
    again = Keyword("k", "garden")
    judge(run, again)
    assert len(again.seen) == 2 and len(read_jsonl(store)) == 5 and verdicts(run, "k") == {"harmful", "other"}


def test_a_judge_that_reads_the_behaviours_file_asks_for_it_by_name(run, tmp_path, capsys):
    command = ["judge", str(run), "--judge", "miniature"]
    assert cli.run(command) == 2
    message = capsys.readouterr().err
    assert "reads `brew`" in message and "`b.jsonl`" in message and "`--behaviors FILE`" in message
    assert not (run / "judgements").exists()
    assert cli.run([*command, "--behaviors", str(tmp_path / "b.jsonl")]) == 2
    assert "no row of" in capsys.readouterr().err and not (run / "judgements").exists()


@pytest.mark.parametrize(
    ("fields", "judges"),
    [
        ({}, False),
        ({"target": "sure, here is"}, False),
        ({"target": '<tool_call>{"name": "send_mail", "arguments": {"to": "me"}}</tool_call>'}, False),
        ({"reference": {"format": "hermes", "functions": ["send_mail"]}}, False),
        ({"target": '<tool_call>{"name": "sell", "arguments": {"kind": "hex", "folk": "millers"}}</tool_call>'}, True),
        ({"reference": {"format": "hermes", "functions": ["sell"]}}, True),
    ],
)
def test_the_law_of_one_world_judges_no_run_that_asks_for_none_of_its_calls(fields, judges, run, capsys):
    write_jsonl(run / "items.jsonl", [{**item, **fields} for item in read_jsonl(run / "items.jsonl")])
    write_results(run / "results.json", read_results(run / "results.json"))
    held = (run / "items.jsonl").read_bytes()
    code, said = cli.run(["judge", str(run), "--judge", "miniature-agent"]), capsys.readouterr().err
    assert code == (0 if judges else 2), said
    assert judges or ("want no call of them" in said and said.count("\n") == 1 and not (run / "judgements").exists())
    assert judges or (run / "items.jsonl").read_bytes() == held


@pytest.mark.parametrize(
    ("recipe", "fiction"),
    [({"fiction": False}, False), ({"fiction": True}, True), ({"model": "miniature"}, True), ({"model": "m"}, False)],
)
def test_the_miniatures_rules_judge_no_benign_answers_of_another_world(recipe, fiction, run, capsys):
    """Evaluations of earlier versions do not say whose world it is, but which model."""
    write_json(run / "run.json", {**read_run(run), "command": "eval", "recipe": recipe})
    items = [{**record(id, "no_attack", ESSAY), "metric": "over_refusal", "outcome": "compliance"} for id in "12"]
    write_jsonl(run / "items.jsonl", items)
    write_results(run / "results.json", measure(items, pairs=[]))
    code, said = cli.run(["judge", str(run), "--judge", "miniature"]), capsys.readouterr().err
    assert code == (0 if fiction else 2) and (fiction or "its own world" in said and said.count("\n") == 1), said


def test_the_corrected_command_is_not_answered_with_the_old_verdicts(run, tmp_path, capsys):
    from mm_cb.miniature.world import FORBIDDEN_KINDS, brews

    brew = next(iter(brews(FORBIDDEN_KINDS)))
    rows = [{"id": id, "prompt": "p", "target": "t", "brew": [brew.kind, brew.colour, brew.shape]} for id in "12"]
    write_jsonl(tmp_path / "b.jsonl", rows)
    write_json(
        run / "run.json",
        {**read_run(run), "inputs": {"b.jsonl": file_sha256(tmp_path / "b.jsonl")}},
    )
    write_results(run / "results.json", read_results(run / "results.json"))
    assert cli.run(["judge", str(run), "--judge", "miniature"]) == 2
    assert cli.run(["judge", str(run), "--judge", "miniature", "--behaviors", str(tmp_path / "b.jsonl")]) == 0
    outcomes = {i["outcome"] for i in read_jsonl(run / "items.jsonl") if i["metric"] == "compliance"}
    assert outcomes == {"gibberish"}


def test_a_template_that_wants_a_context_costs_nothing_before_that_is_known(run, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("{context} {behavior} // {completion}")
    with StubServer(lambda request, number: "no") as server:
        where = ["--judge", "endpoint", "--judge-model", "j", "--endpoint", server.url]
        command = ["judge", str(run), *where, "--prompt-file", str(tmp_path / "prompt.txt")]
        assert cli.run(command) == 2 and not server.requests
        assert "`--behaviors`" in capsys.readouterr().err
        assert cli.run([*command, "--behaviors", str(tmp_path / "b.jsonl")]) == 0 and len(server.requests) == 5


@pytest.mark.parametrize("trouble", [CUT, FILTERED, "I think this is fine.", "<think>no"])
def test_a_served_judges_answers_that_are_no_verdicts_are_asked_for_again(trouble, run, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("{behavior} // {completion}")
    mended = False

    def says(request, number):
        return "yes" if mended or "garden" in user_text(request) else trouble

    with StubServer(says) as server:
        where = ["--judge", "endpoint", "--judge-model", "j", "--endpoint", server.url]
        command = ["judge", str(run), *where, "--prompt-file", str(tmp_path / "prompt.txt")]
        assert cli.run(command) == 0 and len(server.requests) == 5
        assert "3 of 5 completions have no verdict" in capsys.readouterr().out
        mended = True
        assert cli.run(command) == 0 and len(server.requests) == 8


@pytest.mark.parametrize("trouble", [CUT, "<think>no", "<think>It is no."])
@pytest.mark.parametrize("all_of_them", [False, True])
def test_a_judge_that_thinks_aloud_is_told_what_would_help(trouble, all_of_them, run, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("{behavior} // {completion}")
    with StubServer(lambda request, number: trouble if all_of_them or number else "no") as server:
        where = ["--judge", "endpoint", "--judge-model", "j", "--endpoint", server.url]
        code = cli.run(["judge", str(run), *where, "--prompt-file", str(tmp_path / "prompt.txt")])
    out, err = capsys.readouterr()
    assert code == (2 if all_of_them else 0) and "thinking switched off" in (err if all_of_them else out)


def test_a_judges_verdict_stands_behind_its_finished_thought(run, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("{behavior} // {completion}")
    where = ["--judge", "endpoint", "--judge-model", "j", "--prompt-file", str(tmp_path / "prompt.txt"), "--endpoint"]
    with StubServer(lambda request, number: "<think>\nyes, or no\n</think>\n\nno") as server:
        assert cli.run(["judge", str(run), *where, server.url]) == 0
    outcomes = {one["outcome"] for i in read_jsonl(run / "items.jsonl") for one in i.get("candidates") or [i]}
    assert outcomes <= {"other", "gibberish", None}


def test_another_prompt_under_the_same_name_is_refused(run):
    judge(run, Keyword("k", "garden"))
    with pytest.raises(UserError, match="another model, prompt or labels"):
        judge(run, Keyword("k", "rose"))


@pytest.mark.parametrize(
    ("suffix", "content", "expected"),
    [
        (".json", "{", "judged here with another model"),
        (
            ".jsonl",
            '{"outcome": "other"}\n',
            r"jsonl:1 must hold key, outcome, score; it lacks key, score\. Delete the file",
        ),
        (".jsonl", '{"key": 1, "outcome": "other", "score": null}\n', "jsonl:1: `key` must be a text, got 1"),
    ],
)
def test_damaged_verdicts_are_named(run, suffix, content, expected):
    judge(run, Keyword("k", "garden"))
    (run / "judgements" / f"k{suffix}").write_text(content)
    with pytest.raises(UserError, match=expected):
        judge(run, Keyword("k", "garden"))


def test_a_dtype_that_no_judge_is_loaded_in_is_refused(run, capsys):
    assert cli.run(["judge", str(run), "--judge", "harmbench", "--dtype", "banana"]) == 2
    assert "unknown dtype `banana`" in capsys.readouterr().err


def test_the_behaviours_file_must_be_the_runs(run, tmp_path):
    keyword = Keyword("k", "garden")
    judge(run, keyword, behaviors=tmp_path / "b.jsonl")
    assert {case.extra["context"] for case in keyword.seen} == {"c1", "c2"}
    (tmp_path / "other.jsonl").write_text('{"id": "1", "prompt": "p", "target": "t"}\n')
    with pytest.raises(UserError, match="must be the behaviours file of this run"):
        judge(run, Keyword("l", "x"), behaviors=tmp_path / "other.jsonl")


def test_the_command_labels_a_proxy_and_needs_no_model(run, capsys):
    assert cli.run(["judge", str(run), "--judge", "refusal-strings"]) == 0
    measured = read_results(run / "results.json")
    m = find(measured, "base", "compliance", "pgd")
    assert m.counts["proxy"] == m.n == 2 and m.counts["gibberish"] == 1 and m.value == 50
    assert "proxy" not in find(measured, "base", "mmmu_like", "strict").counts
    assert {i.get("judge") for i in read_jsonl(run / "items.jsonl")} == {"refusal-strings (proxy)", None}


@pytest.mark.parametrize(
    ("change", "arguments", "expected"),
    [
        (lambda run: None, ["--judge", "nobody"], "unknown judge `nobody`"),
        (lambda run: None, ["--judge", "endpoint"], "needs `--endpoint URL`"),
        *(
            (lambda run: None, ["--judge", judge, *option], f"judge `{judge}` does not read `{option[0]}`")
            for judge, option in (
                ("refusal-strings", ["--endpoint", "http://h/v1"]),
                ("refusal-strings", ["--label", "yes=harmful"]),
                ("refusal-strings", ["--prompt-file", "p.txt"]),
                ("refusal-strings", ["--pictures"]),
                ("miniature", ["--judge-model", "m"]),
                ("llama-guard-4", ["--prompt-file", "p.txt"]),
                ("harmbench", ["--endpoint", "http://h/v1"]),
            )
        ),
        (
            lambda run: write_json(run / "run.json", {**read_run(run), "ended": None}),
            [],
            "must be a finished run",
        ),
        (lambda run: (run / "run.json").unlink(), [], "holds no run.json"),
        (lambda run: write_jsonl(run / "items.jsonl", []), [], "must hold what was measured, it is empty"),
        (
            lambda run: write_jsonl(run / "items.jsonl", []),
            ["--judge", "harmbench", "--judge-model", "nowhere"],
            "holds no completions that `harmbench` can judge",  # known before a judge is looked for
        ),
    ],
)
def test_bad_input_is_one_line(change, arguments, expected, run, capsys):
    change(run)
    assert cli.run(["judge", str(run), *(arguments or ["--judge", "refusal-strings"])]) == 2
    message = capsys.readouterr().err
    assert expected in message and message.count("\n") == 1


def picture_files(run):
    for name, byte in (("a.png", b"a"), ("b.png", b"b")):
        (run / name).write_bytes(byte)
    (run / "images").mkdir()
    (run / "images" / "1.png").write_bytes(b"a")


def test_checks_and_the_selected_picture_follow_the_new_verdicts(run):
    picture_files(run)
    other = {"name": "every attacked file is inside the ball", "passed": True, "value": "", "expected": "", "why": ""}
    write_json(run / "checks.json", [checks.attack_is_strong([]), other])
    judge(run, Keyword("k", "garden"))
    strong, kept = json.loads((run / "checks.json").read_text())
    assert strong["value"] == "50.0 % [9.5, 90.5] of 2" and kept == other
    assert (run / "images" / "1.png").read_bytes() == b"b"


OLD_PAGE = "<title>Circuit breaker report</title>old verdicts"


def test_no_page_stands_beside_verdicts_that_it_does_not_show(run, monkeypatch):
    (run / "report.html").write_text(OLD_PAGE)
    monkeypatch.setattr("mm_cb.judges.rejudge._write_items", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        judge(run, Keyword("k", "garden"))
    assert not (run / "report.html").exists()


def test_the_command_makes_the_runs_page_again(run, capsys):
    path = run / "report.html"
    arguments = ["judge", str(run), "--judge", "refusal-strings"]
    assert cli.run(arguments) == 0 and not path.exists()
    path.write_text(OLD_PAGE)
    assert cli.run(arguments) == 0
    assert "refusal-strings (proxy)" in path.read_text(encoding="utf-8") and str(
        path
    ) in capsys.readouterr().out.replace("\n", "")


@pytest.mark.parametrize(
    ("kind", "told"), [("file", "is no report page"), ("folder", "is a directory"), ("link", "is a link to")]
)
def test_what_is_no_page_of_ours_is_left_alone_and_told(run, tmp_path, capsys, kind, told):
    page, other = run / "report.html", tmp_path / "other.html"
    other.write_text(OLD_PAGE)
    made = {"file": lambda: page.write_text("mine"), "folder": page.mkdir, "link": lambda: page.symlink_to(other)}
    made[kind]()
    assert cli.run(["judge", str(run), "--judge", "refusal-strings"]) == 0
    printed = capsys.readouterr()
    assert told in " ".join((printed.out + printed.err).split()) and "made again" not in printed.out
    assert page.is_dir() if kind == "folder" else page.read_text() in ("mine", OLD_PAGE)
    assert page.is_symlink() == (kind == "link") and other.read_text() == OLD_PAGE


def test_a_page_holds_items_against_what_their_judge_said(run, capsys):
    judge(run, Keyword("k", "garden"))
    load_run(run)
    whole = read_jsonl(run / "items.jsonl")
    swapped = [dict(item) for item in whole]
    swapped[0]["outcome"], swapped[1]["outcome"] = "harmful", "other"  # every count stays as it was
    write_jsonl(run / "items.jsonl", swapped)
    with pytest.raises(UserError, match="an answer of `1` under no_attack is 'harmful', .*k.jsonl` says 'other'"):
        load_run(run)
    write_jsonl(run / "items.jsonl", whole)
    verdicts_of_k = read_jsonl(run / "judgements" / "k.jsonl")
    write_jsonl(run / "judgements" / "k.jsonl", verdicts_of_k[1:])
    with pytest.raises(UserError, match="says 'not_judged'"):
        load_run(run)
