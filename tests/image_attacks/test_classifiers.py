import pytest
import torch

from image_attacks import L2, apgd, cross_entropy, dlr, margin, pgd
from tests.image_attacks.networks import classifier, held_out


@pytest.fixture
def logits(generator):
    return torch.randn(50, 6, generator=generator)


@pytest.fixture
def labels(generator):
    return torch.randint(0, 6, (50,), generator=generator)


def test_margin_is_negative_exactly_where_the_attack_succeeded(logits, labels):
    assert torch.equal(margin(logits, labels) < 0, logits.argmax(1) != labels)
    targets = (labels + 1) % 6
    assert torch.equal(margin(logits, labels, targets) < 0, logits.argmax(1) == targets)
    assert margin(torch.tensor([[1.0, 4.0, 2.0]]), torch.tensor([1])).item() == 2


def test_dlr_has_the_margins_sign_and_ignores_scale_and_shift(logits, labels):
    value = dlr(logits, labels)
    assert torch.equal(value.sign(), margin(logits, labels).sign())
    torch.testing.assert_close(dlr(100 * logits + 7, labels), value, atol=1e-4, rtol=1e-4)
    targets = (labels + 1) % 6
    torch.testing.assert_close(
        dlr(100 * logits + 7, labels, targets), dlr(logits, labels, targets), atol=1e-4, rtol=1e-3
    )
    row = torch.tensor([[4.0, 3.0, 1.0, 0.0]])
    assert dlr(row, torch.tensor([0])).item() == pytest.approx((4 - 3) / (4 - 1))
    assert dlr(row, torch.tensor([0]), torch.tensor([2])).item() == pytest.approx((4 - 1) / (4 - (1 + 0) / 2))


def test_cross_entropy_is_minimised_in_both_senses(logits, labels):
    targets = (labels + 1) % 6
    better = logits + 3 * torch.nn.functional.one_hot(targets, 6)
    assert (cross_entropy(better, labels, targets) < cross_entropy(logits, labels, targets)).all()
    assert (cross_entropy(better, labels) < cross_entropy(logits, labels)).all()
    assert cross_entropy(logits.bfloat16(), labels).dtype == torch.float32


@pytest.mark.parametrize("scale", [1, 10])  # from 12 on float64 itself has none left
@pytest.mark.parametrize("targeted", [False, True])
def test_cross_entropy_of_a_sure_class_has_the_value_and_the_direction_of_exact_arithmetic(
    logits, labels, scale, targeted
):
    targets = labels if targeted else None
    sure = (scale * (logits + 2 * torch.nn.functional.one_hot(labels, 6))).requires_grad_()
    exact = sure.detach().double().requires_grad_()
    wanted = torch.nn.functional.cross_entropy(exact, labels, reduction="none") * (1 if targeted else -1)
    found = cross_entropy(sure, labels, targets)
    torch.testing.assert_close(found.double(), wanted, rtol=1e-4, atol=1e-9)
    (gradient,), (reference,) = torch.autograd.grad(found.sum(), sure), torch.autograd.grad(wanted.sum(), exact)
    alike = torch.nn.functional.cosine_similarity(gradient.double() * 1e30, reference * 1e30, dim=1)
    assert (alike > 0.999).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: margin(torch.zeros(2, 1), torch.zeros(2).long()), "K >= 2"),
        (lambda: dlr(torch.zeros(2, 2), torch.zeros(2).long()), "K >= 3"),
        (lambda: dlr(torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(2).long()), "K >= 4"),
        (lambda: cross_entropy(torch.zeros(2, 3), torch.zeros(3).long()), "`labels`"),
        (lambda: margin(torch.zeros(2, 3), torch.zeros(2).long(), torch.zeros(3).long()), "`targets`"),
        *(
            (lambda loss=loss, bad=bad: loss(torch.zeros(2, 4), *bad), message)
            for loss in (cross_entropy, margin, dlr)
            for bad, message in (
                (
                    [torch.tensor([3, 4])],
                    "`labels` must lie in 0 to 3, as the logits have 4 classes; got 4, and 1 such",
                ),
                ([torch.tensor([3, -1])], "`labels` must lie in 0 to 3, .* got -1"),
                ([torch.tensor([-100, -100])], "`labels` must lie in 0 to 3, .* got -100, and 2 such"),
                ([torch.tensor([3, 1]), torch.tensor([0, 9])], "`targets` must lie in 0 to 3, .* got 9"),
                (
                    [torch.tensor([3.0, 1.0])],
                    "`labels` must be a tensor of whole numbers .* got a Tensor of torch.float",
                ),
                ([torch.tensor([True, False])], "`labels` must be a tensor of whole numbers .* torch.bool"),
                ([[3, 1]], "`labels` must be a tensor of whole numbers .* got a list"),
                ([torch.tensor([3, 1]), [0, 1]], "`targets` must be a tensor of whole numbers .* got a list"),
            )
        ),
    ],
)
def test_shapes_types_and_values_are_checked(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("lead", [-1e4, -200.0, -61.0, -50.0, -17.0, -1.0, 0.0, 1.0, 30.0, 89.0, 400.0, 1e4])
def test_cross_entropy_is_right_for_every_lead_and_its_direction_never_vanishes(lead):
    logits = torch.tensor([[0.0, lead, -1e6]], requires_grad=True)
    exact = logits.detach().double().requires_grad_()
    for targets in (None, torch.tensor([0])):
        found = cross_entropy(logits, torch.tensor([0]), targets)
        expected = torch.nn.functional.softplus(exact[:, 1] - exact[:, 0], threshold=700)
        expected = expected if targets is not None else -expected
        (slope,) = torch.autograd.grad(found.sum(), logits)
        (wanted,) = torch.autograd.grad(expected.sum(), exact)
        assert torch.allclose(found.double(), expected, rtol=1e-5, atol=1e-21)
        assert torch.allclose(slope.double(), wanted, rtol=1e-4, atol=1e-25)
        assert bool((slope[0, :2] != 0).all()) and float(slope[0, 0]) == -float(slope[0, 1])


@pytest.mark.parametrize("attack", [pgd, apgd], ids=["pgd", "apgd"])
@pytest.mark.parametrize("seed", [0, 1])
def test_an_l2_attack_does_as_much_to_logits_times_ten(attack, seed):
    network = classifier(seed, epochs=20)
    images, labels = held_out(network, 120)

    def robust(scale):
        found = attack(
            lambda pixels: cross_entropy(scale * network(pixels), labels), images, threat_model=L2(1.0), steps=60
        )
        return float((network(found.images).argmax(1) == labels).float().mean())

    assert robust(1) < 0.1 and robust(10) <= robust(1) + 0.01
