"""Runs get away from their start whatever the length of states: what is measured there, and that they do."""

import json

import pytest
import torch
from peft import LoraConfig
from transformers import MistralConfig, MistralForCausalLM

from mm_cb import RRConfig, RRTrainer
from mm_cb.core.errors import UserError
from mm_cb.training.start import matrices_b
from tests.models.shapes import MISTRAL_TEMPLATE
from tests.tiny_llava import tiny_tokenizer
from tests.training.conftest import make_example

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ROWS = [make_example(number, name) for number in range(8) for name in ("circuit_breaker", "retain")]


def model_of(length):
    """A random model, the same at every length of its states: what writes into them is scaled."""
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = MISTRAL_TEMPLATE
    torch.manual_seed(0)
    shape = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 5, "num_attention_heads": 4}
    config = MistralConfig(
        vocab_size=len(tokenizer),
        **shape,
        num_key_value_heads=2,
        initializer_range=0.12,
        rms_norm_eps=1e-12,
        head_dim=12,
    )
    model = MistralForCausalLM(config).eval()
    with torch.no_grad():
        states = model(torch.arange(4, 16)[None], output_hidden_states=True).hidden_states
        times = length / states[3].norm(dim=-1).median()
        for name, weight in model.named_parameters():
            if name.endswith(("embed_tokens.weight", "o_proj.weight", "down_proj.weight")):
                weight *= times
    return model, tokenizer


def trainer_of(length, folder, **settings):
    model, tokenizer = model_of(length)
    settings = {"target_layers": [2, 3], "batch_size": 4, "batches": "text", "held_out": 2, "device": "cpu"} | settings
    args = RRConfig(output_dir=folder, masks={"text": "all"}, **settings)
    lora = LoraConfig(r=16, lora_alpha=16, layers_to_transform=[0, 1, 2], target_modules=PROJECTIONS)
    rows = [{"id": e.id, "messages": e.messages, "images": [], "set": e.set} for e in ROWS]
    return RRTrainer(model, args, rows, tokenizer, lora)


def weights_b(trainer):
    return torch.cat([weight.flatten() for weight in matrices_b(trainer.model)])


@pytest.mark.parametrize("length", [1, 300])
def test_the_start_is_as_far_away_as_it_is_told_in_parts_of_the_length(length, tmp_path):
    trainer = trainer_of(length, tmp_path, start_distance=0.2)
    found = trainer.measure_start()
    assert found["start_norm_3"] == pytest.approx(length, rel=0.4)
    assert found["start_distance"] == pytest.approx(0.2, rel=0.03)
    assert weights_b(trainer).square().mean().sqrt().item() == pytest.approx(found["start_b"], rel=0.05)
    groups = trainer.create_optimizer().param_groups
    rates = {id(weight): group["lr"] for group in groups for weight in group["params"]}
    others = {rate for weight, rate in rates.items() if weight not in map(id, matrices_b(trainer.model))}
    assert {rates[id(weight)] for weight in matrices_b(trainer.model)} == {found["start_b_rate"]}
    assert others == {1e-4} and len(rates) == 2 * len(matrices_b(trainer.model))


def test_where_b_is_zero_it_stays_zero_and_the_loss_that_holds_is_seen(tmp_path):
    found = []
    for length in (1, 300):
        trainer = trainer_of(length, tmp_path, start_distance=0, retain_scale="absolute")
        drawn = torch.get_rng_state()
        found.append(trainer.measure_start())
        assert torch.equal(torch.get_rng_state(), drawn) and not weights_b(trainer).any()
        assert all(weight.grad is None for weight in trainer.model.parameters())
        assert found[-1]["start_b"] == found[-1]["start_distance"] == 0
    ratios = [one["start_retain_gradient"] / one["start_reroute_gradient"] for one in found]
    assert ratios[1] > 30 * ratios[0]


def test_it_does_not_hang_on_how_rows_go_through_the_model(tmp_path):
    found = [trainer_of(10, tmp_path, tokens_per_pass=tokens).measure_start() for tokens in (8, 4096)]
    assert found[0] == pytest.approx(found[1], rel=1e-2)


def test_states_that_are_not_finite_are_refused(tmp_path):
    trainer = trainer_of(10, tmp_path)
    with torch.no_grad():
        trainer.model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UserError, match="target layer 2 must have a finite length"):
        trainer.train()


def escape(folder):
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return next((r["step"] for r in records if r["held_out_circuit_breaker_cosine"] < 0.9), None), records


def test_runs_with_states_of_any_length_get_away_alike_and_stop_where_they_are_told(tmp_path):
    steps = []
    for length in (1, 300):
        folder = tmp_path / str(length)
        settings = {"max_steps": 30, "schedule_steps": 150, "held_out_steps": 1, "stop_at_cosine": 0.9}
        trainer_of(length, folder, **settings).train()
        step, records = escape(folder)
        steps.append(step)
        assert step is not None and records[-1]["step"] == step < 29
        assert records[0]["start_norm_3"] == pytest.approx(length, rel=0.4)
        assert records[3]["retain_coeff"] == pytest.approx(5 * 3 / 300)
    assert max(steps) <= 2 * min(steps)
