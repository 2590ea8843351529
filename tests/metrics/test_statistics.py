import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from mm_cb.metrics.statistics import (
    Z95,
    bootstrap,
    bootstrap_mean,
    cohens_kappa,
    holm,
    items_needed,
    mcnemar_exact,
    paired_rate_interval,
    wilcoxon_signed_rank,
    wilson_interval,
)


@pytest.mark.parametrize(("n", "upper"), [(50, 7.1), (100, 3.7), (110, 3.4), (159, 2.4), (200, 1.9), (320, 1.2)])
def test_wilson_upper_bound_of_zero_successes(n, upper):
    low, high = wilson_interval(0, n)
    assert low == 0
    assert round(100 * high, 1) == upper


def test_wilson_of_the_papers_rate():
    low, high = wilson_interval(19, 133)
    assert (round(100 * low), round(100 * high)) == (9, 21)


def test_wilson_mirrors_and_contains_the_rate():
    for n in (1, 7, 40):
        for successes in range(n + 1):
            low, high = wilson_interval(successes, n)
            mirrored = wilson_interval(n - successes, n)
            assert 0 <= low <= successes / n <= high <= 1
            assert low == pytest.approx(1 - mirrored.high, abs=1e-12)


@pytest.mark.parametrize(("successes", "n"), [(1, 0), (5, 4), (-1, 3)])
def test_wilson_refuses_impossible_counts(successes, n):
    with pytest.raises(ValueError, match="`successes` must lie in"):
        wilson_interval(successes, n)


@pytest.mark.parametrize(
    ("this", "partner", "p"),
    [(6, 0, 0.03125), (0, 6, 0.03125), (5, 0, 0.0625), (0, 0, 1.0), (3, 3, 1.0), (1, 8, 0.0390625)],
)
def test_mcnemar_exact(this, partner, p):
    assert mcnemar_exact(this, partner) == pytest.approx(p, abs=1e-12)


def test_paired_interval_without_discordant_pairs_has_a_closed_form():
    for n in (10, 50, 900):
        low, high = paired_rate_interval(0, 0, n)
        assert high == pytest.approx(Z95**2 / (n + Z95**2), abs=1e-6)
        assert low == pytest.approx(-high, abs=1e-9)


def test_paired_interval_when_every_pair_is_discordant_is_not_a_point():
    low, high = paired_rate_interval(0, 50, 50)
    assert low == -1
    assert -0.9 < high < -0.8


def test_paired_interval_ends_solve_the_score_equation():
    this, partner, n = 12, 2, 50
    for end in paired_rate_interval(this, partner, n):
        # Constrained maximum-likelihood share of "only partner", by brute force instead of the closed form.
        grid = np.linspace(1e-9, (1 - abs(end)) / 2 + max(0, -end), 400_001)
        grid = grid[(grid + end > 0) & (2 * grid + end < 1)]
        likelihood = (
            this * np.log(grid + end) + partner * np.log(grid) + (n - this - partner) * np.log1p(-2 * grid - end)
        )
        share = grid[likelihood.argmax()]
        z = (this - partner - n * end) / math.sqrt(n * (2 * share + end * (1 - end)))
        assert abs(z) == pytest.approx(Z95, abs=1e-3)


def test_paired_interval_covers_the_truth():
    rng = np.random.default_rng(1)
    for this, partner, n in [(0.02, 0.9, 48), (0.0, 0.02, 48), (0.1, 0.2, 100)]:
        draws = rng.multinomial(n, [this, partner, 1 - this - partner], size=400)
        covered = [low <= this - partner <= high for low, high in (paired_rate_interval(a, b, n) for a, b, _ in draws)]
        assert np.mean(covered) > 0.92


def test_paired_interval_mirrors():
    low, high = paired_rate_interval(3, 7, 54)
    mirrored = paired_rate_interval(7, 3, 54)
    assert (low, high) == pytest.approx((-mirrored.high, -mirrored.low), abs=1e-9)


def test_paired_interval_refuses_impossible_counts():
    with pytest.raises(ValueError, match="discordant pairs must fit"):
        paired_rate_interval(3, 3, 5)


def test_bootstrap_is_seeded_and_close_to_the_normal_interval():
    values = np.random.default_rng(0).normal(0.3, 1.0, size=400)
    first = bootstrap_mean(values, np.random.default_rng(5))
    assert first == bootstrap_mean(values, np.random.default_rng(5))
    assert first != bootstrap_mean(values, np.random.default_rng(6))
    half = Z95 * values.std() / math.sqrt(values.size)
    assert first == pytest.approx((values.mean() - half, values.mean() + half), abs=0.01)


@pytest.mark.parametrize("values", [[], [0.1, float("nan")]])
def test_bootstrap_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match="`rows` must be a non-empty table"):
        bootstrap_mean(np.array(values), np.random.default_rng(0))


@given(n=st.integers(1, 2000), share=st.floats(0, 1))
@settings(max_examples=50, deadline=None)
def test_wilson_is_scipys(n, share):
    successes = round(share * n)
    expected = stats.binomtest(successes, n).proportion_ci(method="wilson")
    assert wilson_interval(successes, n) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_bootstrap_mean_is_scipys_percentile_bootstrap():
    values = np.random.default_rng(0).beta(2, 5, size=80)
    ours = bootstrap_mean(values, np.random.default_rng(1), resamples=20_000)
    theirs = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=20_000, rng=np.random.default_rng(2)
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.003)


def test_bootstrap_of_a_ratio_of_means_is_scipys_paired_one():
    rng = np.random.default_rng(3)
    reference = rng.uniform(7, 9, 60)
    rows = np.stack([reference * rng.uniform(0.6, 1.0, 60), reference], axis=1)
    ours = bootstrap(rows, lambda m: m[:, 0] / m[:, 1], np.random.default_rng(1), resamples=20_000)
    theirs = stats.bootstrap(
        (rows[:, 0], rows[:, 1]),
        lambda a, b, axis: a.mean(axis=axis) / b.mean(axis=axis),
        paired=True,
        method="percentile",
        n_resamples=20_000,
        rng=np.random.default_rng(2),
    ).confidence_interval
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.003)


@given(st.lists(st.integers(-6, 6), max_size=9))
@settings(max_examples=60, deadline=None)
def test_wilcoxon_is_the_share_of_all_sign_patterns_as_extreme_with_ties_and_without_equal_pairs(differences):
    from itertools import product

    unequal = [d for d in differences if d]
    ranks = stats.rankdata([abs(d) for d in unequal])
    away = [abs(sum(r for r, up in zip(ranks, ups, strict=True) if up) - sum(ranks) / 2)
            for ups in product((False, True), repeat=len(unequal))]  # fmt: skip
    mine = abs(sum(r for r, d in zip(ranks, unequal, strict=True) if d > 0) - sum(ranks) / 2)
    expected = sum(one >= mine - 1e-9 for one in away) / len(away)
    assert wilcoxon_signed_rank(differences) == pytest.approx(expected, abs=1e-12)


@given(st.lists(st.floats(-5, 5, allow_subnormal=False), max_size=70))
@settings(max_examples=12, deadline=None)
def test_wilcoxon_ignores_direction_and_equal_pairs_and_is_a_p(differences):
    p = wilcoxon_signed_rank(differences)
    assert 0 < p <= 1
    assert wilcoxon_signed_rank([-d for d in differences]) == pytest.approx(p, abs=1e-12)
    assert wilcoxon_signed_rank([*differences, 0.0, 0.0, 0.0]) == p


def test_wilcoxon_sees_what_goes_one_way_and_refuses_what_is_no_number():
    assert wilcoxon_signed_rank([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]) == pytest.approx(0.03125)
    assert wilcoxon_signed_rank([]) == wilcoxon_signed_rank([0.0] * 20) == 1
    assert wilcoxon_signed_rank(np.linspace(0.1, 3, 60)) < 1e-9  # beyond the exact test
    with pytest.raises(ValueError, match="`differences` must be finite"):
        wilcoxon_signed_rank([0.1, float("nan")])


def test_wilcoxon_keeps_its_level_where_nothing_differs():
    rng = np.random.default_rng(0)
    p_values = np.array([wilcoxon_signed_rank(rng.normal(size=12)) for _ in range(1000)])
    assert np.mean(p_values <= 0.05) == pytest.approx(0.05, abs=0.02)


def test_holm_of_a_worked_example():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([]) == [] and holm([0.04]) == [0.04]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12), st.randoms())
@settings(max_examples=60, deadline=None)
def test_holm_is_monotone_bounded_and_blind_to_order(p_values, random):
    adjusted = holm(p_values)
    assert all(p <= q <= min(1.0, len(p_values) * p) for p, q in zip(p_values, adjusted, strict=True))
    pairs = sorted(zip(p_values, adjusted, strict=True))
    assert [q for _, q in pairs] == sorted(q for _, q in pairs)
    order = list(range(len(p_values)))
    random.shuffle(order)
    assert holm([p_values[i] for i in order]) == [adjusted[i] for i in order]


def test_items_needed_gives_the_power_it_promises():
    assert items_needed(0.05) == 21_015
    n, margin = items_needed(0.2, margin=0.05), 0.05
    rng = np.random.default_rng(0)
    draws = rng.multinomial(n, [0.1, 0.1, 0.8], size=2000)
    inside = 0
    for this, partner, _ in draws:
        difference = (this - partner) / n
        half = Z95 * math.sqrt((this + partner) / n - difference**2) / math.sqrt(n)
        inside += -margin < difference - half and difference + half < margin
    assert inside / len(draws) == pytest.approx(0.8, abs=0.03)
    assert items_needed(0.1) > items_needed(0.05) > items_needed(0.0) == 765
    assert paired_rate_interval(0, 0, 765).high <= 0.005 < paired_rate_interval(0, 0, 764).high
    with pytest.raises(ValueError, match="`discordance`"):
        items_needed(1.2)


def test_kappa_of_a_worked_example():
    first = ["yes"] * 25 + ["no"] * 25
    second = ["yes"] * 20 + ["no"] * 5 + ["yes"] * 10 + ["no"] * 15
    assert cohens_kappa(first, second) == pytest.approx(0.4)
    assert cohens_kappa(first, first) == 1
    assert cohens_kappa(["yes"] * 3, ["yes"] * 3) is None
    assert cohens_kappa(["yes"] * 3, ["no"] * 3) == 0
    with pytest.raises(ValueError, match="the same items"):
        cohens_kappa(first, second[:-1])
