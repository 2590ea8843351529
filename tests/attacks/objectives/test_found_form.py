from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mm_cb.attacks.objectives.form import FormObjective
from mm_cb.attacks.objectives.found_form import FoundFormObjective, _answers, _common, _with_form
from mm_cb.data.behaviors_file import GAP, read_behaviors
from mm_cb.miniature.language import FORBIDDEN_WORDS, FORM, harmless_requests, words
from tests.attacks.objectives.conftest import pixels_of

ROOT = Path(__file__).resolve().parents[3]
TOLD = read_behaviors(ROOT / "data" / "miniature" / "behaviors.jsonl")[:5:4]  # both without a picture
UNTOLD = [replace(one, extra={"harmless": harmless_requests()}) for one in TOLD]
FEW = harmless_requests()[:6]  # enough for a form


def test_harmless_answers_give_the_form_and_the_rest_of_the_vocabulary_the_words(breaker, canvases):
    heard = _answers(breaker, [replace(UNTOLD[0], prompt=one) for one in UNTOLD[0].harmless], None)
    refused = _answers(breaker, UNTOLD[:1], canvases[0])
    found = _with_form(breaker, UNTOLD[0], heard, refused).form
    assert words(found.text.replace(GAP, "gap")) == words(FORM.replace(GAP, "gap"))
    assert {*FORBIDDEN_WORDS} < {*found.words}
    said = {word for answer in [*heard, *refused] for word in words(answer)}
    assert not said & {*found.words} and not {*words(UNTOLD[0].prompt)} & {*found.words}
    assert not {word for answer in heard for word in words(answer)} & {*FORBIDDEN_WORDS}, "nobody told a word"


def test_what_a_file_tells_of_the_answer_changes_nothing(breaker, canvases):
    alone = [replace(one, extra={"harmless": FEW}) for one in TOLD]
    both = [replace(one, extra={**one.extra, "harmless": FEW}) for one in TOLD]
    assert all({"facts", "form"} <= one.extra.keys() for one in both)
    pixels = pixels_of(canvases)
    with torch.no_grad():
        untold, told = (FoundFormObjective(breaker, given, canvases)(pixels) for given in (alone, both))
    assert torch.equal(untold, told)


def test_rows_do_not_mix_and_every_row_has_a_gradient(breaker, canvases):
    one, other = (replace(a, extra={"harmless": few}) for a, few in zip(UNTOLD, (FEW, FEW[1:]), strict=True))
    pixels = pixels_of(canvases).requires_grad_()
    losses = FoundFormObjective(breaker, [one, other], canvases)(pixels)
    (gradient,) = torch.autograd.grad(losses[0], pixels, retain_graph=True)
    assert bool(gradient[0].any()) and not bool(gradient[1].any()) and bool(gradient.isfinite().all())
    alone = FoundFormObjective(breaker, [other], canvases[1:])
    assert alone(pixels[1:]).item() == pytest.approx(losses[1].item(), abs=1e-4)


def test_the_loss_is_of_the_picture_alone_whatever_was_looked_at_before(breaker, canvases):
    pixels = pixels_of(canvases)
    used, fresh = (FormObjective(breaker, TOLD, canvases) for _ in range(2))
    with torch.no_grad():
        elsewhere = torch.rand(pixels.shape, generator=torch.Generator().manual_seed(0))
        used(elsewhere)
        stale = used._last.input_ids
        found = used(pixels), fresh(pixels)
    assert not torch.equal(stale, fresh._last.input_ids), "other words stood in the gaps"
    assert torch.equal(*found)


@pytest.mark.parametrize(
    ("texts", "form"),
    [
        (["take mint and salt.", "take sage and clay.", "no."], f"take {GAP} and {GAP}."),
        (["take mint", "take mint"], None),
        (["mint salt", "sage clay"], None),
        (["", ""], None),
    ],
)
def test_a_form_is_what_the_answers_of_the_commonest_length_share(texts, form):
    assert _common(texts) == form


def test_where_answers_have_no_form_in_common_one_word_is_asked_for_and_a_warning_says_so(breaker, canvases):
    lost = replace(UNTOLD[0], extra={"harmless": ["spell the word tea.", "spell the word ink."]})
    with pytest.warns(UserWarning, match=f"{lost.id}.*no two answers to its `harmless` requests hold `:`"):
        objective = FoundFormObjective(breaker, [lost], canvases[:1])
    assert objective(pixels_of(canvases[:1])).isfinite().all() and objective.gaps.sum() == 1
