"""Every write of every command fails once, and is once interrupted: the same command then ends with the same bytes."""

import errno
import json
import os
import re
import shutil
import signal
import stat
from pathlib import Path

import pytest

from mm_cb import cli
from mm_cb.cli import signals
from mm_cb.core.runs import write_jsonl
from mm_cb.miniature import data

ASKED = [{"id": word, "prompt": f"is the {word} forbidden ?", "category": "c"} for word in ("tonic", "oil")]
ON = ["--model", "miniature"]
SHORT = ["--batch", "1", "--max-new-tokens", "2"]
COMMANDS = {
    "train": ["train", "miniature", "--out", "rr", "training.max_steps=2", "training.save_steps=1"],
    "attack": ["attack", *ON, "--behaviors", "b/behaviors.jsonl", "--out", "run", "--steps", "2", *SHORT],
    "eval": ["eval", "over-refusal", *ON, "--data", "asked.jsonl", "--out", "kept", *SHORT],
    "judge": ["judge", "judged", "--judge", "miniature", "--behaviors", "b/behaviors.jsonl"],
    "report": ["report", "run", "--out", "page/page.html"],
    "merge": ["merge", *ON, "--adapter", "rr", "--out", "merged"],
    "data build": ["data", "build", "benign", "--behaviors", "b/behaviors.jsonl", "--out", "benign"],
}
MADE = {"train": "rr", "attack": "run", "eval": "kept", "judge": "judged", "report": "page", "merge": "merged"}
MADE["data build"] = "benign"
NEEDS = {"judge": ["attack"], "report": ["attack"], "merge": ["train"]}
WHEN = ("started", "ended", "resumed", "git", "versions", "seal")
EACH = [pytest.param(name, marks=pytest.mark.long if name in ("train", "merge") else ()) for name in COMMANDS]
ENDING = {signal.SIGINT: 130, signal.SIGTERM: 143, signal.SIGHUP: 129}


@pytest.fixture(scope="module")
def calm(tmp_path_factory):
    """A folder in which a command, and what it needs, has come to its end undisturbed."""
    folder = tmp_path_factory.mktemp("calm")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        data.write_behaviors(data.behaviors((2, 0, 0)), Path("b"))
        write_jsonl(Path("asked.jsonl"), ASKED)

    def made(command):
        if not (folder / MADE[command]).exists():
            for needed in NEEDS.get(command, ()):
                made(needed)
            with pytest.MonkeyPatch.context() as patch:
                patch.chdir(folder)
                if command == "judge":
                    shutil.copytree("run", "judged")
                assert cli.run(COMMANDS[command]) == 0
        return folder

    return made


@pytest.fixture
def beside(calm, tmp_path, monkeypatch):
    """A folder with what one command reads, and nothing of what it writes."""

    def prepare(command):
        shutil.copytree(calm(command), tmp_path, dirs_exist_ok=True)
        shutil.rmtree(tmp_path / MADE[command])
        if command == "judge":
            shutil.copytree(tmp_path / "run", tmp_path / "judged")
        monkeypatch.chdir(tmp_path)
        return tmp_path / MADE[command]

    return prepare


@pytest.fixture
def writes(monkeypatch):
    """What is called before anything is on the disk, with the kind of its file."""
    called = []
    fsync = os.fsync

    def counted(descriptor):
        if stat.S_ISREG(os.fstat(descriptor).st_mode):
            called[0](_kind(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def saved(save, place):
        def half_saved(*args, **options):
            path = next(one for one in (*args[place:], *options.values()) if isinstance(one, str | Path))
            Path(path).write_bytes(b"half")
            called[0](_kind(str(path)))
            return save(*args, **options)

        return half_saved

    monkeypatch.setattr(os, "fsync", counted)
    for module, name in (("peft.peft_model", "safe_save_file"), ("transformers.modeling_utils", "safe_save_file")):
        there = getattr(__import__(module, fromlist=[name]), name)
        monkeypatch.setattr(f"{module}.{name}", saved(there, 1))
    import torch

    monkeypatch.setattr(torch, "save", saved(torch.save, 1))
    return called


def _kind(path):
    """One for all pictures, all checkpoints."""
    folder, _, name = path.rpartition("/")
    name = re.sub(r"\.([a-z0-9_]{8}|\d+)\.mm-cb-tmp$|\.[a-z0-9_]{8}$", "", name.removeprefix("."))
    return re.sub(r"\d+", "#", f"{Path(folder).name}/{name}")


def content(made):
    """The bytes of all that was made, without when and how fast."""
    found = {}
    for path in sorted(path for path in made.rglob("*") if path.is_file() and path.name != ".lock"):
        held = path.read_bytes()
        if path.name == "run.json":
            held = {key: value for key, value in json.loads(held).items() if key not in WHEN}
        if path.name == "timings.jsonl":
            held = b""
        if path.suffix == ".html":
            held = re.sub(rb"\d\d:\d\d|\d+(\.\d+)? s\b", b"", held)
        found[str(path.relative_to(made))] = held
    return found


def begun_again(arguments, called, fault):
    """Repeat a command until nothing of it fails; returns what failed, in order."""
    met = []

    def each_once(kind):
        if kind not in met:
            met.append(kind)
            fault(len(met))

    called[:] = [each_once]
    while True:
        before = len(met)
        code = cli.run(arguments)
        if len(met) == before:
            assert code == 0
            return met
        yield code


def ends_alike(command, beside, calm, writes, fault, check):
    writes[:] = [lambda kind: None]
    made = beside(command)
    repeats = begun_again(COMMANDS[command], writes, fault)
    count = 0
    for count, code in enumerate(repeats, start=1):
        check(count, code)
    assert count and content(made) == content(calm(command) / MADE[command])


@pytest.mark.parametrize("command", EACH)
def test_a_full_disk_at_every_write_is_one_line_and_loses_nothing(command, beside, calm, writes, capsys):
    def full(number):
        raise OSError(errno.ENOSPC, "No space left on device")

    def check(number, code):
        said = capsys.readouterr().err
        assert code == 2 and "disk is full" in said and "Traceback" not in said
        assert said.strip().splitlines()[-1].startswith("mm-cb: ")

    ends_alike(command, beside, calm, writes, full, check)


@pytest.mark.parametrize("command", EACH)
def test_a_signal_at_every_write_says_how_to_go_on(command, beside, calm, writes, capsys, monkeypatch):
    before = {number: signal.getsignal(number) for number in ENDING}
    numbers = list(ENDING)

    def send(number):
        os.kill(os.getpid(), numbers[number % 3])

    def ready():
        for number in signals.ENDING:
            signal.signal(number, signal.SIG_DFL)
        monkeypatch.setattr(signals, "_received", [])
        signals.listen()

    def check(number, code):
        said = capsys.readouterr().err
        assert code == ENDING[numbers[number % 3]]
        assert said.strip().splitlines()[-1].partition("; run the same command again to go on: mm-cb ")[1]
        ready()

    try:
        ready()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        ends_alike(command, beside, calm, writes, send, check)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
