"""The paired comparison of what attacks reached: over which tries, on which items, and where it shows on the page."""

import numpy as np
import pytest

from mm_cb.metrics.statistics import holm, wilcoxon_signed_rank
from mm_cb.report import write_report
from mm_cb.report.comparisons import loss_table


def tried(restart, loss, **more):
    return {"restart": restart, "loss": loss, "image": f"images/r{restart}.png", **more}


def item(subject, id, *candidates, condition="pgd", **more):
    known = {"id": id, "metric": "compliance", "subject": subject, "condition": condition}
    return known | {"candidates": list(candidates), "loss": 9.0} | more


def test_only_tries_that_both_made_are_compared():
    """The base was broken at once and is not attacked again: the subject's later tries must not count either."""
    (row,) = loss_table([item("base", "a", tried(0, 0.5)), item("rr", "a", tried(0, 2.0), tried(1, 0.1))])
    assert (row.pairs, row.base, row.this, row.difference, row.p) == (1, 0.5, 2.0, 1.5, 1.0)
    (row,) = loss_table(
        [item("base", "a", tried(0, 0.5), tried(1, 0.4)), item("rr", "a", tried(0, 2.0), tried(1, 0.1))]
    )
    assert (row.base, row.this) == (0.4, 0.1)


def test_iterates_count_and_drawn_answers_and_relaxations_do_not():
    base = item("base", "a", tried(0, 0.5), tried(0, 0.3, iterate=5), tried(0, 0.2, iterate=9))
    rr = item("rr", "a", tried(0, 2.0), tried(0, 1.5, iterate=5), tried(0, 0.01, sample=1))
    (row,) = loss_table([base, rr])
    assert (row.base, row.this) == (0.3, 1.5)
    embedded = [item(s, "a", tried(0, 0.1) | {"image": None}, condition="embedding") for s in ("base", "rr")]
    assert loss_table(embedded) == []


def test_an_item_that_lists_no_tries_counts_with_its_own_loss():
    own = [item(s, "a", loss=loss) for s, loss in (("base", 0.5), ("rr", 0.7))]
    assert loss_table(own)[0].difference == pytest.approx(0.2)
    assert loss_table([own[0], item("rr", "a", tried(0, 0.7))]) == []  # nobody knows which tries they share
    assert loss_table([own[0], item("rr", "a", loss=None)]) == []


def test_the_test_is_of_differences_by_behaviour_and_holm_covers_the_list():
    rng = np.random.default_rng(0)
    items, expected = [], []
    for condition, shift in (("pgd", 0.8), ("noise", 0.0), ("apgd", 0.1)):
        base = rng.uniform(1, 2, 20).round(5)
        rr = base[::-1] + shift  # without the shift every difference has its mirror image: p is 1
        items += [item("base", f"b{i}", tried(0, v), condition=condition) for i, v in enumerate(base)]
        items += [item("rr", f"b{i}", tried(0, rr[i]), condition=condition) for i in rng.permutation(20)]
        expected.append(wilcoxon_signed_rank(rr - base))
    rows = loss_table(items)
    assert [row.condition for row in rows] == ["pgd", "noise", "apgd"]
    assert [row.p for row in rows] == pytest.approx(expected)
    assert [row.adjusted for row in rows] == holm([row.p for row in rows])
    assert rows[0].adjusted < 0.05 and rows[1].p == 1


def test_equal_losses_differ_in_nothing():
    both = [(s, f"b{i}", 0.1 * i) for i in range(1, 9) for s in ("base", "rr")]
    (row,) = loss_table([item(s, id, tried(0, loss)) for s, id, loss in both])
    assert (row.pairs, row.difference, row.p) == (8, 0, 1)


def test_differences_that_are_alike_in_the_files_digits_are_ties():
    """0.4 - 0.1 and 0.9 - 0.6 are not one number in floating point; ranked apart they would give another p."""
    signs = [1, 1, -1, 1, -1, 1, 1, 1, 1, 1, 1, 1]
    losses = [(f"b{i}", 0.1 * i + 1, 0.1 * i + 1 + 0.3 * sign) for i, sign in enumerate(signs)]
    (row,) = loss_table(
        [item(s, id, tried(0, v)) for id, *both in losses for s, v in zip(("base", "rr"), both, strict=True)]
    )
    assert row.p == pytest.approx(wilcoxon_signed_rank(signs)) and row.difference == pytest.approx(0.3)
    assert row.p != pytest.approx(wilcoxon_signed_rank([this - base for _, base, this in losses]))


def test_repeats_other_metrics_and_what_only_one_has_give_no_row():
    assert loss_table([item("rr", "a", tried(0, 1.0))]) == []
    assert loss_table([item("base", "a", tried(0, 1.0)), item("rr", "b", tried(0, 1.0))]) == []
    repeated = item("base", "a", tried(0, 1.0), condition="pgd_adaptive", same_as="pgd")
    assert loss_table([repeated, item("rr", "a", tried(0, 1.0), condition="pgd_adaptive")]) == []
    assert loss_table([item(s, "a", tried(0, 1.0), metric="mmmu_like") for s in ("base", "rr")]) == []


def test_the_page_shows_it_where_there_is_something_to_show(make_run, tmp_path):
    def apart(items):
        for one in items:
            if one.get("loss") is not None and one["subject"] == "rr":
                one["loss"] = 2.25

    def unmeasured(items):
        for one in items:
            one.pop("loss", None)

    pages = []
    for name, edit in (("with", apart), ("without", unmeasured)):
        write_report([make_run(n=8, benign=3, edit=edit, name=name)], tmp_path / f"{name}.html")
        pages.append((tmp_path / f"{name}.html").read_text())
    assert "How far the attacks got" in pages[0] and "PGD: RR − base" in pages[0]
    assert ">0.400<" in pages[0] and ">2.250<" in pages[0] and ">+1.850<" in pages[0] and "0.008" in pages[0]
    assert "How far the attacks got" not in pages[1]
