from dataclasses import replace

import pytest
import torch

from mm_cb.attacks.objectives.facts import FactsObjective
from mm_cb.attacks.objectives.homotopy import FLOOR, HomotopyObjective
from mm_cb.attacks.saved import to_pixels
from mm_cb.inference.subjects import Subject
from tests.attacks.objectives.test_adaptive import BEHAVIORS, PICTURES, RESPONSES
from tests.tiny_llava import adapted_llava


def test_it_is_the_loss_of_the_response_floored_token_by_token():
    model = adapted_llava()
    subject = Subject("rr", model, adapted=True)
    objective = HomotopyObjective(subject, BEHAVIORS, PICTURES, responses=RESPONSES)
    pixels = torch.stack([to_pixels(p) for p in PICTURES])
    inputs = model.encode([b.prompt for b in BEHAVIORS], PICTURES, completions=RESPONSES, close_turn=False)
    with torch.no_grad():
        logs = model.forward(inputs).logits.log_softmax(-1)
        found = objective(pixels)
    for row in range(2):
        places = [i for i in range(1, inputs.input_ids.shape[1]) if inputs.labels[row, i] != -100]
        losses = [max(FLOOR, -float(logs[row, i - 1, inputs.input_ids[row, i]])) for i in places]
        assert float(found[row]) == pytest.approx(sum(losses) / len(losses), abs=1e-4)


def test_bare_facts_are_forced_whatever_text_the_others_force():
    subject = Subject("rr", adapted_llava(), adapted=True)
    told = [replace(b, extra={"facts": text}) for b, text in zip(BEHAVIORS, RESPONSES, strict=True)]
    pixels = torch.stack([to_pixels(p) for p in PICTURES])
    with torch.no_grad():
        found = FactsObjective(subject, told, PICTURES, responses=["it is red"] * 2)(pixels)
        assert torch.equal(found, HomotopyObjective(subject, BEHAVIORS, PICTURES, responses=RESPONSES)(pixels))
