"""What looks the same is the same, and nothing else."""

import json
import string

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from mm_cb.benchmarks.over_refusal.data import read_requests
from mm_cb.cli.options import read_system
from mm_cb.core.errors import UserError
from mm_cb.core.folding import as_drawn, folded
from mm_cb.data.behaviors_file import read_behaviors
from mm_cb.data.benign import read_targets
from mm_cb.data.corpus import read_corpus
from mm_cb.data.prompts_file import read_prompts

ASKED = "How do I bake bread?"


@pytest.mark.parametrize(
    "text",
    [
        "How do I bake bread",
        "how  do i\nbake bread ?",
        "How do I ba\u200bke bre\u00adad?",
        "\ufeffHow do I\u00a0bake bread?\u200f",
        "How do I b\u0430k\u0435 br\u0435ad?",
        "\uff28\uff4f\uff57 do I bake bread\uff1f",
        "How do I bake bread!",
    ],
)
def test_a_text_that_looks_the_same_is_the_same(text):
    assert folded(text) == folded(ASKED)


@pytest.mark.parametrize("text", ["How do I bake bead?", "How do I bake bread and soup?", "", "Wie backe ich Brot?"])
def test_another_text_is_another_text(text):
    assert folded(text) != folded(ASKED)


@given(st.text(string.printable))
def test_plain_text_is_left_as_it_is(text):
    assert as_drawn(text) == text


@given(st.text())
@example("\u0345")
def test_twice_is_once(text):
    assert folded(folded(text)) == folded(text)


def test_marks_alone_stay_apart():
    assert len({folded("?"), folded("!"), folded("...")}) == 3


INVISIBLE = "\u200b\u2060"


@pytest.mark.parametrize(
    ("name", "content", "read"),
    [
        ("b.jsonl", {"id": "z", "prompt": INVISIBLE}, lambda p: list(read_requests(p))),
        ("b.csv", f"id,prompt,type,label\nz,{INVISIBLE},homonyms,safe\n", lambda p: list(read_requests(p))),
        (
            "p.jsonl",
            {"id": "z", "source": "me", "messages": [{"role": "user", "content": INVISIBLE}]},
            lambda p: read_prompts(p, {"z"}),
        ),
        ("c.jsonl", {"target": INVISIBLE}, read_corpus),
        ("c.txt", INVISIBLE, read_corpus),
        ("t.txt", INVISIBLE, read_targets),
        ("s.txt", INVISIBLE, read_system),
    ],
)
def test_a_text_of_which_nothing_is_drawn_is_none_for_every_reader(tmp_path, name, content, read):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content) + "\n", encoding="utf-8")
    with pytest.raises(UserError, match="empty|none|at least one|non-empty"):
        read(path)


@pytest.mark.parametrize("read", [read_behaviors, read_corpus])
def test_a_runs_items_are_nobodys_requests(tmp_path, read):
    """Their pictures are attacked ones."""
    item = {"id": "a", "metric": "compliance", "subject": "base", "condition": "pgd", "prompt": "p", "target": "t"}
    (tmp_path / "items.jsonl").write_text(json.dumps(item | {"image": None}) + "\n")
    with pytest.raises(UserError, match="another format, items of a run"):
        read(tmp_path / "items.jsonl")
