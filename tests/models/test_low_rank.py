import json
import shutil

import pytest
import torch

from mm_cb.core.errors import UserError
from mm_cb.models import load_model
from mm_cb.models.low_rank import SIZE, changed, changes_of, linear_layers, norm_of, random_changes
from tests.attacks.helpers import save_adapter
from tests.models.tiny import tiny
from tests.tiny_llava import adapted_llava


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_adapter(tmp_path_factory.mktemp("low_rank") / "adapter", 1)


def logits(model):
    with torch.no_grad():
        return model.forward(model.encode(["what is it"], [None])).logits


def test_what_an_adapter_changes_is_what_peft_makes_of_it(folder):
    whole, base = logits(load_model("miniature", adapter=folder)), load_model("miniature")
    plain, changes = logits(base), changes_of(base, folder)
    with changed(changes, 1.0):
        assert torch.allclose(logits(base), whole, atol=1e-4)
    with changed(changes, 0.0):
        assert torch.equal(logits(base), plain)
    with pytest.raises(KeyboardInterrupt), changed(changes, 0.5):
        assert not torch.allclose(logits(base), plain, atol=1e-3)
        raise KeyboardInterrupt
    assert torch.equal(logits(base), plain) and not torch.allclose(whole, plain, atol=1e-3)


def test_it_goes_below_an_adapter_that_is_on(folder):
    """Half of an adapter and half of it again beside that: the adapter."""
    model = load_model("miniature", adapter=folder)
    whole = logits(model)
    with model.adapter_scaled(0.5), changed(changes_of(model, folder), 0.5):
        assert torch.allclose(logits(model), whole, atol=1e-4)


@pytest.mark.parametrize("make", [adapted_llava, lambda: tiny("llava"), lambda: tiny("qwen2_5_vl")])
def test_random_changes_are_of_the_size_that_is_said(make):
    layers = linear_layers(make())
    norms = [norm_of(layer) for layer in layers]
    assert norms == pytest.approx([float(layer.weight.norm()) for layer in layers], rel=1e-4)
    made = random_changes(layers, norms, torch.Generator().manual_seed(0))
    shares = [float((one.up @ one.down).norm()) / norm for one, norm in zip(made, norms, strict=True)]
    assert sum(shares) / len(shares) == pytest.approx(SIZE, rel=0.1)


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (lambda config: config.update(r=3), "have the shapes"),
        (lambda config: config.update(use_dora=True), "`use_dora` is not supported"),
        (lambda config: config.update(rank_pattern={"([a-z._0-9]+)+!": 2}), "matching its patterns .* more than 1 sec"),
        (lambda config: config.update(base_model_name_or_path="another"), "was trained for `another`"),
    ],
)
def test_another_adapter_is_refused(folder, tmp_path, edit, match, monkeypatch):
    monkeypatch.setattr("mm_cb.models.patterns.SECONDS", 1)
    copy = shutil.copytree(folder, tmp_path / "copy")
    config = json.loads((copy / "adapter_config.json").read_text())
    edit(config)
    (copy / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=match):
        changes_of(load_model("miniature"), copy)
