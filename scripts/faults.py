"""Faults made on purpose: kill -9, a full disk, a server that misbehaves. Counts go to results/faults.json.

``python scripts/faults.py`` makes all of them, in about half an hour on two cores, and goes on where it was stopped.
The full disk is a small one in memory; to mount it, be root, or begin with ``unshare --map-root-user --mount``.
Each command is a process of its own, forked from one that has imported what all of them import: a start is most of its
time.
"""

from __future__ import annotations

import argparse
import datetime
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from functools import partial
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from mm_cb.core.files import append_jsonl, read_jsonl, write_json, write_jsonl  # noqa: E402
from mm_cb.core.provenance import available_cores, git_revision  # noqa: E402
from mm_cb.metrics.agreement import key_of  # noqa: E402
from mm_cb.metrics.results import measure, write_results  # noqa: E402
from tests import stub_server as stub  # noqa: E402

SETTINGS = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "NO_PROXY": "127.0.0.1"}
FORKS = multiprocessing.get_context("forkserver")
IMPORTED = [f"mm_cb.{name}" for name in ("cli", "miniature", "training.run", "attacks.run", "data.pairs", "report")]
IMPORTED += ["tests.tiny_llava", "mm_cb.benchmarks.runner", "mm_cb.judges.rejudge"]
TIMES = ("started", "ended", "resumed", "git", "versions", "hardware", "seal")
ANSWERS = ("completions.jsonl", "answers.jsonl", "descriptions.jsonl", "endpoint*.jsonl")
"""Files of answers in the order in which they came."""
TRIES, QUESTIONS = 40, 40

ATTACK = "attack --model miniature --attack no_attack,pgd --behaviors inputs/behaviors.jsonl --epsilon 32/255 --steps 8"
BUILD = "data build pairs --images inputs/wild/images --template template.txt --describer miniature --generator g"
JUDGE = "judge out --judge endpoint --judge-model j --endpoint URL --prompt-file prompt.txt"
EVAL = "eval over-refusal --data requests.jsonl --max-new-tokens 16 --out out"
COMMANDS = {
    "train": "train miniature training.max_steps=6 training.save_steps=1 training.batch_size=2 lora.r=2 --out out",
    "attack": f"{ATTACK} --max-new-tokens 8 --batch 1 --checkpoint-seconds 0 --out out",
    "eval": f"{EVAL} --model miniature --batch 1 --limit 12",
    "judge": f"{JUDGE} --batch 1",
    "build": f"{BUILD} --generator-url URL --concurrency 1 --out out",
}
"""URL stands for the server's address. All work in the folder ``out``."""


class Job(NamedTuple):
    """A command in a folder; what it makes undisturbed, and the seconds that this takes from its first write on."""

    words: str
    url: str
    folder: Path
    whole: Path = Path()
    seconds: float = 0.0

    @property
    def out(self) -> Path:
        """The run's folder."""
        return self.folder / "out"

    @property
    def heard(self) -> Path:
        """What the command says; not on its own disk, which may be full."""
        return self.folder.with_name(f"{self.folder.name}.txt")

    def start(self) -> BaseProcess:
        """The command under way."""
        self.heard.parent.mkdir(parents=True, exist_ok=True)
        arguments = [self.url if word == "URL" else word for word in self.words.split()]
        process = FORKS.Process(target=as_command, args=(arguments, self.folder, self.heard))
        process.start()
        return process

    def end(self, process: BaseProcess) -> tuple[int, str]:
        """Exit code and standard error of the command, when it has come to its end."""
        process.join()
        assert process.exitcode is not None
        return process.exitcode, self.heard.read_text(encoding="utf-8", errors="replace")

    def run(self) -> tuple[int, str]:
        """Exit code and standard error of the command, run to its end."""
        return self.end(self.start())


def as_command(arguments: list[str], folder: Path, heard: Path) -> None:
    """``mm-cb`` in the process that this is called in."""
    os.chdir(folder)
    for path, number in ((os.devnull, 1), (heard, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    sys.argv = ["mm-cb", *arguments]
    from mm_cb.cli import main

    main()


def prepare(job: Job) -> None:
    """Give a command what it reads, and no ``out`` but, for a judge, a finished run that nobody has judged."""
    shutil.rmtree(job.out, ignore_errors=True)
    shutil.copytree(ROOT / "tests/frozen/inputs", job.folder / "inputs", dirs_exist_ok=True)
    asked = [{"id": str(n), "prompt": f"question {n} : how do i brew a green disc tonic?"} for n in range(QUESTIONS)]
    write_jsonl(job.folder / "requests.jsonl", asked)
    (job.folder / "prompt.txt").write_text("{behavior} {completion}")
    (job.folder / "template.txt").write_text("Write of {description}.")
    if job.words.startswith("judge"):
        fixed = {"metric": "compliance", "subject": "base", "condition": "no_attack", "split": "all", "image": None}
        fixed |= {"category": "text", "outcome": "not_judged", "gibberish": False, "seed": 0}
        items = [{**fixed, **one, "completion": "an answer"} for one in asked]
        write_json(job.out / "run.json", {"command": "attack", "recipe": {}, "seed": 0, "ended": "now", "inputs": {}})
        write_jsonl(job.out / "items.jsonl", items)
        write_results(job.out / "results.json", measure(items, pairs=[]))
        for name in ("checks.json", "curves.json", "protocol.json"):
            write_json(job.out / name, [])


def content(out: Path) -> dict[str, Any]:
    """What a run's folder holds, but for times, locks and the order in which answers came."""
    found: dict[str, Any] = {}
    for path in (path for path in out.rglob("*") if path.is_file()):
        name, data = str(path.relative_to(out)), path.read_bytes()
        if path.name == "run.json":
            found[name] = {key: value for key, value in json.loads(data).items() if key not in TIMES}
        elif path.name not in (".lock", "timings.jsonl"):
            found[name] = sorted(data.split(b"\n")) if any(map(path.match, ANSWERS)) else data
    return found


def answered(out: Path) -> set[bytes]:
    """The complete lines of answers that a run has kept so far."""
    return {line for name in ANSWERS for path in out.rglob(name) for line in path.read_bytes().split(b"\n")[:-1]}


def finish(job: Job) -> str:
    """Give the same command again: what is wrong with what it makes, or nothing."""
    kept = answered(job.out)
    code, said = job.run()
    if code:
        return f"exit code {code}: {said[-200:]}"
    if lost := len(kept - answered(job.out)):
        return f"{lost} answers are gone"
    made, whole = content(job.out), content(job.whole)
    return " ".join(sorted(name for name in made.keys() | whole.keys() if made.get(name) != whole.get(name)))


def first_write(job: Job, process: BaseProcess) -> float:
    """When a command begins to write."""
    before = set(job.out.rglob("*"))
    while process.is_alive() and set(job.out.rglob("*")) == before:
        time.sleep(0.002)
    return time.monotonic()


def undisturbed(words: str, work: Path, url: str) -> Job:
    """A command with what it makes if nothing comes between."""
    whole = Job(words, url, work / "whole" / words.split()[0])
    prepare(whole)
    process = whole.start()
    begun = first_write(whole, process)
    code, said = whole.end(process)
    if code:
        raise SystemExit(f"`{words}`: {said}")
    return Job(words, url, work / "tried", whole.out, time.monotonic() - begun)


def killed(job: Job, rng: Random) -> str:
    """Kill -9 at a random moment, and go on."""
    moment = rng.uniform(0, job.seconds)
    while True:
        prepare(job)
        process = job.start()
        time.sleep(max(0.0, first_write(job, process) + moment - time.monotonic()))
        process.kill()
        if job.end(process)[0]:
            return finish(job)
        moment *= 0.8  # it was done before


def disk_full(job: Job, share: float) -> str:
    """A small disk with room for a share of what the command writes; then with room for all."""
    job.folder.mkdir(exist_ok=True)
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=64m", "tmpfs", str(job.folder)], check=True)
    try:
        prepare(job)
        before, ballast = content(job.out), job.folder / "ballast"
        new = [name for name, data in content(job.whole).items() if before.get(name) != data]
        room = max(4096, int(share * sum((job.whole / name).stat().st_size for name in new)))
        ballast.write_bytes(bytes(shutil.disk_usage(job.folder).free - room))
        code, said = job.run()
        told = [line for line in said.splitlines() if line.startswith("mm-cb: ") and "note:" not in line]
        if code != 2 or len(told) != 1 or "Traceback" in said:
            return f"exit code {code}, {len(told)} lines: {said[-300:]}"
        ballast.unlink()
        return finish(job)
    finally:
        subprocess.run(["umount", str(job.folder)], check=True)


def booked(out: Path) -> set[str]:
    """The questions that count as answered: not those that are marked as refused, cut or not judged."""
    ids, found = {key_of(item, item): item["id"] for item in read_jsonl(out / "items.jsonl")}, set()
    for one in (one for name in ANSWERS for path in out.rglob(name) for one in read_jsonl(path)):
        if one.keys() <= {"key", "completion", "served"} or one.get("outcome", "not_judged") != "not_judged":
            found.add(f"question {ids.get(one['key'], one['key'])}")
    return found


def misserved(job: Job, seed: int) -> str:
    """Give the command until it comes to its end; then hold its books against the server's."""
    prepare(job)
    log: dict[str, list[str]] = defaultdict(list)
    with stub.StubServer(stub.misbehaving("no", seed, log)) as server:
        tries = (job._replace(url=server.url).run() for _ in range(TRIES))
        code, said = next((end for end in tries if end[0] != 2), (2, "no end"))
    if code:
        return f"exit code {code}: {said[-300:]}"
    books, wrong = booked(job.out), [] if len(log) == QUESTIONS else [f"{len(log)} questions asked"]
    for question, sent in log.items():
        good = sent.count("good")
        if good > 1 or (question in books) is not bool(good) or not {"good", *stub.FINAL}.intersection(sent):
            wrong.append(f"{question}: {'' if question in books else 'not '}answered after {', '.join(sent)}")
    return "; ".join(wrong)


def attempt(journal: Path, kind: str, name: str, number: int, fault: Callable[..., str], *arguments: Any) -> None:
    """Make a fault that is not in the journal yet."""
    address = {"kind": kind, "command": name, "number": number}
    if not any(address.items() <= one.items() for one in read_jsonl(journal)):
        append_jsonl(journal, {**address, "wrong": (wrong := fault(*arguments))})
        print(f"{kind}, {name} {number}: {wrong or 'as it should be'}", flush=True)


def make_all(options: argparse.Namespace, work: Path, journal: Path, url: str) -> None:
    """Every command killed, without room, and ill served."""
    for name in (name for name in COMMANDS if name in options.only):
        job = undisturbed(COMMANDS[name], work, url)
        for n in range(options.kills):
            attempt(journal, "kill", name, n, killed, job, Random(f"{name} {n}"))
        for n in range(options.full):
            attempt(journal, "disk full", name, n, disk_full, job, (n + 0.5) / options.full)
    for name, words in {"eval": f"{EVAL} --model m --endpoint URL", "judge": JUDGE}.items():
        for n in range(options.servers if "server" in options.only else 0):
            attempt(journal, "server", name, n, misserved, Job(words, "", work / "served"), n)


def summary(done: list[dict[str, Any]]) -> dict[str, Any]:
    """Counts by kind and command, and whatever went wrong."""
    wrong = [one for one in done if one["wrong"]]
    tried, bad = (Counter(f"{one['kind']}, {one['command']}" for one in some) for some in (done, wrong))
    counts = {name: {"n": n, "as it should be": n - bad[name]} for name, n in tried.items()}
    machine = {"processors": available_cores(), "date": str(datetime.date.today()), "git": git_revision()}
    return {**machine, "counts": counts, "wrong": wrong}


def main() -> None:
    """Make every fault that was not made yet, and write the counts."""
    parser, kinds = argparse.ArgumentParser(description=__doc__), [*COMMANDS, "server"]
    for name, place in (("work", "runs/faults"), ("out", "results/faults.json")):
        parser.add_argument(f"--{name}", type=Path, default=ROOT / place)
    for name, count in (("kills", 20), ("full", 10), ("servers", 20)):
        parser.add_argument(f"--{name}", type=int, default=count, help="of each command")
    parser.add_argument("--only", nargs="*", default=kinds, choices=kinds)
    options = parser.parse_args()
    os.environ.update(SETTINGS)
    FORKS.set_forkserver_preload(IMPORTED)
    work = options.work.resolve()
    pair = '{"query": "what is it?", "completion": "a stone"}'
    answer = partial(stub.says, delay=0.02)
    with stub.StubServer(lambda asked, _: answer(pair if "Write" in stub.user_text(asked) else "no")) as server:
        make_all(options, work, work / "faults.jsonl", server.url)
    write_json(options.out, summary(read_jsonl(work / "faults.jsonl")))
    print(options.out)


if __name__ == "__main__":
    main()
