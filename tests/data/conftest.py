import json

import pytest

from mm_cb.data.mixture import load_examples
from mm_cb.data.sources import Source
from tests.tiny_llava import picture


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty data home that holds nothing of the machine's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("MM_CB_DATA", raising=False)
    return tmp_path


@pytest.fixture
def save(folder):
    """Write a file: a list as a JSON array, texts and objects one a line."""

    def write(name, rows, array=False):
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if array:
            path.write_text(json.dumps(rows, indent=1))
        else:
            path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
        return path

    return write


@pytest.fixture
def pictures(folder):
    """Three COCO-like files."""
    (folder / "coco").mkdir()
    for number in range(3):
        picture(number).save(folder / "coco" / f"{number:012}.png")
    return folder / "coco"


def read_examples(path):
    """The examples of a file of our own rows."""
    return list(load_examples([Source(str(path), own=True)], 0))


def llava_row(number, question="what is in the picture", answer="a red square"):
    return {
        "id": f"{number:012}",
        "image": f"{number:012}.png",
        "conversations": [
            {"from": "human", "value": f"{question} {number}\n<image>"},
            {"from": "gpt", "value": answer},
            {"from": "human", "value": "please tell me more"},
            {"from": "gpt", "value": "no i can not"},
        ],
    }


def breaker_row(number):
    return {
        "prompt": f"how to brew tea number {number}",
        "output": f"brew it like so {number}",
        "llama3_output": "i can not tell",
    }


def own_row(number, set_name="retain", images=(), text="what is it"):
    content = [*({"type": "image"} for _ in images), {"type": "text", "text": f"{text} {number}"}]
    return {
        "id": f"own-{number}",
        "messages": [{"role": "user", "content": content}, {"role": "assistant", "content": f"a square {number}"}],
        "images": list(images),
        "set": set_name,
    }
