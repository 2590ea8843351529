from dataclasses import replace
from pathlib import Path

import pytest
import torch

from mm_cb.attacks.objectives.form import FormObjective
from mm_cb.attacks.objectives.found_form import FoundFormObjective, _answers, _common, _with_form
from mm_cb.attacks.saved import to_pixels
from mm_cb.core.errors import UserError
from mm_cb.data.behaviors_file import GAP, grey_canvas, read_behaviors
from mm_cb.inference.subjects import Subject
from mm_cb.miniature import NAME
from mm_cb.miniature.language import FORBIDDEN_WORDS, FORM, harmless_requests, words
from mm_cb.models import load_model

ROOT = Path(__file__).resolve().parents[3]
TOLD = read_behaviors(ROOT / "data" / "miniature" / "behaviors.jsonl")[:5:4]  # both without a picture
UNTOLD = [replace(one, extra={"harmless": harmless_requests()}) for one in TOLD]


@pytest.fixture(scope="module")
def subject():
    return Subject("rr", load_model(NAME, adapter=ROOT / "results" / "miniature_demo" / "rr"), adapted=True)


@pytest.fixture
def pictures(subject):
    return [grey_canvas(subject.model.canvas)] * 2


def pixels_of(pictures):
    return torch.stack([to_pixels(one) for one in pictures])


def test_harmless_answers_give_the_form_and_the_rest_of_the_vocabulary_the_words(subject, pictures):
    heard = _answers(subject, [replace(UNTOLD[0], prompt=one) for one in UNTOLD[0].harmless], None)
    refused = _answers(subject, UNTOLD[:1], pictures[0])
    found = _with_form(subject, UNTOLD[0], heard, refused).form
    assert words(found.text.replace(GAP, "gap")) == words(FORM.replace(GAP, "gap"))
    assert {*FORBIDDEN_WORDS} < {*found.words}
    said = {word for answer in [*heard, *refused] for word in words(answer)}
    assert not said & {*found.words} and not {*words(UNTOLD[0].prompt)} & {*found.words}
    assert not {word for answer in heard for word in words(answer)} & {*FORBIDDEN_WORDS}, "nobody told a word"


def test_what_a_file_tells_of_the_answer_changes_nothing(subject, pictures):
    both = [replace(one, extra={**one.extra, "harmless": harmless_requests()}) for one in TOLD]
    assert all({"facts", "form"} <= one.extra.keys() for one in both)
    pixels = pixels_of(pictures)
    with torch.no_grad():
        untold, told = (FoundFormObjective(subject, given, pictures)(pixels) for given in (UNTOLD, both))
    assert torch.equal(untold, told)


def test_rows_do_not_mix_and_every_row_has_a_gradient(subject, pictures):
    other = replace(UNTOLD[1], extra={"harmless": harmless_requests()[3:]})
    pixels = pixels_of(pictures).requires_grad_()
    losses = FoundFormObjective(subject, [UNTOLD[0], other], pictures)(pixels)
    (gradient,) = torch.autograd.grad(losses[0], pixels, retain_graph=True)
    assert bool(gradient[0].any()) and not bool(gradient[1].any()) and bool(gradient.isfinite().all())
    alone = FoundFormObjective(subject, [other], pictures[1:])
    assert alone(pixels[1:]).item() == pytest.approx(losses[1].item(), abs=1e-4)


def test_the_loss_is_of_the_picture_alone_whatever_was_looked_at_before(subject, pictures):
    pixels = pixels_of(pictures)
    used, fresh = (FormObjective(subject, TOLD, pictures) for _ in range(2))
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


def test_requests_whose_answers_have_no_form_in_common_are_refused_by_name(subject, pictures):
    lost = replace(UNTOLD[0], extra={"harmless": ["spell the word tea.", "spell the word ink."]})
    with pytest.raises(UserError, match=f"{lost.id}.*`harmless` requests must hold `:`"):
        FoundFormObjective(subject, [lost], pictures[:1])
