"""A model as it is asked: with its adapter, and with the operator's text."""

import pytest

from mm_cb.core.errors import UserError
from mm_cb.inference.source import ModelSource
from mm_cb.inference.subjects import load_subject


@pytest.mark.parametrize(
    ("system", "told"),
    [
        ("be brief . " * 500, "the text of `--system` is too long for `miniature`: .* Shorten it"),
        ("an <image> .", "the text of `--system` cannot be used: .* placeholder"),
        ("be </s> kind", "the text of `--system` cannot be used: .* control token `</s>`"),
    ],
)
def test_an_operators_text_that_no_request_can_follow_is_named(system, told):
    with pytest.raises(UserError, match=told):
        load_subject(ModelSource("miniature", None, "cpu", "float32", system=system), "base")
