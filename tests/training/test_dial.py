"""Rerouting with a part of the adapter: when, with how much, and that nothing else changes."""

import pytest

from mm_cb.core.errors import UserError
from mm_cb.models.dial import lora_turned
from mm_cb.training.objective import share_of_adapter
from mm_cb.training.recipes.recipe import load_recipe
from tests.training.test_trainer import batch_of, build, gradients  # noqa: F401


def test_two_steps_in_four_draw_a_share_and_one_leaves_all_as_it_was():
    shares = [share_of_adapter(0.25, 0, step) for step in range(400)]
    assert all((share == 1) == (step // 2 % 2 == 0) for step, share in enumerate(shares))
    drawn = [share for share in shares if share < 1]
    assert min(drawn) >= 0.25 and min(drawn) < 0.3 and max(drawn) > 0.95  # both ends are reached
    assert shares == [share_of_adapter(0.25, 0, step) for step in range(400)]
    assert shares != [share_of_adapter(0.25, 1, step) for step in range(400)]
    assert {share_of_adapter(1.0, 0, step) for step in range(8)} == {1.0}


@pytest.mark.parametrize("step", [0, 2])
def test_circuit_breaker_rows_alone_see_that_share_and_the_gradient_is_its_own(build, step):  # noqa: F811
    batch = batch_of(plain := build(at=(step, 9)), range(4))
    dialled = build(at=(step, 9), dial_from=0.25)
    losses, parts = dialled.compute_loss(dialled.model, batch, return_outputs=True)
    losses.backward()
    share = share_of_adapter(0.25, 0, step)
    counts = plain.counts([batch])

    def part(left_out):
        some = {key: batch[key] for key in batch if key != left_out}
        return plain.compute_loss(plain.model, some, num_items_in_batch=counts)

    with lora_turned(plain.model, share):
        expected = part("retain")
    expected.backward()
    retain = part("circuit_breaker")
    retain.backward()
    assert losses.item() == pytest.approx((expected + retain).item(), rel=1e-5)
    for name, gradient in gradients(plain).items():
        assert (gradients(dialled)[name] - gradient).norm() <= 1e-4 * gradient.norm() + 1e-7, name
    whole = plain.compute_loss(plain.model, batch, return_outputs=True)[1]
    assert (parts["reroute_loss"].item() == whole["reroute_loss"].item()) is (step == 0)
    assert parts["retain_loss"].item() == whole["retain_loss"].item()


def test_blocks_that_are_run_again_would_see_another_share():
    with pytest.raises(UserError, match="`dial_from` must be 1 where `recompute` is true, got 0.5"):
        load_recipe("miniature", ["circuit_breaker.dial_from=0.5", "training.recompute=true"])
