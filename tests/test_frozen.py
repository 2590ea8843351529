"""Runs that an earlier revision made: today's code opens them, and makes them again."""

import json
import shutil
from pathlib import Path

import pytest

from mm_cb import cli
from tests.frozen.compare import battery_difference, first_difference
from tests.frozen.make import NAMES, machine, make

KEPT = Path(__file__).parent / "frozen" / "714213b"
PAGES = [
    ("attack-base", "attack", "check", "mmmu-base", "mmmu", "llava-wild", "over-refusal", "beside"),
    ("transfer",),
    ("judged",),
]
"""Runs that go on one page; the others measure the same items of the same subject."""


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    """A copy, so that what opens a run may write there."""
    return shutil.copytree(KEPT, tmp_path_factory.mktemp("kept") / "runs")


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    out = tmp_path_factory.mktemp("made") / "runs"
    make(out, breaker=KEPT / "train")
    return out


def test_recorded_paths_are_relative():
    texts = [path for path in KEPT.rglob("*") if path.suffix in (".json", ".jsonl", ".md")]
    assert texts and not [path for path in texts if '"/' in path.read_text(encoding="utf-8")]


def test_every_run_is_on_a_page_or_trained_an_adapter():
    folders = {path.name for path in KEPT.iterdir() if path.is_dir()}
    assert folders == set(NAMES) == {"train", *(name for page in PAGES for name in page)}


@pytest.mark.parametrize("page", PAGES, ids="+".join)
def test_a_page_is_made_of_frozen_runs(page, kept, tmp_path):
    target = tmp_path / "page.html"
    assert cli.run(["report", *(str(kept / name) for name in page), "--out", str(target)]) == 0
    assert target.stat().st_size > 10_000


@pytest.mark.parametrize(("name", "adapter"), [("attack", "train"), ("attack-base", None), ("judged", None)])
def test_a_frozen_attack_is_verified(name, adapter, kept):
    where = ["--model", "miniature", *(["--adapter", str(kept / adapter)] if adapter else [])]
    assert cli.run(["attack", "verify", str(kept / name), *where]) == 0


@pytest.mark.slow
def test_the_runs_made_again_are_the_frozen_ones(made):
    exact = json.loads((KEPT / "machine.json").read_text()) == machine()
    compare = {"check": battery_difference}
    found = {name: compare.get(name, first_difference)(KEPT / name, made / name, exact=exact) for name in NAMES}
    lines = [f"{name}/{difference}" for name, difference in found.items() if difference]
    how = "bit for bit, as on the machine that made them" if exact else "by structure: this is another machine"
    assert not lines, "\n".join([f"compared {how}; the first difference of each run that has one:", *lines])
