import io
import struct
import zlib

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from PIL import ExifTags, Image

from image_attacks import L2, ImageFileError, Linf, load_image, load_png, open_image, round_towards, save_png

RGB = Image.fromarray((np.arange(24 * 20 * 3) % 256).astype(np.uint8).reshape(20, 24, 3))


def encoded(image, kind="PNG", **options):
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def png(width, height, depth, colour, rows):
    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_transparency_lies_on_white(tmp_path):
    Image.new("RGBA", (2, 1), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert (load_image(tmp_path / "a.png") == 1).all()
    Image.new("RGBA", (2, 1), (255, 0, 0, 255)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png")[:, 0, 0].tolist() == [1, 0, 0]


@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L", "LA", "P", "1"])
def test_common_modes_become_what_image_processors_make_of_them(tmp_path, mode):
    path = tmp_path / "a.png"
    RGB.convert(mode).save(path)
    expected = np.array(Image.open(path).convert("RGB"))
    pixels = load_image(path)
    assert pixels.shape == (3, 20, 24) and pixels.dtype == torch.float32
    assert np.array_equal((pixels * 255).round().permute(1, 2, 0).numpy(), expected)
    save_png(pixels, tmp_path / "b.png")
    assert torch.equal(load_png(tmp_path / "b.png"), pixels)


def test_a_jpeg_with_a_wrong_ending_is_read(tmp_path):
    (tmp_path / "a.png").write_bytes(encoded(RGB, "JPEG"))
    assert load_image(tmp_path / "a.png").shape == (3, 20, 24)


JPEG = encoded(RGB, "JPEG")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "got an empty one"),
        (b"hello", r"got text \(5 bytes\)"),
        (JPEG[: len(JPEG) * 2 // 3], "expected a whole image"),
        (encoded(RGB)[:-40], "expected a whole image"),
        (encoded(RGB.convert("F"), "TIFF"), "got mode F"),
        (png(2, 1, 16, 2, bytes(13)), "16 bits per channel"),
        (png(2, 1, 16, 0, bytes(5)), "16 bits per channel"),
        (encoded(RGB, "GIF", save_all=True, append_images=[RGB.rotate(180)]), "expected one picture, got 2 frames"),
        (png(60000, 60000, 8, 2, b""), "expected at most .* pixels"),
        (png(10000, 10000, 8, 2, b""), "expected at most .* pixels"),
    ],
)
def test_odd_files_are_refused_with_expected_got_and_remedy(tmp_path, data, message):
    path = tmp_path / "odd.png"
    path.write_bytes(data)
    with pytest.raises(ImageFileError, match=f"odd.png: expected.*{message.removeprefix('expected')}"):
        load_image(path)


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_a_phones_picture_stands_as_a_chat_shows_it(tmp_path, orientation, kind):
    from transformers.image_utils import load_image as as_transformers

    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    RGB.save(tmp_path / "turned", kind, exif=exif)
    shown = np.array(as_transformers(str(tmp_path / "turned")))
    assert shown.shape == ((20, 24, 3) if orientation < 5 else (24, 20, 3))
    assert np.array_equal(np.array(open_image(tmp_path / "turned")), shown)


def test_a_picture_is_turned_whatever_else_its_exif_holds(tmp_path):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    exif[ExifTags.Base.ImageDescription] = "shape"
    data = encoded(RGB, "JPEG", exif=exif)
    (tmp_path / "a.jpg").write_bytes(data.replace(b"\x01\x0e\x00\x02", b"\x01\x1a\x00\x02"))  # a text as resolution
    assert open_image(tmp_path / "a.jpg").size == (20, 24)


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(ImageFileError, match="cannot be read"):
        load_image(tmp_path / "missing.png")


@settings(deadline=None)
@given(
    hnp.arrays("uint8", (1, 3, 4, 5)),
    hnp.arrays("float32", (1, 3, 4, 5), elements=st.floats(-1, 1, width=32)),
    st.floats(0, 1),
)
def test_rounding_towards_the_image_never_leaves_a_ball_and_loses_less_than_a_level(clean, move, epsilon):
    clean = torch.from_numpy(clean) / 255
    for ball in (Linf(epsilon), L2(epsilon)):
        pixels = ball.project(clean + torch.from_numpy(move), clean)
        saved = round_towards(pixels, clean)
        before, after = pixels - clean, saved - clean
        assert ((saved * 255).round() / 255 - saved).abs().max() < 1e-6 and saved.min() >= 0 and saved.max() <= 1
        # up to 1/1024 of a level: a value so near to a level is that level
        assert (after.abs() <= before.abs() + 1 / 255 / 1000).all() and (before * after >= 0).all()
        assert (after - before).abs().max() < 1 / 255


def test_rounding_towards_refuses_a_start_that_is_no_file():
    with pytest.raises(ValueError, match="8-bit"):
        round_towards(torch.zeros(1, 3, 2, 2), torch.full((1, 3, 2, 2), 0.501))
