"""Gathering shards: everything is read before anything is written."""

import json
import shutil
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from mm_cb.attacks import shards
from mm_cb.attacks.shards import Shard, gather, shard_runs
from mm_cb.core.errors import UserError
from mm_cb.core.runs import RunDirectory
from mm_cb.data.behaviors_file import kept_behaviors
from mm_cb.metrics.results import read_results, write_results

FROZEN = Path(__file__).parent.parent / "frozen" / "714213b" / "attack"
SECOND = "shards/0002-of-0002"


@pytest.fixture
def run(tmp_path):
    """A run whose shards are finished and not gathered."""
    out = tmp_path / "run"
    shutil.copytree(FROZEN / "shards", out / "shards")
    for name in ("run.json", "behaviors.jsonl"):
        shutil.copyfile(FROZEN / name, out / name)
    return out


def edit(path, change):
    lines = path.read_text().splitlines() if path.suffix == ".jsonl" else [path.read_text()]
    path.write_text("\n".join([*lines[:-1], json.dumps(change(json.loads(lines[-1])))]) + "\n")


def items(**fields):
    return lambda run: edit(run / SECOND / "items.jsonl", lambda item: item | fields)


def counted_before(damage):
    """As this version counts a shard: its results hold the hash of its items."""

    def damaged(run):
        write_results(run / SECOND / "results.json", read_results(run / SECOND / "results.json"))
        damage(run)

    return damaged


def parts(change):
    return lambda run: edit(run / SECOND / "parts" / "pgd-s0-r0-0000.json", change)


def test_the_frozen_shards_gather_to_the_frozen_run(run):
    assert gather(run, kept_behaviors(run))
    for name in ("items.jsonl", "curves.json"):
        assert json.loads((run / name).read_text().splitlines()[0]) if name == "items.jsonl" else True
        assert (run / name).read_bytes() == (FROZEN / name).read_bytes(), name
    checks, before = (json.loads((folder / "checks.json").read_text()) for folder in (run, FROZEN))
    assert (before[0].pop("value"), checks[0].pop("value")) == (  # which counted the 8 clean pictures too
        "largest change 32/255 in 24 files",
        "largest change 32/255 in 16 files",
    )
    assert checks == before


@pytest.mark.parametrize(
    ("damage", "expected"),
    [
        (items(id="another"), "it lacks 1"),
        (items(image="images/none.png"), "images/none.png"),
        (items(image="../../../run.json"), "must lie inside"),
        (items(condition="unheard_of"), "it lacks 2"),
        (items(candidates=[]), "`candidates` must hold at least one try"),
        (items(candidates=[{"completion": 3}]), "completion"),
        (items(target=None), "`target` must be a text"),
        (items(loss_clean="0.5"), "`loss_clean` must be a number"),
        (parts(lambda records: records[0]), "must hold a JSON list"),
        (parts(lambda records: [records[0] | {"curve": "0.1"}]), "`curve` must be a list"),
        (parts(lambda records: [*records, records[0] | {"curve": [0.5]}]), "loss curves of one length"),
        (lambda run: (run / SECOND / "parts" / "pgd-s0-r0-0000.json").write_bytes(b"\xff["), "UTF-8"),
        (lambda run: (run / SECOND / "items.jsonl").write_text(""), "it is empty"),
        (counted_before(items(completion="yes")), r"items\.jsonl` was changed after it was written"),
        (lambda run: edit(run / "run.json", lambda held: held | {"recipe": {}}), "it lacks"),
        (lambda run: edit(run / "run.json", lambda held: held | {"recipe": held["recipe"] | {"dtype": "f"}}), "dtype"),
    ],
)
def test_a_damaged_shard_is_refused_with_nothing_written(run, damage, expected):
    behaviors = kept_behaviors(run)
    damage(run)
    before = {path for path in run.rglob("*")}
    with pytest.raises(UserError, match=expected):
        gather(run, behaviors)
    assert {path for path in run.rglob("*")} == before


def test_shards_that_start_together_all_get_their_part(tmp_path, monkeypatch):
    """Each waits for as many as there are: 256 on a slow disk are no reason to give up."""
    opened = RunDirectory.open

    def slow(self):
        run = opened(self)
        time.sleep(0.05 * (self.path == out))
        return run

    def begin(index):
        with shard_runs(out, {}, 0, {}, Shard(index, 24)) as run:
            return run.path.name

    out = tmp_path / "run"
    monkeypatch.setattr(RunDirectory, "open", slow)
    monkeypatch.setattr(shards, "_WAIT_SECONDS", 0.3)
    with ThreadPoolExecutor(24) as pool:
        assert list(pool.map(begin, range(1, 25))) == [f"{index:04d}-of-0024" for index in range(1, 25)]
