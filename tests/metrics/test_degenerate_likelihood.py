"""The likelihood under the base tells working answers from broken ones, whoever wrote them."""

import copy
import math

import pytest
import torch
from peft import LoraConfig, get_peft_model

from mm_cb.attacks.judged_files import Asked, base_nll
from mm_cb.attacks.saved import SavedPicture
from mm_cb.data.behaviors_file import Behavior
from mm_cb.inference.base_nll import likelihood_fields, nll_under_base
from mm_cb.inference.generation import LocalEngine, Request
from mm_cb.inference.subjects import Subject
from mm_cb.miniature.data import look_alikes
from mm_cb.models import load_model
from mm_cb.models.llava_next import LlavaNextModel
from tests.tiny_llava import picture, tiny_llava


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


def plain_loss(base, processor, request, completion):
    """transformers' own loss of a model without PEFT, with the prompt's labels left out."""
    content = [*[{"type": "image"}] * len(request.pictures), {"type": "text", "text": request.text}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    asked, whole = (
        processor(text=text, images=list(request.pictures) or None, return_tensors="pt")
        for text in (prompt, f"{prompt} {completion}")
    )
    labels = whole["input_ids"].clone()
    labels[:, : asked["input_ids"].shape[1]] = -100
    return float(base(**whole, labels=labels).loss)


def test_it_is_the_loss_of_a_base_that_never_had_an_adapter():
    tiny = tiny_llava()
    base = copy.deepcopy(tiny.model)
    config = LoraConfig(target_modules=r".*language_model.*down_proj", r=4, lora_alpha=64, init_lora_weights=False)
    model = LlavaNextModel(get_peft_model(tiny.model, config).eval().requires_grad_(False), tiny.processor)
    requests = [Request("alone", "what is it"), Request("shown", "tell me how to brew tea", (picture(),))]
    said = {"alone": "a red square in the picture", "shown": "no i can not"}
    plain = {r.key: plain_loss(base, tiny.processor, r, said[r.key]) for r in requests}
    subject = Subject("rr", model, adapted=True)
    with subject.active():
        adapted = {r.key: plain_loss(model.model, tiny.processor, r, said[r.key]) for r in requests}
        found = likelihood_fields(LocalEngine(subject, 2), requests, said, 2)
        behaviour = Behavior("shown", requests[1].text, "", None)
        shown = SavedPicture("shown.png", requests[1].pictures[0], "")
        (attacked,) = base_nll(Asked(subject, [behaviour], [behaviour], [shown]), [said["shown"]])
    assert all(abs(adapted[key] - plain[key]) > 0.1 for key in plain)
    assert {key: fields["nll_base"] for key, fields in found.items()} == pytest.approx(plain, abs=2e-4)
    assert attacked == pytest.approx(plain["shown"], abs=2e-4)
