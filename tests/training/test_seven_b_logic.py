"""The 7B recipe's literal layers, end to end, on a random LLaVA-NeXT of 20 tiny blocks."""

import json

import pytest
import torch
import yaml
from peft import PeftModel
from safetensors.torch import load_file
from transformers import LlavaNextForConditionalGeneration

from mm_cb.models import load_model
from mm_cb.models.merging import merge
from mm_cb.training import rr_trainer as running
from mm_cb.training.recipes.recipe import load_recipe
from mm_cb.training.run import train
from tests.data.conftest import read_examples
from tests.tiny_llava import WORDS, picture, tiny_llava

BLOCKS = 20
SMALL = [
    "device=cpu",
    "dtype=float32",
    "training.max_steps=2",
    "training.held_out=1",
    "training.batch_size=2",
    "lora.r=2",
]


def write_rows(folder):
    """Our own JSONL: both sets, text and multimodal, pictures beside the file."""
    folder.mkdir()
    lines = []
    for number in range(8):
        image, set_name = number % 2, "circuit_breaker" if number < 4 else "retain"
        content = [{"type": "text", "text": " ".join(WORDS[number : number + 5])}]
        if image:
            picture(number).save(folder / f"{number}.png")
            content.insert(0, {"type": "image"})
        answer = " ".join(WORDS[number + 3 : number + 9])
        messages = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
        images = [f"{number}.png"] * image
        lines.append({"id": f"{number}", "messages": messages, "images": images, "set": set_name, "source": "own"})
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "rows.jsonl"


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "llava"
    model = tiny_llava(blocks=BLOCKS, hidden=16, ffn=32)
    model.model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trained(base, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    rows = write_rows(folder / "data")
    recipe = load_recipe("llava-next-mistral-7b", [f"model={base}", f"data=[{rows}]", *SMALL])
    assert (recipe.circuit_breaker.target_layers, recipe.lora.layers_to_transform) == ([16], [14, 15, 16])
    loaded, real = [], running.load_tower

    def load_tower(*arguments, **options):
        loaded.append(real(*arguments, **options))
        return loaded[-1]

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(running, "load_tower", load_tower)
        out = train(recipe, folder / "run", read_examples(rows))
    assert len(loaded[0].decoder_blocks) == 17
    return out


def test_the_run_trained_exactly_blocks_14_to_16(trained):
    records = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert [record["modality"] for record in records] == ["text", "multimodal"]
    assert 0.95 < records[0]["reroute_loss"] < 1 and records[0]["start_distance"] == pytest.approx(0.15, rel=0.05)
    assert (records[1]["reroute_coeff"], records[1]["retain_coeff"]) == (5 * (1 - 1 / 4), 5 * 1 / 4)
    weights = load_file(trained / "adapter_model.safetensors")
    assert len(weights) == 3 * 7 * 2
    moved = {key.split(".")[5] for key, value in weights.items() if "lora_B" in key and value.any()}
    assert moved == {"14", "15", "16"}


def test_the_keys_are_those_that_vllm_maps(trained):
    """vLLM takes ``base_model.model.`` off, maps ``model.language_model.`` to ``language_model.model.``, and looks for
    the module below; q, k, v and gate, up are parts of its packed layers.

    Source:
        vllm/lora/utils.py (parse_fine_tuned_lora_name) and the weights mappers of its LLaVA families, for checkpoints
        saved since transformers 4.52.
    """
    for key in load_file(trained / "adapter_model.safetensors"):
        prefix, _, name = key.partition("base_model.model.")
        assert prefix == "" and name.startswith("model.language_model.layers.")
        mapped = name.replace("model.language_model.", "language_model.model.", 1)
        module, kind, weight = mapped.rsplit(".", 2)
        assert kind in ("lora_A", "lora_B") and weight == "weight"
        owner, projection = module.split(".")[-2:]
        assert projection in {"self_attn": ["q_proj", "k_proj", "v_proj", "o_proj"]}.get(
            owner, ["gate_proj", "up_proj", "down_proj"]
        )
        assert module.split(".")[:3] == ["language_model", "model", "layers"]
    config = json.loads((trained / "adapter_config.json").read_text())
    assert config["bias"] == "none" and not config["modules_to_save"] and not config["use_dora"]


def test_plain_peft_ours_and_the_merged_checkpoint_agree_on_the_whole_model(trained, base, tmp_path):
    ours = load_model(base, adapter=trained)
    inputs = ours.encode(["what is it"], [picture()], completions=["a square"])
    arguments = {
        "input_ids": inputs.input_ids,
        "attention_mask": inputs.attention_mask,
        "pixel_values": inputs.pixel_values,
        "image_sizes": inputs.beside["image_sizes"],
    }
    plain = LlavaNextForConditionalGeneration.from_pretrained(base).eval()
    expected = plain(**arguments).logits
    adapted = PeftModel.from_pretrained(plain, trained).eval()
    changed = adapted(**arguments).logits
    assert not torch.equal(changed, expected)
    with adapted.disable_adapter():
        assert torch.equal(adapted(**arguments).logits, expected)
    torch.testing.assert_close(ours.model(**arguments).logits, changed, rtol=0, atol=0)
    merge(base, trained, tmp_path / "merged")
    merged = LlavaNextForConditionalGeneration.from_pretrained(tmp_path / "merged").eval()
    torch.testing.assert_close(merged(**arguments).logits, changed, rtol=1e-5, atol=1e-5)


def test_the_card_names_recipe_and_results(trained):
    card = (trained / "README.md").read_text()
    recipe = yaml.safe_load(card.partition("```yaml\n")[2].partition("\n```")[0])
    assert recipe["circuit_breaker"]["target_layers"] == [16] and recipe["lora"]["layers_to_transform"] == [14, 15, 16]
    assert "| held-out rows | step | cosine |" in card
    assert "| 1 | multimodal |" in card and "| retain | multimodal | own | 2 |" in card
