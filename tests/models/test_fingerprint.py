import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from mm_cb.core.errors import UserError
from mm_cb.models import fingerprint as module
from mm_cb.models import load_model
from mm_cb.models.fingerprint import FILE, check_weights, fingerprint, remember_base
from mm_cb.models.merging import merge
from tests.models.shapes import relayout
from tests.models.test_loading import new, old, saved_adapter
from tests.tiny_llava import tiny_llava


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model whose norms are all ones, in one file."""
    path = tmp_path_factory.mktemp("base") / "model"
    model = tiny_llava(blocks=6)
    model.model.save_pretrained(path)
    model.processor.save_pretrained(path)
    return path


def with_tensors(base, folder, change):
    shutil.copytree(base, folder)
    tensors = {key: change(key, value).contiguous() for key, value in load_file(folder / "model.safetensors").items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


def test_copies_shards_layouts_and_wider_numbers_have_one_fingerprint(base, tmp_path):
    expected = fingerprint(base)
    assert len(expected) == 64
    for rename in (old, new):
        assert fingerprint(relayout(base, tmp_path / rename.__name__, rename)) == expected
    load_model(base).model.save_pretrained(tmp_path / "shards", max_shard_size="60KB")
    assert len(list((tmp_path / "shards").glob("*.safetensors"))) > 3 and fingerprint(tmp_path / "shards") == expected
    narrow = with_tensors(base, tmp_path / "narrow", lambda key, value: value.bfloat16())
    wide = with_tensors(narrow, tmp_path / "wide", lambda key, value: value.float())
    assert fingerprint(narrow) == fingerprint(wide) != expected


def test_other_weights_have_another_fingerprint(base, tmp_path):
    other = tiny_llava(blocks=6, seed=1)
    other.model.save_pretrained(tmp_path / "seed")
    adapter = saved_adapter(tmp_path / "adapter", str(base))
    weights = load_file(adapter / "adapter_model.safetensors")
    save_file({key: torch.ones_like(value) for key, value in weights.items()}, adapter / "adapter_model.safetensors")
    merge(base, adapter, tmp_path / "merged")  # which changes one matrix by little, and no norm
    assert len({fingerprint(folder) for folder in (base, tmp_path / "seed", tmp_path / "merged")}) == 3


def swapped(key):
    """Blocks 1 and 2 of the tower change places."""
    return key.replace("layers.1.", "layers.x.").replace("layers.2.", "layers.1.").replace("layers.x.", "layers.2.")


@pytest.mark.parametrize("quarter", range(4))
def test_a_changed_quarter_of_one_matrix_is_seen(base, tmp_path, quarter):
    def change(key, value):
        if not key.endswith("layers.3.mlp.up_proj.weight"):
            return value
        rows = len(value) // 4
        return torch.cat([v + (n == quarter) for n, v in enumerate(value.split(rows))])

    assert fingerprint(with_tensors(base, tmp_path / "changed", change)) != fingerprint(base)


def test_blocks_that_changed_places_are_seen(base, tmp_path):
    assert fingerprint(relayout(base, tmp_path / "swapped", swapped)) != fingerprint(base)


def test_a_few_rows_are_read(base, monkeypatch):
    read = []

    class File:
        def __init__(self, *arguments):
            self.opened = real(*arguments)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            return None

        def keys(self):
            return self.opened.keys()

        def get_slice(self, key):
            return Part(self.opened.get_slice(key))

    class Part:
        def __init__(self, part):
            self.part, self.get_shape = part, part.get_shape

        def __getitem__(self, rows):
            read.append(rows.stop - rows.start)
            return self.part[rows]

    real = module.safe_open
    monkeypatch.setattr(module, "safe_open", File)
    monkeypatch.setattr(module, "_NUMBERS", 1)
    fingerprint(base)
    assert len(read) > 40 and set(read) == {1}


def test_an_adapter_knows_its_base_by_content_and_not_by_name(base, tmp_path):
    adapter = saved_adapter(tmp_path / "adapter", "elsewhere/model")
    remember_base(adapter, str(base))
    impostor = tmp_path / "other" / "model"
    tiny_llava(blocks=6, seed=1).model.save_pretrained(impostor)
    shutil.copytree(base, impostor, ignore=shutil.ignore_patterns("*.safetensors", "config.json"), dirs_exist_ok=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_model(base, adapter=adapter)
    for use in (lambda: load_model(impostor, adapter=adapter), lambda: merge(impostor, adapter, tmp_path / "merged")):
        with pytest.raises(UserError, match=r"trained on other weights than those of `.*model`.*delete base\.json"):
            use()
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize("content", [None, "[]", '{"fingerprint": ""}'])
def test_an_adapter_that_does_not_say_is_loaded_and_that_is_said_once(base, tmp_path, content):
    adapter = saved_adapter(tmp_path / "adapter", str(base))
    if content is not None:
        (adapter / FILE).write_text(content)
    with pytest.warns(UserWarning, match="cannot be checked"):
        load_model(base, adapter=adapter)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_weights(adapter, str(base))


def test_a_model_that_is_not_here_has_none(tmp_path):
    assert fingerprint(tmp_path) == fingerprint("nobody/nothing") == ""
    remember_base(tmp_path, "nobody/nothing")
    assert json.loads((tmp_path / FILE).read_text()) == {"model": "nobody/nothing", "fingerprint": ""}
