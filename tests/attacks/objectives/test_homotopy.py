import json

import pytest
import torch

from mm_cb.attacks.objectives.homotopy import FLOOR, RAISED, HomotopyObjective, scale_at
from mm_cb.attacks.saved import to_pixels
from mm_cb.attacks.verify import verify_run
from mm_cb.inference.subjects import Subject
from tests.attacks.helpers import attack, first_behaviors, save_adapter
from tests.attacks.objectives.test_adaptive import BEHAVIORS, PICTURES, RESPONSES, adapted_model


@pytest.fixture(scope="module")
def model():
    return adapted_model()


def logits(model):
    with torch.no_grad():
        return model.forward(model.encode(["what is it"], [PICTURES[0]])).logits


def test_a_scale_of_one_is_the_adapter_to_the_last_bit_and_of_nought_the_base(model):
    whole = logits(model)
    with model.adapter_scaled(1.0):
        assert torch.equal(logits(model), whole)
    with model.adapter(False):
        base = logits(model)
    with model.adapter_scaled(0.0):
        assert torch.allclose(logits(model), base, atol=1e-6) and not torch.allclose(base, whole, atol=1e-2)


def test_a_scale_is_that_of_the_weights_change_and_is_gone_afterwards(model):
    whole = logits(model)
    with pytest.raises(KeyboardInterrupt), model.adapter_scaled(0.5):
        half = logits(model)
        raise KeyboardInterrupt
    assert torch.equal(logits(model), whole)
    matrices = [p for name, p in model.model.named_parameters() if "lora_B" in name]
    for matrix in matrices:
        matrix.data.mul_(0.5)
    assert torch.allclose(logits(model), half, atol=1e-5)
    for matrix in matrices:
        matrix.data.mul_(2)


def test_the_scale_rises_from_nought_to_one_and_stays():
    scales = [scale_at(step, 100) for step in range(101)]
    assert scales[0] == 0 and scales == sorted(scales)
    assert [step for step in range(101) if scales[step] == 1] == list(range(round(100 * RAISED), 101))
    assert scale_at(1, 1) == 1


def test_outside_a_search_it_is_the_floored_loss_of_the_response_under_the_adapter(model):
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
    assert objective.scale == 1


def test_on_the_way_it_is_another_models_loss_that_no_picture_can_win_by(model):
    objective = HomotopyObjective(Subject("rr", model, adapted=True), BEHAVIORS, PICTURES, responses=RESPONSES)
    pixels = torch.stack([to_pixels(p) for p in PICTURES])
    with torch.no_grad():
        at_end = objective(pixels)
        objective.at_step(0, 10)
        at_start = objective(pixels)
    assert bool((at_start > at_end).all())
    assert not torch.allclose(at_start - objective.handicap(0, 10), at_end, atol=1e-3)


def test_a_run_selects_a_picture_of_the_whole_adapter_and_every_number_of_it_verifies(tmp_path):
    adapter, behaviors = str(save_adapter(tmp_path / "adapter", 1)), first_behaviors(tmp_path, 2)
    run = attack(tmp_path / "run", behaviors, "pgd_homotopy", adapter=adapter, steps=10, batch=2)
    for item in map(json.loads, (run / "items.jsonl").read_text().splitlines()):
        (candidate,) = item["candidates"]
        assert candidate["selected_step"] >= 10 * RAISED
        assert candidate["objective_file"] == pytest.approx(candidate["objective_logged"], abs=1e-4)
    curves = json.loads((run / "curves.json").read_text())
    assert max(curves[0]["q75"]) < 100  # without what stands on top of the losses on the way
    assert not [row for row in verify_run(run) if row.disagreements]


def test_a_run_that_was_cut_off_goes_on_at_its_scale(tmp_path, monkeypatch):
    adapter, behaviors = str(save_adapter(tmp_path / "adapter", 1)), first_behaviors(tmp_path, 2)
    settings = {"adapter": adapter, "steps": 8, "batch": 2, "checkpoint_seconds": 0.0}
    whole = attack(tmp_path / "whole", behaviors, "pgd_homotopy", **settings)
    real, calls = HomotopyObjective.__call__, []

    def dies(self, pixels):
        calls.append(self.scale)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(self, pixels)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(HomotopyObjective, "__call__", dies)
        attack(tmp_path / "cut", behaviors, "pgd_homotopy", **settings)
    attack(tmp_path / "cut", behaviors, "pgd_homotopy", **settings)
    assert (tmp_path / "cut" / "items.jsonl").read_bytes() == (whole / "items.jsonl").read_bytes()
