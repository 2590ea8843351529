"""Weight files that are not whole are named with what gets them whole, before a tensor is read."""

import os

import pytest
import torch
from safetensors.torch import save_file

from mm_cb.attacks.quick_look import _whole
from mm_cb.core.errors import UserError
from mm_cb.core.reading import read_text
from mm_cb.core.weights import refuse_cut
from mm_cb.data.rows import open_rows
from mm_cb.models.adapters import read_tensors
from mm_cb.models.cache import model_folder, weight_files

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 4\n"


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"a": torch.arange(6.0), "b": torch.ones(2, 2)}, path, {"format": "pt"})
    (tmp_path / "config.json").write_text("{}")
    return path


def test_a_whole_file_is_taken_and_one_that_is_cut_anywhere_is_not(file):
    whole = file.read_bytes()
    refuse_cut(file)
    for end in (*range(0, len(whole), 7), len(whole) - 1):
        file.write_bytes(whole[:end])
        with pytest.raises(
            UserError, match=r"model\.safetensors` must be a whole safetensors file.* download it again"
        ):
            refuse_cut(file)


def test_what_is_no_weight_file_at_all_is_left_to_its_reader(file):
    for content in (b"not weights, but a text\n", b"\xff" * 40):
        file.write_bytes(content)
        refuse_cut(file)


@pytest.mark.parametrize("content", [b"", POINTER, None])
def test_every_reader_and_the_doctor_say_how_to_get_it_whole(content, file, tmp_path):
    told = "git lfs pull" if content == POINTER else "download it again"
    file.write_bytes(file.read_bytes()[:-5] if content is None else content)
    with pytest.raises(UserError, match=told):
        weight_files(tmp_path)
    fine, said = _whole(str(tmp_path))
    assert not fine and told in said
    file.rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(UserError, match=told):
        read_tensors(tmp_path)


def test_a_pointer_in_place_of_a_text_is_named(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(POINTER)
    for read in (read_text, open_rows):
        with pytest.raises(UserError, match=r"rows\.jsonl:1: .*Git LFS pointer.*git lfs pull"):
            read(tmp_path / "rows.jsonl")


def test_a_pipe_among_rows_or_a_models_files_is_named_and_not_waited_for(file, tmp_path):
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json` must be a file, .* it is a pipe"):
        model_folder(tmp_path)
    for read in (open_rows, refuse_cut):
        with pytest.raises(UserError, match=r"tokenizer\.json` must be a file, .* it is a pipe"):
            read(tmp_path / "tokenizer.json")
