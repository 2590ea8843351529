"""What happens when memory is short: other parts, the same gradients."""

from dataclasses import replace

import pytest
import torch

from mm_cb.training import objective as objective_module
from tests.training.test_trainer import batch_of, build, gradients  # noqa: F401  (build is a fixture)


def step(trainer, batch):
    trainer.model.zero_grad()
    loss = trainer.training_step(trainer.model, batch)
    return loss.item(), {name: gradient.clone() for name, gradient in gradients(trainer).items()}


@pytest.mark.parametrize("average", ["tokens", "official"])
@pytest.mark.parametrize("tokens_per_pass", [1, 60, 10_000])
def test_parts_add_up_to_the_whole(build, tokens_per_pass, average):  # noqa: F811
    trainer = build(at=(2, 5), retain_average=average)
    batch = batch_of(trainer, range(4, 8))
    whole = trainer.compute_loss(trainer.model, batch)
    whole.backward()
    expected = {name: gradient.clone() for name, gradient in gradients(trainer).items()}
    trainer._tokens_per_pass = tokens_per_pass
    loss, got = step(trainer, batch)
    assert loss == pytest.approx(whole.item(), rel=1e-5)
    for name, gradient in got.items():
        assert torch.linalg.vector_norm(gradient - expected[name]) <= 1e-4 * torch.linalg.vector_norm(expected[name])


@pytest.mark.parametrize("among_tokens", [False, True])
def test_out_of_memory_in_a_backward_pass_is_survived_with_the_same_gradients(
    among_tokens,
    build,  # noqa: F811
    monkeypatch,
    caplog,
):
    trainer = build(at=(2, 5))
    batch = batch_of(trainer, range(4))
    trainer.training_step(trainer.model, batch)  # gradients of an earlier micro-batch, which have to survive
    trainer.training_step(trainer.model, batch)
    expected = {name: gradient.clone() for name, gradient in gradients(trainer).items()}
    trainer.model.zero_grad()
    trainer.training_step(trainer.model, batch)

    real, limit, failed = objective_module.hidden_states, 40, []

    def small_device(model, rows, first, last):
        states = real(model, rows, first, last)
        if sum(rows.lengths) > limit:

            def full(gradient):
                failed.append(sum(rows.lengths))
                raise torch.OutOfMemoryError("injected")

            states.adapted[0].register_hook(full)  # fails when part of the gradients has been added
        return states

    monkeypatch.setattr(objective_module, "hidden_states", small_device)
    assert (
        max(batch["retain"]["inputs"].attention_mask.sum(-1)) <= limit < batch["retain"]["inputs"].attention_mask.sum()
    )
    trainer._objective.loss = replace(trainer._objective.loss, among_tokens=among_tokens)
    trainer.training_step(trainer.model, batch)
    assert failed and trainer._tokens_per_pass <= limit
    assert ("it is another loss from here on" in caplog.text) == among_tokens
    for name, gradient in gradients(trainer).items():
        assert torch.linalg.vector_norm(gradient - expected[name]) <= 1e-4 * torch.linalg.vector_norm(expected[name])


def test_a_row_that_does_not_fit_by_itself_is_an_error(build, monkeypatch):  # noqa: F811
    trainer = build(at=(2, 5))

    def full(*args):
        raise torch.OutOfMemoryError("injected")

    monkeypatch.setattr(objective_module, "hidden_states", full)
    with pytest.raises(torch.OutOfMemoryError, match="injected"):
        trainer.training_step(trainer.model, batch_of(trainer, range(4)))
