"""docs/formats.md: its examples are read by the product's own readers, and what it calls optional is."""

import json
import re
from pathlib import Path

import pytest
from PIL import Image

from mm_cb.benchmarks.harmful_calls.rows import read_harmful_rows
from mm_cb.benchmarks.over_refusal.data import read_requests
from mm_cb.core.errors import UserError
from mm_cb.data.behaviors_file import read_behaviors
from mm_cb.data.benign import read_targets
from mm_cb.data.mixture import load_examples
from mm_cb.data.prompts_file import messages_hash, read_prompts
from mm_cb.data.sources import Source

PAGE = (Path(__file__).parents[2] / "docs" / "formats.md").read_text(encoding="utf-8")
_IDS = ["bread", "soup"]
READERS = {
    "Training rows": lambda file: list(load_examples([Source(str(file))], 0)),
    "Behaviours": read_behaviors,
    "Prompts": lambda file: [one for all_ in read_prompts(file, _IDS).values() for one in all_],
    "Benign requests": read_requests,
    "Harmful calls": lambda file: read_harmful_rows(str(file), None, split="test_public", accepted=False),
}
OPTIONAL = {
    "Training rows": {"source", "tools"},
    "Behaviours": {"image", "category", "split", "tools", "target_call", "facts", "form", "harmless"},
    "Prompts": {"hash"},
    "Benign requests": {"image", "category"},
    "Harmful calls": {"image", "category", "target_functions"},
}


def example(title, language="jsonl"):
    (section,) = re.findall(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, flags=re.DOTALL | re.MULTILINE)
    return re.search(rf"```{language}\n(.*?)```", section, flags=re.DOTALL)[1]


@pytest.fixture
def written(tmp_path):
    """Writes lines into a file beside the page's picture."""
    (tmp_path / "pictures").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "pictures" / "square.png")

    def write(records):
        file = tmp_path / "file.jsonl"
        file.write_text("".join(json.dumps(record) + "\n" for record in records))
        return file

    return write


@pytest.mark.parametrize("title", READERS)
def test_an_example_is_read_whole(title, written):
    records = [json.loads(line) for line in example(title).splitlines()]
    assert len(READERS[title](written(records))) == len(records)
    assert OPTIONAL[title] <= {key for record in records for key in record}


@pytest.mark.parametrize(("title", "key"), [(t, k) for t in READERS for k in json.loads(example(t).splitlines()[0])])
def test_what_is_not_called_optional_is_needed(title, key, written):
    records = [json.loads(line) for line in example(title).splitlines()]
    file = written([{k: v for k, v in records[0].items() if k != key}, *records[1:]])
    if key in OPTIONAL[title]:
        READERS[title](file)
    else:
        with pytest.raises(UserError, match=r"file\.jsonl(:\d|`)"):
            READERS[title](file)


def test_the_hash_of_a_prompt_is_made_as_the_page_says():
    (told,) = [json.loads(line) for line in example("Prompts").splitlines() if '"hash"' in line]
    space = {"messages": told["messages"]}
    exec(example("Prompts", "python"), space)
    assert space["hash"] == told["hash"] == messages_hash(told["messages"])


def test_targets_are_lines(tmp_path):
    file = tmp_path / "targets.txt"
    file.write_text(example("Targets", "text"))
    assert read_targets(file) == example("Targets", "text").splitlines()
