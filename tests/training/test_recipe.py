import functools
import json
import re

import pytest
import yaml

from mm_cb.core.errors import UserError
from mm_cb.core.recipe_files import RECIPES, recipe_names, recipe_text
from mm_cb.models.known import known_config
from mm_cb.training.recipes.config import Recipe
from mm_cb.training.recipes.recipe import load_recipe, recipe_keys, typed_recipe


def test_the_miniature_recipe():
    assert set(recipe_names()) == {
        "gemma-3-12b-it", "gemma-4-e4b-it", "gpt2", "idefics3-8b", "internvl3-8b", "llama-3-8b-instruct",
        "llama-3-8b-instruct-agents", "llava-1.5-7b", "llava-next-mistral-7b", "llava-onevision-7b", "miniature",
        "miniature-agent", "miniature-paper", "mistral-7b-instruct", "mistral-small-3.1-24b", "pixtral-12b",
        "qwen2-vl-7b", "qwen2.5-vl-7b", "qwen2.5-vl-7b-agents", "qwen3-vl-8b", "qwen3.5-9b", "smolvlm-2b",
    }  # fmt: skip
    recipe = load_recipe("miniature")
    assert recipe.circuit_breaker.alpha == 5 and recipe.circuit_breaker.target_layers == [2, 4]
    assert recipe.lora.layers_to_transform == [0, 1, 2, 3] and len(recipe.lora.modules) == 7
    assert recipe.circuit_breaker.masks.multimodal == "completion"
    assert recipe.circuit_breaker.masks.text == "completion"
    assert (recipe.batches, recipe.training.max_steps, recipe.training.batch_size) == ("alternate", 220, 16)


def test_every_shipped_recipe_writes_out_what_the_method_needs():
    for name in recipe_names():
        assert load_recipe(name).name == name


def test_layers_of_another_depth_than_the_papers_are_marked_as_scaled():
    for name in recipe_names():
        shape = known_config(load_recipe(name).model)
        if shape is None or shape.get_text_config().num_hidden_layers == 32:
            continue
        text = (RECIPES / f"{name}.yaml").read_text(encoding="utf-8")
        marks = re.findall(r"^  (?:target_layers|layers_to_transform):.*# (.*)$", text, re.MULTILINE)
        assert len(marks) == 2 and all(mark.startswith("ours") for mark in marks), (name, marks)


def test_the_defaults_are_the_papers():
    recipe = Recipe(name="x", model="x", data="miniature")
    assert recipe.circuit_breaker.alpha == 5 and recipe.circuit_breaker.target_layers == [16]
    assert recipe.lora.layers_to_transform == [14, 15, 16]
    assert (recipe.lora.r, recipe.lora.lora_alpha, recipe.lora.dropout) == (16, 16, 0.05)
    assert (recipe.training.learning_rate, recipe.training.weight_decay) == (1e-4, 0)


def test_a_recipe_that_names_the_papers_way_names_every_deviation_and_marks_it():
    ways = ("circuit_breaker.retain_scale=absolute", "circuit_breaker.shared_openings=rerouted", "start_distance=0")
    texts = [text for text in map(recipe_text, recipe_names()) if "paper's way" in text.lower()]
    assert len(texts) > 15
    for text in texts:
        head, _, fields = text.partition("\nname:")
        assert all(way in head for way in ways) and "shared_openings: left_out  # ours, a deviation" in fields


def test_the_7b_recipe_is_the_papers():
    recipe = load_recipe("llava-next-mistral-7b")
    breaker, lora = recipe.circuit_breaker, recipe.lora
    assert recipe.model == "llava-hf/llava-v1.6-mistral-7b-hf"
    assert (breaker.alpha, breaker.target_layers, lora.layers_to_transform) == (5, [16], [14, 15, 16])
    assert (breaker.masks.multimodal, breaker.masks.text) == ("after_image", "user_and_assistant")
    assert recipe.batches == "alternate" and (breaker.retain_layers, breaker.retain_average) == ("all", "tokens")


@pytest.mark.parametrize(("name", "alpha"), [("mistral-7b-instruct", 5), ("llama-3-8b-instruct", 10)])
def test_the_text_recipes_are_the_released_ones(name, alpha):
    recipe = load_recipe(name)
    breaker, lora, training = recipe.circuit_breaker, recipe.lora, recipe.training
    assert (breaker.alpha, breaker.target_layers, recipe.batches) == (alpha, [10, 20], "text")
    assert lora.layers_to_transform == list(range(21)) and len(lora.modules) == 7
    assert (lora.r, lora.lora_alpha, lora.dropout) == (16, 16, 0.05)
    assert (training.max_steps, training.batch_size, training.learning_rate, training.weight_decay) == (
        150,
        16,
        1e-4,
        0,
    )


@pytest.mark.parametrize("name", ["llama-3-8b-instruct", "qwen2.5-vl-7b"])
def test_the_recipes_for_agents_are_those_of_their_models_with_calls_mixed_in(name):
    plain, agents = load_recipe(name), load_recipe(f"{name}-agents")
    mixed = [source for source in agents.data.sources if source not in plain.data.sources]
    assert [source for source in agents.data.sources if source in plain.data.sources] == plain.data.sources
    assert [(source.name, source.set) for source in mixed] == [
        ("harmful-calls.jsonl", "circuit_breaker"),
        ("calls.jsonl", "retain"),
    ]
    assert agents.circuit_breaker.masks.text == "user_and_assistant"
    masks = {"masks": plain.circuit_breaker.masks}
    same = {"name": name, "data": plain.data, "circuit_breaker": agents.circuit_breaker.model_copy(update=masks)}
    assert agents.model_copy(update=same) == plain


OTHER_FAMILIES = {
    "gemma-3-12b-it": (24, 48),
    "gemma-4-e4b-it": (21, 42),
    "idefics3-8b": (16, 32),
    "internvl3-8b": (14, 28),
    "llava-1.5-7b": (16, 32),
    "llava-onevision-7b": (14, 28),
    "mistral-small-3.1-24b": (20, 40),
    "pixtral-12b": (20, 40),
    "qwen2-vl-7b": (14, 28),
    "qwen2.5-vl-7b": (14, 28),
    "qwen3-vl-8b": (18, 36),
    "qwen3.5-9b": (16, 32),
    "smolvlm-2b": (12, 24),
}


RECURRENT = ("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b", "out_proj")
"""Linear layers that stand in Qwen3.5's recurrent blocks in place of attention's."""


@pytest.mark.parametrize(("name", "target", "blocks"), [(name, *depth) for name, depth in OTHER_FAMILIES.items()])
def test_the_recipes_of_other_families_are_the_papers_at_the_same_depth_and_say_so(name, target, blocks):
    recipe, paper = load_recipe(name), load_recipe("llava-next-mistral-7b")
    assert recipe.circuit_breaker.target_layers == [target] == [blocks // 2]
    assert recipe.lora.layers_to_transform == [target - 2, target - 1, target]
    moved = {"circuit_breaker": {"target_layers": [16]}, "lora": {"layers_to_transform": [14, 15, 16]}}
    moved["lora"]["modules"] = [one for one in recipe.lora.modules if one not in RECURRENT]
    same = recipe.model_dump() | {"name": paper.name, "model": paper.model}
    for section, fields in moved.items():
        same[section] |= fields
    assert same == paper.model_dump()
    text = (RECIPES / f"{name}.yaml").read_text()
    assert "No breaker was trained by this recipe so far." in text and "# paper" not in text


@pytest.mark.parametrize("name", ["llava-next-mistral-7b", *OTHER_FAMILIES])
def test_every_line_of_a_shipped_recipe_says_where_its_value_is_from(name):
    lines = (RECIPES / f"{name}.yaml").read_text().splitlines()
    values = [line for line in lines if ": " in line and not line.startswith(("#", "name:", "device:"))]
    assert values and all(
        re.search(r"# (paper|text trainer|transfer|ours|your copy)", line) for line in values if "set:" not in line
    )


def test_a_mixture_of_data_sets():
    sources = "{sources: [{name: ultrachat_200k, limit: 5}, {name: mine.jsonl, set: retain, images: coco}]}"
    recipe = load_recipe("miniature", [f"data={sources}"])
    assert [source.name for source in recipe.data.sources] == ["ultrachat_200k", "mine.jsonl"]
    assert (recipe.data.sources[0].limit, recipe.data.sources[0].weight, recipe.data.sources[1].images) == (
        5,
        1,
        "coco",
    )


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


def test_no_field_is_given_twice():
    for key in recipe_keys():
        group, _, last = key.rpartition(".")
        pairs = [(f"{key}=1", f" {key} =2")]
        pairs += [(f"{group}={{{last}: 1}}", f"{key}=2"), (f"{key}=2", f"{group}={{{last}: 1}}")] if group else []
        for first, second in pairs:
            with pytest.raises(UserError) as told:
                typed_recipe("miniature", [first, "name=x" if key != "name" else "seed=3", second])
            assert all(f"`{one}`" in str(told.value) for one in (first, second)), (first, second)
    with pytest.raises(UserError, match=r"`data.sources` is given more than once"):
        typed_recipe("miniature", ["data=[a.jsonl]", "data.sources=[{name: b.jsonl}]"])
    beside = typed_recipe("miniature", ["training={max_steps: 8}", "training.weight_decay=0.1"]).training
    assert (beside.max_steps, beside.weight_decay) == (8, 0.1)


@pytest.mark.parametrize("name", ["miniature", "llava-next-mistral-7b"])
def test_a_group_changes_the_fields_that_it_names_and_no_other(name):
    whole = load_recipe(name).model_dump(mode="json")
    for group in ("circuit_breaker", "circuit_breaker.masks", "circuit_breaker.adversary", "lora", "training"):
        fields = functools.reduce(lambda part, key: part[key], group.split("."), whole)
        for field, value in fields.items():
            if not isinstance(value, dict):  # as the recipe has it: nothing changes
                assert load_recipe(name, [f"{group}={json.dumps({field: value})}"]).model_dump(mode="json") == whole
    nested = load_recipe(name, ["circuit_breaker={alpha: 7, masks: {text: all}}"])
    assert nested == load_recipe(name, ["circuit_breaker.alpha=7", "circuit_breaker.masks.text=all"])
    typed = typed_recipe(name, ["training.weight_decay=0.1", "training={max_steps: 8}"]).training
    assert (typed.max_steps, typed.weight_decay) == (8, 0.1)


def test_the_settings_of_a_loss_are_a_group_that_can_be_emptied():
    loss = ["circuit_breaker.loss=repbend", "circuit_breaker.keep_length=0", "circuit_breaker.loss_settings={away: 3}"]
    given = [*loss, "circuit_breaker.loss_settings={alike: 4}"]
    settings = load_recipe("miniature", given).circuit_breaker.loss_settings
    assert (settings["away"], settings["alike"]) == (3, 4)
    emptied = load_recipe("miniature", [*given, "circuit_breaker.loss_settings={}"])
    assert emptied == load_recipe("miniature", loss[:-1])


def test_fields_of_a_mixture_survive_its_group():
    skip = ["data={sources: [{name: a.jsonl}], skip_too_long: true}", "data={skip_missing_images: true}"]
    data = load_recipe("miniature", skip).data
    assert data.skip_too_long and data.skip_missing_images and data.sources[0].name == "a.jsonl"


def test_fields_of_a_mixture_may_be_typed_beside_a_list_of_files():
    files = "data=[a.jsonl, b.jsonl]"
    data = load_recipe("miniature", [files, "data.skip_missing_images=true", "data.skip_too_long=true"]).data
    assert [source.name for source in data.sources] == ["a.jsonl", "b.jsonl"]
    assert data.skip_missing_images and data.skip_too_long
    with pytest.raises(UserError, match=r"`data\.skip_images` .*did you mean `skip_missing_images`|skip_images"):
        load_recipe("miniature", [files, "data.skip_images=true"])


@pytest.mark.parametrize(
    "override", ["data.skip_missing_images=true", "seed.value=3", "model.x=1", "trainig.max_step=3", "q=1", "lr=1"]
)
def test_an_unknown_key_is_one_short_line(override):
    with pytest.raises(UserError) as told:
        load_recipe("miniature", [override])
    assert len(str(told.value)) < 300 and "--fields" in str(told.value)


def test_a_resolved_recipe_can_be_run_again(tmp_path):
    recipe = load_recipe("miniature", ["seed=3"])
    (tmp_path / "again.yaml").write_text(yaml.safe_dump(recipe.model_dump(mode="json")))
    assert load_recipe(tmp_path / "again.yaml") == recipe


UNKNOWN_DEVICES = ("CPU", "cudaa:0", "cud", "'cuda:-1'", "mps", "cuda:01")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.steps=3", "unknown recipe key `training.steps`.*training.max_steps"),
        *(
            (f"device={name}", r"`device`: the device must be cpu, cuda, cuda:N or auto, got '[^']*'\.$")
            for name in UNKNOWN_DEVICES
        ),
        ("lora.dropuot=0", "did you mean `lora.dropout`"),
        ("circuit_breaker.masks.txt=all", "did you mean `circuit_breaker.masks.text`"),
        ("seed.value=3", "unknown recipe key `seed.value`"),
        ("alpha", "key=value"),
        ("=3", "key=value"),
        ("training.max_steps=many", "`training.max_steps`.*'many'"),
        ("circuit_breaker.dial_from='1_0'", "`circuit_breaker.dial_from`: a number is expected, got '1_0'"),
        ("training.max_steps=0", "`training.max_steps`"),
        ("training.save_steps=0", r"`training.save_steps`: .* \(no run has more steps\)"),
        ("training.learning_rate=.nan", "`training.learning_rate`"),
        ("circuit_breaker.alpha=-1", "`circuit_breaker.alpha`"),
        ("circuit_breaker.target_layers=[]", "`circuit_breaker.target_layers`"),
        ("circuit_breaker.target_layers=[-1]", "`circuit_breaker.target_layers.0`"),
        ("circuit_breaker.masks.text=answers", "`circuit_breaker.masks.text`"),
        ("training.gradient_accumulation_steps=3", r"must be a multiple of .*, got \d+ and 3\.$"),
        ("training=3", "`training`"),
        ("training={}", r"`training=\{\}` names no field to change"),
        ("circuit_breaker={masks: {}}", r"`circuit_breaker.masks=\{\}` names no field to change"),
        ("seed=[", "not YAML"),
        ("data=ultrachat", "`data`: .*`miniature`.*'ultrachat'"),
        ("data=rows.jsonl", r"a list of files \(`data=\[FILE\]`\).*'rows.jsonl'"),
        ("data.sources=[]", "`data.sources`"),
        ("data={sources: [{nam: x}]}", "`data.sources.0.name`: Field required"),
        ("data={sources: [{name: x, wieght: 2}]}", "unknown key of `data.sources.0` `wieght`, did you mean `weight`"),
        ("data={sources: [{name: x, set: harmful}]}", "`data.sources.0.set`"),
        ("data={source: []}", "did you mean `sources`|`data.sources`: Field required"),
        ("quantize=8bit", "`quantize`.*4bit"),
        ("attention=eager", "`attention`: `sdpa` or `flash_attention_2` is expected, got 'eager'"),
    ],
)
def test_bad_overrides_are_one_line(override, message):
    with pytest.raises(UserError, match=message):
        load_recipe("miniature", [override])


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match="unknown recipe `miniatur`, did you mean `miniature`"):
        load_recipe("miniatur")
    file = tmp_path / "recipe.yaml"
    with pytest.raises(UserError, match="cannot read"):
        load_recipe(file)
    (tmp_path / "recipe.txt").touch()
    for path in (tmp_path, tmp_path / "recipe.txt"):
        with pytest.raises(UserError, match=r"a file whose name ends in \.yaml, got"):
            load_recipe(path)
    for content, message in [
        ("a: [", "not YAML"),
        ("- a", "key: value"),
        ("name: x", "Field required"),
        ("", "lines, it is empty"),
    ]:
        file.write_text(content)
        with pytest.raises(UserError, match=message):
            load_recipe(file)
    file.write_text("name: x\nmodel: x\ndata: x\ntraining:\n  epochs: 3\n")
    with pytest.raises(UserError, match=r"unknown recipe key `training\.epochs`"):
        load_recipe(file)


@pytest.mark.parametrize("override", ["training.max_steps=true", "circuit_breaker.alpha=yes", "name=off", "seed=no"])
def test_a_truth_value_is_no_number(override):
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=rf"`{key}`: neither true nor false can stand here.* got (True|False)"):
        load_recipe("miniature", [override])
    with pytest.raises(UserError, match="can stand here, but one of left_out, rerouted .*, got False"):
        load_recipe("miniature", ["circuit_breaker.shared_openings=no"])


def test_a_truth_value_is_one_where_one_is_asked_for():
    assert load_recipe("miniature", ["training.recompute=true"]).training.recompute


def test_a_section_that_is_no_section_is_said_in_the_words_of_a_recipe():
    with pytest.raises(UserError, match="`lora`: `key: value` fields are expected, got 5"):
        load_recipe("miniature", ["lora=5"])


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("training.learning_rate=null", "a number above 0 up to 10 is expected .*, got None"),
        ("training.max_steps=[2]", "a whole number from 1 to .* is expected .*, got \\[2\\]"),
        ('training.max_steps="1_000"', "a whole number from 1 .*, got '1_000'"),
        ('circuit_breaker.alpha="٣"', "a number above 0 .*, got '٣'"),
        ('lora.dropout="0_1"', "a number is expected, got '0_1'"),
        ("lora.dropout=null", "a number is expected, got None"),
        ("lora.modules=[1]", "a text is expected, got 1"),
        ("lora.layers_to_transform=3", "a list is expected, got 3"),
        ("training.recompute=perhaps", "true or false is expected, got 'perhaps'"),
        ("dtype=null", "`float32`, `bfloat16` or `float16` is expected, got None"),
        ('model=""', "a text is expected, got ''"),
    ],
)
def test_what_is_expected_is_said_in_the_words_of_a_recipe(override, said):
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=rf"`{key}(\.0)?`: {said}\.$"):
        load_recipe("miniature", [override])


def test_a_number_that_yaml_takes_for_a_text_is_one():
    assert load_recipe("miniature", ["training.learning_rate=1e-4"]).training.learning_rate == 1e-4
    assert load_recipe("miniature", ['lora.r="8"', "lora.dropout=1e-1"]).lora.r == 8


def test_a_run_that_may_stop_at_a_step_keeps_no_mean_of_many():
    stop = ["training.held_out=1", "training.stop_at_cosine=0.5"]
    with pytest.raises(UserError, match="set one to null or 0, got 0.5 and 0.33"):
        load_recipe("miniature", stop)
    assert load_recipe("miniature", [*stop, "training.average_last=0"]).training.stop_at_cosine == 0.5


def test_a_source_of_a_mixture_is_changed_by_its_number():
    fields = [
        "data.sources.0.remove_request=0",
        "data.sources.1={limit: 7, weight: 2}",
        "data.sources.2.refusals=false",
    ]
    before, after = (load_recipe("llama-3-8b-instruct", given).data.sources for given in ([], fields))
    assert (before[0].remove_request, after[0].remove_request) == (0.5, 0)
    assert (after[1].name, after[1].limit, after[1].weight) == (before[1].name, 7, 2) and not after[2].refusals
    mine = load_recipe("miniature", ["data=[a.jsonl, b.jsonl]", "data.sources.1.weight=3"]).data.sources
    assert [(one.name, one.weight) for one in mine] == [("a.jsonl", 1), ("b.jsonl", 3)]


@pytest.mark.parametrize(
    "key", ["data.sources.3.limit", "data.sources.x.limit", "data.sources.-1.limit", "data.sources.9"]
)
def test_a_source_that_is_not_there_is_refused_with_the_numbers_that_are(key):
    with pytest.raises(UserError, match=r"a number from 0 to 2 is expected"):
        load_recipe("llama-3-8b-instruct", [f"{key}=1"])
