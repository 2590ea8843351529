import io
import os
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import Image

from image_attacks import ImageFileError, Linf, linf_255, load_png, save_png

from .helpers import eight_bit


def test_every_level_survives_the_round_trip(tmp_path):
    pixels = (torch.arange(256).float() / 255).view(1, 16, 16).repeat(3, 1, 1)
    save_png(pixels, tmp_path / "a.png")
    assert torch.equal(load_png(tmp_path / "a.png"), pixels)


@pytest.mark.parametrize("name", ["a.jpg", "a.webp", "a", "a.png.bak", ".png"])
def test_a_file_of_another_name_than_png_is_refused(tmp_path, name):
    with pytest.raises(ValueError, match=r"`path` must end in \.png, which is what is written, got"):
        save_png(torch.zeros(3, 2, 2), tmp_path / name)
    assert not list(tmp_path.iterdir())
    save_png(torch.zeros(3, 2, 2), tmp_path / "A.PNG")


def test_saving_rounds_to_the_nearest_level_and_never_truncates(tmp_path):
    level = torch.tensor([10.0, 10.4, 10.6, 10.999, 254.6, 0.4]).view(1, 1, 6).repeat(3, 1, 1)
    save_png(level / 255, tmp_path / "a.png")
    assert (load_png(tmp_path / "a.png")[0, 0] * 255).round().tolist() == [10, 10, 11, 11, 255, 0]


@settings(deadline=None, max_examples=50)
@given(
    hnp.arrays("uint8", (3, 4, 5)),
    hnp.arrays("float32", (3, 4, 5), elements=st.floats(-1, 1, width=32)),
    st.integers(0, 64),
)
def test_a_point_of_the_ball_is_still_inside_as_a_file(tmp_path_factory, clean, move, epsilon):
    folder = tmp_path_factory.mktemp("ball")
    clean = torch.from_numpy(clean) / 255
    save_png(clean, folder / "clean.png")
    save_png(Linf(epsilon / 255).project(clean + torch.from_numpy(move), clean), folder / "attacked.png")
    assert linf_255(folder / "clean.png", folder / "attacked.png") <= epsilon


def test_distance_is_the_largest_difference_in_whole_levels_either_way_round(tmp_path):
    levels = torch.tensor([[0, 255], [100, 7]]).expand(3, 2, 2) / 255
    save_png(levels, tmp_path / "a.png")
    save_png(torch.tensor([[9, 255], [83, 7]]).expand(3, 2, 2) / 255, tmp_path / "b.png")
    save_png(1 - levels, tmp_path / "c.png")
    assert linf_255(tmp_path / "a.png", tmp_path / "b.png") == 17
    assert linf_255(tmp_path / "b.png", tmp_path / "a.png") == 17
    assert linf_255(tmp_path / "a.png", tmp_path / "a.png") == 0
    assert linf_255(tmp_path / "a.png", tmp_path / "c.png") == 255


def test_distance_needs_equal_sizes(tmp_path):
    for name, size in (("a", 4), ("b", 5)):
        save_png(torch.zeros(3, 4, size), tmp_path / f"{name}.png")
    with pytest.raises(ImageFileError, match="4x4 and 5x4"):
        linf_255(tmp_path / "a.png", tmp_path / "b.png")


def test_equal_pixels_give_equal_bytes_and_odd_sizes_work(tmp_path, generator):
    pixels = eight_bit((3, 7, 3), generator)
    save_png(pixels, tmp_path / "a.png")
    save_png(pixels.clone().requires_grad_(), str(tmp_path / "b.png"))
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    assert load_png(tmp_path / "a.png").shape == (3, 7, 3)


def test_grey_is_written_as_three_equal_channels(tmp_path, generator):
    pixels = eight_bit((1, 5, 4), generator)
    save_png(pixels, tmp_path / "a.png")
    assert torch.equal(load_png(tmp_path / "a.png"), pixels.expand(3, -1, -1))


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (torch.full((3, 2, 2), 1.1), "must lie in"),
        (torch.full((3, 2, 2), float("nan")), "must lie in"),
        (torch.zeros(1, 3, 2, 2), "shape \\(3, H, W\\)"),
        (torch.zeros(2, 2, 2), "shape \\(3, H, W\\), or \\(1, H, W\\) for grey, got \\(2, 2, 2\\)"),
        (torch.zeros(4, 2, 2), "without transparency"),
        (torch.zeros(2, 2), "got \\(2, 2\\)"),
        (torch.zeros(3, 0, 2), "shape \\(3, H, W\\)"),
    ],
)
def test_what_is_no_image_is_not_saved(tmp_path, pixels, message):
    with pytest.raises(ValueError, match=message):
        save_png(pixels, tmp_path / "a.png")
    assert list(tmp_path.iterdir()) == []


def test_a_failed_write_leaves_the_old_file_and_no_rubbish(tmp_path, monkeypatch):
    save_png(torch.zeros(3, 2, 2), tmp_path / "a.png")
    monkeypatch.setattr(os, "fsync", lambda _: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space"):
        save_png(torch.ones(3, 2, 2), tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert load_png(tmp_path / "a.png").max() == 0


def _encoded(image, **options):
    buffer = io.BytesIO()
    image.save(buffer, **({"format": "PNG"} | options))
    return buffer.getvalue()


def _chunk(kind, data):
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def _png(width, height, depth, rows):
    header = struct.pack(">IIBBBBB", width, height, depth, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + _chunk(b"IHDR", header) + _chunk(b"IDAT", zlib.compress(rows)) + _chunk(b"IEND", b"")


RGB = Image.fromarray(np.arange(4 * 5 * 3, dtype=np.uint8).reshape(4, 5, 3))
GOOD = _encoded(RGB)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "got an empty file"),
        (b"not an image", "expected a PNG"),
        (_encoded(RGB, format="JPEG"), "expected a PNG"),
        (GOOD[:30], "damaged"),
        (GOOD[:-30], "damaged"),
        (GOOD[:8], "damaged"),
        (GOOD[:50] + bytes(8) + GOOD[58:], "damaged"),
        (_encoded(RGB.convert("L")), "mode L"),
        (_encoded(RGB.convert("RGBA")), "mode RGBA"),
        (_encoded(RGB.convert("P")), "mode P"),
        (_encoded(RGB, transparency=(0, 0, 0)), "transparency"),
        (_encoded(RGB, save_all=True, append_images=[RGB.transpose(Image.Transpose.ROTATE_180)]), "animation"),
        (_png(2, 1, 16, bytes(13)), "16 bits per channel"),
        (_png(60000, 60000, 8, b""), "pixels; resize"),
        (_png(10000, 10000, 8, b""), "pixels; resize"),
    ],
)
def test_odd_files_are_refused_with_path_and_reason(tmp_path, data, message):
    path = tmp_path / "odd.png"
    path.write_bytes(data)
    with pytest.raises(ImageFileError, match=f"odd.png: .*{message}"):
        load_png(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path):
    with pytest.raises(ImageFileError, match="No such file"):
        load_png(tmp_path / "missing.png")
    with pytest.raises(ImageFileError, match="cannot be read"):
        load_png(tmp_path)
