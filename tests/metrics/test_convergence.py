"""The rule by which an attack has finished, on curves and outcomes whose answer is known."""

import numpy as np
import pytest

from mm_cb.metrics.convergence import LEAST, Doubled, Fall, doubled, fall, has_settled, is_stable, state


def falling(late):
    """100 steps of a loss that falls from 10 to 0, of which ``late`` in the last tenth."""
    return [*np.linspace(10, late, 91), *np.linspace(late, 0, 11)[1:]]


@pytest.mark.parametrize(("late", "settled"), [(0.0, True), (0.09, True), (0.11, False), (5.0, False)])
def test_a_loss_has_settled_if_less_than_a_hundredth_of_its_fall_is_late(late, settled):
    found = fall([falling(late)])
    assert found[:2] == pytest.approx((10, late)) and has_settled(found) is settled


def test_a_rise_on_the_way_is_no_fall_and_scale_does_not_matter():
    noisy = np.array(falling(0.3))
    noisy[1::2] += 3
    assert fall([noisy]) == pytest.approx(fall([falling(0.3)]))
    assert has_settled(fall([noisy * 50])) is has_settled(fall([noisy]))


def test_a_quarter_that_still_falls_is_not_hidden_by_the_rest():
    assert has_settled(fall([falling(0.0)] * 3)) and not has_settled(fall([falling(0.0)] * 3 + [falling(2.0)]))


def test_steps_at_which_another_model_is_attacked_are_left_out():
    dialled = [*np.linspace(0, 8, 70), *np.linspace(8, 4, 31)]
    assert fall([dialled]).total == 0
    assert fall([dialled], settles=0.7).total == pytest.approx(4, abs=0.2)
    assert not has_settled(fall([dialled], settles=0.7))


def test_a_fall_that_stored_curves_cannot_hold_is_none():
    assert has_settled(Fall(0.0, 0.0, 10)) and has_settled(Fall(2e-4, 2e-4, 10))
    assert not has_settled(Fall(0.01, 0.005, 10))


@pytest.mark.parametrize(("start", "end", "settled"), [(7.4, 7.4, False), (7.4, 7.3995, False), (4e-4, 4e-4, True)])
def test_a_loss_that_never_moved_has_not_settled_unless_it_had_nowhere_to_go(start, end, settled):
    assert has_settled(fall([np.linspace(start, end, 101)] * 12)) is settled


@pytest.mark.parametrize(("steps", "settled"), [(1, False), (9, False), (10, True)])
def test_a_search_without_a_last_tenth_has_not_converged_though_its_loss_stands_still(steps, settled):
    assert has_settled(fall([[9.0, *[3.0] * steps]])) is settled
    dialled = fall([[*[9.0] * steps, *[3.0] * (steps + 1)]], settles=0.5)
    assert (dialled.steps, has_settled(dialled)) == (steps, settled)


def items(outcomes, openings=None):
    openings = openings or [False] * len(outcomes)
    return {
        f"b{i}": {"outcome": one, "prefix_emitted": emitted}
        for i, (one, emitted) in enumerate(zip(outcomes, openings, strict=True))
    }


@pytest.mark.parametrize(
    ("content", "openings", "stable"),
    [(0, 0, True), (1, 1, True), (2, 0, False), (0, 2, False)],
)
def test_twice_the_steps_may_change_one_outcome_of_content_and_one_of_openings(content, openings, stable):
    before = items(["other"] * LEAST)
    after = items(
        ["harmful"] * content + ["gibberish"] * (LEAST - content), [True] * openings + [False] * (LEAST - openings)
    )
    found = doubled(before, after)
    assert found == Doubled(LEAST, content, openings) and is_stable(found) is stable
    assert doubled(after, before) == found


def test_content_that_nobody_judged_and_too_few_behaviours_leave_it_open_unless_openings_decide():
    unjudged = items(["not_judged"] * LEAST)
    assert is_stable(doubled(unjudged, items(["other"] * LEAST))) is None
    assert is_stable(doubled(unjudged, items(["other"] * LEAST, [True] * LEAST))) is False
    assert is_stable(Doubled(LEAST - 1, 0, 0)) is None and is_stable(Doubled(LEAST - 1, 2, 0)) is False


SETTLED, FALLING = Fall(10.0, 0.0, 100), Fall(10.0, 1.0, 100)
SAME, OTHER, OPEN = Doubled(12, 0, 0), Doubled(12, 3, 0), Doubled(12, None, 0)


@pytest.mark.parametrize(
    ("found", "longer", "expected"),
    [
        (SETTLED, SAME, "converged"),
        (SETTLED, None, "not checked"),
        (SETTLED, OPEN, "not checked"),
        (None, SAME, "not checked"),
        (None, None, "not checked"),
        (FALLING, SAME, "not converged"),
        (FALLING, None, "not converged"),
        (SETTLED, OTHER, "not converged"),
        (None, OTHER, "not converged"),
    ],
)
def test_an_attack_has_converged_only_by_both_parts_and_either_refutes_it(found, longer, expected):
    assert state(found, longer) == expected
