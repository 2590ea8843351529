"""`scripts/masking.py`: what it says of an adapter that does nothing, and of one that anything moves."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from mm_cb.training.recipe import load_recipe
from mm_cb.training.run import train
from scripts.masking import measure

SHORT = ["training.max_steps=1", "training.batch_size=2", "training.learning_rate=1e-12"]


@pytest.fixture(scope="module")
def adapter(tmp_path_factory):
    """Of one step that trains nothing."""
    return train(load_recipe("miniature", SHORT), tmp_path_factory.mktemp("adapter") / "untrained")


def test_an_untrained_adapter_moves_nothing_and_only_a_changed_picture_moves_states(adapter):
    found = measure(adapter, rows=2)
    assert (found.pop("length"), found.pop("plain")) == (1.0, 1.0)
    assert set(found) == {"training_adversary", "patient", "patient_seventh"}
    assert all(0.9 < cosine <= 1.0 for cosine in found.values())  # the adversary raises what its random start lowers


def test_patience_and_room_undo_more_of_an_adapter_that_was_not_trained_against_them(adapter, tmp_path):
    for file in adapter.glob("*.json"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.randn(value.shape, generator=generator) / 4 if "lora_B" in name else value
        for name, value in load_file(adapter / "adapter_model.safetensors").items()
    }
    save_file(weights, tmp_path / "adapter_model.safetensors")
    found = measure(tmp_path, rows=2)
    assert found["plain"] < 0.95
    assert found["plain"] < found["training_adversary"] < found["patient"]
    assert found["plain"] < found["patient_seventh"] < found["patient"]


def test_length_is_that_of_the_states_over_the_base_s(adapter, monkeypatch):
    from scripts import masking

    true = masking.adapted_states
    monkeypatch.setattr(masking, "adapted_states", lambda *arguments: 3 * true(*arguments))
    found = measure(adapter, rows=2)
    assert found["length"] == 3.0 and found["plain"] == 1.0


def test_it_names_a_recipe_without_an_adversary(tmp_path):
    plain = train(load_recipe("miniature", [*SHORT, "circuit_breaker.adversary.steps=0"]), tmp_path / "plain")
    with pytest.raises(ValueError, match=r"adversary\.steps"):
        measure(plain, rows=2)
