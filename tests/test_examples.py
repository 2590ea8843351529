"""The files of data/examples, each run by the command that stands beside it."""

import json
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from mm_cb import cli
from mm_cb.models import load_model

ROOT = Path(__file__).resolve().parents[1]
EXAMPLES = ROOT / "data" / "examples"
PAGE = (EXAMPLES / "README.md").read_text(encoding="utf-8")
ROWS = [line.strip("| ").split(" | ") for line in PAGE.splitlines() if line.startswith("| `")]
AFTER = re.findall(r"^mm-cb .*$", PAGE.partition("Then:")[2], flags=re.MULTILINE)


@pytest.fixture(scope="module")
def checkout(tmp_path_factory):
    """A folder where the commands' relative paths lead to the examples, and where their runs stay."""
    folder = tmp_path_factory.mktemp("examples")
    (folder / "data").mkdir()
    (folder / "data" / "examples").symlink_to(EXAMPLES)
    return folder


def run(line, folder, monkeypatch):
    monkeypatch.chdir(folder)
    words = shlex.split(line.strip("`"))
    assert words[0] == "mm-cb" and cli.run(words[1:]) == 0


@pytest.mark.parametrize("command", [row[2] for row in ROWS], ids=[row[0].strip("`") for row in ROWS])
def test_the_command_beside_an_example_reads_it(command, checkout, monkeypatch):
    run(command, checkout, monkeypatch)


def test_what_follows_runs_on_their_runs(checkout, monkeypatch):
    for command in AFTER:
        run(command, checkout, monkeypatch)
    assert (checkout / "report.html").is_file()


def test_every_example_has_its_row():
    named = {row[0].strip("`/") for row in ROWS} | {"README.md", "pictures", "images"}
    assert named == {path.name for path in EXAMPLES.iterdir()}


def test_the_request_that_is_shown_has_no_word_that_the_miniature_does_not_know():
    (shown,) = re.findall(r"^{.*}$", PAGE, flags=re.MULTILINE)
    tokenizer = load_model("miniature").processor.tokenizer
    for text in (json.loads(shown)[key] for key in ("prompt", "target")):
        assert tokenizer.unk_token_id not in tokenizer(text).input_ids


def test_the_lines_for_a_model_of_text_alone_are_those_without_a_picture(checkout):
    commands = re.findall(r"^grep .*$", PAGE, flags=re.MULTILINE)
    for command in commands:
        subprocess.run(["bash", "-c", command], cwd=checkout, check=True)
        source, made = (checkout / name for name in re.findall(r"\S+\.jsonl", command))
        every = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
        kept = [json.loads(line) for line in made.read_text(encoding="utf-8").splitlines()]
        assert kept == [one for one in every if not one.get("image")] and 0 < len(kept) < len(every)
    assert len(commands) == 2
