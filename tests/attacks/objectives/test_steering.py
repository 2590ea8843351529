from pathlib import Path

import pytest
import torch

from mm_cb.attacks.objectives.steering import RADIUS, SteeringObjective
from mm_cb.attacks.objectives.target import TargetObjective, encode
from mm_cb.attacks.saved import to_pixels
from mm_cb.data.behaviors_file import Behavior, grey_canvas, read_behaviors
from mm_cb.inference.subjects import Subject
from mm_cb.miniature import NAME
from mm_cb.models import load_model
from tests.models.conftest import save_text_model

ROOT = Path(__file__).resolve().parents[3]
SEEN = read_behaviors(ROOT / "data" / "miniature" / "behaviors.jsonl")[:5:4]  # both without a picture
READ = [Behavior("a", "how to brew tea", "it is a circle", None), Behavior("b", "what is red", "no", None)]


@pytest.fixture(scope="module", params=["miniature", "llama", "gpt2"])
def asked(request, tmp_path_factory):
    """A subject, requests and pictures."""
    if request.param == "miniature":
        subject = Subject("rr", load_model(NAME, adapter=ROOT / "results" / "miniature_demo" / "rr"), adapted=True)
        return subject, SEEN, [grey_canvas(subject.model.canvas)] * 2
    folder = save_text_model(tmp_path_factory.mktemp("steering") / request.param, request.param)
    return Subject("base", load_model(folder)), READ, [None, None]


@pytest.fixture(scope="module")
def steered(asked):
    return SteeringObjective(*asked)


def test_where_nothing_is_moved_it_is_the_plain_model(asked, steered):
    subject, behaviors, pictures = asked
    with torch.no_grad():
        found = steered(steered.start())
        if pictures[0] is not None:
            plain = TargetObjective(subject, behaviors, pictures)(torch.stack([to_pixels(one) for one in pictures]))
            assert torch.allclose(found, plain, atol=1e-4)
    with subject.active() as model:
        said = model.generate(encode(subject, behaviors, pictures, None), 6)
    assert steered.answers(steered.start(), 6) == said


def test_a_blocks_states_move_by_the_way_to_the_opening_and_no_farther(asked, steered):
    subject, _, _ = asked
    blocks, first = subject.model.decoder_blocks, steered._blocks[0]
    heard = []
    hook = blocks[first + 1].register_forward_pre_hook(lambda module, given: heard.append(given[0]))
    whole = steered.start()
    whole[1, 0, 0, 0] = 1.0
    try:
        with torch.no_grad(), subject.active() as model:
            model.forward(steered.inputs)
            with steered._moved(whole):
                model.forward(steered.inputs)
            model.forward(steered.inputs)
    finally:
        hook.remove()
    before, moved, again = heard
    assert torch.equal(before, again) and torch.equal(before[0], moved[0])
    way = (moved - before)[1].norm(dim=-1)
    assert torch.allclose(way, RADIUS * before[1, -1].norm().expand_as(way), rtol=1e-3)


def test_rows_do_not_mix_and_steps_lower_the_loss(asked, steered):
    subject, behaviors, pictures = asked
    variable = steered.start().requires_grad_()
    losses = steered(variable)
    (gradient,) = torch.autograd.grad(losses[1], variable)
    assert not bool(gradient[0].any()) and bool(gradient[1].any())
    alone = SteeringObjective(subject, behaviors[1:], pictures[1:])
    some = torch.linspace(0.2, 0.9, variable.numel()).view_as(variable)
    with torch.no_grad():
        assert float(alone(some[1:])) == pytest.approx(float(steered(some)[1]), abs=1e-3)
        assert float(steered(variable - 1e-3 * gradient.sign())[1]) < float(losses[1])
