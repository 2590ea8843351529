"""The laws over every family that ships and both image backends; and that they notice what they are there for."""

from functools import partial

import pytest
import torch

from image_attacks import resize
from image_attacks.resampling import RECIPES
from image_attacks.views import Plan
from mm_cb.core.errors import UserError
from mm_cb.models import VisionModel
from mm_cb.models.counted_positions import OF_ONE_TOKEN
from mm_cb.models.decoding import decode_ids
from mm_cb.models.qwen3_5 import Qwen35Model
from mm_cb.models.qwen_vl import QwenVLModel
from mm_cb.models.registry import _FAMILIES
from mm_cb.models.smolvlm import SmolVLMModel
from mm_cb.models.tower import LanguageTower
from tests.models import laws
from tests.models.tiny import KINDS, squeezed_llava, tiny, tiny_with


@pytest.fixture(autouse=True)
def trusted_templates(monkeypatch):
    """Ours are not a stranger's: to run each in a process of its own first is tested elsewhere, and costs seconds."""
    monkeypatch.setattr("mm_cb.models.templates._run_apart", lambda told: None)


@pytest.mark.parametrize("law", laws.LAWS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_law(kind, law, tmp_path):
    law(partial(tiny, kind), tmp_path)


@pytest.mark.parametrize("law", laws.BY_PIXELS, ids=lambda law: law.__name__)
@pytest.mark.parametrize("kind", KINDS)
def test_law_with_torchvision(kind, law, tmp_path):
    law(partial(tiny, kind, "torchvision"), tmp_path)


@pytest.mark.parametrize(
    "law",
    [
        *laws.BY_PIXELS,
        laws.an_attack_lowers_the_loss_that_the_file_has,
        laws.an_adapter_is_saved_loaded_and_merged,
    ],
    ids=lambda law: law.__name__,
)
@pytest.mark.parametrize("backend", ["pil", "torchvision"])
def test_law_with_pictures_squeezed_to_the_square(backend, law, tmp_path):
    law(partial(squeezed_llava, backend), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_no_law_is_kept_because_a_matrix_is_the_same_everywhere(kind):
    weights = tiny(kind).base.named_parameters()
    assert [name for name, weight in weights if weight.ndim > 1 and len(weight.unique()) == 1] == []


NARROW = {(1, 201): "cannot show pictures of 1 x 201", (201, 1): "cannot show pictures of 201 x 1"}
TOO_SMALL = dict.fromkeys([(1, 1), (3, 3)], "pixels on one side; enlarge it")
REFUSED = {
    **dict.fromkeys(("mistral3", "pixtral"), NARROW | TOO_SMALL),
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"), NARROW),
}


@pytest.mark.parametrize("backend", ["pil", "torchvision"])
@pytest.mark.parametrize("kind", KINDS)
def test_tiny_and_extreme_pictures_are_exact_or_refused_by_name(kind, backend):
    model = laws.with_adapter(tiny(kind, backend))[0]
    for size in laws.SMALL if backend == "pil" else laws.SMALL[::4]:  # where refusals and plans are the same
        expected = REFUSED.get(kind, {}).get(size)
        for why in laws.shown_or_refused(model, size):
            assert (why is None) == (expected is None) and (expected or "") in (why or ""), (size, why)
            assert "\n" not in (why or "")


_QWEN2 = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 1}
WINDOWS = {
    "aya_vision": {"sliding_window": 8},
    "gemma3": {"sliding_window": 3},
    "gemma4": {"sliding_window": 8},
    "internvl": _QWEN2,
    "llava_onevision": _QWEN2,
    **dict.fromkeys(("mistral3", "pixtral"), {"sliding_window": 8}),
    "qwen2_5_vl": _QWEN2,
    "qwen2_vl": _QWEN2,
}
"""Settings of language towers under which rows are longer than a window, Gemma's pictures too. The towers of the other
families have none, but for LLaVA-NeXT's, below."""


@pytest.mark.parametrize("kind", WINDOWS)
def test_rows_longer_than_a_sliding_window(kind, tmp_path):
    make = partial(tiny, kind, **WINDOWS[kind])
    types = getattr(make().base.config.text_config, "layer_types", None)
    assert not types or set(types) == {"full_attention", "sliding_attention"}
    laws.packed_states_are_the_padded_ones(make, tmp_path)
    laws.rows_of_a_mixed_batch_are_single_rows(make, tmp_path)


TOWERS = [
    *(("internvl", "llama"), ("internvl", "qwen3"), ("llava", "mistral"), ("llava", "qwen2")),
    *(("llava_next", "llama"), ("llava_next", "qwen2")),
]
"""Families around language towers of further types."""
OF_TOWERS = [law for law in laws.LAWS if law not in (*laws.BEFORE_THE_TOWER, laws.training_reroutes)]


@pytest.mark.parametrize("law", OF_TOWERS, ids=lambda law: law.__name__)
@pytest.mark.parametrize(("kind", "tower"), TOWERS)
def test_law_with_another_language_tower(kind, tower, law, tmp_path):
    law(partial(tiny_with, kind, tower), tmp_path)


def test_training_reroutes_with_the_one_tower_that_no_family_is_made_with(tmp_path):
    laws.training_reroutes(partial(tiny_with, "internvl", "qwen3"), tmp_path)


@pytest.mark.parametrize(
    ("kind", "tower", "settings"),
    [
        ("internvl", "qwen3", _QWEN2),
        ("llava_next", "mistral", {"sliding_window": 8}),
        ("llava_next", "qwen2", _QWEN2),
    ],
)
def test_rows_longer_than_the_window_of_another_tower(kind, tower, settings, tmp_path):
    make = partial(tiny_with, kind, tower, **settings)
    laws.packed_states_are_the_padded_ones(make, tmp_path)
    laws.rows_of_a_mixed_batch_are_single_rows(make, tmp_path)


LARGE_GEMMA4 = {
    "use_bidirectional_attention": "vision",
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": 0,
    "attention_k_eq_v": True,
    "num_global_key_value_heads": 1,
    "sliding_window": 8,
}


@pytest.mark.parametrize(
    "law",
    [
        laws.an_open_answer_begins_where_the_model_goes_on,
        laws.ids_and_pixels_are_the_processors,
        laws.logits_are_those_of_the_processors_own_inputs,
        laws.packed_states_are_the_padded_ones,
        laws.rows_of_a_mixed_batch_are_single_rows,
        laws.every_chat_of_a_batch_has_its_own_pictures_in_order,
        laws.answers_are_transformers_own_to_the_last_token,
        laws.a_cut_tower_has_the_whole_models_states,
    ],
)
def test_a_large_gemma4(law, tmp_path):
    law(partial(tiny, "gemma4", **LARGE_GEMMA4), tmp_path)


@pytest.mark.parametrize("kind", ["qwen2_vl", "qwen2_5_vl"])
def test_a_cut_tower_describes_the_blocks_that_are_left(kind):
    model = tiny(kind, "pil")
    text = model.base.config.get_text_config()
    types = list(text.layer_types)
    model.keep_blocks(1, final_norm=False)
    assert len(types) > 1 and text.layer_types == types[:1] and text.num_hidden_layers == 1


def without_types(model, inputs):
    return {}


def flat_positions(model, inputs):
    return inputs.text_positions


def a_row_each(model, made):
    return None


def nothing_between(model, index, state, rows):
    return state


def one_pass_for_all(model, rows):
    given = LanguageTower.block_arguments(model, rows)
    return given | {"row_lengths": (sum(rows.lengths),)}


def a_smaller_plan(model, image_size):
    side = model.processor.image_processor.patch_size
    return Plan([[resize(2 * side, 2 * side)]], lambda views: views[0].flatten(1))


def unmoved(model, inputs, features):
    return VisionModel.with_features(model, inputs, features)


ENDS = "generation_begins_as_the_forward_says_and_ends_with_the_turn"
FAULTS = {
    "pixels cut a row a picture": ("pixel_rows", a_row_each, "rows_of_a_mixed_batch_are_single_rows"),
    "deepstack left out between blocks": ("next_state", nothing_between, "packed_states_are_the_padded_ones"),
    "deepstack left out of the rows": ("with_features", unmoved, "packed_states_are_the_padded_ones"),
    "rows see each other": ("block_arguments", one_pass_for_all, "packed_states_are_the_padded_ones"),
    "another plan": ("plan", a_smaller_plan, "attacked_pixels_are_the_processors"),
    "grids are not passed on": ("beside", (), "logits_are_those_of_the_processors_own_inputs"),
    "a stop token is missing": ("stops", lambda model: [0], ENDS),
    "answers end too early": ("stop_tokens", ("<|endoftext|>", "<|vision_end|>"), ENDS),
    "pictures are thought larger": ("largest_picture", lambda model: 48, "as_many_tokens_as_features"),
    "pictures have no limit": ("largest_picture", lambda model: 1, "as_many_tokens_as_features"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault, monkeypatch, tmp_path):
    name, wrong, law = FAULTS[fault]
    monkeypatch.setattr(QwenVLModel, name, wrong)
    with pytest.raises((AssertionError, UserError, ValueError, KeyError, TypeError, RuntimeError, AttributeError)):
        getattr(laws, law)(partial(tiny, "qwen3_vl"), tmp_path)


IDS, LOGITS = "ids_and_pixels_are_the_processors", "logits_are_those_of_the_processors_own_inputs"
MIXED, PACKED = "rows_of_a_mixed_batch_are_single_rows", "packed_states_are_the_padded_ones"


def counts_left_out(model, inputs, pixel_values):
    return VisionModel._tower_arguments(model, inputs, pixel_values)


def one_chat_each(model, rows):
    return [[image] for row in rows for image in row]


OWN_FAULTS = {
    ("aya_vision", "turns end in the end of sequence"): ("end_of_turn", None, IDS),
    ("aya_vision", "the template's token for the picture's"): ("soft_token", "<image>", "as_many_tokens_as_features"),
    ("aya_vision", "logits are scaled"): (
        "logits",
        lambda model, states: model.base.lm_head(states) * model.base.config.text_config.logit_scale,
        "lean_passes_are_the_whole_model",
    ),
    ("gemma3", "angles of one type for all"): ("layer_types", ["full_attention"] * 3, PACKED),
    ("gemma3", "pictures are read like text"): ("looks_ahead", frozenset(), PACKED),
    ("gemma3", "the template's token for the picture's"): ("soft_token", "<start_of_image>", LOGITS),
    ("gemma3", "token types are forgotten"): ("token_arguments", without_types, LOGITS),
    ("gemma3", "turns end in the end of sequence"): ("end_of_turn", None, IDS),
    ("gemma4", "a tower is read in part"): (
        "blocks_read",
        classmethod(lambda family, config, blocks: blocks),
        "a_cut_tower_has_the_whole_models_states",
    ),
    ("gemma4", "logits are not capped"): (
        "logits",
        lambda model, states: model.base.lm_head(states),
        "lean_passes_are_the_whole_model",
    ),
    ("gemma4", "a stop token is not named"): ("stop_tokens", ("<eos>",), ENDS),
    ("gemma4", "places of patches are left out"): ("beside", (), LOGITS),
    ("internvl", "tiles cut a row a picture"): ("pixel_rows", a_row_each, MIXED),
    ("large gemma4", "pictures seen ahead without window"): (
        "looks_ahead",
        frozenset({"full_attention", "sliding_attention"}),
        PACKED,
    ),
    ("large gemma4", "pictures are read like text"): ("looks_ahead", frozenset(), PACKED),
    ("llava_onevision", "every picture is a chat's only one"): ("grouped", one_chat_each, IDS),
    ("llava_onevision", "pictures of a chat are not counted"): ("_tower_arguments", counts_left_out, LOGITS),
}


QWENS = ("qwen2_vl", "qwen2_5_vl", "qwen3_5", "qwen3_vl")
CLASSES = {kind: _FAMILIES["llava+pixtral" if kind == "pixtral" else kind] for kind in KINDS}
WITH_OPTIONS = [kind for kind, family in CLASSES.items() if family.options is not VisionModel.options]
WITH_OPTIONS.remove("pixtral")  # whose tokens are patches, as its image processor has them already
WITH_TURNS = [kind for kind, family in CLASSES.items() if family.end_of_turn is not None]
WITH_STOPS = [kind for kind, family in CLASSES.items() if family.stop_tokens]
ELSEWHERE = dict.fromkeys(QWENS, "<|vision_end|>")
OWN_FAULTS |= {
    **{(kind, "positions in one dimension"): ("positions", flat_positions, LOGITS) for kind in QWENS},
    **{(kind, "token types are forgotten"): ("token_arguments", without_types, LOGITS) for kind in QWENS},
    **{(kind, "settings of the processor's own"): ("options", {}, IDS) for kind in WITH_OPTIONS},
    **{(kind, "turns end elsewhere"): ("end_of_turn", ELSEWHERE.get(kind, "<unk>"), IDS) for kind in WITH_TURNS},
    **{(kind, "a stop token is not named"): ("stop_tokens", (), ENDS) for kind in WITH_STOPS},
}
"""What every family has that it can have, and what the class itself says otherwise."""


@pytest.mark.parametrize(("kind", "fault"), OWN_FAULTS)
def test_a_familys_own_fault_is_noticed(kind, fault, monkeypatch, tmp_path):
    name, wrong, law = OWN_FAULTS[kind, fault]
    make = partial(tiny, "gemma4", **LARGE_GEMMA4) if kind == "large gemma4" else partial(tiny, kind)
    monkeypatch.setattr(type(make()), name, wrong)
    with pytest.raises((AssertionError, AttributeError, KeyError, RuntimeError, TypeError, UserError, ValueError)):
        getattr(laws, law)(make, tmp_path)


@pytest.mark.parametrize("kind", ["gemma3", "qwen2_5_vl"])
def test_generation_that_is_not_told_of_token_types_is_noticed(kind, monkeypatch, tmp_path):
    generate = VisionModel.generate

    def untold(model, *given):
        with monkeypatch.context() as patch:
            patch.setattr(type(model), "token_arguments", without_types)
            return generate(model, *given)

    monkeypatch.setattr(VisionModel, "generate", untold)
    with pytest.raises(AssertionError):
        getattr(laws, ENDS)(partial(tiny, kind), tmp_path)


OWN_PICTURES = "every_chat_of_a_batch_has_its_own_pictures_in_order"
PLACES = {"two chats": (0, 5), "one chat": (2, 4)}
"""Two of the six pictures of that law's chats, which have 2, 0, 3 and 1."""


@pytest.mark.parametrize("of", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_pictures_that_changed_places_are_noticed(kind, of, monkeypatch, tmp_path):
    one, other = PLACES[of]
    shown = VisionModel._pictures

    def swapped(model, rows):
        flat = [image for row in rows for image in row]
        if len(flat) == 6:
            flat[one], flat[other] = flat[other], flat[one]
        rest = iter(flat)
        return shown(model, [[next(rest) for _ in row] for row in rows])

    monkeypatch.setattr(VisionModel, "_pictures", swapped)
    with pytest.raises(AssertionError):
        getattr(laws, OWN_PICTURES)(partial(tiny, kind), tmp_path)


ANSWERS = "answers_are_transformers_own_to_the_last_token"


def seeing_padding(model, tokenizer, inputs, *rest):
    return decode_ids(model, tokenizer, {**inputs, "attention_mask": torch.ones_like(inputs["input_ids"])}, *rest)


def placed_by_order(model, tokenizer, inputs, *rest):
    """A token behind the prompt at its place in the row, whatever room a picture took."""
    update = model._update_model_kwargs_for_generation

    def counted(*given, **told):
        kept = update(*given, **told)
        kept["position_ids"][..., -1] = kept["attention_mask"].sum(-1) - 1
        return kept

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(model, "_update_model_kwargs_for_generation", counted)
        return decode_ids(model, tokenizer, inputs, *rest)


@pytest.mark.parametrize(
    ("kind", "wrong"),
    [
        *((kind, seeing_padding) for kind in KINDS),
        *((kind, placed_by_order) for kind in ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5")),
    ],
)
def test_answers_that_go_wrong_behind_their_first_token_are_noticed(kind, wrong, monkeypatch, tmp_path):
    monkeypatch.setattr(laws, "decode_ids", wrong)
    with pytest.raises(AssertionError):
        getattr(laws, ANSWERS)(partial(tiny, kind), tmp_path)


def test_targets_in_front_of_an_empty_thinking_block_are_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr("mm_cb.models.chat._behind", lambda asked, template, answer: template)
    with pytest.raises((AssertionError, RuntimeError)):
        laws.an_open_answer_begins_where_the_model_goes_on(partial(tiny, "gemma4", **LARGE_GEMMA4), tmp_path)


@pytest.mark.parametrize("kind", ["gemma3", "gemma4"])
def test_texts_that_a_template_trims_are_noticed(kind, monkeypatch, tmp_path):
    monkeypatch.setattr("mm_cb.models.chat._BLANK", "")
    with pytest.raises(AssertionError):
        laws.ids_and_pixels_are_the_processors(partial(tiny, kind), tmp_path)


OTHERS = {
    "rows share a recurrent state": (
        Qwen35Model,
        "run_block",
        LanguageTower.run_block,
        "packed_states_are_the_padded_ones",
        "qwen3_5",
    ),
    "a cache writes over states": (
        Qwen35Model,
        "cache",
        LanguageTower.cache,
        "lean_passes_are_the_whole_model",
        "qwen3_5",
    ),
    "thinking is left open": (
        Qwen35Model,
        "template_settings",
        {},
        "a_target_stands_where_the_model_goes_on",
        "qwen3_5",
    ),
    "tiles that only fill are shown": (
        SmolVLMModel,
        "pixels",
        VisionModel.pixels,
        "rows_of_a_mixed_batch_are_single_rows",
        "smolvlm",
    ),
}


@pytest.mark.parametrize("fault", OTHERS)
def test_a_fault_of_another_family_is_noticed(fault, monkeypatch, tmp_path):
    family, name, wrong, law, kind = OTHERS[fault]
    monkeypatch.setattr(family, name, wrong)
    with pytest.raises((AssertionError, UserError, ValueError, KeyError, TypeError, RuntimeError, AttributeError)):
        getattr(laws, law)(partial(tiny, kind), tmp_path)


@pytest.mark.parametrize(
    ("place", "wrong"),
    [
        ("mm_cb.models.counted_positions.OF_ONE_TOKEN", (*OF_ONE_TOKEN, "self_attn.k_proj")),
        ("mm_cb.training.recompute.chosen_positions", lambda block: None),
    ],
    ids=["keys of counted tokens alone", "forgotten in the second run"],
)
def test_a_top_block_that_is_wrong_for_counted_tokens_is_noticed(place, wrong, monkeypatch, tmp_path):
    monkeypatch.setattr(place, wrong)
    with pytest.raises((AssertionError, RuntimeError)):
        laws.tokens_that_count_have_the_states_and_gradients_of_the_whole_top_block(partial(tiny, "llava"), tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_passes_in_one_order_for_all_sizes_are_noticed(kind, monkeypatch, tmp_path):
    monkeypatch.setitem(RECIPES, "pil", RECIPES["pil"][:1])
    with pytest.raises((AssertionError, UserError)):
        laws.attacked_pixels_are_the_processors(partial(tiny, kind), tmp_path)


def test_a_model_whose_picture_tokens_are_scattered_wrongly_is_noticed(monkeypatch, tmp_path):
    features = VisionModel.image_features

    def reversed_features(model, *arguments):
        found = features(model, *arguments)
        found.pooler_output = [one.flip(0) for one in found.pooler_output]
        return found

    monkeypatch.setattr(VisionModel, "image_features", reversed_features)
    with pytest.raises(AssertionError):
        laws.the_embed_path_is_the_pixel_path(partial(tiny, "llava"), tmp_path)


def test_an_adapter_that_is_not_merged_is_noticed(monkeypatch, tmp_path):
    monkeypatch.setattr("mm_cb.models.merging.fold", lambda model: (model.unload(), 1))
    with pytest.raises(AssertionError):
        laws.an_adapter_is_saved_loaded_and_merged(partial(tiny, "llava"), tmp_path)


def test_every_quantised_module_lies_in_the_decoder_blocks():
    from transformers.quantizers.quantizers_utils import should_convert_module

    from mm_cb.models.quantization import skipped

    for kind in KINDS:
        model = tiny(kind)
        linear = [name for name, module in model.base.named_modules() if isinstance(module, torch.nn.Linear)]
        names = [name for name in linear if should_convert_module(name, skipped(model.full_precision))]
        assert names == [name for name in linear if name.startswith(f"{model.language_path}.")] != [], kind
