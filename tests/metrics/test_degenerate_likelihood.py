"""The likelihood under the base tells working answers from broken ones, whoever wrote them."""

import math

import pytest
import torch

from mm_cb.inference.base_nll import likelihood_fields, nll_under_base
from mm_cb.inference.generation import LocalEngine, Request
from mm_cb.inference.subjects import Subject
from mm_cb.miniature.data import look_alikes
from mm_cb.models import load_model


@pytest.fixture(scope="module")
def answered():
    model = load_model("miniature")
    questions = look_alikes(count=8)
    requests = [Request(str(i), q.prompt, () if q.picture is None else (q.picture,)) for i, q in enumerate(questions)]
    engine = LocalEngine(Subject("base", model), 4)
    return engine, requests, dict(engine.complete(requests, 32))


def test_own_answers_are_coherent_and_shuffled_ones_are_not(answered):
    engine, requests, completions = answered
    shuffled = {key: " ".join(sorted(text.split())) for key, text in completions.items()}
    own = likelihood_fields(engine, requests, completions, 4)
    broken = likelihood_fields(engine, requests, shuffled, 4)
    assert not any(fields["incoherent"] for fields in own.values())
    assert all(fields["incoherent"] for fields in broken.values())
    assert all(own[key]["nll_base"] < broken[key]["nll_base"] for key in own)


def test_it_is_the_mean_over_the_completions_own_tokens(answered):
    engine, requests, completions = answered
    model, request = engine.subject.model, requests[0]
    pictures = [request.pictures[0] if request.pictures else None]
    prompt = model.encode([request.text], pictures)
    whole = model.encode([request.text], pictures, completions=[completions["0"]], close_turn=False)
    logits = model.forward(whole).logits[0].log_softmax(-1)
    start, ids = prompt.input_ids.shape[1], whole.input_ids[0]
    picked = [-logits[i - 1, ids[i]] for i in range(start, len(ids))]
    found = nll_under_base(model, requests[:1], completions, 1)["0"]
    assert found == pytest.approx(float(torch.stack(picked).mean()), abs=2e-4)


def test_batches_change_nothing_and_empty_answers_have_no_likelihood(answered):
    engine, requests, completions = answered
    alone = nll_under_base(engine.subject.model, requests, completions, 1)
    together = nll_under_base(engine.subject.model, requests, completions, 8)
    assert all(math.isclose(alone[key], together[key], abs_tol=2e-4) for key in alone)
    assert nll_under_base(engine.subject.model, requests[:1], {"0": " "}, 1) == {"0": None}
    assert likelihood_fields(object(), requests, completions, 4) == {}
