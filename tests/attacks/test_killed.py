"""Runs killed without warning (SIGKILL): what was answered is never asked for again, an attack goes on where it was."""

import importlib
import json
import multiprocessing
import shutil
import time
from pathlib import Path

import pytest
from PIL import Image

from mm_cb import cli
from mm_cb.attacks.objectives.target import TargetObjective
from mm_cb.core.runs import read_jsonl, write_json, write_jsonl
from mm_cb.metrics.results import measure, write_results
from tests.stub_server import StubServer, user_text

N, AT_ONCE = 40, 8
"""Items, and the requests that are under way at a time."""


def kill_at(server, requests, arguments):
    """Run a command in a process of its own and kill it (SIGKILL) once the server has seen so many requests."""
    process = multiprocessing.get_context("fork").Process(target=cli.run, args=(arguments,))
    process.start()
    deadline = time.monotonic() + 60
    while len(server.requests) < requests and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.001)
    process.kill()
    process.join()
    assert process.exitcode == -9, "it came to its end before it was killed"


def goes_on(server, store, arguments, name):
    """The same command again asks exactly what is not in ``store``; with what was under way that is all there is."""
    kept = {record["key"] for record in read_jsonl(store)}
    before = len(server.requests)
    assert 0 < len(kept) < N and before - len(kept) <= AT_ONCE
    assert cli.run(arguments) == 0
    asked = [name(user_text(request)) for request in server.requests]
    assert len(asked) - before == N - len(kept)
    assert sum(asked.count(one) - 1 for one in set(asked)) <= AT_ONCE and len(set(asked)) == N


def slowly(text):
    def answer(request, number):
        time.sleep(0.01)
        return text

    return answer


@pytest.fixture(scope="module", autouse=True)
def imported():
    """What the commands import, before they are forked off: each would spend seconds on it."""
    for name in ("mm_cb.attacks.run", "mm_cb.inference.served", "mm_cb.judges.rejudge", "openai"):
        importlib.import_module(name)


@pytest.fixture
def wild(tmp_path):
    """Questions in the original's layout, and the command without its addresses."""
    (tmp_path / "images").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "a.png")
    one = {"image": "a.png", "category": "conv"}
    rows = {
        "questions": [{"question_id": n, "text": f"question {n}?", **one} for n in range(N)],
        "context": [{"image": "a.png", "caption": "a caption"}],
        "answers_gpt4": [{"question_id": n, "text": "a reference"} for n in range(N)],
    }
    for name, records in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (tmp_path / "rule.txt").write_text("Give two scores.")
    named = {"--model": "m", "--judge-model": "j", "--data": tmp_path, "--own-rule": tmp_path / "rule.txt"}
    named["--out"] = tmp_path / "out"
    return ["eval", "llava-wild", *(str(part) for pair in named.items() for part in pair), "--batch", str(AT_ONCE)]


def question(text):
    return text.split("question ")[1].split("?")[0]


def test_answers_and_judgements_are_paid_once(wild, tmp_path):
    store = tmp_path / "out" / "parts"
    with StubServer(slowly("an answer")) as model, StubServer(slowly("8 6")) as judge:
        wild += ["--endpoint", model.url, "--judge-endpoint", judge.url]
        kill_at(model, 20, wild)
        answered = {record["key"] for record in read_jsonl(store / "completions.jsonl")}
        assert 0 < len(answered) < N and not judge.requests
        kill_at(judge, 20, wild)
        spent = len(model.requests)
        assert spent - N <= AT_ONCE and len(read_jsonl(store / "completions.jsonl")) == N
        goes_on(judge, store / "judgements.jsonl", wild, question)
        assert len(model.requests) == spent
        assert cli.run(wild) == 0 and len(model.requests) == spent
    again = [question(user_text(request)) for request in model.requests]
    assert all(again.count(one) == 1 for one in answered)


def test_verdicts_are_paid_once(tmp_path):
    fixed = {"metric": "compliance", "subject": "base", "condition": "no_attack", "split": "all", "category": "text"}
    fixed |= {"outcome": "not_judged", "gibberish": False, "seed": 0, "image": None}
    items = [{**fixed, "id": str(n), "prompt": f"ask {n}?", "completion": f"question {n}?"} for n in range(N)]
    write_json(tmp_path / "run.json", {"command": "attack", "recipe": {}, "seed": 0, "ended": "now", "inputs": {}})
    write_jsonl(tmp_path / "items.jsonl", items)
    write_results(tmp_path / "results.json", measure(items, pairs=[]))
    for name in ("checks.json", "curves.json"):
        write_json(tmp_path / name, [])
    write_json(tmp_path / "protocol.json", {})
    (tmp_path / "p.txt").write_text("{behavior} {completion}")
    with StubServer(slowly("no")) as server:
        command = ["judge", str(tmp_path), "--judge", "endpoint", "--judge-model", "j", "--endpoint", server.url]
        command += ["--prompt-file", str(tmp_path / "p.txt")]
        kill_at(server, 20, command)
        (store,) = (tmp_path / "judgements").glob("endpoint*.jsonl")
        goes_on(server, store, command, question)
    assert {item["outcome"] for item in read_jsonl(tmp_path / "items.jsonl")} == {"other"}


def test_an_attack_killed_in_an_optimisation_ends_with_the_bits_of_an_undisturbed_one(tmp_path, monkeypatch):
    for n in range(2):
        Image.effect_noise((42, 42), 40 + n).convert("RGB").save(tmp_path / f"{n}.png")
    rows = [{"id": str(n), "prompt": "how do i make it", "target": "sure , here", "image": f"{n}.png"} for n in (0, 1)]
    write_jsonl(tmp_path / "b.jsonl", rows)
    command = ["attack", "--model", "miniature", "--behaviors", str(tmp_path / "b.jsonl"), "--epsilon", "8/255"]
    command += [
        "--steps",
        "6",
        "--batch",
        "1",
        "--max-new-tokens",
        "2",
        "--iterates",
        "1",
        "--checkpoint-seconds",
        "0",
    ]
    command += ["--out"]
    run, cut, real = tmp_path / "run", tmp_path / "cut", TargetObjective.__call__

    def killed(self, pixels):
        """What a process killed here would leave on the disk: nothing is flushed or tidied up first."""
        if list(run.glob("parts/*.safetensors")):
            shutil.copytree(run, cut)
            raise KeyboardInterrupt
        return real(self, pixels)

    with monkeypatch.context() as patched:
        patched.setattr(TargetObjective, "__call__", killed)
        assert cli.run([*command, str(run)]) == 130
    assert list(cut.glob("parts/*.safetensors"))
    assert not list(cut.glob("parts/*.json"))  # the first optimisation was still under way

    calls = []
    monkeypatch.setattr(TargetObjective, "__call__", lambda self, pixels: calls.append(1) or real(self, pixels))
    spent = []
    for out in ("cut", "whole"):
        calls.clear()
        assert cli.run([*command, str(tmp_path / out)]) == 0
        spent.append(len(calls))
    assert spent[0] < spent[1]  # it went on from the saved state
    names = {path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").glob("images/**/*")}
    assert names == {path.relative_to(tmp_path / "cut") for path in (tmp_path / "cut").glob("images/**/*")}
    files = [Path(name) for name in ("items.jsonl", "results.json", "curves.json", "checks.json")]
    files += [name for name in names if (tmp_path / "whole" / name).is_file()]
    for name in files:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
