"""Plans at the true 7B shapes; nothing here has a weight."""

from pathlib import Path

import pytest
import torch

from mm_cb.core.embedded import embedded
from mm_cb.core.errors import UserError
from mm_cb.core.recipe_files import recipe_names
from mm_cb.models import TokenRole
from mm_cb.models.known import known_config
from mm_cb.training.adapter import add_adapter
from mm_cb.training.placement import KeptBlocks, lora_paths
from mm_cb.training.planning.memory import block_bytes, estimate, kept_weights
from mm_cb.training.planning.plan import Smaller, check_device, longest_row, make_plan
from mm_cb.training.recipes.recipe import load_recipe
from tests.tiny_llava import picture, tiny_llava

GIB = 2**30
SIZES = [(42, 84), (84, 42), (84, 84), (42, 42), (60, 50), (300, 300)]  # width, height
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    """The paper's recipe, planned from a folder that holds a configuration alone."""
    folder = tmp_path_factory.mktemp("seven") / "llava-v1.6-mistral-7b-hf"
    known_config("llava-hf/llava-v1.6-mistral-7b-hf").save_pretrained(folder)
    return make_plan(load_recipe("llava-next-mistral-7b", [f"model={folder}"]))


def test_the_papers_placement_at_7b(plan):
    assert not plan.published
    assert plan.kept == KeptBlocks(17, True) and len(plan.model.decoder_blocks) == 32
    assert plan.paths == [
        f"model.language_model.layers.{block}.{part}.{name}"
        for block in (14, 15, 16)
        for part, names in (("self_attn", ALL[:4]), ("mlp", ALL[4:]))
        for name in names
    ]
    assert plan.parameters == 3 * 16 * 81920  # r x (in + out) of the seven layers of three blocks
    assert all(parameter.is_meta for parameter in plan.model.base.parameters())


def test_the_page_says_what_the_kl_of_logits_takes_at_7b(plan):
    fields = [f"model={plan.recipe.model}", "circuit_breaker.retain=kl", "circuit_breaker.retain_scale=relative"]
    kl = make_plan(load_recipe("llava-next-mistral-7b", fields))
    assert kl.kept == KeptBlocks(32, True, head=True)
    page = (Path(__file__).resolve().parents[2] / "docs" / "train_7b.md").read_text()
    assert f"run: {kl.memory().total / 1e9:.1f} GB in place of {plan.memory().total / 1e9:.1f}, estimated" in page


def test_the_weights_of_7b_are_those_of_17_blocks_without_head(plan):
    block = 4096 * (4096 + 1024 + 1024 + 4096) + 3 * 4096 * 14336 + 2 * 4096
    tower = sum(p.numel() for p in plan.model.base.model.vision_tower.parameters())
    projector = 1024 * 4096 + 4096 + 4096 * 4096 + 4096
    expected = 17 * block + 32064 * 4096 + 4096 + tower + projector + 4096
    assert kept_weights(plan.model, plan.kept, 2) == 2 * expected
    assert 300e6 < tower < 310e6 and 8.2e9 < 2 * expected < 8.4e9


def test_the_goals_of_the_default_recipe_and_its_smaller_options(plan):
    assert plan.longest_row == 2928 + 1024  # a picture of 672 x 672, and the text
    assert plan.memory().total <= 16e9  # GB as 1e9 bytes, and so also what a card of 16 GiB has
    assert plan.memory(Smaller(2048)) == plan.memory(Smaller(1024)) == plan.memory(Smaller(3952))  # rows stay whole
    assert plan.memory(Smaller(2048, recompute=True)).total <= 12e9
    assert plan.memory(Smaller(2048, recompute=True, quantize="4bit")).total <= 8e9
    assert plan.fitting(15 * GIB) == ["training.tokens_per_pass=4096"]
    assert plan.fitting(12 * GIB) == ["training.recompute=true", "training.tokens_per_pass=4096"]
    assert plan.fitting(8 * GIB) == ["quantize=4bit", "training.recompute=true", "training.tokens_per_pass=4096"]
    assert plan.fitting(2 * GIB) == []


def test_text_rows_alone_are_no_longer_than_max_length():
    plan = make_plan(load_recipe("llava-next-mistral-7b", ["batches=text", "training.max_length=300"]))
    assert plan.longest_row == 300 and plan.memory(Smaller(1024)).total < plan.memory(Smaller(2048)).total


def test_a_recipes_own_settings_are_what_is_estimated(plan):
    changed = ["training.recompute=true", "quantize=4bit", "training.tokens_per_pass=5000"]
    other = make_plan(load_recipe("llava-next-mistral-7b", changed))
    assert other.memory() == plan.memory(Smaller(5000, recompute=True, quantize="4bit")) != plan.memory()


def test_the_longest_row_is_what_the_processor_makes_of_the_largest_picture():
    model = tiny_llava()
    recipe = load_recipe("miniature", ["training.max_length=7"])
    counts = [model.encode(["what"], [picture(0, size)]).roles.eq(TokenRole.IMAGE).sum() for size in SIZES]
    assert longest_row(model, recipe) == 7 + max(counts)


@pytest.mark.parametrize("name", sorted(n for n in recipe_names() if not embedded(load_recipe(n).model)))
def test_every_shipped_recipe_can_be_planned_before_its_model_is_here(name):
    plan = make_plan(load_recipe(name))
    assert plan.published and plan.parameters > 0 and plan.memory().total > 0
    breaker = plan.recipe.circuit_breaker
    assert plan.kept.blocks == max(*breaker.target_layers, max(plan.recipe.lora.layers_to_transform) + 1)


@pytest.mark.parametrize(
    ("name", "parameters", "picture"),
    [
        ("gemma-3-12b-it", 12.187e9, 256),
        ("gemma-4-e4b-it", 7.941e9, 280),
        ("idefics3-8b", 8.462e9, 2873),
        ("internvl3-8b", 7.944e9, 13 * 256),
        ("llava-1.5-7b", 7.063e9, 576),
        ("llava-onevision-7b", 8.031e9, 729 + 7938 + 162),
        ("mistral-small-3.1-24b", 24.011e9, 55 * 55),
        ("pixtral-12b", 12.683e9, 64 * 64),
        ("qwen2-vl-7b", 8.291e9, 16384),
        ("qwen2.5-vl-7b", 8.292e9, 16384),
        ("qwen3-vl-8b", 8.767e9, 16384),
        ("qwen3.5-9b", 9.410e9, 16384),
        ("smolvlm-2b", 2.247e9, 1377),
    ],
)
def test_the_published_shapes_of_other_families(name, parameters, picture):
    plan = make_plan(load_recipe(name))
    assert sum(p.numel() for p in plan.model.base.parameters()) == pytest.approx(parameters, rel=1e-3)
    assert plan.longest_row == picture + 1024


def test_a_model_that_nobody_knows():
    with pytest.raises(UserError, match="the configuration of `nowhere/x` cannot be read here"):
        make_plan(load_recipe("llava-next-mistral-7b", ["model=nowhere/x"]))


@pytest.mark.parametrize(
    ("free", "advice"),
    [
        (12, "this would fit: training.recompute=true training.tokens_per_pass=4096"),
        (1, "no setting of this recipe would fit"),
    ],
)
def test_a_gpu_that_is_too_small_says_what_would_fit(plan, monkeypatch, free, advice):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (free * GIB, 16 * GIB))
    with pytest.raises(UserError, match=f"needs about 1[0-9.]+ GiB, `cuda` has {free}.0 of 16.0 GiB free; {advice}"):
        check_device(plan)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * GIB, 80 * GIB))
    check_device(plan)


def test_a_gpu_that_is_not_there(plan, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(UserError, match="torch sees 0 GPUs"):
        check_device(plan)


FLASH = "`attention: flash_attention_2` needs a GPU, bfloat16 or float16, and the flash-attn package; "


@pytest.mark.parametrize(
    ("device", "dtype", "gpus", "came"),
    [
        ("cpu", "bfloat16", 1, "the device is `cpu`, and torch sees 1 GPUs"),
        ("auto", "bfloat16", 0, "the device is `auto`, and torch sees 0 GPUs"),
        ("cuda", "float32", 1, "the dtype is float32"),
        ("cuda", "bfloat16", 1, "the package is not here"),
    ],
)
def test_flash_attention_that_cannot_be_run(monkeypatch, device, dtype, gpus, came):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: bool(gpus))
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (80 * GIB, 80 * GIB))
    monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: False)
    asked = ["attention=flash_attention_2", f"device={device}", f"dtype={dtype}"]
    plan = make_plan(load_recipe("llava-next-mistral-7b", asked))
    with pytest.raises(UserError, match=f"^{FLASH}{came}; use `attention: sdpa`.$"):
        check_device(plan)
    if came.startswith("the package"):
        monkeypatch.setattr("transformers.utils.is_flash_attn_2_available", lambda: True)
        check_device(plan)


def saved_bytes(model, block, tokens):
    """What autograd keeps for the backward pass of one block, parameters left out."""
    kept = {}
    own = {p.untyped_storage().data_ptr() for p in model.model.parameters()}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage, storage.nbytes())
        return tensor

    hidden = model.base.config.text_config.hidden_size
    state = torch.randn(1, tokens, hidden, dtype=model.base.dtype, requires_grad=True)
    rotary = model.base.model.language_model.rotary_emb(state, torch.arange(tokens)[None])
    for name, module in model.model.named_modules():
        module.training = "lora_dropout" in name.split(".")
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model.decoder_blocks[block](state, attention_mask=None, position_ids=None, position_embeddings=rotary)
    del output
    return sum(size for _, size in kept.values())


@pytest.mark.parametrize("block", [0, 1], ids=["below the adapter", "adapted"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_activation_formula_against_what_autograd_keeps(dtype, block):
    model = tiny_llava(blocks=2, hidden=256, ffn=896)
    model.model.to(getattr(torch, dtype))
    paths, tokens = lora_paths(model, [1], ALL), 512
    size = getattr(torch, dtype).itemsize
    expected = tokens * block_bytes(model, f"model.language_model.layers.{block}.", paths, 4, size)
    inputs = block * (6 * 256 + 896)
    expected += 3 * tokens * inputs  # the CPU's dropout keeps its mask in float32, CUDA's one byte a value
    adapted = add_adapter(model, paths, KeptBlocks(2, True), r=4, lora_alpha=4, dropout=0.05)
    assert 0.9 < saved_bytes(adapted, block, tokens) / expected < 1.1


def test_memory_grows_with_what_it_should():
    model = tiny_llava(blocks=4)
    paths = lora_paths(model, [1], ALL)

    def total(kept=2, **changed):
        options = {"tokens": 100, "r": 4, "dtype": "float32", **changed}
        return estimate(model, paths, KeptBlocks(kept, True), **options).total

    assert total(kept=3) > total() and total(tokens=200) > total() and total(r=8) > total()
    assert total(dtype="bfloat16") < total() and total(quantize="4bit") < total()
    assert total(recompute=True) == total()  # of one adapted block, nothing can be saved
    assert total() < total(adversary=True, recompute=True) < total(adversary=True)  # it goes through block 0, too
    with_head = estimate(model, paths, KeptBlocks(4, True, head=True), r=4, dtype="float32", tokens=100)
    without = estimate(model, paths, KeptBlocks(4, True), r=4, dtype="float32", tokens=100)
    assert with_head.weights - without.weights == 4 * model.base.lm_head.weight.numel()
    assert with_head.activations > without.activations  # of blocks 2 and 3, through which the gradient comes
    assert with_head.working > without.working
    paths = lora_paths(model, [0, 1], ALL)
    assert total(recompute=True) < total() == total(adversary=True)
    assert "GiB: weights" in str(estimate(model, paths, KeptBlocks(2, True), r=4, dtype="float32", tokens=9))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ("[wandbb]", "unknown tracker `wandbb`, did you mean `wandb`"),
        ("[mlflow]", "`mlflow`, which is not installed here"),
    ],
)
def test_trackers_are_looked_for_before_anything_is_loaded(monkeypatch, names, message):
    from transformers.integrations import integration_utils

    monkeypatch.setattr(integration_utils, "get_available_reporting_integrations", lambda: ["tensorboard"])
    with pytest.raises(UserError, match=message):
        make_plan(load_recipe("miniature", [f"training.report_to={names}"]))
    make_plan(load_recipe("miniature", ["training.report_to=[tensorboard]"]))
