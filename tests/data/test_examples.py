import io
import json
import re

import pytest
from PIL import Image

from mm_cb.core.errors import UserError
from mm_cb.data.examples import Example, check_messages
from mm_cb.data.pictures import PictureError
from tests.data.conftest import read_examples
from tests.tiny_llava import picture

GOOD = {
    "id": "a-1",
    "messages": [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "what is it"}]},
        {"role": "assistant", "content": "a square"},
    ],
    "images": ["pictures/a.png"],
    "set": "retain",
    "source": "made",
}


@pytest.fixture
def file(tmp_path):
    (tmp_path / "pictures").mkdir()
    picture().save(tmp_path / "pictures" / "a.png")
    return tmp_path / "examples.jsonl"


def write(file, *records):
    file.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records))


def test_examples_are_read_with_their_pictures(file):
    text = {**GOOD, "id": "t", "images": [], "set": "circuit_breaker"}
    text["messages"] = [{"role": "user", "content": "tell me"}, {"role": "assistant", "content": "no"}]
    del text["source"]
    write(file, GOOD, "", text)
    first, second = read_examples(file)
    assert (first.modality, second.modality, second.source) == ("multimodal", "text", "")
    assert first.open_images()[0].tobytes() == picture().tobytes() and second.open_images() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"images": []}, "list of 1 paths"),
        ({"images": ["/etc/passwd"]}, "stay inside"),
        ({"images": ["../a.png"]}, "stay inside"),
        ({"images": [3]}, "stay inside"),
        ({"images": ["a" * 300]}, "too long for a file's name"),
        ({"set": "harmful"}, "circuit_breaker or retain, got 'harmful'"),
        ({"id": ""}, "`id`"),
        ({"id": 3}, "`id`"),
        ({"messages": []}, "not empty"),
        ({"messages": ["hello"]}, "not empty"),
        ({"messages": GOOD["messages"][:1]}, "end with the assistant"),
        ({"messages": GOOD["messages"][::-1]}, "end with the assistant"),
        ({"messages": [{"role": "user", "content": [{"type": "sound"}]}, GOOD["messages"][1]]}, "image parts and text"),
        ({"messages": [GOOD["messages"][0], {"role": "assistant", "content": " "}]}, "some text"),
        ({"messages": [GOOD["messages"][0], {"role": "assistant", "content": [{"type": "image"}]}]}, "only the user"),
        ({"messages": [GOOD["messages"][0], {"role": "assistant"}]}, "image parts and text"),
        ({"extra": 1}, "with the keys"),
        ({"id": "a\ud83d"}, "half of a surrogate pair"),
        ({"source": "a\0"}, "NUL"),
        ({"images": ["pictures/a\ud83d.png"]}, "half of a surrogate pair"),
        ({"messages": [GOOD["messages"][0], {"role": "assistant", "content": "a\ud83d"}]}, "half of a surrogate pair"),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "txt": "a"}]}, GOOD["messages"][1]]},
            "text parts",
        ),
        ({"images": [[1, 2, 3]]}, "stay inside"),
    ],
)
def test_a_broken_example_names_file_and_line(file, change, message):
    write(file, GOOD, {**GOOD, "id": "b", **change})
    with pytest.raises(UserError, match=rf"examples\.jsonl:2: .*{message}"):
        read_examples(file)


@pytest.mark.parametrize("line", ["{", "[]", "null", '"text"', "[" * 100_000])
def test_a_line_that_is_no_object(file, line):
    write(file, GOOD, line)
    with pytest.raises(UserError, match=r"examples\.jsonl:2: "):
        read_examples(file)


def test_repeated_ids_and_empty_or_missing_files(file, tmp_path):
    write(file, GOOD, GOOD)
    with pytest.raises(UserError, match=r":2: .*used at .*:1"):
        read_examples(file)
    write(file)
    with pytest.raises(UserError, match="it is empty"):
        read_examples(file)
    with pytest.raises(UserError, match="is not there"):
        read_examples(tmp_path / "nowhere.jsonl")
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match=":1: .*UTF-16"):
        read_examples(file)


@pytest.mark.parametrize("content", [b"", b"not a picture", b"\x89PNG\r\n\x1a\n"])
def test_a_picture_that_cannot_be_read_names_path_and_example(file, content):
    write(file, GOOD)
    path = file.parent / "pictures" / "a.png"
    path.write_bytes(content)
    with pytest.raises(PictureError, match=r"examples\.jsonl:1: cannot read the picture `.*a\.png` of example `a-1`"):
        read_examples(file)[0].open_images()


def test_a_damaged_picture_in_memory_is_the_users_error_too():
    content = io.BytesIO()
    picture().save(content, "PNG")
    damaged = Image.open(io.BytesIO(content.getvalue()[:200]))
    with pytest.raises(PictureError, match="cannot read the picture of example `a`"):
        Example("a", [], [damaged], "retain").open_images()


@pytest.mark.parametrize(
    ("content", "came"), [(None, "null or none"), (3, "3"), ([], "[]"), ({"type": "text"}, "type")]
)
def test_content_that_is_none_is_named_with_its_turn(content, came):
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
    with pytest.raises(
        ValueError, match=rf"`content` of turn 2 must be a text or a list of .*, got .*{re.escape(came)}"
    ):
        check_messages(turns)
