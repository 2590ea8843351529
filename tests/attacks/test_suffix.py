"""GCG: the search on a table whose best suffix is known, and what is sent of a tiny Llama's."""

import pytest
import torch

from image_attacks import target_nll
from mm_cb.attacks import texts
from mm_cb.attacks.suffix import ProbeTerm, _SuffixRow, find_suffix, search
from mm_cb.data.behaviors_file import Behavior
from mm_cb.inference.subjects import Subject
from mm_cb.models import load_model
from mm_cb.models.probe import Probe, ProbeNetwork
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


@pytest.fixture
def probed(tmp_path):
    """A tiny Llama with a random probe that flags about half of all tokens."""
    model = load_model(save_text_model(tmp_path / "model", "llama"))
    torch.manual_seed(0)
    network = ProbeNetwork(model.base.config.hidden_size, "mlp").requires_grad_(False)
    return Subject("base+probe", model, probe=Probe(network, 1, 0.0, "no"))


def test_the_probes_score_of_a_long_answer_stands_in_the_loss_and_its_slope(probed):
    behavior, weight = Behavior("tea", "how to brew tea", "it is a circle", None), 3.0
    row, blind = _SuffixRow(probed, behavior, ProbeTerm(weight, 6)), _SuffixRow(probed, behavior)
    (said,) = row._responses
    assert said.startswith(behavior.target) and blind._responses == [behavior.target]
    ids = row.start
    whole = row._rows(ids[None])
    embeds = probed.model.base.get_input_embeddings()(whole.input_ids).detach().requires_grad_()
    output = probed.model.model(**probed.model.start_from(whole, embeds), use_cache=False, output_hidden_states=True)
    answer = whole.completion_mask[0].bool()
    scores = probed.probe.margins(output.hidden_states[1])[0, answer]
    opening = blind._inputs.completion_mask.sum()
    target = whole.labels.masked_fill(whole.completion_mask.cumsum(1) > opening, -100)
    expected = target_nll(output.logits, target) + weight * torch.nn.functional.softplus(scores).mean()
    assert float(row.losses(ids[None])) == pytest.approx(float(expected.detach()), abs=1e-5)
    (gradient,) = torch.autograd.grad(expected.sum(), embeds)
    table = probed.model.base.get_input_embeddings().weight.detach()
    found = row.slope(ids)
    writable = found.isfinite()
    assert torch.allclose(found[writable], (gradient[0, row._begin : row._end] @ table.T)[writable], atol=1e-5)


def test_a_search_that_knows_the_probe_is_less_flagged_than_one_that_does_not(probed):
    behavior = Behavior("tea", "how to brew tea", "it is a circle", None)
    knows = ProbeTerm(100.0, 6)
    row = _SuffixRow(probed, behavior, knows)

    def loss(term):
        draws = torch.Generator().manual_seed(0)
        sent = find_suffix(probed, behavior, steps=12, candidates=16, generator=draws, probe_term=term)
        ids = row._encode(sent.prompt).input_ids[0, row._begin : row._end]
        return float(row.losses(ids[None]))

    assert loss(knows) < loss(None)
