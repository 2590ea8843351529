"""What a model's folder lacks is told in one line that names the file; nothing it says of decoding decides answers."""

import json
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from mm_cb.attacks.quick_look import shape_of
from mm_cb.core.errors import UserError
from mm_cb.models import load_model, load_tower
from mm_cb.models.cache import model_folder
from mm_cb.models.chat import chat, render_chat
from mm_cb.models.families import read_config
from mm_cb.models.loading import load_plain
from tests.models.shapes import MISTRAL_TEMPLATE
from tests.tiny_llava import TEMPLATE, picture, tiny_processor

GREEDY = ["what is in the picture", "tell me how to brew tea", "no i can not", "a red circle"]


def changed(folder, path, file=None, drop=(), **fields):
    """A copy of a model's folder with other fields in one of its JSON files."""
    shutil.copytree(folder, path)
    if file is not None:
        held = json.loads((path / file).read_text()) if (path / file).is_file() else {}
        kept = {key: value for key, value in held.items() if key not in drop}
        (path / file).write_text(json.dumps({**kept, **fields}))
    return path


def with_template(folder, path, template):
    shutil.copytree(folder, path)
    if template is None:
        (path / "chat_template.jinja").unlink()
    else:
        (path / "chat_template.jinja").write_text(template)
    return path


BROKEN = {
    None: "must hold a chat template .chat_template.jinja",
    "  ": "must hold a chat template",
    "{{ 'a' }}\n{% for m in messages %}{{ }}": "TemplateSyntaxError in line 2",
    "{{ ''.__class__.__mro__ }}" + TEMPLATE: "SecurityError",
    "hello": "must write the texts of all messages .*; of 1 it wrote none",
    TEMPLATE + TEMPLATE: "once and in order",
    TEMPLATE.replace("<image>", ""): "once for each picture; of 1 it wrote 0",
    **{
        TEMPLATE.replace(
            "['text']", f"['text']{change}"
        ): "it changes the text of a turn of the role `(user|assistant)`"
        for change in (
            " | upper",
            "[:40]",
            " | replace('e', 'a')",
            " | e",
            ".split()[0]",
            " | truncate(255)",
            " | indent",
        )
    },
    "<image>" + TEMPLATE.replace("<image>", ""): "once for each picture; of 0 it wrote 1",
    "{{ tools[0].name }}" + TEMPLATE: "UndefinedError",
    "{{ raise_exception('system role must be given') }}": "TemplateError: system role must be given",
    "{% for i in range(10000) %}{{ 'a' * 1000 }}{% endfor %}"
    + TEMPLATE: "10,000,0.. characters for a chat of two words",
    "{% if tools %}{% for i in range(10000) %}{{ 'a' * 1000 }}{% endfor %}{% endif %}"
    + TEMPLATE: "characters for a chat of one word and a tool",
    "{{ 'a' * 100000000000 }}": "more memory than there is",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "without end",
}


@pytest.mark.parametrize("template", BROKEN, ids=range(len(BROKEN)))
def test_a_template_that_cannot_be_used_is_refused_with_its_file(template, folder, tmp_path):
    bad = with_template(folder, tmp_path / "bad", template)
    with pytest.raises(UserError, match=BROKEN[template]) as refused:
        load_model(bad)
    assert "chat template" in str(refused.value) and len(str(refused.value)) < 900


def test_an_endless_template_is_stopped(folder, tmp_path, monkeypatch):
    monkeypatch.setattr("mm_cb.models.templates.SECONDS", 1)
    loops = "".join(f"{{% for i{n} in range(99999) %}}" for n in range(4)) + "{% endfor %}" * 4
    bad = with_template(folder, tmp_path / "bad", loops + TEMPLATE)
    with pytest.raises(UserError, match="does not end within 1 seconds"):
        load_tower(bad, 1)


def test_a_tokenizers_template_serves_a_processor_without_one(folder, tmp_path):
    old = with_template(folder, tmp_path / "old", None)
    fields = json.loads((old / "tokenizer_config.json").read_text())
    (old / "tokenizer_config.json").write_text(json.dumps({**fields, "chat_template": TEMPLATE}))
    assert load_model(old).prompt("what", has_image=True) == load_model(folder).prompt("what", has_image=True)


def test_a_template_that_fails_on_other_chats_is_the_users_to_mend():
    processor = tiny_processor()
    processor.chat_template = "{% if messages | length > 2 %}{{ raise_exception('two at most') }}{% endif %}" + TEMPLATE
    turns = [*chat("what", completion="no"), *chat("what")]
    with pytest.raises(UserError, match="cannot write a chat of user, assistant, user: two at most"):
        render_chat(processor, turns)


def test_half_a_character_is_refused_before_the_tokenizer_sees_it(folder):
    model = load_model(folder)
    for texts in (["what \ud83d is"], ["a", "\udc00"]):
        with pytest.raises(UserError, match=r"half a one, '\\ud"):
            model.encode(texts, [None] * len(texts))
    with pytest.raises(UserError, match="half a one"):
        model.encode(["what"], [None], completions=["tea \ud83d"])


FIELDS = {
    "patch_size": ("processor_config.json", ["patch_size"], {}, r"processor_config\.json` must have `patch_size` 14"),
    "other patches": ("processor_config.json", [], {"patch_size": 7}, r"`patch_size` 14, .* got 7"),
    "patches in words": ("processor_config.json", [], {"patch_size": "14"}, r"`patch_size` 14, .* got '14'"),
    "strategy": (
        "processor_config.json",
        ["vision_feature_select_strategy"],
        {},
        r"`vision_feature_select_strategy` 'default', .* got none",
    ),
    "class token": ("processor_config.json", ["num_additional_image_tokens"], {}, "`num_additional_image_tokens` 1"),
    "no image token": ("tokenizer_config.json", ["image_token"], {"extra_special_tokens": {}}, None),
    "pad and end": (
        "tokenizer_config.json",
        ["pad_token", "eos_token"],
        {},
        r"tokenizer_config\.json` must name a `pad_token` or an `eos_token`",
    ),
}


@pytest.mark.parametrize("case", FIELDS)
def test_a_field_that_is_absent_is_named_with_its_file(case, folder, tmp_path):
    file, drop, fields, expected = FIELDS[case]
    bad = changed(folder, tmp_path / "bad", file, drop, **fields)
    if expected is None:
        load_model(bad)  # `<image>` is what a processor takes without it
        return
    with pytest.raises(UserError, match=expected):
        load_model(bad)


@pytest.mark.parametrize("kind", ["llava", "text"])
def test_padding_falls_back_to_the_end_token(kind, folder, text_folder, tmp_path):
    source = folder if kind == "llava" else text_folder
    model = load_model(changed(source, tmp_path / "model", "tokenizer_config.json", ["pad_token"]))
    assert model.processor.tokenizer.pad_token == "</s>"
    whole = load_model(source)
    assert model.generate(model.encode(GREEDY, [None] * 4), 6) == whole.generate(whole.encode(GREEDY, [None] * 4), 6)


FILES = ("config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json", "generation_config.json")


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b'"a"', b"null", b"\xff\xfe", b"[" * 100_000])
@pytest.mark.parametrize("file", FILES)
def test_a_damaged_file_is_one_line(file, content, folder, tmp_path):
    bad = changed(folder, tmp_path / "bad")
    (bad / file).write_bytes(content)
    with pytest.raises(UserError, match=str(bad)):
        load_model(bad)


SETTINGS = [file for file in FILES if file != "tokenizer.json"]


@pytest.mark.parametrize("file", SETTINGS)
@pytest.mark.parametrize("depth", ["top", "inside"])
def test_a_key_that_comes_twice_is_named_with_file_and_line(file, depth, folder, tmp_path):
    bad = changed(folder, tmp_path / "bad", file, inside={"deep": [{"a": 1, "b": 2}]})
    held = json.dumps(json.loads((bad / file).read_text()), indent=1)
    key, line = ("b", held[: held.index('"deep"')].count("\n") + 2) if depth == "inside" else ("inside", 1)
    at = held.index('"a": 1') if depth == "inside" else held.index("{") + 1
    (bad / file).write_text(f'{held[:at]}"{key}": Infinity, {held[at:]}')
    for load in (load_model, lambda path: load_tower(path, 1)):
        with pytest.raises(UserError, match=rf"{bad / file}:{line}: .* the key `{key}` twice"):
            load(bad)


def test_numbers_that_json_has_not_are_left_to_their_reader(folder, tmp_path):
    load_model(changed(folder, tmp_path / "model", "config.json", of_a_newer_version=[0.0, float("inf")]))


def in_other_words(bad, index):
    torch.save({}, bad / "pytorch_model.bin")
    (bad / "model.safetensors").rename(bad / "one.safetensors")
    if index is not None:
        (bad / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.mark.parametrize(
    ("break_it", "told"),
    [
        (lambda bad: in_other_words(bad, None), r"its weights as model\.safetensors, it has none; other formats"),
        (lambda bad: in_other_words(bad, {"metadata": {}, "weight_map": {"a": "b.safetensors"}}), r"`b\.safetensors`"),
        (lambda bad: in_other_words(bad, {"weight_map": {"a": "one.safetensors"}}), "must hold `metadata`"),
        (lambda bad: (bad / "chat_template.jinja").write_bytes("{{ a }}".encode("utf-16")), "it is UTF-16"),
    ],
)
def test_weights_and_templates_that_cannot_be_read_are_named(break_it, told, folder, tmp_path):
    bad = changed(folder, tmp_path / "bad")
    break_it(bad)
    with pytest.raises(UserError, match=told):
        load_model(bad)


@pytest.mark.parametrize(("field", "value"), [("dtype", "float99"), ("dtype", "int8"), ("hidden_act", "nope")])
def test_words_of_a_configuration_that_nothing_knows_are_named(field, value, text_folder, tmp_path):
    with pytest.raises(UserError, match=rf"`{field}` must be a.*, got '{value}'"):
        load_model(changed(text_folder, tmp_path / "bad", "config.json", **{field: value}))


@pytest.mark.parametrize("kind", [None, 3, ["llava_next"]])
def test_a_configuration_without_a_type_is_named(kind, folder, tmp_path):
    bad = changed(folder, tmp_path / "bad", "config.json", model_type=kind)
    with pytest.raises(UserError, match=r"config\.json` must name the model's `model_type`, got"):
        load_model(bad)


@pytest.mark.parametrize("content", [{}, {"image_processor": None}, {"processor_class": "LlavaNextProcessor"}])
def test_a_processor_that_says_nothing_of_pictures_is_named(content, folder, tmp_path):
    bad = changed(folder, tmp_path / "bad")
    (bad / "processor_config.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=r"processor_config\.json` must say in `image_processor` what its pictures"):
        load_model(bad)


OTHERS = ("pytorch_model.bin", "model.ckpt", "model.pt", "model.safetensors.bin", "../bad/model.safetensors")
OTHERS += ("/model.safetensors", "sub/model.safetensors", "model.safetensors\0", "", "\ud83d.safetensors", 3, None, [])


@pytest.mark.parametrize("name", OTHERS)
def test_an_index_names_safetensors_of_its_own_folder_and_nothing_else(name, folder, tmp_path):
    bad = changed(folder, tmp_path / "bad")
    (bad / "model.safetensors").rename(bad / "one.safetensors")
    (bad / "pytorch_model.bin").write_bytes(b"not to be read")
    (bad / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": {"a": name}}))
    with pytest.raises(UserError, match=r"model.safetensors.index.json"):
        load_model(bad)


@pytest.mark.parametrize("file", FILES[:-1])
def test_an_absent_file_is_one_line(file, folder, tmp_path):
    bad = changed(folder, tmp_path / "bad")
    (bad / file).unlink()
    with pytest.raises(UserError, match=str(bad)):
        load_model(bad)


def test_weights_of_another_shape_are_one_line(folder, tmp_path):
    config = json.loads((folder / "config.json").read_text())
    text = {**config["text_config"], "intermediate_size": 32}
    bad = changed(folder, tmp_path / "bad", "config.json", text_config=text)
    with pytest.raises(UserError, match=r"has other shapes in 9 tensors of .*, such as `.*mlp"):
        load_model(bad)


@pytest.mark.parametrize("value", [10**6, 10**12, 10**18])
@pytest.mark.parametrize("field", ["vocab_size", "intermediate_size", "num_hidden_layers"])
def test_a_size_beyond_all_weights_is_named(field, value, folder, text_folder, tmp_path):
    held = json.loads((folder / "config.json").read_text())
    bad = changed(folder, tmp_path / "bad", "config.json", text_config={**held["text_config"], field: value})
    with pytest.raises(UserError, match=rf"`config\.json` of .*/bad`: `text_config\.{field}` .* {value:,}|got {value}"):
        load_model(bad)
    with pytest.raises(UserError, match=rf"`config\.json` of .*: `{field}` .* {value:,}|got {value}"):
        load_model(changed(text_folder, tmp_path / "text", "config.json", **{field: value}))


@pytest.mark.parametrize("value", ["middle", "", 1, ["left"], True])
@pytest.mark.parametrize("field", ["padding_side", "truncation_side"])
def test_a_side_that_is_none_is_named(field, value, folder, text_folder, tmp_path):
    for number, source in enumerate((folder, text_folder)):
        bad = changed(source, tmp_path / str(number), "tokenizer_config.json", **{field: value})
        with pytest.raises(UserError, match=rf"tokenizer_config\.json`: `{field}` must be left or right, got "):
            load_model(bad)


def test_a_tokenizer_with_tokens_that_the_model_lacks_is_refused(folder, tmp_path):
    processor = tiny_processor()
    processor.tokenizer.add_tokens(["zzz"])
    bad = changed(folder, tmp_path / "bad")
    processor.save_pretrained(bad)
    with pytest.raises(UserError, match=r"gives `zzz` the id \d+, its model has \d+ tokens"):
        load_model(bad)


DECODING = {
    **{"num_beams": 4, "min_new_tokens": 5, "suppress_tokens": list(range(7, 20)), "begin_suppress_tokens": [20, 21]},
    **{"repetition_penalty": 5.0, "no_repeat_ngram_size": 1, "length_penalty": 3.0, "forced_bos_token_id": 9},
    **{"forced_eos_token_id": 9, "bad_words_ids": [[8], [9], [10]], "stop_strings": ["a", "i"], "max_length": 3},
    **{"max_new_tokens": 1, "exponential_decay_length_penalty": [1, 9.0], "sequence_bias": [[[11], 100.0]]},
    **{"do_sample": True, "temperature": 3.0, "top_k": 2, "top_p": 0.1, "min_p": 0.9, "typical_p": 0.1},
    **{"epsilon_cutoff": 0.5, "eta_cutoff": 0.5, "renormalize_logits": True, "return_dict_in_generate": True},
    **{"output_scores": True, "num_return_sequences": 3, "guidance_scale": 2.0, "watermarking_config": {"bias": 9.0}},
    **{"cache_implementation": "static", "max_time": 0.0001, "low_memory": True},
}


@pytest.fixture(scope="module")
def plain(folder):
    return load_model(folder)


def said(model, temperature=None):
    torch.manual_seed(0)
    inputs = model.encode(GREEDY, [picture(), None, picture(1), None])
    return model.generate(inputs, 8, temperature)


SOME = ("num_beams", "min_new_tokens", "suppress_tokens", "stop_strings", "min_p", "return_dict_in_generate")


@pytest.mark.parametrize("fields", [DECODING, *({name: DECODING[name]} for name in SOME)], ids=lambda f: sorted(f)[0])
def test_no_setting_of_the_folder_decides_an_answer(fields, folder, plain, tmp_path):
    other = changed(folder, tmp_path / "other", "generation_config.json", **fields)
    with pytest.warns(UserWarning, match=f"only the end tokens are read; ignored: .*{sorted(fields)[0]}"):
        model = load_model(other)
    assert said(model) == said(plain) and said(model, 1.0) == said(plain, 1.0)
    assert len(set(said(plain))) > 1


@pytest.mark.parametrize("part", ["", "text_config"])
def test_settings_of_the_configuration_decide_no_answer_and_are_named(part, folder, plain, tmp_path):
    held = json.loads((folder / "config.json").read_text())
    fields = {**DECODING, "top_k": 50, "max_length": 20, "diversity_penalty": 0.0, "output_attentions": True}
    fields = {part: {**held[part], **fields}} if part else fields
    other = changed(folder, tmp_path / "other", "config.json", **fields)
    with pytest.warns(UserWarning, match="no setting of decoding is read; ignored: .*num_beams") as told:
        model = load_model(other)
    assert said(model) == said(plain)
    for usual in ("top_k", "max_length", "diversity_penalty", "output_attentions"):  # what older versions always wrote
        assert not any(usual in str(one.message) for one in told)


def test_a_model_with_settings_of_its_own_keeps_them(plain):
    model = load_model(plain.name)
    model.model.generation_config.num_beams = 3
    assert said(model) == said(plain) and model.model.generation_config.num_beams == 3


@pytest.mark.parametrize("ends", ["x", [2, "x"], -1, True, 1.5, {}, [[2]]])
def test_end_tokens_that_are_none_are_refused(ends, folder, tmp_path):
    bad = changed(folder, tmp_path / "bad", "generation_config.json", eos_token_id=ends)
    with pytest.raises(UserError, match=r"generation_config\.json`: `eos_token_id` must be a token id or a list"):
        load_model(bad)


def test_end_tokens_that_are_named_twice_are_refused(folder, tmp_path):
    bad = changed(folder, tmp_path / "bad", "generation_config.json")
    (bad / "generation_config.json").write_text('{"eos_token_id": 2,\n "eos_token_id": 3}')
    with pytest.raises(UserError, match=r"generation_config\.json:\d: .*eos_token_id"):
        load_model(bad)


def test_all_end_tokens_are_kept(folder, text_folder, plain, tmp_path):
    more = changed(folder, tmp_path / "more", "generation_config.json", eos_token_id=[9, 10])
    assert set(load_model(more).stops()) == {*plain.stops(), 9, 10}
    template = MISTRAL_TEMPLATE.replace("eos_token", "'[/INST]\\n'")
    written = with_template(text_folder, tmp_path / "written", template)
    model, before = load_model(written), load_model(text_folder)
    ends = {*before.stops(), model.processor.tokenizer.convert_tokens_to_ids("[/INST]")}
    assert set(model.stops()) == ends > set(before.stops())


def test_an_answer_ends_at_every_end_token(folder, plain, tmp_path):
    words = max((answer.split() for answer in said(plain)), key=lambda words: len(set(words)))
    last = next(word for word in words if word != words[0])
    end = plain.processor.tokenizer.convert_tokens_to_ids(last)
    model = load_model(changed(folder, tmp_path / "more", "generation_config.json", eos_token_id=[2, end]))
    cut = [answer.split() for answer in said(plain)]
    assert [answer.split() for answer in said(model)] == [a[: a.index(last)] if last in a else a for a in cut]


def test_a_gguf_or_another_file_in_place_of_a_folder_is_named_with_what_to_do(tmp_path):
    (tmp_path / "held").mkdir()
    for place in (tmp_path / "held" / "small.Q4_1.gguf", tmp_path / "held" / "notes.txt"):
        place.write_bytes(b"GGUF")
    for name in (tmp_path / "held" / "small.Q4_1.gguf", tmp_path / "held", tmp_path / "absent.gguf"):
        with pytest.raises(UserError, match=r"is a GGUF file.*gguf_file='\w+(\.Q4_1)?\.gguf'"):
            model_folder(name)
    with pytest.raises(UserError, match="must be a folder with config.json.*notes.txt` is a file"):
        model_folder(tmp_path / "held" / "notes.txt")


@pytest.mark.parametrize("name", ["x" * 300, f"org/{'x' * 300}", "a\0b", f"org/name@{'x' * 300}"])
def test_a_name_that_no_model_has_is_one_line(name, folder, tmp_path):
    for load in (load_model, model_folder, lambda name: load_model(folder, adapter=name)):
        with pytest.raises(UserError):
            load(name)


@pytest.mark.parametrize("weights", [None, "adapter_model.safetensors", "adapter_model.bin"])
def test_a_model_with_an_adapter_beside_its_weights_is_refused(weights, folder, tmp_path):
    both = changed(folder, tmp_path / "both", "adapter_config.json", peft_type="LORA")
    if weights is not None:
        (both / weights).write_bytes(b"")
    for read in (read_config, load_model, load_plain, shape_of, lambda name: load_tower(name, 1)):
        with pytest.raises(UserError, match=r"/both` .*adapter_config\.json beside .*--adapter"):
            read(both)


def test_an_adapter_alone_is_still_told_as_one(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"must hold config\.json, it has none; it is an adapter"):
        read_config(tmp_path)


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", "tokenizer_config.json"])
def test_a_byte_order_mark_is_named_with_its_file(folder, tmp_path, file):
    path = changed(folder, tmp_path / "marked")
    (path / file).write_bytes(b"\xef\xbb\xbf" + (path / file).read_bytes())
    with pytest.raises(UserError, match=f"{file}` begins with a byte order mark"):
        load_model(path)


def test_a_run_in_place_of_a_model_is_called_what_it_is(tmp_path):
    (tmp_path / "checks.json").write_text("[]")
    (tmp_path / "run.json").write_text(json.dumps({"command": "attack", "recipe": {}}))
    with pytest.raises(UserError, match=r"must hold config\.json, it has none; it is a run of `mm-cb attack`"):
        read_config(tmp_path)


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize(
    ("left", "advice"), [(".{}.Xa3F2q", "finish it"), ("{}.incomplete", "finish it"), ("{}", "rename it")]
)
def test_weights_that_lie_there_under_another_name_are_named(left, advice, sharded, folder, tmp_path):
    bad, name = tmp_path / "bad", "model-00001-of-00001.safetensors" if sharded else "model.safetensors"
    shutil.copytree(folder, bad)
    if sharded:
        index = {"metadata": {}, "weight_map": dict.fromkeys(load_file(bad / "model.safetensors"), name)}
        (bad / "model.safetensors.index.json").write_text(json.dumps(index))
    found = left.format(name if left != "{}" else name.capitalize())
    (bad / "model.safetensors").rename(bad / found)
    with pytest.raises(UserError, match=rf"`{re.escape(found)}` looks like it: .*{advice}"):
        load_model(bad)
