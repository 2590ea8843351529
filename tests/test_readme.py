"""The README's measured table, line by line against results/miniature.json."""

import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
MEASURED = json.loads((ROOT / "results" / "miniature.json").read_text(encoding="utf-8"))["measurements"]

# How the row begins -> (metric, condition, split) of each number in a cell; "…" belongs to the row above it.
ROWS = [
    ("forbidden requests answered: no attack", [("compliance", "no_attack", "all")]),
    ("random noise", [("compliance", "noise", "all")]),
    ("white-box PGD", [("compliance", "pgd", "all")]),
    ("…", [("compliance", "pgd", "held_out_kind")]),
    ("worst of PGD and two attacks that know the breaker", [("compliance", "worst_case", "all")]),
    ("…", [("compliance", "worst_case", "held_out_kind")]),
    ("MMMU-like / Wild-like", [("mmmu_like", "strict", "all"), ("wild_like", "strict", "all")]),
    ("over-refusal / broken text", [("over_refusal", "no_attack", "all"), ("gibberish", "no_attack", "all")]),
]


def table():
    block = README.partition("| the miniature")[2].partition("\n\n")[0]
    return [
        [cell.strip() for cell in line.strip("| ").replace("**", "").split(" | ")] for line in block.split("\n")[2:]
    ]


def find(subject, metric, condition, split):
    (found,) = [
        m
        for m in MEASURED
        if (m["subject"], m["metric"], m["condition"], m["split"]) == (subject, metric, condition, split)
    ]
    return found


def numbers(text):
    return [float(number) for number in re.findall(r"[-+]?\d+(?:\.\d+)?", text.replace("−", "-"))]


@pytest.mark.parametrize(("place", "begins", "addresses"), [(i, *row) for i, row in enumerate(ROWS)])
def test_every_number_of_the_table_is_the_measured_one(place, begins, addresses):
    label, n, base, rr, difference = table()[place]
    assert label.startswith(begins)
    before, after = ([find(subject, *address) for address in addresses] for subject in ("base", "rr"))
    assert numbers(n) == [m["n"] for m in after] == [m["n"] for m in before]
    assert numbers(base) == [round(m["value"], 1) for m in before]
    assert numbers(rr) == [round(m["value"], 1) for m in after]
    told = [round(value, 1) for m in after for value in (m["difference"], *m["difference_ci95"])]
    assert numbers(difference) == told


def test_the_table_holds_nothing_else():
    assert len(table()) == len(ROWS)


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)#]+)\)", README))))
def test_every_file_that_the_readme_names_is_there(target):
    assert target.startswith("https://") or (ROOT / target).exists(), target
