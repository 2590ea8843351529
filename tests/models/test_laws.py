"""Whatever number of a model's folder does not fit the others is refused by file and field, for every family."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from mm_cb.core.errors import UserError
from mm_cb.models import load_model, load_tower
from mm_cb.models.chat import chat, render_chat
from mm_cb.models.families import load_processor, read_config, skeleton
from mm_cb.models.laws import CONFIG, PROCESSOR
from mm_cb.models.loading import load_plain
from mm_cb.models.templates import template_of
from tests.models.shapes import MISTRAL_TEMPLATE
from tests.models.test_model_folders import changed, with_template
from tests.models.tiny import KINDS, tiny
from tests.tiny_llava import TEMPLATE


@pytest.fixture(scope="module")
def described(tmp_path_factory):
    """Folders of all families that see, whose weights are never read."""
    folders = {kind: tmp_path_factory.mktemp("described") / kind for kind in KINDS}
    for kind, folder in folders.items():
        model = tiny(kind)
        model.base.config.save_pretrained(folder)
        model.processor.save_pretrained(folder)
        (folder / "model.safetensors").touch()
    return folders


def read(folder):
    config = read_config(folder)
    processor = load_processor(folder, config)
    skeleton(config, str(folder), processor)
    return processor


def variants(folder, path, file, places):
    """The folder with one field after another set to a value."""
    shutil.copytree(folder, path)
    held = (path / file).read_text()
    for place, value in places:
        fields = json.loads(held)
        *inside, last = place.split(".")
        part = fields
        for name in inside:
            part = part[name]
        part[last] = value
        (path / file).write_text(json.dumps(fields))
        yield place, value


SIZES = {"hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "depth"}
SIZES |= {"vocab_size", "num_heads", "embed_dim", "image_size", "patch_size", "num_channels", "in_channels"}
SIZES |= {"spatial_merge_size", "temporal_patch_size", "out_hidden_size", "window_size", "num_position_embeddings"}
SIZES |= {"sliding_window", "scale_factor", "linear_conv_kernel_dim", "linear_key_head_dim", "linear_value_head_dim"}
SIZES |= {"linear_num_key_heads", "linear_num_value_heads"}
TOKENS = {"image_token_id", "image_token_index", "video_token_id", "vision_start_token_id", "vision_end_token_id"}
TOKENS |= {"bos_token_id", "eos_token_id", "pad_token_id"}
BLOCKS = {"vision_feature_layer", "fullatt_block_indexes", "deepstack_visual_indexes"}


def wrong_fields(fields, where=""):
    """Every field that must fit another, with values that do not."""
    for name, value in fields.items():
        if name in ("text_config", "vision_config", "rope_parameters"):
            yield from wrong_fields(value, f"{where}{name}.")
        wrong = [0, -1, 1.5, "x"] if name in SIZES else []
        wrong += [10**6, -2, 1.5, True] if name in TOKENS else []
        wrong += [99, [99], [-99], ["x"]] if name in BLOCKS else []
        wrong += [[1], [9, 9, 9], "x"] if name == "mrope_section" else []
        wrong += [0, -1, "x"] if name == "rope_theta" else []
        yield from ((f"{where}{name}", one) for one in wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_a_number_of_the_configuration_that_fits_no_other_is_refused_by_name(kind, described, tmp_path):
    read(described[kind])
    places = list(wrong_fields(json.loads((described[kind] / CONFIG).read_text())))
    assert len(places) > 60
    for place, value in variants(described[kind], tmp_path / "bad", CONFIG, places):
        with pytest.raises(UserError, match=place.rpartition(".")[2]) as refused:
            read(tmp_path / "bad")
        assert len(str(refused.value)) < 600, (place, value)


UNLIKE = [("do_resize", False), ("do_rescale", False), ("do_normalize", False), ("rescale_factor", 1.0)]
UNLIKE += [("rescale_factor", "x"), ("image_std", [0, 1, 1]), ("image_std", [1, 1]), ("image_mean", [None] * 3)]
UNLIKE += [("resample", 0), ("resample", 4)]
SQUARE = [("crop_size", 0), ("crop_size", {"height": 14, "width": 14}), ("size", {"shortest_edge": 56})]
TILE = [("size", {"height": 14, "width": 14}), ("size", {"shortest_edge": 28})]
LONGEST = [("size", {"longest_edge": 0}), ("size", {"shortest_edge": 28}), ("size", {"longest_edge": "x"})]
TILES = [*TILE, ("min_patches", 0), ("max_patches", 0), ("max_patches", "x"), ("max_patches", 10**6)]
OWN = {  # beside what is refused for every family
    **dict.fromkeys(("aya_vision", "internvl"), TILES),
    "gemma3": [*TILE, ("do_pan_and_scan", True)],
    "gemma4": [("patch_size", 7), ("pooling_kernel_size", 2)],
    "llava": [*SQUARE, ("do_center_crop", False)],
    "llava_next": [
        ("do_pad", False),
        *SQUARE,
        *(("image_grid_pinpoints", one) for one in ([], [[42, 84]], [[43, 43]], "x", None)),
    ],
    "llava_onevision": [
        ("do_pad", False),
        *TILE,
        *(("image_grid_pinpoints", one) for one in ([], [[28, 84]], "x", None)),
    ],
    **dict.fromkeys(("mistral3", "pixtral"), LONGEST),
    **dict.fromkeys(
        ("idefics3", "smolvlm"),
        [("do_pad", False), *LONGEST, *(("max_image_size", one) for one in ({"longest_edge": 28}, {}, "x"))],
    ),
    **dict.fromkeys(
        ("qwen2_5_vl", "qwen2_vl", "qwen3_5", "qwen3_vl"),
        [
            *(("patch_size", 7), ("merge_size", 1), ("temporal_patch_size", 1)),
            ("size", {"shortest_edge": 0, "longest_edge": 9}),
            ("size", {"shortest_edge": 10**9, "longest_edge": 10**9}),
            ("size", {"shortest_edge": 9000, "longest_edge": 5000}),
        ],
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_image_processor_that_shows_other_pictures_is_refused_by_name(kind, described, tmp_path):
    places = [(f"image_processor.{field}", value) for field, value in UNLIKE + OWN.get(kind, [])]
    if kind == "gemma4":  # which does not normalise
        places[UNLIKE.index(("do_normalize", False))] = ("image_processor.do_normalize", True)
    for place, value in variants(described[kind], tmp_path / "bad", PROCESSOR, places):
        field = "size" if "center_crop" in place else place.partition(".")[2]
        with pytest.raises(UserError, match=rf"processor_config\.json` must .*`{field}`"):
            read(tmp_path / "bad")
            pytest.fail(f"{place} {value}")


def test_another_familys_processor_is_refused_by_what_is_wrong_with_it(described, tmp_path):
    """SmolVLM's asks for a package that no picture needs: to get it would not help."""
    held, its = (json.loads((described[kind] / CONFIG).read_text()) for kind in ("llava", "smolvlm"))
    held["text_config"]["vocab_size"] = its["text_config"]["vocab_size"]
    fields = held | {"image_token_index": its["image_token_id"]}
    with pytest.raises(UserError, match=r"processor_config\.json` must have `patch_size` 14.*got none"):
        read(changed(described["smolvlm"], tmp_path / "bad", CONFIG, drop=its, **fields))


def test_a_model_without_an_image_tower_is_refused(described, tmp_path):
    bad = changed(described["gemma4"], tmp_path / "bad", CONFIG, vision_config=None)
    with pytest.raises(UserError, match="must have a `vision_config`"):
        read(bad)


CANVASES = [[], [[43, 43]], [[0, 0]], [[42]], [[42, -42]], [[42, 42.0]], [[42 * 11, 42 * 11]], None]


@pytest.mark.parametrize("canvases", CANVASES)
def test_canvases_are_whole_tiles_in_both_files(canvases, described, tmp_path):
    bad = changed(described["llava_next"], tmp_path / "bad", CONFIG, image_grid_pinpoints=canvases)
    with pytest.raises(UserError, match="image_grid_pinpoints"):
        read(bad)


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_stand_at_the_token_of_the_configuration(kind, described, tmp_path):
    (field,) = {"image_token_index", "image_token_id"} & json.loads((described[kind] / CONFIG).read_text()).keys()
    bad = changed(described[kind], tmp_path / "bad", CONFIG, **{field: 0})
    with pytest.raises(UserError, match=rf"`{field}` must be \d+, the tokenizer's id of `\S*(image|IMG)\S*`, got 0"):
        read(bad)


@pytest.mark.parametrize("part", [None, "text_config", "vision_config"])
@pytest.mark.parametrize("stored", [{"quant_method": "bogus"}, {"quant_method": "gptq", "bits": 4}, {"a": 1}, "x"])
def test_stored_quantised_weights_are_refused(part, stored, described, tmp_path):
    fields = {"quantization_config": stored}
    if part is not None:
        fields = {part: json.loads((described["llava"] / CONFIG).read_text())[part] | fields}
    with pytest.raises(UserError, match="quantization_config` says .*take the full-precision model"):
        read_config(changed(described["llava"], tmp_path / "bad", CONFIG, **fields))


def test_weights_of_few_bits_are_refused(text_folder, tmp_path):
    bad = changed(text_folder, tmp_path / "bad")
    tensors = load_file(bad / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: tensors[name].to(torch.float8_e4m3fn)}, bad / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=rf"but 1 are of another type, such as `{name}` \(F8_E4M3\)"):
        load_model(bad)


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_fewer_blocks_than_the_weights_have_are_another_model(part, folder, tmp_path):
    fields = json.loads((folder / CONFIG).read_text())[part]
    bad = changed(folder, tmp_path / "bad", CONFIG, **{part: fields | {"num_hidden_layers": 2}})
    for load in (load_model, load_plain, lambda name: load_tower(name, 1)):
        with pytest.raises(UserError, match=r"has, beyond its own, \d+ tensors .*layers\.2"):
            load(bad)


@pytest.mark.parametrize("most", ["many", 0, -1, True, [512], {}])
def test_a_longest_input_that_is_no_number_is_refused(most, described, tmp_path):
    bad = changed(described["llava"], tmp_path / "bad", "tokenizer_config.json", model_max_length=most)
    with pytest.raises(UserError, match=r"tokenizer_config\.json`: `model_max_length` must be a number of tokens"):
        read(bad)


ABSENT = {
    PROCESSOR: r"must hold processor_config\.json .or preprocessor_config\.json.: what its pictures become",
    "tokenizer.json": "must hold its tokenizer, tokenizer.json",
}


@pytest.mark.parametrize("file", ABSENT)
def test_an_absent_file_is_named_in_our_words(file, described, tmp_path):
    bad = changed(described["llava"], tmp_path / "bad")
    (bad / file).unlink()
    with pytest.raises(UserError, match=ABSENT[file]) as refused:
        read(bad)
    assert len(str(refused.value)) < 400


def test_a_tokenizer_without_model_is_named(described, tmp_path):
    bad = changed(described["llava"], tmp_path / "bad")
    (bad / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match=r"tokenizer\.json` must hold a tokenizer with its `model`, it has none"):
        read(bad)


CHANCE = {
    "{% if messages | length > 4 %}{{ ['a', 'b'] | random }}{% endif %}": "draws by chance .`random`.",
    "{{ dict }}": "an address in memory",
}


@pytest.mark.parametrize("template", CHANCE)
def test_a_template_that_writes_one_chat_in_many_ways_is_refused(template, folder, tmp_path):
    with pytest.raises(UserError, match=CHANCE[template]):
        load_model(with_template(folder, tmp_path / "bad", template + TEMPLATE))


@pytest.mark.parametrize("kind", ["llava", "text"])
def test_a_template_that_asks_for_the_date_is_told_the_same_one_every_day(kind, folder, text_folder, tmp_path):
    source, template = (folder, TEMPLATE) if kind == "llava" else (text_folder, MISTRAL_TEMPLATE)
    dated = "{%- if strftime_now is defined %}{{ strftime_now('%A %d %b %Y, %H:%M') }} {% endif %}" + template
    path = with_template(source, tmp_path / "dated", dated)
    processor = load_processor(path, read_config(path))
    template_of(processor, processor.tokenizer, path)
    assert "Friday 26 Jul 2024, 00:00 " in render_chat(processor, chat("what")).text
