"""One reader: every command shows a model the same pixels of a file, or refuses it by name."""

import base64
import io
import json
import os
import struct
import threading
import zlib
from types import SimpleNamespace

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import ExifTags, Image

from image_attacks.errors import ImageFileError
from image_attacks.image_files import decode_image
from mm_cb.attacks import saved
from mm_cb.benchmarks.base import Question
from mm_cb.benchmarks.llava_wild.questions import read_questions as wild_questions
from mm_cb.benchmarks.mmmu.benchmark import MmmuSettings
from mm_cb.benchmarks.mmmu.questions import read_questions as mmmu_questions
from mm_cb.benchmarks.over_refusal.data import read_requests
from mm_cb.benchmarks.pictures import fingerprint, ready
from mm_cb.benchmarks.pope import Pope, PopeSettings
from mm_cb.benchmarks.rows import DataRow
from mm_cb.core.endpoint import user_message
from mm_cb.core.errors import UserError
from mm_cb.data import describe
from mm_cb.data.behaviors_file import read_behaviors
from mm_cb.data.check import Limits, check_sources
from mm_cb.data.mixture import load_examples
from mm_cb.data.pictures import EncodedPicture, absent, open_picture, path_inside, shown
from mm_cb.data.records import Records
from mm_cb.data.sources import Source
from mm_cb.judges.base import Case
from mm_cb.judges.served import EndpointJudge
from mm_cb.models.chat import chat
from mm_cb.report.gallery import read_picture
from tests.benchmarks import mmmu_stand_in
from tests.data.conftest import read_examples
from tests.image_attacks.test_image_files import encoded, png
from tests.tiny_llava import tiny_llava

W, H = 6, 4
LEVELS = (np.arange(H * W * 3) * 3 % 256).astype(np.uint8).reshape(H, W, 3)
RGB = Image.fromarray(LEVELS)
GREY = RGB.convert("L")
ALPHA = Image.fromarray((np.arange(H * W) * 11 % 256).astype(np.uint8).reshape(H, W))


def chunk_in(data, kind, content):
    """A PNG with one more chunk behind its header."""
    body = struct.pack(">I", len(content)) + kind + content
    return data[:33] + body + struct.pack(">I", zlib.crc32(kind + content)) + data[33:]


def turned(kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(RGB, kind, exif=exif, **({"lossless": True} if kind == "WEBP" else {}))


def with_alpha(image):
    image = image.copy()
    image.putalpha(ALPHA)
    return image


def on_white(image):
    white = Image.new("RGBA", image.size, "white")
    white.alpha_composite(image.convert("RGBA"))
    return np.array(white)[..., :3]


def palette():
    image = RGB.quantize(16)
    return encoded(image, transparency=bytes(range(0, 256, 16)))


def decoded(data):
    return np.array(Image.open(io.BytesIO(data)).convert("RGB"))


GREY2 = png(4, 1, 2, 0, b"\0\x1b")
"""Grey of two bits: 0, 1, 2, 3."""
KINDS = {
    "rgb": (encoded(RGB), LEVELS),
    "profile": (encoded(RGB, icc_profile=b"x" * 200), LEVELS),
    "jpeg": (encoded(RGB, "JPEG"), decoded(encoded(RGB, "JPEG"))),
    "jpeg 6": (turned("JPEG", 6), np.rot90(decoded(encoded(RGB, "JPEG")), -1)),
    "png 3": (turned("PNG", 3), np.rot90(LEVELS, 2)),
    "png 5": (turned("PNG", 5), LEVELS.transpose(1, 0, 2)),
    "webp 8": (turned("WEBP", 8), np.rot90(LEVELS)),
    "tiff 6": (turned("TIFF", 6), np.rot90(LEVELS, -1)),
    "rgba": (encoded(with_alpha(RGB)), on_white(with_alpha(RGB))),
    "la": (encoded(with_alpha(GREY)), on_white(with_alpha(GREY))),
    "palette": (encoded(RGB.quantize(16)), np.array(RGB.quantize(16).convert("RGB"))),
    "palette tRNS": (palette(), on_white(Image.open(io.BytesIO(palette())))),
    "gif": (encoded(RGB.quantize(8), "GIF"), np.array(RGB.quantize(8).convert("RGB"))),
    "rgb tRNS": (
        encoded(RGB, transparency=tuple(map(int, LEVELS[1, 2]))),
        np.where((LEVELS == LEVELS[1, 2]).all(-1, keepdims=True), 255, LEVELS),
    ),
    "grey tRNS": (
        chunk_in(encoded(Image.new("L", (W, H), 7)), b"tRNS", b"\0\x07"),
        np.full((H, W, 3), 255),
    ),
    "2-bit grey": (GREY2, np.repeat(np.array([0, 85, 170, 255]), 3).reshape(1, 4, 3)),
    "2-bit tRNS": (
        chunk_in(GREY2, b"tRNS", b"\0\x01"),
        np.repeat(np.array([0, 255, 170, 255]), 3).reshape(1, 4, 3),
    ),
    "1 bit": (encoded(GREY.convert("1")), np.array(GREY.convert("1").convert("RGB"))),
    "cmyk": (encoded(RGB.convert("CMYK"), "TIFF"), np.array(RGB.convert("CMYK").convert("RGB"))),
    "cmyk jpeg": (encoded(RGB.convert("CMYK"), "JPEG"), decoded(encoded(RGB.convert("CMYK"), "JPEG"))),
    "grey and alpha in a tiff": (encoded(with_alpha(GREY), "TIFF"), on_white(with_alpha(GREY))),
    "bmp": (encoded(RGB, "BMP"), LEVELS),
    "several in a jpeg": (
        encoded(RGB, "MPO", save_all=True, append_images=[GREY]),
        decoded(encoded(RGB, "MPO", save_all=True, append_images=[GREY])),
    ),
}
"""File -> what a chat shows of it, worked out without our reader."""

ANIMATED = {"save_all": True, "append_images": [RGB.transpose(Image.Transpose.ROTATE_180)]}
PHOTO = encoded(RGB.resize((64, 64)), "JPEG")
REFUSED = {
    "16-bit grey": (png(2, 1, 16, 0, bytes(5)), "16 bits"),
    "16-bit rgb": (png(2, 1, 16, 2, bytes(13)), "16 bits"),
    "16-bit rgba": (png(2, 1, 16, 6, bytes(17)), "16 bits"),
    "32-bit": (encoded(GREY.convert("I"), "TIFF"), "mode I"),
    "float": (encoded(GREY.convert("F"), "TIFF"), "mode F"),
    "gif": (encoded(RGB, "GIF", **ANIMATED), "2 frames"),
    "apng": (encoded(RGB, "PNG", **ANIMATED), "2 frames"),
    "webp": (encoded(RGB, "WEBP", **ANIMATED), "2 frames"),
    "pages": (encoded(RGB, "TIFF", **ANIMATED), "2 frames"),
    "cut": (PHOTO[: len(PHOTO) * 2 // 3], "damaged"),
    "cut png": (encoded(RGB)[:-40], "damaged"),
    "png without its end": (encoded(RGB)[:-2], "without its end"),
    "gif that ends in zeros": (encoded(RGB.quantize(8), "GIF")[:-1] + bytes(9), "without its end"),
    "no width": (png(0, 4, 8, 2, b"\0"), "damaged header"),
    "bomb": (png(60000, 60000, 8, 2, b""), "expected at most"),
    "nearly a bomb": (png(10000, 10000, 8, 2, b""), "expected at most"),
    "text": (b"the picture was moved\n", "got text"),
    "html": (b"<!DOCTYPE html>\n<html><body>403</body></html>", "an HTML page"),
    "svg": (b'<?xml version="1.0"?>\n<svg xmlns="http://www.w3.org/2000/svg"/>', "an SVG drawing"),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3", "a PDF document"),
    "pointer": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "a Git LFS pointer"),
    "json": (b'{"error": "rate limit"}', "a JSON text"),
    "heic": (b"\0\0\0\x18ftypheic\0\0\0\0", "a HEIC picture"),
    "noise": (bytes(range(128, 256)) * 4, "something else"),
}
ANSWER = {"role": "assistant", "content": "a square"}
ASKED = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]}
PLACED = {"role": "user", "content": "<image>what is it"}


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF"])
def test_a_picture_is_shown_whole_or_not_at_all(kind):
    """Wherever it is cut, also where zeros stand for what was not fetched; what follows a whole one is left alone."""
    data = encoded(RGB.resize((40, 30)), kind)
    whole = decoded(data)
    assert np.array_equal(np.array(decode_image(data + (b"" if kind == "GIF" else b"more behind"), "it")), whole)
    compressed = kind in ("PNG", "JPEG", "GIF")
    for end in {*range(1, len(data), max(1, len(data) // 40)), *range(len(data) - 12, len(data) - 2)}:
        for one in (data[:end], *([data[:end] + bytes(len(data) - end)] if compressed else ())):
            with pytest.raises(ImageFileError, match="it: expected"):
                decode_image(one, "it")


def lines(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def file_of(folder, data):
    (folder / "p.png").write_bytes(data)  # a wrong ending for most
    return folder / "p.png"


def own_rows(folder, data):
    record = {"id": "a", "messages": [ASKED, ANSWER], "images": [file_of(folder, data).name], "set": "retain"}
    return lines(folder / "rows.jsonl", record)


def train(folder, data):
    return read_examples(own_rows(folder, data))[0].open_images()[0]


def train_llava(folder, data):
    turns = [{"from": "human", "value": "<image>what"}, {"from": "gpt", "value": "a square"}]
    (folder / "l.json").write_text(json.dumps([{"image": file_of(folder, data).name, "conversations": turns}]))
    return load_examples([Source(str(folder / "l.json"))], 0)[0].open_images()[0]


def table(data):
    features = datasets.Features(
        {
            "messages": datasets.List({"role": datasets.Value("string"), "content": datasets.Value("string")}),
            "images": datasets.List(datasets.Image()),
            "set": datasets.Value("string"),
        }
    )
    rows = {"messages": [[PLACED, ANSWER]], "images": [[{"bytes": data, "path": None}]], "set": ["retain"]}
    return datasets.Dataset.from_dict(rows, features=features)


def train_hub(folder, data):
    table(data).remove_columns("set").save_to_disk(str(folder / "saved"))
    return load_examples([Source(str(folder / "saved"))], 0)[0].open_images()[0]


def python_dataset(folder, data):
    plain = table(data).map(lambda row: {"messages": [{**PLACED, "content": "what"}, ANSWER]})
    return Records(plain)[0].open_images()[0]


def python_rows(value):
    return Records([{"messages": [ASKED, ANSWER], "images": [value], "set": "retain"}])[0].open_images()[0]


def attack(folder, data):
    record = {"id": "a", "prompt": "p", "target": "t", "image": file_of(folder, data).name}
    return open_picture(read_behaviors(lines(folder / "b.jsonl", record))[0].image)


def over_refusal(folder, data):
    (asked,) = read_requests(lines(folder / "r.jsonl", {"id": "a", "prompt": "p", "image": file_of(folder, data).name}))
    return shown(ready([Question("a", "p", (asked.image,))])[0][0])


def pope(folder, data):
    record = {"question_id": 1, "text": "is there a square?", "label": "yes", "image": file_of(folder, data).name}
    asked = Pope().questions(str(lines(folder / "coco_pope_random.json", record)), PopeSettings())
    return shown(ready(asked)[0][0])


def pope_stored(folder, data):
    row = {"question_id": "1", "question": "is there?", "answer": "yes", "image": {"bytes": data, "path": None}}
    pq.write_table(pa.Table.from_pylist([row]), folder / "test.parquet")
    return shown(ready(Pope().questions(str(folder / "test.parquet"), PopeSettings()))[0][0])


def wild(folder, data):
    (folder / "images").mkdir()
    file_of(folder / "images", data)
    lines(folder / "questions.jsonl", {"question_id": 0, "image": "p.png", "category": "conv", "text": "what?"})
    lines(folder / "context.jsonl", {"image": "p.png", "caption": "c"})
    lines(folder / "answers_gpt4.jsonl", {"question_id": 0, "text": "r"})
    return wild_questions(str(folder))[0].picture.open()


def wild_stored(folder, data):
    from mm_cb.benchmarks.llava_wild import questions

    row = {"question_id": 0, "question": "q", "caption": "c", "gpt_answer": "g", "category": "conv"}
    row |= {"image": {"bytes": data, "path": None}}
    return questions._from_row(DataRow(row, "row 0", None)).picture.open()


def described(folder, data):
    image = describe._open(file_of(folder, data))
    if not isinstance(image, Image.Image):
        raise UserError(image.reason)
    return image


class _Nobody:
    model, url = "m", "http://127.0.0.1:1/v1"


def judged(folder, data):
    judge = EndpointJudge(_Nobody(), "{behavior} {completion}", pictures=True)
    return judge._shown(Case("k", "b", "c", image=file_of(folder, data)))[0]


def served(folder, data):
    return sent(user_message("t", [shown(EncodedPicture(file_of(folder, data)))]))


def sent(message):
    encoded = message["content"][0]["image_url"]["url"].partition(",")[2]
    image = Image.open(io.BytesIO(base64.b64decode(encoded)))
    assert image.mode == "RGB" and not image.info
    return image


FILES = (train, train_llava, attack, over_refusal, pope, wild, described, judged, served)
CELLS = (train_hub, python_dataset, pope_stored, wild_stored)
READERS = {reader.__name__: reader for reader in (*FILES, *CELLS)} | {
    "python_path": lambda folder, data: python_rows(str(file_of(folder, data))),
    "python_bytes": lambda folder, data: python_rows(data),
    "python_pillow": lambda folder, data: python_rows(Image.open(io.BytesIO(data))),
}


def report(folder, data):
    return Image.fromarray(read_picture(folder, file_of(folder, data).name))


@pytest.mark.parametrize("reader", [*READERS, "report"])
def test_every_command_shows_the_same_pixels(reader, tmp_path):
    for number, (kind, (data, expected)) in enumerate(KINDS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        image = {**READERS, "report": report}[reader](folder, data)
        assert image.mode == "RGB" and np.array_equal(np.array(image), expected), kind


@pytest.mark.parametrize("reader", [name for name in READERS if name != "python_pillow"])
def test_every_command_refuses_the_same_files_in_one_line(reader, tmp_path):
    for number, (kind, (data, reason)) in enumerate(REFUSED.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(UserError) as caught:
            READERS[reader](folder, data)
        line = str(caught.value)
        assert reason in line and len(line) < 600 and "\\x" not in line, f"{kind}: {line}"
        if READERS[reader] in FILES:
            assert str(folder) in line and "p.png" in line, f"{kind}: {line}"


def test_a_page_lacks_what_every_command_refuses(tmp_path):
    for kind, (data, _) in REFUSED.items():
        assert read_picture(tmp_path, file_of(tmp_path, data).name) is None, kind


@pytest.mark.parametrize(("reader", "place"), [("attack", "b.jsonl:1"), ("pope", ".json:1"), ("over_refusal", ":1")])
def test_the_row_that_names_a_picture_is_named(reader, place, tmp_path):
    with pytest.raises(UserError, match=rf"{place}: picture .*p\.png: expected .* got an empty one"):
        READERS[reader](tmp_path, b"")


@pytest.mark.parametrize("name", KINDS)
def test_data_check_agrees(name, tmp_path):
    assert not check_sources([Source(str(own_rows(tmp_path, KINDS[name][0])))], Limits()).has_errors


@pytest.mark.parametrize("name", REFUSED)
def test_data_check_refuses_what_training_refuses(name, tmp_path):
    data, reason = REFUSED[name]
    report = check_sources([Source(str(own_rows(tmp_path, data)))], Limits())
    (line,) = report.problems["corrupt image"].first
    assert f"{tmp_path}/rows.jsonl:1: picture {tmp_path}/p.png: expected" in line and reason in line


@pytest.mark.parametrize("name", KINDS)
def test_mmmu_differs_in_transparency_alone(name, tmp_path):
    data, expected = KINDS[name]
    row = mmmu_stand_in.row("Art", 1, image_1={"bytes": data, "path": None})
    mmmu_stand_in.write(tmp_path, subjects=["Art"], rows=[row])
    (question,) = mmmu_questions(str(tmp_path), MmmuSettings(subjects=("Art",)))
    image = question.pictures[1].open()
    official = datasets.Image().decode_example({"bytes": data, "path": None}).convert("RGB")
    assert question.pictures[1].size == image.size and np.array_equal(np.array(image), np.array(official))
    see_through = name in ("rgba", "la") or "alpha" in name or name.endswith("tRNS")
    assert np.array_equal(np.array(image), expected) != see_through


def test_a_model_given_pillow_images_is_shown_what_commands_show():
    model = tiny_llava()

    def seen(image):
        return model.encode_chats([chat("hi", images=1)], [[image]]).pixel_values

    for kind in ("jpeg 6", "rgba", "palette tRNS", "cmyk", "2-bit tRNS"):
        data, expected = KINDS[kind]
        levels = Image.fromarray(np.ascontiguousarray(expected).astype(np.uint8))
        assert torch.equal(seen(Image.open(io.BytesIO(data))), seen(levels)), kind
    with pytest.raises(ValueError, match="16 bits"):
        seen(Image.new("I;16", (4, 4)))


@pytest.mark.parametrize("name", KINDS)
def test_reading_twice_is_reading_once_and_nothing_is_saved_back(name):
    once = open_picture(Image.open(io.BytesIO(KINDS[name][0])))
    assert not once.info and not once.getexif()
    assert open_picture(once).tobytes() == once.tobytes()
    buffer = io.BytesIO()
    once.save(buffer, "PNG")
    assert open_picture(buffer.getvalue()).tobytes() == once.tobytes()


def test_what_an_attack_saved_is_exact_for_every_reader(tmp_path):
    pixels = torch.from_numpy(LEVELS.copy()).permute(2, 0, 1).float() / 255
    mine = saved.save(tmp_path, "images/a.clean.png", pixels)
    assert mine.image.tobytes() == open_picture(tmp_path / mine.name).tobytes() == LEVELS.tobytes()


def test_files_that_are_none_are_named_and_none_is_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "folder.png").mkdir()
    cases = {"pipe.png": "a pipe", "folder.png": "Is a directory", "none.png": "No such file", "a\0.png": "null"}
    for name, reason in cases.items():
        with pytest.raises(UserError, match=reason):
            open_picture(tmp_path / name)


@pytest.mark.parametrize(("make", "reason"), [(os.mkfifo, "a pipe"), (os.mkdir, "Is a directory")])
def test_what_is_no_file_is_not_said_to_be_missing(make, reason, tmp_path):
    make(tmp_path / "p.png")
    with pytest.raises(UserError, match=rf"^rows:7: picture .*p\.png.*{reason}"):
        fingerprint([Question("1", "Asked?", (EncodedPicture(tmp_path / "p.png", "rows:7"),))])
    assert absent(tmp_path / "p.png") == "no file" and absent(tmp_path / "q.png") == "not there"


def test_a_picture_behind_links_in_a_circle_is_out_of_reach(tmp_path):
    (tmp_path / "p.png").symlink_to("p.png")
    assert "out of reach" in str(absent(tmp_path / "p.png"))


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read all")
def test_a_file_that_may_not_be_read_is_named(tmp_path):
    file_of(tmp_path, encoded(RGB)).chmod(0)
    with pytest.raises(UserError, match=r"p\.png: .*Permission denied"):
        open_picture(tmp_path / "p.png")


@pytest.mark.parametrize("reader", [attack, train, train_llava, over_refusal, pope, wild])
def test_links_lead_nowhere_else(reader, tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "out.png"
    inside.mkdir()
    outside.write_bytes(encoded(RGB))
    link = inside / ("images/p.png" if reader is wild else "p.png")

    def file(folder, data):
        link.parent.mkdir(exist_ok=True)
        link.symlink_to(outside)
        return link

    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError, match="leads out of it by a link"):
        patch.setitem(globals(), "file_of", file)
        reader(inside, encoded(RGB))


def test_links_are_followed_in_the_hubs_cache_and_in_a_folder_that_the_user_named(tmp_path):
    blob, snapshot = tmp_path / "repo" / "blobs" / "abc", tmp_path / "repo" / "snapshots" / "rev"
    for folder in (blob.parent, snapshot, tmp_path / "own"):
        folder.mkdir(parents=True)
    blob.write_bytes(encoded(RGB))
    (snapshot / "a.png").symlink_to(blob)
    (tmp_path / "own" / "a.png").symlink_to(blob)
    assert path_inside(snapshot, "a.png") == snapshot / "a.png"
    assert path_inside(tmp_path / "own", "a.png", links=True).is_file()
    for name in ("../x.png", "/etc/passwd", "", 3, b"\x89PNG", "a\0b", "a" * 300, "a/" * 3000):
        with pytest.raises(ValueError, match=r"`image` must (be a path|lie inside)") as caught:
            path_inside(snapshot, name, links=True)
        assert "x89" not in str(caught.value)


NAMES = {
    "pictures/a.png": True, "pictures/../pictures/a.png": True, "./pictures/a.png": True, "pictures//a.png": True,
    "../a.png": False, "pictures/../../a.png": False, "/a.png": False, "..": False, "pictures/../..": False,
}  # fmt: skip


@pytest.mark.parametrize("reader", [attack, train, train_llava, over_refusal])
@pytest.mark.parametrize(("name", "stays"), NAMES.items())
def test_a_name_is_taken_where_it_stays_inside_whatever_way_it_goes(reader, name, stays, tmp_path):
    inside = tmp_path / "data"
    for folder in (tmp_path, inside / "pictures"):
        folder.mkdir(exist_ok=True, parents=True)
        (folder / "a.png").write_bytes(encoded(RGB))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(globals(), "file_of", lambda folder, data: SimpleNamespace(name=name))
        if stays:
            assert reader(inside, encoded(RGB)) is not None
            return
        with pytest.raises(UserError, match="inside"):
            reader(inside, encoded(RGB))


@pytest.mark.parametrize(
    ("cell", "named"), [({"bytes": b"", "path": None}, "{'bytes': <0 bytes>"), (7, "got 7"), ([1, 2], "[1, 2]")]
)
def test_cells_without_a_picture_are_named_by_type_and_length(cell, named):
    with pytest.raises(ValueError, match=r"rows\[0\]: a picture must be") as caught:
        python_rows(cell)
    assert named in str(caught.value)


def test_threads_may_read_side_by_side(recwarn):
    found = []

    def read():
        for data in (REFUSED["nearly a bomb"][0], KINDS["rgb"][0]) * 20:
            try:
                found.append(open_picture(data).size)
            except UserError:
                found.append(None)

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found.count(None) == found.count((W, H)) == 160 and not recwarn.list
