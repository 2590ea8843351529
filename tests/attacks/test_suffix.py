"""GCG: the search on a table whose best suffix is known, and what is sent of a tiny Llama's."""

import pytest
import torch

from image_attacks import target_nll
from mm_cb.attacks import texts
from mm_cb.attacks.suffix import _SuffixRow, find_suffix, search
from mm_cb.data.behaviors_file import Behavior
from mm_cb.inference.subjects import Subject
from mm_cb.models import load_model
from tests.models.conftest import save_text_model

PLACES, WORDS, BARRED = 4, 9, 3


def table(seed):
    return torch.randn(PLACES, WORDS, generator=torch.Generator().manual_seed(seed))


def found(costs, seed=0, **settings):
    def slope(ids):
        return costs.clone().index_fill_(1, torch.tensor([BARRED]), torch.inf)

    def losses(ids):
        return costs[torch.arange(PLACES), ids].sum(1)

    given = {"steps": 60, "candidates": 6, "likeliest": WORDS} | settings
    draws = torch.Generator().manual_seed(seed)
    return search(
        torch.zeros(PLACES, dtype=torch.long),
        slope,
        losses,
        lambda ids: torch.ones(len(ids)) > 0,
        generator=draws,
        **given,
    )


@pytest.mark.parametrize("seed", range(3))
def test_where_places_do_not_hang_together_it_finds_the_best_of_all(seed):
    costs = table(seed)
    allowed = costs.clone().index_fill_(1, torch.tensor([BARRED]), torch.inf)
    assert found(costs, seed).ids.tolist() == allowed.argmin(1).tolist()
    (last, again) = found(costs, 1), found(costs, 1)
    assert torch.equal(last.ids, again.ids) and last.curve == again.curve


def test_what_is_sent_is_never_worse_than_the_start_and_nothing_unusable_is_weighed():
    costs, weighed = table(0), []

    def losses(ids):
        weighed.extend(ids.tolist())
        return -costs[torch.arange(PLACES), ids].sum(1)  # the slope points the wrong way

    started = torch.zeros(PLACES, dtype=torch.long)
    even = lambda ids: ids.sum(1) % 2 == 0  # noqa: E731
    draws = torch.Generator().manual_seed(0)
    one = search(started, lambda ids: costs, losses, even, steps=9, candidates=4, generator=draws)
    assert min(one.curve) == pytest.approx(float(losses(one.ids[None]))) and len(one.curve) == 10
    assert min(one.curve) <= one.curve[0] and all(sum(ids) % 2 == 0 for ids in weighed)


def test_on_a_model_the_loss_is_that_of_the_prompt_that_is_sent_and_falls(tmp_path):
    base = Subject("base", load_model(save_text_model(tmp_path / "model", "llama")))
    behavior = Behavior("tea", "how to brew tea", "it is a circle", None)
    draws = torch.Generator().manual_seed(0)
    sent = find_suffix(base, behavior, steps=6, candidates=8, generator=draws)
    assert sent.prompt.startswith("how to brew tea ") and min(sent.curve) < sent.curve[0]
    asked = texts.ask(base, [Behavior("tea", sent.prompt, behavior.target, None)])
    assert float(texts.target_losses(asked)) == pytest.approx(min(sent.curve), abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "mistral", "gpt2"])
def test_the_slope_is_the_gradient_of_the_whole_row_though_its_front_runs_once(tmp_path, kind):
    base = Subject("base", load_model(save_text_model(tmp_path / "model", kind)))
    row = _SuffixRow(base, Behavior("tea", "how to brew tea", "it is a circle", None))
    for ids in (row.start, row.start.flip(0), row.start.roll(3)):  # more than once: the kept front must not change
        whole = row._rows(ids[None])
        embeds = base.model.base.get_input_embeddings()(whole.input_ids).detach().requires_grad_()
        logits = base.model.model(**base.model.start_from(whole, embeds), use_cache=False).logits
        loss = target_nll(logits, whole.labels)
        (gradient,) = torch.autograd.grad(loss.sum(), embeds)
        table = base.model.base.get_input_embeddings().weight.detach()
        expected = gradient[0, row._begin : row._end] @ table.T
        found = row.slope(ids)
        writable = found.isfinite()
        assert bool(writable.any()) and torch.allclose(found[writable], expected[writable], atol=1e-5)
        assert float(row.losses(ids[None])) == pytest.approx(float(loss.detach()), abs=1e-5)
