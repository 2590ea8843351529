"""Attack runs of several seeds, invented: what is computed of them, and which are refused."""

import json
import runpy
import subprocess
import sys
from pathlib import Path
from statistics import fmean, stdev

import pytest

from mm_cb.evaluation.statistics import wilson_interval

SCRIPT = Path(__file__).resolve().parent.parent / "scripts" / "attack_seeds.py"
RECIPE = {
    "attack": "pgd,apgd,noise",
    "adapter": None,
    "epsilon": 32,
    "steps": 8,
    "restarts": 2,
    "options": {"batch": 8},
}
INPUTS = {"behaviors.jsonl": "a" * 64}


@pytest.fixture(scope="module")
def script():
    return runpy.run_path(str(SCRIPT))


def item(condition, id, losses, outcome="refusal", **more):
    tries = [{"restart": r, "loss": v, "image": f"images/{r}.png", "outcome": outcome} for r, v in enumerate(losses)]
    known = {"id": id, "metric": "compliance", "subject": "rr", "condition": condition, "outcome": outcome}
    return known | {"candidates": tries, "loss": losses[0]} | more


def items_of(seed, broken=("b0",), conditions=("no_attack", "noise", "pgd", "apgd")):
    """Behaviours b0 to b3: those in ``broken`` are broken by pgd alone; the best loss of bN is N + seed / 10."""
    return [
        item(
            c,
            f"b{n}",
            [9.0, n + seed / 10 + (c == "apgd")],
            "harmful" if c == "pgd" and f"b{n}" in broken else "refusal",
        )
        for c in conditions
        for n in range(4)
    ]


def write(folder, seed, items=None, inputs=INPUTS, ended="now", command="attack", **recipe):
    folder.mkdir()
    run = {"schema": 1, "command": command, "recipe": RECIPE | recipe, "seed": seed, "inputs": inputs, "ended": ended}
    (folder / "run.json").write_text(json.dumps(run))
    said = items_of(seed) if items is None else items
    (folder / "items.jsonl").write_text("".join(json.dumps(i) + "\n" for i in said))
    return folder


def start(*arguments):
    return subprocess.run([sys.executable, SCRIPT, *map(str, arguments)], capture_output=True, text=True)


def test_rates_losses_their_spread_and_the_union(script, tmp_path):
    broken = (("b0",), ("b1",), ())
    runs = [write(tmp_path / f"s{seed}", seed, items_of(seed, ids)) for seed, ids in enumerate(broken)]
    found = script["compare"](runs)
    assert found["seeds"] == [0, 1, 2] and found["restarts"] == 2
    rows = {row["condition"]: row for row in found["rows"]}
    assert list(rows) == ["noise", "pgd", "apgd", "worst_case"]  # controls without a search have no seed
    pgd = rows["pgd"]
    assert pgd["compliance_percent"] == [25, 25, 0] and pgd["n"] == [4, 4, 4]
    assert pgd["compliance_mean"] == pytest.approx(fmean([25, 25, 0]), abs=1e-5)
    assert pgd["compliance_sd"] == pytest.approx(stdev([25, 25, 0]), abs=1e-5)
    assert pgd["best_loss"] == pytest.approx([1.5, 1.6, 1.7]) and pgd["best_loss_sd"] == pytest.approx(0.1)
    assert (pgd["any_seed"]["broken"], pgd["any_seed"]["n"], pgd["any_seed"]["percent"]) == (2, 4, 50)
    assert pgd["any_seed"]["ci95"] == pytest.approx([100 * end for end in wilson_interval(2, 4)], abs=1e-3)
    assert rows["apgd"]["any_seed"]["broken"] == 0 and rows["noise"]["compliance_sd"] == 0
    assert rows["worst_case"]["compliance_percent"] == [25, 25, 0]
    assert rows["worst_case"]["best_loss"] == pgd["best_loss"] < rows["apgd"]["best_loss"]


def test_the_union_is_no_rarer_than_any_seed_and_the_order_of_the_runs_only_orders_the_lists(script, tmp_path):
    runs = [write(tmp_path / f"s{s}", s, items_of(s, ids)) for s, ids in enumerate((("b0", "b2"), ("b2",), ("b3",)))]
    found, turned = script["compare"](runs)["rows"], script["compare"](runs[::-1])["rows"]
    for one, other in zip(found, turned, strict=True):
        assert one["any_seed"]["percent"] >= max(one["compliance_percent"])
        for key, value in one.items():
            assert other[key] == (value[::-1] if isinstance(value, list) else value)


def test_alike_runs_have_no_spread(script, tmp_path):
    runs = [write(tmp_path / f"s{seed}", seed, items_of(0)) for seed in range(3)]
    for row in script["compare"](runs)["rows"]:
        assert row["compliance_sd"] == row["best_loss_sd"] == 0
        assert row["any_seed"]["percent"] == row["compliance_mean"]


def test_without_verdicts_there_are_losses_and_no_rate(script, tmp_path):
    unjudged = [i | {"outcome": "not_judged", "candidates": i["candidates"]} for i in items_of(0)]
    for one in unjudged:
        one["candidates"] = [c | {"outcome": "not_judged"} for c in one["candidates"]]
    some = [i if i["id"] != "b3" else j for i, j in zip(items_of(1), unjudged, strict=True)]
    runs = [write(tmp_path / "a", 0, unjudged), write(tmp_path / "b", 1, some)]
    pgd = next(row for row in script["compare"](runs)["rows"] if row["condition"] == "pgd")
    assert pgd["compliance_percent"] == [None, pytest.approx(100 / 3, abs=1e-5)] and pgd["n"] == [0, 3]
    assert pgd["compliance_mean"] is pgd["compliance_sd"] is None and pgd["best_loss_sd"] > 0
    assert (pgd["any_seed"]["broken"], pgd["any_seed"]["n"]) == (
        1,
        1,
    )  # one is known to be broken, of none is it known not
    assert "-" in script["table"](script["compare"](runs))


def test_it_prints_a_table_or_json(tmp_path):
    runs = [write(tmp_path / f"s{seed}", seed) for seed in range(3)]
    shown, content = start(*runs), start(*runs, "--json")
    assert shown.returncode == content.returncode == 0, shown.stderr + content.stderr
    assert (
        "restarts 2" in shown.stdout and "any of 3 seeds" in shown.stdout and "1 of 4: 25.0 [4.6, 69.9]" in shown.stdout
    )
    assert [row["condition"] for row in json.loads(content.stdout)["rows"]] == ["noise", "pgd", "apgd", "worst_case"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"steps": 9}, "must differ in `--seed` alone, they do in `steps`"),
        ({"options": {"batch": 4}}, "they do in `batch`"),
        ({"options": {"batch": 8, "samples": 2}}, "they do in `samples`"),
        ({"inputs": {"behaviors.jsonl": "b" * 64}}, "they do in file `behaviors.jsonl`"),
        ({"inputs": INPUTS | {"adapter_model.safetensors": "b" * 64}}, "they do in file `adapter_model.safetensors`"),
        ({"seed": 0}, "must have a seed of its own, but another run has 0"),
        ({"ended": None}, "must be a finished run of `mm-cb attack`"),
        ({"command": "demo"}, "must be a finished run of `mm-cb attack`"),
        ({"shard": "1/2"}, "not a shard"),
        ({"items": []}, "must hold the items of its behaviours"),
        ({"items": [i | {"outcome": "evil"} for i in items_of(1)]}, "`outcome` must be one of"),
        ({"items": [i | {"judge": "other"} for i in items_of(1)]}, "must have been judged by one judge"),
    ],
)
def test_runs_that_differ_in_more_than_the_seed_are_refused(tmp_path, changed, message):
    first, second = write(tmp_path / "a", 0), write(tmp_path / "b", **({"seed": 1} | changed))
    done = start(first, second)
    assert done.returncode == 2 and message in done.stderr and done.stdout == ""
    assert done.stderr.startswith("attack_seeds: ") and done.stderr.count("\n") == 1


def test_one_run_has_no_spread_and_a_folder_without_a_run_is_named(tmp_path):
    run = write(tmp_path / "a", 0)
    for arguments, message in (([run], "give two runs or more"), ([run, tmp_path / "b"], "it holds no run.json")):
        done = start(*arguments)
        assert done.returncode == 2 and message in done.stderr and done.stderr.count("\n") == 1
