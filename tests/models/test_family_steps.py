"""What a step of training and of an attack computes, in every family: no more than in LLaVA-NeXT."""

import pytest
import torch

from mm_cb.attacks.objectives.target import TargetObjective
from mm_cb.training.hidden_states import hidden_states, lay_out
from mm_cb.training.planning.flops import FlopCount
from tests.models import laws
from tests.models.tiny import KINDS, tiny

SHARES = {
    "gemma3": (0.94, 2.06),
    "gemma4": (0.93, 3.15),
    "idefics3": (0.82, 2.15),
    "internvl": (0.94, 2.04),
    "llava": (0.91, 1.87),
    "llava_next": (0.78, 1.94),
    "llava_onevision": (1.08, 2.08),
    "mistral3": (0.91, 2.16),
    "pixtral": (0.77, 2.22),
    "qwen2_5_vl": (0.97, 2.09),
    "qwen2_vl": (0.97, 2.08),
    "qwen3_5": (0.81, 2.37),
    "qwen3_vl": (0.94, 2.05),
    "smolvlm": (0.82, 2.15),
}
"""FLOPs of a step on hidden states (two of the tiny models' blocks, the upper one adapted) and of an attack's, as
shares of the whole model's forward pass on the same rows. A linear layer's backward pass counts once, attention's 2.5
times: most of the tiny Gemma 4 is the attention of 2520 padded patches. What is
not here lies between these."""


def fits(found, kind, place):
    """Whether a share is the family's."""
    known = [SHARES[kind][place]] if kind in SHARES else [share[place] for share in SHARES.values()]
    return 0.98 * min(known) <= found <= 1.02 * max(known)


def test_a_family_without_shares_lies_between_the_others():
    assert fits(1.0, "new", 0) and not fits(1.5, "new", 0) and not fits(1.5, "new", 1)


class Counted:
    """A model with an adapter; how often its image tower ran, and tokens through each block."""

    def __init__(self, kind):
        plain = tiny(kind)
        tower = plain.base.get_submodule(f"model.{plain.full_precision[0]}")
        self.model = laws.with_adapter(plain)[0]
        tower.register_forward_hook(lambda *_: setattr(self, "seen", self.seen + 1))
        for index, block in enumerate(self.model.decoder_blocks):
            block.register_forward_hook(lambda _, args, out, index=index: self.ran(index, out))
        self.restart()

    def restart(self):
        self.seen, self.tokens = 0, [0] * len(self.model.decoder_blocks)

    def ran(self, index, out):
        self.tokens[index] += out.numel() // out.shape[-1]

    def flops(self, step):
        self.restart()
        with FlopCount() as count:
            step()
        return count.total


@pytest.fixture(params=KINDS)
def counted(request):
    return Counted(request.param), request.param


def test_a_training_step_sees_once_and_runs_adapted_blocks_twice_and_none_above(counted):
    of, kind = counted
    inputs = of.model.encode_chats(laws.CHATS, [laws.pictures_of(chat) for chat in laws.CHATS])
    with torch.no_grad():
        whole = of.flops(lambda: of.model.forward(inputs))

    def step(mask=inputs.attention_mask):
        rows = lay_out(of.model, inputs, mask)
        hidden_states(of.model, rows, laws.FIRST, laws.TARGET).adapted[-1].sum().backward()

    last_of_each = inputs.attention_mask * (inputs.attention_mask.cumsum(-1) == inputs.attention_mask.sum(-1)[:, None])
    with FlopCount() as fewer:
        step(last_of_each)
    most = of.flops(step)
    assert fits(most / whole, kind, 0) and fewer.total < 0.98 * most  # Gemma 4's image tower is most
    real = int(inputs.attention_mask.sum())
    assert of.seen == 1 and of.tokens == [real, 2 * real, *[0] * (len(of.tokens) - 2)]


def test_an_attack_step_sees_once_and_runs_every_block_once_without_a_gradient_of_weights(counted):
    of, kind = counted
    objective = TargetObjective(laws.subject_of(of.model), laws.BEHAVIORS, laws.SHOWN)
    pixels = torch.stack([laws.as_pixels(one) for one in laws.SHOWN]).requires_grad_()
    with torch.no_grad():
        whole = of.flops(lambda: of.model.forward(objective.inputs, logits_to_keep=objective.keep))
    resized = of.flops(lambda: torch.autograd.grad(objective.preprocess(pixels).sum(), pixels))
    step = of.flops(lambda: torch.autograd.grad(objective(pixels).sum(), pixels))
    assert fits((step - resized) / whole, kind, 1)
    most = objective.read.input_ids.numel()
    assert of.seen == 1 and of.tokens[0] == most and max(of.tokens) == most
