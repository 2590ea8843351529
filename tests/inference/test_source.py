"""What a model is called: no base as a breaker, no breaker as a base."""

import itertools

import pytest

from mm_cb.core.errors import UserError
from mm_cb.inference.source import ModelSource, chosen_name, refuse_lookalike, subject_name

KINDS = ["base", "rr"]
MORE = ["", "+probe", "+safety_prompt", "+probe+safety_prompt"]
GIVEN = [
    dict(zip(("adapter", "probe", "system"), held, strict=True)) for held in itertools.product([None, "x"], repeat=3)
]


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("name", [kind + more for kind in KINDS for more in MORE])
def test_a_name_of_ours_is_the_models_own_or_refused(name, given):
    source = ModelSource("miniature", **given)
    own = subject_name(source.breaker, source.system, source.probe)
    assert chosen_name(source, None) == own and chosen_name(source, f"my-{name}") == f"my-{name}"
    if name == own:
        assert chosen_name(source, name) == name
        return
    with pytest.raises(UserError, match="says what this model is not"):
        chosen_name(source, name)


@pytest.mark.parametrize("name", ["rr", "base", "rr+safety_prompt", "mine"])
def test_a_served_model_may_be_called_anything(name):
    assert chosen_name(ModelSource("m", endpoint="http://127.0.0.1:1/v1"), name) == name


def test_a_merged_breaker_may_be_called_one_and_a_known_base_may_not(tmp_path):
    for model in (str(tmp_path), "GraySwanAI/Llama-3-8B-Instruct-RR"):
        assert chosen_name(ModelSource(model), "rr") == "rr" and chosen_name(ModelSource(model), "base") == "base"
    for model in ("miniature", "llava-hf/llava-v1.6-mistral-7b-hf"):
        with pytest.raises(UserError, match="a base without `--adapter`"):
            chosen_name(ModelSource(model), "rr")
    with pytest.raises(UserError, match="no `--system`"):
        chosen_name(ModelSource(str(tmp_path)), "rr+safety_prompt")


@pytest.mark.parametrize(
    "name", ["base ", " rr", "Base", "RR", "b\u0430se", "rr\u200b", "Base+Probe", "mine ", "", " "]
)
def test_a_name_that_reads_as_another_is_refused_of_served_models_and_stored_answers_too(name):
    named = lambda: chosen_name(ModelSource("m", endpoint="http://127.0.0.1:1/v1"), name)  # noqa: E731
    for choose in (named, lambda: chosen_name(ModelSource("miniature"), name), lambda: refuse_lookalike(name)):
        with pytest.raises(UserError, match="`--subject` must be a name that nobody mistakes"):
            choose()
