"""Runs that an earlier revision made: today's code opens them, and makes them again."""

import json
import shutil
from pathlib import Path

import pytest
from PIL import Image

from mm_cb import cli
from mm_cb.core.runs import read_jsonl, write_jsonl
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


OTHER_BITS = ("train",)
"""Since its adversary's passes leave the adapter's dropout out, a training ends in other weights."""


@pytest.mark.slow
def test_the_runs_made_again_are_the_frozen_ones(made):
    exact = json.loads((KEPT / "machine.json").read_text()) == machine()
    compare = {"check": battery_difference}
    found = {
        name: compare.get(name, first_difference)(KEPT / name, made / name, exact=exact and name not in OTHER_BITS)
        for name in NAMES
    }
    lines = [f"{name}/{difference}" for name, difference in found.items() if difference]
    how = "bit for bit, as on the machine that made them" if exact else "by structure: this is another machine"
    assert not lines, "\n".join([f"compared {how}; the first difference of each run that has one:", *lines])


@pytest.mark.parametrize(
    ("file", "edit"),
    [
        ("items.jsonl", lambda text: text.replace('"loss": ', '"loss": 9', 1)),
        ("items.jsonl", lambda text: text.replace('"completion": "', '"completion": "oh ', 1)),
        ("results.json", lambda text: text.replace('"value": 0.0', '"value": 1.0', 1)),
    ],
)
@pytest.mark.parametrize("exact", [True, False])
def test_a_planted_difference_is_found_on_this_machine_and_on_others(tmp_path, file, edit, exact):
    planted = shutil.copytree(KEPT / "attack-base", tmp_path / "run")
    assert first_difference(KEPT / "attack-base", planted, exact=exact) is None
    text = (planted / file).read_text(encoding="utf-8")
    assert edit(text) != text
    (planted / file).write_text(edit(text), encoding="utf-8")
    assert file in first_difference(KEPT / "attack-base", planted, exact=exact)


def test_a_loss_that_is_off_by_a_ten_thousandth_is_found_on_this_machine(tmp_path):
    planted = shutil.copytree(KEPT / "attack-base", tmp_path / "run")
    items = read_jsonl(planted / "items.jsonl")
    items[-1]["loss"] += 1e-4
    write_jsonl(planted / "items.jsonl", items)
    assert ", loss: " in first_difference(KEPT / "attack-base", planted, exact=True)


@pytest.mark.parametrize("exact", [True, False])
def test_another_clean_picture_is_found_on_this_machine_and_on_others(tmp_path, exact):
    planted = shutil.copytree(KEPT / "attack-base", tmp_path / "run")
    clean = sorted((planted / "images").glob("*.clean.png"))[0]
    with Image.open(clean) as image:
        image.point(lambda value: 255 - value).save(clean)
    assert ".clean.png" in first_difference(KEPT / "attack-base", planted, exact=exact)
