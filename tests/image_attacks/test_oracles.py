"""Parity with independent implementations, and strength against them.

The full sweep is ``scripts/benchmarks/strength.py``, its result ``results/attack_strength.json``.
"""

import json
import runpy
from pathlib import Path

import pytest
import torch

from image_attacks import L2, Linf, Patch, apgd, cross_entropy, pgd

from .networks import classifier, held_out
from .oracles import art_attack, foolbox_attack

EPSILON, STEPS = 8 / 255, 10
TEXTBOOK = {"steps": STEPS, "step_size": EPSILON / 4, "keep": "last"}


@pytest.fixture(params=[0.0, 16 / 255], ids=["standard", "adversarial"])
def attacked(request):
    network = classifier(0, request.param, epochs=3)
    images, labels = held_out(network, 20)
    return network, images, labels


def objective(network, labels):
    return lambda pixels: cross_entropy(network(pixels), labels)


def test_textbook_linf_equals_foolbox_and_art(attacked):
    network, images, labels = attacked
    ours = pgd(objective(network, labels), images, threat_model=Linf(EPSILON), **TEXTBOOK).images
    options = {"steps": STEPS, "abs_stepsize": EPSILON / 4, "random_start": False}
    theirs = foolbox_attack("LinfPGD", network, images, labels, EPSILON, **options)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    options = {"eps": EPSILON, "eps_step": EPSILON / 4, "max_iter": STEPS, "num_random_init": 0}
    theirs = art_attack("ProjectedGradientDescentPyTorch", network, images, labels, **options)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert (ours - images).abs().amax() > EPSILON / 2


def test_textbook_l2_equals_foolbox_and_art_inside_the_box(attacked):
    """Away from the box their projection (ball, then box) is the exact one too."""
    network, images, labels = attacked
    images = (0.3 + 0.4 * images) * 255
    images, epsilon = images.round() / 255, 0.25
    ours = pgd(
        objective(network, labels), images, threat_model=L2(epsilon), steps=STEPS, step_size=epsilon / 4, keep="last"
    ).images
    options = {"steps": STEPS, "abs_stepsize": epsilon / 4, "random_start": False}
    theirs = foolbox_attack("L2PGD", network, images, labels, epsilon, **options)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    options = {"norm": 2, "eps": epsilon, "eps_step": epsilon / 4, "max_iter": STEPS, "num_random_init": 0}
    theirs = art_attack("ProjectedGradientDescentPyTorch", network, images, labels, **options)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert ((ours - images).flatten(1).norm(dim=1) > 0.9 * epsilon).all()


def test_fgsm_equals_foolbox(attacked):
    network, images, labels = attacked
    options = {"threat_model": Linf(EPSILON), "steps": 1, "step_size": EPSILON, "keep": "last"}
    ours = pgd(objective(network, labels), images, **options).images
    theirs = foolbox_attack("FGSM", network, images, labels, EPSILON, random_start=False)
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


class Pasted(torch.nn.Module):
    """A network as a function of the picture's upper left corner alone."""

    def __init__(self, network, images):
        super().__init__()
        self.network, self.images = network, images

    def forward(self, corner):
        """Paste the corner and classify."""
        height, width = corner.shape[-2:]
        below = self.images[..., height:, :width]
        return self.network(torch.cat([torch.cat([corner, below], dim=-2), self.images[..., width:]], dim=-1))


def test_a_patch_equals_foolbox_on_the_network_of_the_patch_alone(attacked):
    network, images, labels = attacked
    side, epsilon = images.shape[-1] // 2, 0.25
    patch = Patch.rectangle(tuple(images.shape[-2:]), (0, 0), (side, side), within=Linf(epsilon))
    options = {"steps": STEPS, "step_size": epsilon / 4, "keep": "last"}
    ours = pgd(objective(network, labels), images, threat_model=patch, **options).images
    pasted, corner = Pasted(network, images).eval(), images[..., :side, :side].contiguous()
    options = {"steps": STEPS, "abs_stepsize": epsilon / 4, "random_start": False}
    theirs = foolbox_attack("LinfPGD", pasted, corner, labels, epsilon, **options)
    torch.testing.assert_close(ours[..., :side, :side], theirs, atol=1e-6, rtol=0)
    assert torch.equal(ours[..., side:, :], images[..., side:, :]) and (theirs - corner).abs().amax() > epsilon / 2


@pytest.mark.parametrize("attack", [pgd, apgd])
def test_defaults_are_as_strong_as_the_best_oracle(attacked, attack):
    network, images, labels = attacked
    loss, epsilon, steps = objective(network, labels), 16 / 255, 20
    theirs = [
        foolbox_attack("LinfPGD", network, images, labels, epsilon, steps=steps, rel_stepsize=share)
        for share in (0.1, 0.33)
    ]
    options = {"eps": epsilon, "max_iter": steps, "nb_random_init": 1, "loss_type": "cross_entropy"}
    theirs.append(art_attack("AutoProjectedGradientDescent", network, images, labels, eps_step=2 * epsilon, **options))
    ours = attack(loss, images, threat_model=Linf(epsilon), steps=steps)
    best = max(-loss(pixels).mean() for pixels in theirs)
    robust = min((network(pixels).argmax(1) == labels).float().mean() for pixels in theirs)
    assert -ours.losses.mean() >= 0.99 * best
    assert (network(ours.images).argmax(1) == labels).float().mean() <= robust + 1e-6


RESULT = Path(__file__).resolve().parents[2] / "results" / "attack_strength.json"


def test_the_committed_sweep_covers_models_budgets_and_seeds():
    sweep = json.loads(RESULT.read_text(encoding="utf-8"))
    cells = sweep["cells"]
    assert {cell["training"] for cell in cells} == {"standard", "adversarial"}
    assert len({cell["seed"] for cell in cells}) >= 3 and len({cell["epsilon_255"] for cell in cells}) >= 3
    assert all({"ours", "foolbox", "art", "apgd"} <= {name.split(":")[0] for name in cell["attacks"]} for cell in cells)


def test_the_sweep_judges_what_the_command_line_steps_by_where_it_can_run(monkeypatch):
    sweep = runpy.run_path(str(RESULT.parents[1] / "scripts" / "benchmarks" / "strength.py"))
    network = classifier(0, 0.0, epochs=1)
    images, labels = held_out(network, 4)
    monkeypatch.setitem(sweep["attack_all"].__globals__, "oracles", lambda *_: {"foolbox:none": lambda number: images})
    ran = [sweep["attack_all"](network, images, labels, norm, EPSILON, 2, 1) for norm in ("linf", "l2")]
    by_adam = {"ours:adam_pgd", "ours:adam_pgd, random starts"}
    assert ran[0].keys() - ran[1].keys() == by_adam  # an l-2 ball is refused
    summary = sweep["summarise"]([{"attacks": found} for found in ran])
    assert {name: judged["cells"] for name, judged in summary.items()} == {
        name: 1 if name in by_adam else 2 for name in sweep["OURS"]
    }
    weak = ran[0] | {"ours:adam_pgd": {"cross_entropy": 0.0, "robust_accuracy": 100.0}}
    assert not sweep["summarise"]([{"attacks": weak}])["ours:adam_pgd"]["goal_met"]
