"""Prepared pictures that are kept: the same inputs as without, and nothing prepared twice."""

import copy

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save

from mm_cb.core.errors import UserError
from mm_cb.models.chat import chat
from mm_cb.models.picture_cache import _name
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
    assert same(again.encode_chats(CHATS[2:], ROWS[2:]), tiny(kind).encode_chats(CHATS[2:], ROWS[2:]))


def prepare_once(model, folder, pictures=ROWS[0]):
    """Encode a chat with a cache, as without, and count the files of the folder."""
    asked = [chat("a", images=len(pictures), completion="b")]
    model.picture_cache = None
    whole = model.encode_chats(asked, [pictures])
    model.keep_pictures(str(folder))
    assert same(model.encode_chats(asked, [pictures]), whole)
    return len(list(folder.iterdir()))


def test_another_picture_setting_or_version_is_prepared_anew(tmp_path, monkeypatch):
    model = tiny("llava_next")
    assert [prepare_once(model, tmp_path, some) for some in (ROWS[0], pictures((64, 96), seed=5))] == [1, 2]

    images = model.processor.image_processor
    images.image_mean = [0.1, 0.2, 0.3]
    assert prepare_once(model, tmp_path) == 3
    images.image_mean = [0.4, 0.2, 0.3]  # the folder is in use
    kept = model.encode_chats(CHATS[:1], ROWS[:1])
    model.picture_cache = None
    assert same(kept, model.encode_chats(CHATS[:1], ROWS[:1])) and len(list(tmp_path.iterdir())) == 4

    monkeypatch.setattr("mm_cb.models.picture_cache.package_versions", lambda: {"transformers": "6"})
    assert prepare_once(model, tmp_path) == 5


@pytest.mark.parametrize("kind", KINDS)
def test_another_token_for_pictures_is_not_taken_for_the_first(kind, tmp_path):
    model = tiny(kind)
    assert prepare_once(model, tmp_path) == 1
    tokens = {name for name, value in vars(model.processor).items() if "token" in name and isinstance(value, str)}
    for number, name in enumerate(sorted(tokens), 2):
        held = getattr(model.processor, name)
        setattr(model.processor, name, "</s>")
        model.keep_pictures(tmp_path)
        model._pictures(ROWS[:1])
        assert len(list(tmp_path.iterdir())) == number
        setattr(model.processor, name, held)


def named_as(one, module="transformers.models.other"):
    """Of a class of another name, which is otherwise the same."""
    one.__class__ = type("Other", (type(one),), {"__module__": module})


def test_whatever_decides_is_in_the_name(monkeypatch):
    model = tiny("smolvlm")
    (first,), lying = ROWS[0], Image.frombytes("RGB", (64, 96), ROWS[0][0].tobytes())
    names = [_name(model, some) for some in ([first], [lying], [first, first])]
    for change in (
        lambda: monkeypatch.setattr(type(model), "options", {"return_row_col_info": False}),
        lambda: named_as(model.processor.image_processor),
        lambda: named_as(model.processor),
        lambda: named_as(model, "mm_cb.models.other"),
        lambda: monkeypatch.setattr("mm_cb.models.picture_cache._CODE", "edited"),
    ):
        change()
        names.append(_name(model, [first]))
    assert len({*names}) == len(names) == 8


@pytest.mark.parametrize("part", ["family", "processor", "image processor"])
def test_what_is_somebodys_own_is_refused(tmp_path, part):
    model = tiny("llava")
    processor = model.processor
    named_as({"family": model, "processor": processor, "image processor": processor.image_processor}[part], "mine")
    with pytest.raises(UserError, match="not for `Other`, whose code may change: leave out `picture_cache`"):
        model.keep_pictures(tmp_path)


def test_a_model_that_changes_under_its_cache_is_asked_anew(tmp_path):
    model = tiny("llava")
    model.keep_pictures(tmp_path)
    first, other = model.encode_chats(CHATS[:1], ROWS[:1]), copy.copy(model)
    other.processor = copy.copy(model.processor)
    other.processor.image_processor = copy.copy(model.processor.image_processor)
    other.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert not torch.equal(other.encode_chats(CHATS[:1], ROWS[:1]).pixel_values, first.pixel_values)
    named_as(other.processor, "mine")
    with pytest.raises(UserError, match="not for `Other`"):
        other.encode_chats(CHATS[:1], ROWS[:1])


@pytest.mark.parametrize("damage", ["empty", "no tensors", "half", "bits", "tokens"])
def test_a_damaged_file_is_made_again(tmp_path, damage, nothing_prepared):
    model = tiny("qwen2_vl")
    model.keep_pictures(tmp_path)
    whole = model.encode_chats(CHATS[:1], ROWS[:1])
    (file,) = tmp_path.iterdir()
    good = file.read_bytes()
    turned = bytes([good[-9] ^ 1])
    bad = {
        "empty": b"",
        "no tensors": b"x" * 99,
        "half": good[: len(good) // 2],
        "bits": good[:-9] + turned + good[-8:],
    }
    with safe_open(file, "pt") as held:
        told = held.metadata() | {"tokens": '["a"]'}
    bad["tokens"] = save(load_file(file), told)
    file.write_bytes(bad[damage])
    assert same(model.encode_chats(CHATS[:1], ROWS[:1]), whole)
    nothing_prepared(model)
    assert same(model.encode_chats(CHATS[:1], ROWS[:1]), whole)


def test_where_nothing_can_be_written_one_warning_says_so(tmp_path):
    (tmp_path / "file").touch()
    model = tiny("llava")
    whole = model.encode_chats(CHATS, ROWS)
    model.keep_pictures(tmp_path / "file")
    with pytest.warns(UserWarning, match=r"no longer kept in `.*/file` \(.*\); the run goes on") as warned:
        assert same(model.encode_chats(CHATS, ROWS), whole)
    assert len(warned) == 1
