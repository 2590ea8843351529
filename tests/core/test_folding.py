"""What looks the same is the same, and nothing else."""

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mm_cb.core.folding import as_drawn, folded

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
def test_twice_is_once(text):
    assert folded(folded(text)) == folded(text)


def test_marks_alone_stay_apart():
    assert len({folded("?"), folded("!"), folded("...")}) == 3
