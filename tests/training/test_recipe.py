import pytest
import yaml

from mm_cb.errors import UserError
from mm_cb.training.recipe import Recipe, load_recipe, recipe_keys, recipe_names


def test_the_miniature_recipe():
    assert recipe_names() == ["miniature"]
    recipe = load_recipe("miniature")
    assert recipe.circuit_breaker.alpha == 5 and recipe.circuit_breaker.target_layers == [2, 4]
    assert recipe.lora.layers_to_transform == [0, 1, 2, 3] and len(recipe.lora.modules) == 7
    assert recipe.circuit_breaker.masks.multimodal == "completion"
    assert recipe.circuit_breaker.masks.text == "completion"
    assert (recipe.batches, recipe.training.max_steps, recipe.training.batch_size) == ("alternate", 300, 16)


def test_every_shipped_recipe_writes_out_what_the_method_needs():
    for name in recipe_names():
        assert load_recipe(name).name == name


def test_the_defaults_are_the_papers():
    recipe = Recipe(name="x", model="x", data="x")
    assert recipe.circuit_breaker.alpha == 5 and recipe.circuit_breaker.target_layers == [16]
    assert recipe.lora.layers_to_transform == [14, 15, 16]
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.dropout) == (16, 16, 0.05)
    assert (recipe.training.learning_rate, recipe.training.weight_decay) == (1e-4, 0)


def test_every_key_can_be_overridden():
    recipe = load_recipe("miniature")
    flat = dict.fromkeys(recipe_keys())
    for key in flat:
        value = recipe
        for part in key.split("."):
            value = getattr(value, part)
        assert load_recipe("miniature", [f"{key}={yaml.safe_dump(value, default_flow_style=True)}"]) == recipe, key


def test_overrides_have_yaml_values():
    recipe = load_recipe(
        "miniature", ["training.learning_rate=3e-3", "circuit_breaker.target_layers=[2, 4]", "data=[a.jsonl]"]
    )
    assert recipe.training.learning_rate == 3e-3
    assert recipe.circuit_breaker.target_layers == [2, 4] and recipe.data == ["a.jsonl"]


def test_a_resolved_recipe_can_be_run_again(tmp_path):
    recipe = load_recipe("miniature", ["seed=3"])
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(tmp_path / "again.yaml") == recipe


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps=3", "unknown recipe key `training.steps`.*training.max_steps"),
        ("lora.dropuot=0", "did you mean `lora.dropout`"),
        ("circuit_breaker.masks.txt=all", "did you mean `circuit_breaker.masks.text`"),
        ("seed.value=3", "unknown recipe key `seed.value`"),
        ("alpha", "key=value"),
        ("=3", "key=value"),
        ("training.max_steps=many", "`training.max_steps`.*'many'"),
        ("training.max_steps=0", "`training.max_steps`"),
        ("training.learning_rate=.nan", "`training.learning_rate`"),
        ("circuit_breaker.alpha=-1", "`circuit_breaker.alpha`"),
        ("circuit_breaker.target_layers=[]", "`circuit_breaker.target_layers`"),
        ("circuit_breaker.target_layers=[-1]", "`circuit_breaker.target_layers.0`"),
        ("circuit_breaker.masks.text=answers", "`circuit_breaker.masks.text`"),
        ("training.gradient_accumulation_steps=3", "must be a multiple"),
        ("training=3", "`training`"),
        ("training={}", None),
        ("seed=[", "not YAML"),
    ],
)
def test_bad_overrides_are_one_line(override, message):
    if message is None:
        assert load_recipe("miniature", [override]).training.max_steps == 150
        return
    with pytest.raises(UserError, match=message):
        load_recipe("miniature", [override])


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="unknown recipe `miniatur`, did you mean `miniature`"):
        load_recipe("miniatur")
    file = tmp_path / "recipe.yaml"
    with pytest.raises(UserError, match="cannot read"):
        load_recipe(file)
    for content, message in [("a: [", "not YAML"), ("- a", "key: value"), ("name: x", "Field required"), ("", "key:")]:
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            load_recipe(file)
    file.write_text("name: x\nmodel: x\ndata: x\ntraining:\n  epochs: 3\n")
    with pytest.raises(UserError, match=r"unknown recipe key `training\.epochs`"):
        load_recipe(file)
