import math

import numpy as np
import pytest

from mm_cb.evaluation.statistics import Z95, bootstrap_mean, mcnemar_exact, paired_rate_interval, wilson_interval


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
    with pytest.raises(ValueError, match="`values` must be a non-empty row"):
        bootstrap_mean(np.array(values), np.random.default_rng(0))
