import numpy as np
import pytest

from mm_cb.metrics.graded import graded_interval, interval_over_seeds, no_narrower
from mm_cb.metrics.observations import Observation
from mm_cb.metrics.ratios import measure_ratio
from mm_cb.metrics.statistics import Interval, bootstrap_mean, paired_rate_interval, wilson_interval


@pytest.mark.parametrize("lowest", [0.0, -1.0])
@pytest.mark.parametrize("n", [60, 300])
def test_one_graded_item_that_differs_is_never_surer_than_none(lowest, n):
    alike = graded_interval(np.zeros(n), np.random.default_rng(0), lowest=lowest)
    expected = paired_rate_interval(0, 0, n) if lowest else wilson_interval(0, n)
    assert alike == pytest.approx(expected, abs=1e-6)
    for worse in (0.05, 0.25, 1.0):
        found = graded_interval(
            np.array([lowest and -worse, *[0.0] * (n - 1)]), np.random.default_rng(0), lowest=lowest
        )
        assert found.high - found.low >= 0.97 * (alike.high - alike.low)


def test_where_no_two_items_are_alike_the_bootstrap_stands():
    values = np.random.default_rng(0).beta(2, 5, size=40)
    assert graded_interval(values, np.random.default_rng(1)) == bootstrap_mean(values, np.random.default_rng(1))


@pytest.mark.parametrize(("n", "share"), [(60, 0.02), (60, 0.1), (300, 0.005), (300, 0.02)])
def test_graded_interval_covers_the_truth_where_few_items_differ(n, share):
    """A percentile bootstrap alone covers 81 to 91 % here."""
    rng, sizes, covered = np.random.default_rng(3), np.array([-1.0, -0.5, 0.25]), 0
    for _ in range(120):
        differences = np.where(rng.random(n) < share, rng.choice(sizes, n), 0.0)
        found = bootstrap_or_graded(differences, rng)
        covered += found.low <= share * sizes.mean() <= found.high
    assert covered / 120 >= 0.93


def bootstrap_or_graded(values, rng):
    """`graded_interval` with fewer resamples, to be quick."""
    mean = float(values.mean())
    found = bootstrap_mean(values, rng, resamples=400) if np.ptp(values) else Interval(mean, mean)
    return no_narrower(found, mean, values)


def test_interval_over_seeds_covers_a_rate_whose_seeds_differ():
    rng, covered = np.random.default_rng(0), {"over seeds": 0, "over items": 0}
    for _ in range(60):
        rates = rng.beta(2, 10, size=4)  # a seed is a draw: mean 16.7 %
        values = (rng.random((4, 60)) < rates[:, None]).astype(float)
        low, high = interval_over_seeds(values, rng)
        covered["over seeds"] += low <= 1 / 6 <= high
        low, high = wilson_interval(values[0].sum(), 60)
        covered["over items"] += low <= 1 / 6 <= high
    assert covered["over seeds"] >= 0.9 * 60 > covered["over items"]


def test_seeds_that_agree_leave_what_the_items_leave():
    values = (np.random.default_rng(0).random(50) < 0.3).astype(float)
    alone = graded_interval(values, np.random.default_rng(1))
    assert interval_over_seeds(np.stack([values] * 3), np.random.default_rng(1)) == pytest.approx(alone)
    low, high = interval_over_seeds(np.stack([values, 1 - values]), np.random.default_rng(1))
    assert (low, high) == (0.0, 1.0)
    with pytest.raises(ValueError, match="at least two seeds"):
        interval_over_seeds(values[None], np.random.default_rng(1))


def ratio(rows, other=None):
    def group(counts):
        return {str(i): Observation("base", "m", "c", str(i), 1.0, (), columns=one) for i, one in enumerate(counts)}

    return measure_ratio(
        group(rows), other and group(other), {}, np.random.default_rng(0), lambda part, whole: part / whole
    )


def test_an_interval_of_a_share_stays_within_shares_and_holds_the_bootstraps_ends():
    """Few items, most of them alike: what is added to the bootstrap's ends would go below 0 or beyond 100."""
    few, most = [(1, 1), *[(0, 1)] * 4], [(0, 1), *[(1, 1)] * 4]
    low, high = ratio(few).ci95
    assert (low, ratio(few).value) == (0.0, pytest.approx(20)) and high <= 100
    low, high = ratio(most).ci95
    assert high == 100.0 and 0 <= low < 80
    found = ratio(few, most)
    assert found.difference == pytest.approx(-60) and -100 <= found.difference_ci95[0] < found.difference_ci95[1] <= 100
    beyond = ratio([(3, 1), (0, 1), (3, 1)])  # no share: nothing is cut off
    assert beyond.value == pytest.approx(200) and beyond.ci95[1] >= 300
    below = ratio([(-3, 1), (0, 1), (-3, 1)])
    assert below.value == pytest.approx(-200) and below.ci95[0] <= -300
