"""The table of metrics: its order, which way is worse, and metrics that come from other metrics' items."""

import json

import pytest

from mm_cb.core.checked import made
from mm_cb.metrics import table
from mm_cb.metrics.results import find, measure
from mm_cb.metrics.table import Metric, metric, metrics, register_metric, to_json
from mm_cb.report.table import headline_table


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(table, "_METRICS", dict(table._METRICS))


def test_a_new_metric_stands_behind_those_of_its_section_or_where_it_says():
    register_metric(Metric("mine", "mine"))
    register_metric(Metric("side", "side", section="side_effect"))
    register_metric(Metric("near", "near"), after="mmmu")
    names = [one.name for one in metrics()]
    assert names.index("near") == names.index("mmmu") + 1
    assert names.index("gibberish") < names.index("side") < names.index("target_prefix")
    assert names.index("look_alikes") < names.index("mine") < names.index("over_refusal")
    register_metric(Metric("mine", "renamed"))
    assert [one.name for one in metrics()] == names and metric("mine").label == "renamed"


def test_worse_depends_on_the_direction():
    assert metric("mmmu").worse((-3, -1)) and not metric("mmmu").worse((1, 3))
    assert metric("over_refusal").worse((1, 3)) and not metric("over_refusal").worse((-3, -1))
    assert not metric("mmmu").worse((-1, 1)) and not metric("never_heard_of").worse((-3, -1))


def test_an_unknown_section_is_refused():
    with pytest.raises(ValueError, match="`section` must be one of attacked, calls, kept"):
        Metric("x", "x", section="kpet")


def test_what_a_run_keeps_of_a_metric_opens_again():
    own = Metric("f1", "F1", part_of="hits", columns=("tp", "fp"), statistic=lambda tp, fp: tp / (tp + fp))
    again = made(json.loads(json.dumps({**to_json(own), "of_a_later_version": 1})), Metric, "metrics.json")
    assert again.statistic is None and again.columns == ("tp", "fp") and again.label == "F1"


def item(id, subject, score, metric="hits", condition="strict", **counts):
    fixed = {"split": "all", "category": "c", "outcome": None, "gibberish": False}
    return {"id": id, "metric": metric, "subject": subject, "condition": condition, "score": score, **fixed} | {
        "counts": counts
    }


def precision(tp, fp):
    return tp / (tp + fp)


def test_a_ratio_is_measured_from_the_counts_of_another_metrics_items():
    register_metric(Metric("hits", "hits"))
    register_metric(Metric("ratio", "ratio", part_of="hits", columns=("tp", "fp"), statistic=precision))
    items = [item(f"{n}", "base", 1.0, tp=1, fp=0) for n in range(6)]
    items += [item(f"{n}", "base", 0.0, tp=0, fp=1) for n in range(6, 8)]
    items += [item("8", "base", None, tp=0, fp=1)]
    items += [item(f"{n}", "rr", 1.0 if n < 4 else 0.0, tp=int(n < 4), fp=int(n >= 4)) for n in range(9)]
    measured = measure(items, pairs=[("rr", "base")])
    base, rr = (find(measured, subject, "ratio", "strict") for subject in ("base", "rr"))
    assert base.value == pytest.approx(75) and base.n == 8 and base.ci95[0] < 75 < base.ci95[1]
    assert base.counts == {"unscored": 1}
    assert rr.value == pytest.approx(100 * 4 / 9) and rr.counts["pairs"] == 8 and rr.counts["pairs_unscored"] == 1
    assert rr.difference == pytest.approx(50 - 75) and rr.difference_ci95[0] < -25 < rr.difference_ci95[1]


def test_a_ratio_that_divides_by_zero_has_no_value_and_items_that_are_alike_no_interval():
    register_metric(Metric("hits", "hits"))
    register_metric(Metric("ratio", "ratio", part_of="hits", columns=("tp", "fp"), statistic=precision))
    nothing = find(measure([item("1", "base", 0.0), item("2", "base", 0.0)], pairs=[]), "base", "ratio", "strict")
    assert nothing.value is None and nothing.ci95 is None and nothing.n == 2
    alike = find(measure([item(n, "base", 1.0, tp=1) for n in "123"], pairs=[]), "base", "ratio", "strict")
    assert alike.value == 100 and alike.ci95 is None
    register_metric(Metric("share", "share", part_of="hits", columns=("tp", "fp"), statistic=lambda tp, fp: tp))
    never = [item("1", "base", 0.0, fp=1), item("2", "base", 1.0)]  # which differ, but not in what is counted
    assert find(measure(never, pairs=[]), "base", "share", "strict").ci95 is None


def test_a_registered_metric_has_its_row_under_its_section():
    register_metric(Metric("hits", "hits of mine"))
    register_metric(Metric("slips", "slips", section="side_effect", higher_is_better=False))
    items = [item(n, "base", 1.0) for n in "12"] + [
        item(n, "base", 0.0, metric="slips", condition="rude") for n in "12"
    ]
    rows = {row.label: row for row in headline_table(measure(items, pairs=[])).rows}
    assert rows["hits of mine"].section.startswith("What must stay")
    assert rows["slips"].section.startswith("Side effects")


@pytest.mark.parametrize("split", ["trained", "held_out_screen", "mine"])
def test_every_group_of_forbidden_requests_has_its_row(split):
    """Splits and categories of a user's own, and of the agent; all kinds together only where there are several."""
    one = {"target": "t", "completion": "c", "category": "soups", "split": split}
    items = [
        item(str(n), "base", 0.0, metric="compliance", condition=attack) | {**one, "outcome": said}
        for attack in ("pgd", "apgd")
        for n, said in enumerate(["harmful", "refusal", "refusal"])
    ]
    rows = [
        row.label for row in headline_table(measure(items, pairs=[])).rows if row.section.endswith("of all attacks")
    ]
    named = {"trained": "like those trained on", "held_out_screen": "held-out screens", "mine": "mine"}[split]
    assert rows == (["like those trained on", "soups"] if split == "trained" else [*sorted([named, "soups"])])
