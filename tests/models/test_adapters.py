"""An adapter is read as a whole or refused in one line with the number of its faults and the first name."""

import json
import re
import shutil
import struct

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from mm_cb.core.errors import UserError
from mm_cb.models import load_model
from mm_cb.models.adapters import WEIGHTS, own_hashes, put_adapter, read_settings, read_tensors
from mm_cb.models.fingerprint import remember_base
from mm_cb.models.merging import merge
from tests.tiny_llava import tiny_llava

BLOCKS = "model.language_model.layers"
MODULES = [f"{BLOCKS}.1.self_attn.q_proj", f"{BLOCKS}.1.mlp.up_proj", f"{BLOCKS}.2.mlp.down_proj"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    path = tmp_path_factory.mktemp("adapter") / "whole"
    wrapped = get_peft_model(tiny_llava().model, LoraConfig(target_modules=MODULES, r=4, lora_alpha=8))
    with torch.no_grad():
        for name, parameter in wrapped.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    wrapped.save_pretrained(path, save_embedding_layers=False)
    fields = json.loads((path / "adapter_config.json").read_text())
    settings = {**fields, "base_model_name_or_path": "", "target_modules": MODULES}
    (path / "adapter_config.json").write_text(json.dumps(settings))
    return path


def changed(whole, path, tensors=None, **settings):
    """A copy of the adapter with other tensors or other settings."""
    shutil.copytree(whole, path)
    if tensors is not None:
        save_file(tensors(load_file(whole / "adapter_model.safetensors")), path / "adapter_model.safetensors")
    fields = json.loads((whole / "adapter_config.json").read_text())
    (path / "adapter_config.json").write_text(json.dumps({**fields, **settings}))
    return path


def first(tensors):
    return sorted(tensors)[0]


def with_last(number):
    def change(tensors):
        last = sorted(tensors)[-1]
        tensors[last][-1, -1] = number
        return tensors

    return change


FILES = {
    "a causal LM's layout": (
        lambda t: {k.replace("language_model.layers", "layers"): v for k, v in t.items()},
        r"6 tensors of 6 are missing, such as `base_model.*layers\.1\.mlp\.up_proj\.lora_A",
    ),
    "half of them": (lambda t: dict(list(sorted(t.items()))[:3]), r"3 tensors of 6 are missing, such as"),
    "B alone": (lambda t: {k: v for k, v in t.items() if "lora_B" in k}, r"3 tensors of 6 are missing"),
    "one too many": (
        lambda t: {**t, first(t).replace("layers.1", "layers.0"): t[first(t)].clone()},
        r"1 tensors belong to no module, such as `base_model.*layers\.0",
    ),
    "a stranger": (lambda t: {**t, "classifier.weight": torch.ones(2)}, "1 tensors belong to no module, such as"),
    "both layouts": (
        lambda t: {**t, **{k.replace("model.model.language_model", "model.language_model.model"): v.clone()
                           for k, v in t.items()}},
        "6 tensors belong to no module|some are there twice",
    ),
    "another rank": (
        lambda t: {k: v[:2].clone() if "lora_A" in k else v[:, :2].clone() for k, v in t.items()},
        r"6 tensors have another shape, such as .*expected \[4, 32\], got \[2, 32\]",
    ),
    "another size": (
        lambda t: {k: v[:, :8].clone() if k == first(t) else v for k, v in t.items()},
        r"1 tensors have another shape, such as .*got \[4, 8\]",
    ),
    "NaN everywhere": (
        lambda t: {k: v * float("nan") for k, v in t.items()},
        r"6 tensors have NaN or infinity in them, such as `base_model.*layers\.1\.mlp\.up_proj\.lora_A",
    ),
    "few bits": (
        lambda t: {k: v.to(torch.float8_e4m3fn) for k, v in t.items()},
        r"tensors of float32, bfloat16 or float16, but 6 are .*float8_e4m3fn",
    ),
    "whole numbers": (lambda t: {k: v.long() for k, v in t.items()}, r"6 are of another type, such as .*int64"),
    "one NaN": (with_last(float("nan")), r"but 1 tensors have NaN"),
    "one infinity": (with_last(float("-inf")), r"but 1 tensors have NaN"),
    "none": (lambda t: {}, "holds none"),
}  # fmt: skip


@pytest.mark.parametrize("case", FILES)
def test_tensors_that_are_not_exactly_the_models_are_refused_with_number_and_name(case, folder, whole, tmp_path):
    tensors, expected = FILES[case]
    bad = changed(whole, tmp_path / "bad", tensors)
    for use in (
        lambda: load_model(folder, adapter=bad),
        lambda: load_model(folder, adapter=bad, trainable=True),
        lambda: merge(folder, bad, tmp_path / "merged"),
    ):
        with pytest.raises(UserError, match=expected) as refused:
            use()
        assert str(bad) in str(refused.value) and len(str(refused.value)) < 600
    assert not [path for path in tmp_path.iterdir() if path != bad]


SETTINGS = {
    "code": ({"auto_map": {"AutoModel": "x.Y"}}, "`auto_map` is unknown"),
    "a typing error": ({"lora_alhpa": 4}, "`lora_alhpa` is unknown"),
    "DoRA": ({"use_dora": True}, "`use_dora` is not supported"),
    "more than LoRA": ({"modules_to_save": ["lm_head"]}, "`modules_to_save` is not supported"),
    "biases": ({"bias": "all"}, "`bias` is not supported"),
    "biases of B": ({"lora_bias": True}, "`lora_bias` is not supported"),
    "copied layers": ({"layer_replication": [[0, 2]]}, "`layer_replication` is not supported"),
    "tokens": ({"trainable_token_indices": [1]}, "`trainable_token_indices` is not supported"),
    "a base that changes": ({"init_lora_weights": "pissa"}, "`init_lora_weights` 'pissa' changes the base"),
    "another method": ({"peft_type": "IA3"}, "`peft_type` must be LORA, got 'IA3'"),
    "no method": ({"peft_type": None}, "`peft_type` must be LORA, got None"),
    "an odd method": ({"peft_type": ["LORA"]}, "`peft_type` must be LORA"),
    "rank 0": ({"r": 0}, "`r` must be a whole number from 1 on, got 0"),
    "half a rank": ({"r": 0.5}, "`r` must be a whole number"),
    "another rank": ({"r": 2}, "6 tensors have another shape"),
    "a rank of many digits": ({"r": 10**30}, "its rank, 10000000000000000000, is more than any side of its tensors"),
    "a rank beyond its tensors": ({"rank_pattern": {"q_proj": 10**9}}, "its rank, 1000000000, is more than any side"),
    "a scale of many digits": ({"lora_alpha": 10**400}, "`lora_alpha` must be a finite number"),
    "a scale below 0": ({"lora_alpha": -16}, "`lora_alpha` must be a finite number from 0 on, got -16"),
    "a module's scale below 0": ({"alpha_pattern": {"q_proj": -1}}, "`alpha_pattern.q_proj` must be a finite number"),
    "a rank below 0": ({"r": -4}, "`r` must be a whole number from 1 on, got -4"),
    "a dropout of everything": ({"lora_dropout": 1.5}, "`lora_dropout` must be a number from 0 to below 1, got 1.5"),
    "a flag that is a text": ({"use_rslora": "false"}, "`use_rslora` must be true or false, got 'false'"),
    "no number": ({"lora_alpha": "8"}, "`lora_alpha` must be a finite number from 0 on, got '8'"),
    "NaN": ({"lora_alpha": float("nan")}, "NaN, which is no number in JSON"),
    "a module that is not there": (
        {"target_modules": [*MODULES, f"{BLOCKS}.9.mlp.up_proj"]},
        r"names 1 modules that are not there, such as `model.language_model.layers.9.mlp.up_proj`",
    ),
    "no module at all": ({"target_modules": ["nothing"]}, "does not fit this model"),
    "a broken pattern": ({"target_modules": "(["}, "`target_modules` must be a regular expression of Python, got"),
    "a glob": ({"target_modules": "*q_proj"}, r"`target_modules` must .*, got '\*q_proj' .*any characters are `\.\*`"),
    "a glob of what is left out": ({"exclude_modules": "*q_proj"}, r"`exclude_modules` must .*, got '\*q_proj'"),
    "a glob of ranks": ({"rank_pattern": {"*q_proj": 4}}, r"`rank_pattern` must be a regular expression"),
    "a glob of scales": ({"alpha_pattern": {"*q_proj": 4}}, r"`alpha_pattern` must be a regular expression"),
    "a glob of layers": (
        {"layers_pattern": ["*layers"], "layers_to_transform": [1]},
        "`layers_pattern` must be a regular expression",
    ),
    "no modules": ({"target_modules": []}, r"`target_modules` must name the modules that .*, got \[\]"),
    "modules left open": ({"target_modules": None}, "`target_modules` must name the modules that .*, got None"),
    "a module without a name": ({"target_modules": [""]}, "`target_modules` must name the modules that"),
    "modules that are none": ({"target_modules": 5}, "`target_modules` must be a text or a list of texts, got 5"),
    "a module that is none": ({"target_modules": [5]}, "`target_modules` must be a text or a list of texts, got 5"),
    "modules by name": ({"target_modules": {"q_proj": 1}}, "`target_modules` must be a text or a list of texts"),
    "no module left out": (
        {"exclude_modules": [None]},
        "`exclude_modules` must be a text or a list of texts, got None",
    ),
    "layers that are none": ({"layers_to_transform": ["1"]}, "`layers_to_transform` must be a layer or a list .*'1'"),
    "a layer below 0": ({"layers_to_transform": -1}, "`layers_to_transform` must be a layer or a list .* got -1"),
    "a pattern without end": (
        {"target_modules": r"((model|\.|\w)+)+!"},
        "matching its patterns .* takes more than 1 seconds",
    ),
    "modules left out without end": ({"exclude_modules": r"(?i)([a-z._0-9]+)+!"}, "matching its patterns"),
    "layers without end": (
        {"target_modules": ["q_proj"], "layers_to_transform": [1], "layers_pattern": r"([a-z._]+)+!"},
        "matching its patterns",
    ),
    "a rank without end": ({"rank_pattern": {r"([a-z._0-9]+)+!": 4}}, "matching its patterns"),
    "a scale without end": ({"alpha_pattern": {r"^([a-z._0-9]+)+!": 4}}, "matching its patterns"),
    "a pattern of too many": ({"target_modules": "a{99999999999}"}, "`target_modules` must be a regular expression"),
    "a scale of nothing": ({"alpha_pattern": {"nothing": 2}}, "names 1 modules that are not there, such as `nothing`"),
    "patterns that are none": ({"rank_pattern": [1]}, "`rank_pattern` must be an object"),
    "fewer modules": ({"target_modules": MODULES[:2]}, "2 tensors belong to no module"),
    "an odd base": ({"base_model_name_or_path": 5}, "`base_model_name_or_path` must be a name, got 5"),
}


@pytest.mark.parametrize("case", SETTINGS)
def test_settings_that_are_not_understood_are_refused_by_name(case, folder, whole, tmp_path, monkeypatch):
    monkeypatch.setattr("mm_cb.models.patterns.SECONDS", 1)
    settings, expected = SETTINGS[case]
    with pytest.raises(UserError, match=expected):
        load_model(folder, adapter=changed(whole, tmp_path / "bad", **settings))


def test_a_key_that_comes_twice_is_named(folder, whole, tmp_path):
    bad = changed(whole, tmp_path / "bad")
    text = (bad / "adapter_config.json").read_text()
    (bad / "adapter_config.json").write_text(text.replace('"r": 4', '"r": 4, "r": 2'))
    remember_base(bad, str(folder))
    with pytest.raises(UserError, match=r"adapter_config\.json:1: .* the key `r` twice"):
        load_model(folder, adapter=bad)
    (bad / "adapter_config.json").write_text(text)
    told = (bad / "base.json").read_text()
    (bad / "base.json").write_text(told.replace("{", '{"fingerprint": "", ', 1))
    with pytest.raises(UserError, match=r"base\.json.*the key `fingerprint` twice"):
        load_model(folder, adapter=bad)


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"task_type": "CAUSAL_LM", "megatron_config": None, "a_newer_field": None, "another": False},
        {"init_lora_weights": "gaussian", "lora_dropout": 0.1},
        {"fan_in_fan_out": True},
        {"target_modules": r".*language_model.*\.1\.(self_attn\.q_proj|mlp\.up_proj)|.*\.2\.mlp\.down_proj"},
        {"alpha_pattern": {"mlp.up_proj": 8, "down_proj": 8}, "rank_pattern": {"q_proj": 4}},
    ],
)
def test_settings_that_change_nothing_are_read(settings, folder, whole, tmp_path):
    same = load_model(folder, adapter=changed(whole, tmp_path / "same", **settings))
    plain, inputs = load_model(folder, adapter=whole), same.encode(["what is it"], [None])
    assert torch.equal(same.forward(inputs).logits, plain.forward(inputs).logits)


def test_keys_without_prefix_are_the_same_adapter(folder, whole, tmp_path):
    bare = changed(whole, tmp_path / "bare", lambda t: {k.removeprefix("base_model.model."): v for k, v in t.items()})
    same, plain = load_model(folder, adapter=bare), load_model(folder, adapter=whole)
    inputs = same.encode(["what is it"], [None])
    assert torch.equal(same.forward(inputs).logits, plain.forward(inputs).logits)


def damaged(kind, content):
    header = struct.unpack("<Q", content[:8])[0]
    return {
        "no byte": b"",
        "a header cut off": content[: header // 2],
        "half": content[: len(content) // 2],
        "no header": b"\xff" * 64,
        "a huge header": struct.pack("<Q", 2**62) + content[8:],
        "a pickle": b"\x80\x04\x95.",
    }[kind]


@pytest.mark.parametrize("kind", ["no byte", "a header cut off", "half", "no header", "a huge header", "a pickle"])
def test_a_damaged_file_is_refused_by_name(kind, folder, whole, tmp_path):
    bad = changed(whole, tmp_path / "bad")
    file = bad / "adapter_model.safetensors"
    file.write_bytes(damaged(kind, file.read_bytes()))
    with pytest.raises(UserError, match=r"bad/adapter_model\.safetensors` must be a (whole )?safetensors file"):
        load_model(folder, adapter=bad)


LEFT = {
    "Adapter_Model.safetensors": "rename it",
    ".adapter_model.safetensors.Xa3F2q": "finish it",
    "adapter_model.safetensors.part": "finish it",
    "adapter_model.safetensors.incomplete": "finish it",
    "adapter_model.bin": "save it as safetensors",
    "adapter_model.safetensors.index.json": "fetch these parts as one file",
    "README.md": None,
}


@pytest.mark.parametrize("left", LEFT)
def test_of_an_adapter_that_lacks_a_file_that_and_what_looks_like_it_are_named(left, whole, tmp_path):
    lacks = changed(whole, tmp_path / "lacks")
    (lacks / WEIGHTS).rename(lacks / left)
    told = f", `{re.escape(left)}` looks like it: .*{LEFT[left]}" if LEFT[left] else r"\.$"
    with pytest.raises(UserError, match=rf"lacks` is not an adapter: .*; adapter_model\.safetensors is missing{told}"):
        read_settings(lacks)


def test_a_pickle_is_no_adapter(folder, whole, tmp_path):
    bad = changed(whole, tmp_path / "bad")
    torch.save(load_file(bad / "adapter_model.safetensors"), bad / "adapter_model.bin")
    (bad / "adapter_model.safetensors").unlink()
    with pytest.raises(UserError, match=r"is not an adapter: expected .*adapter_model\.safetensors"):
        put_adapter(load_model(folder).model, bad, None)


def test_a_merge_that_changes_nothing_says_so(folder, whole, tmp_path):
    def silent(t):
        return {k: torch.zeros_like(v) if "lora_B" in k else v for k, v in t.items()}

    idle = changed(whole, tmp_path / "zero", silent)
    with pytest.warns(UserWarning, match="changes no weight of .* is the base model, no breaker"):
        merge(folder, idle, tmp_path / "merged")


def unarrived(file, share):
    """Zeros from ``share`` of the tensors' bytes on, at full length, as a download that stopped leaves a file."""
    content = file.read_bytes()
    begin = 8 + struct.unpack("<Q", content[:8])[0]
    kept = begin + int(share * (len(content) - begin))
    file.write_bytes(content[:kept] + bytes(len(content) - kept))


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6])
def test_an_adapter_whose_end_never_arrived_is_refused_with_number_and_name(share, folder, whole, tmp_path):
    bad = changed(whole, tmp_path / "bad")
    unarrived(bad / "adapter_model.safetensors", share)
    for use in (lambda: load_model(folder, adapter=bad), lambda: merge(folder, bad, tmp_path / "merged")):
        with pytest.raises(
            UserError, match=r"adapter_model\.safetensors` must hold whole tensors, but \d of 6 are zeros"
        ):
            use()


def test_an_adapter_whose_last_tensor_did_not_arrive_whole_is_refused(tmp_path):
    save_file({"x.lora_A.weight": torch.ones(4, 8), "x.lora_B.weight": torch.ones(1024, 4)}, tmp_path / WEIGHTS)
    unarrived(tmp_path / WEIGHTS, 0.5)
    with pytest.raises(UserError, match=r"must hold whole tensors, but it ends in 8,2\d\d bytes of zeros"):
        read_tensors(tmp_path)


def test_modules_that_no_training_reached_are_told_and_their_adapter_is_taken(folder, whole, tmp_path):
    def unreached(t):
        return {k: torch.zeros_like(v) if "up_proj.lora_B" in k else v for k, v in t.items()}

    with pytest.warns(UserWarning, match=r"1 of 6 tensors are zeros alone, such as `.*up_proj\.lora_B\.weight`"):
        load_model(folder, adapter=changed(whole, tmp_path / "some", unreached))


def test_matrices_of_zeros_in_a_model_whose_end_never_arrived_are_told_with_number_and_name(folder, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    unarrived(bad / "model.safetensors", 0.7)
    with pytest.warns(UserWarning, match=r"bad`: \d+ matrices are zeros alone, such as `.*did not arrive whole"):
        load_model(bad)


def test_a_base_with_nan_is_refused_by_name(folder, tmp_path):
    bad = tmp_path / "bad"
    shutil.copytree(folder, bad)
    weights = load_file(folder / "model.safetensors")
    key = next(key for key in sorted(weights) if "layers.1.mlp.up_proj" in key and "vision" not in key)
    weights[key][0, 0] = float("nan")
    save_file(weights, bad / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"1 tensors have NaN or infinity in them, such as `.*layers\.1\.mlp\.up_proj"):
        load_model(bad)


def test_a_merge_that_overflows_is_refused_and_leaves_nothing(folder, whole, tmp_path):
    huge = changed(whole, tmp_path / "huge", lora_alpha=1e6)
    with pytest.raises(UserError, match="merged with .* tensors have NaN or infinity"):
        merge(folder, huge, tmp_path / "merged", dtype="float16")
    assert [path.name for path in tmp_path.iterdir()] == ["huge"]


def as_trained(whole, path):
    """A copy of the adapter that knows its own files, as training leaves it."""
    shutil.copytree(whole, path)
    remember_base(path, "", own_hashes(path))
    return path


EDITS = {
    "a larger scale": (None, {"lora_alpha": 900}),
    "another scale of ranks": (None, {"use_rslora": True}),
    "other blocks": (None, {"layers_to_transform": [1], "target_modules": ["up_proj"]}),
    "a module's scale": (None, {"alpha_pattern": {"q_proj": 1}}),
    "larger tensors": (lambda t: {k: v * 5 for k, v in t.items()}, {}),
    "one number": (with_last(0.0), {}),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_adapter_that_was_edited_after_its_training_is_refused_and_without_its_hashes_is_not(edit, whole, tmp_path):
    tensors, settings = EDITS[edit]
    edited = changed(as_trained(whole, tmp_path / "made"), tmp_path / "edited", tensors, **settings)
    use, file = (read_settings, "adapter_config.json") if settings else (read_tensors, "adapter_model.safetensors")
    with pytest.raises(UserError, match=rf"{file}` was changed after its training wrote it .*delete base\.json"):
        use(edited)
    (edited / "base.json").unlink()
    use(edited)


@pytest.mark.parametrize("damaged", [b"{", b"\xff", b""])
def test_a_damaged_record_of_the_training_is_refused_not_passed_over(damaged, whole, tmp_path):
    made = as_trained(whole, tmp_path / "made")
    (made / "base.json").write_bytes(damaged)
    with pytest.raises(UserError, match=r"base\.json` must be JSON .*cannot be read"):
        read_settings(made)


@pytest.mark.parametrize(
    "told", [{"base_model_name_or_path": "a/copy", "revision": "main", "inference_mode": False}, {}]
)
def test_an_adapter_that_names_a_copy_of_its_base_or_is_laid_out_otherwise_is_as_its_training_wrote_it(
    told, folder, whole, tmp_path
):
    moved = changed(as_trained(whole, tmp_path / "made"), tmp_path / "moved", **told)
    fields = json.loads((moved / "adapter_config.json").read_text())
    (moved / "adapter_config.json").write_text(json.dumps(dict(reversed(fields.items())), indent=4))
    if not told:
        (moved / "base.json").write_text('{"files": 5}')
    read_settings(moved), read_tensors(moved)
