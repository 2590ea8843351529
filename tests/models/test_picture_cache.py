"""Prepared pictures that are kept: the same inputs as without, and nothing prepared twice."""

import numpy as np
import pytest
import torch
from PIL import Image

from mm_cb.core.errors import UserError
from mm_cb.models.chat import chat
from tests.models.tiny import KINDS, tiny


def pictures(*sizes, seed=0):
    draw = np.random.default_rng(seed)
    return [Image.fromarray(draw.integers(0, 256, (*size, 3), dtype=np.uint8)) for size in sizes]


ROWS = [pictures((64, 96)), pictures((200, 120), (97, 331), seed=1), [], pictures((120, 60), seed=2)]
CHATS = [chat("a", images=len(row), completion="b") for row in ROWS]


def same(ours, others):
    names = ("input_ids", "attention_mask", "roles", "pixel_values", "images_per_row", "pixel_rows")
    pairs = [(getattr(ours, name), getattr(others, name)) for name in names]
    pairs += [(ours.beside[name], others.beside[name]) for name in others.beside]
    return ours.beside.keys() == others.beside.keys() and all(
        a is b is None or (a.dtype == b.dtype and torch.equal(a, b)) for a, b in pairs
    )


@pytest.fixture
def nothing_prepared(monkeypatch):
    """No image processor is run from here on."""

    def stop(model):
        def refuse(*given, **options):
            raise AssertionError("a picture was prepared")

        monkeypatch.setattr(model, "_shown", refuse)

    return stop


@pytest.mark.parametrize("kind", KINDS)
def test_kept_pictures_are_those_that_the_processor_makes_of_the_batch(kind, tmp_path, nothing_prepared):
    model, again = tiny(kind), tiny(kind)
    whole = model.encode_chats(CHATS, ROWS)
    model.keep_pictures(tmp_path)
    assert same(model.encode_chats(CHATS, ROWS), whole)
    assert len(list(tmp_path.iterdir())) == 3

    again.keep_pictures(tmp_path)
    nothing_prepared(again)
    assert same(again.encode_chats(CHATS, ROWS), whole)
    assert same(again.encode_chats(CHATS[2:], ROWS[2:]), whole_of(kind, CHATS[2:], ROWS[2:]))


def whole_of(kind, chats, rows):
    return tiny(kind).encode_chats(chats, rows)


def test_another_picture_setting_or_version_is_prepared_anew(tmp_path, monkeypatch):
    model = tiny("llava_next")
    model.keep_pictures(tmp_path)
    asked = [chat("a", images=1)]
    model.encode_chats(asked, [ROWS[0]])
    model.encode_chats(asked, [pictures((64, 96), seed=5)])
    assert len(list(tmp_path.iterdir())) == 2

    first = model.encode_chats(asked, [ROWS[0]])
    model.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    model.keep_pictures(tmp_path)
    assert not torch.equal(model.encode_chats(asked, [ROWS[0]]).pixel_values, first.pixel_values)
    assert len(list(tmp_path.iterdir())) == 3

    monkeypatch.setattr("mm_cb.models.picture_cache.package_versions", lambda: {"transformers": "6"})
    model.keep_pictures(tmp_path)
    model.encode_chats(asked, [ROWS[0]])
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("content", [b"", b"no tensors", b"half"])
def test_a_damaged_file_is_made_again(tmp_path, content):
    model = tiny("qwen2_vl")
    model.keep_pictures(tmp_path)
    whole = model.encode_chats(CHATS[:1], ROWS[:1])
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    file.write_bytes(good[: len(good) // 2] if content == b"half" else content)
    assert same(model.encode_chats(CHATS[:1], ROWS[:1]), whole)
    assert file.read_bytes() == good


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    model = tiny("llava")
    model.keep_pictures(tmp_path / "file")
    with pytest.raises(UserError, match=r"file/.*safetensors` must be writable"):
        model.encode_chats(CHATS[:1], ROWS[:1])
