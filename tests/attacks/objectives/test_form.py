import runpy
from pathlib import Path

import pytest
import torch

from mm_cb.attacks import registry
from mm_cb.attacks.saved import to_pixels
from mm_cb.data.behaviors_file import grey_canvas, read_behaviors
from mm_cb.inference.subjects import Subject
from mm_cb.miniature import NAME
from mm_cb.miniature.world import FORBIDDEN_KINDS, Brew, brews, recipe
from mm_cb.models import load_model

ROOT = Path(__file__).resolve().parents[3]


@pytest.fixture(scope="module")
def form():
    held = dict(registry._ATTACKS)
    try:
        yield runpy.run_path(str(ROOT / "scripts" / "benchmarks" / "form.py"))
    finally:
        registry._ATTACKS.clear()
        registry._ATTACKS.update(held)


def test_what_it_supplies_holds_no_true_word_of_what_is_asked_for(form):
    for brew in brews(FORBIDDEN_KINDS):
        assert not {*recipe(brew).values()} & {*recipe(form["another"](brew)).values()}, brew


def test_it_brings_an_opening_and_knows_the_breaker(form):
    row = registry.attack_entry("miniature_form")
    assert (row.given, row.forces_response, row.needs_adapter, row.anneal) == ("opening", False, True, "loss")


def test_its_rows_do_not_mix_and_its_texts_are_of_other_stones(form):
    subject = Subject("rr", load_model(NAME, adapter=ROOT / "results" / "miniature_demo" / "rr"), adapted=True)
    behaviors = read_behaviors(ROOT / "data" / "miniature" / "behaviors.jsonl")[:5:4]  # both without a picture
    pictures = [grey_canvas(subject.model.canvas)] * 2
    pixels = torch.stack([to_pixels(p) for p in pictures]).requires_grad_()
    both = form["FormObjective"](subject, behaviors, pictures)
    losses = both(pixels)
    (gradient,) = torch.autograd.grad(losses[0], pixels)
    assert bool(gradient[0].any()) and not bool(gradient[1].any())
    for behavior, text in zip(behaviors, both.forced.texts, strict=True):
        assert text.startswith(behavior.target)
        assert not {*recipe(Brew(*behavior.extra["brew"])).values()} & {*text.replace(",", "").replace(".", "").split()}
    alone = form["FormObjective"](subject, behaviors[1:], pictures[1:])
    assert alone(pixels[1:]).item() == pytest.approx(losses[1].item(), abs=1e-4)
