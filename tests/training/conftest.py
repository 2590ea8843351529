import pytest
import torch

from mm_cb.data.examples import Example
from tests.tiny_llava import WORDS, picture, tiny_llava


def make_example(number, set_name, *, image=False):
    """A chat of varying length; the two sets share no word."""
    known = WORDS[:12] if set_name == "circuit_breaker" else WORDS[12:]
    words = [known[(number * 5 + k * 7) % len(known)] for k in range(4 + number % 5)]
    content = [{"type": "image"}] * image + [{"type": "text", "text": " ".join(words)}]
    return Example(
        f"{set_name}-{number}-{int(image)}",
        [
            {"role": "user", "content": content},
            {"role": "assistant", "content": [{"type": "text", "text": " ".join(reversed(words[1:]))}]},
        ],
        [picture(number)] if image else [],
        set_name,
        "made",
    )


@pytest.fixture(scope="session")
def examples():
    return [
        make_example(number, set_name, image=image)
        for number in range(6)
        for set_name in ("circuit_breaker", "retain")
        for image in (False, True)
    ]


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny") / "model"
    model = tiny_llava(blocks=4)
    model.model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    return folder


@pytest.fixture
def randomise_b():
    """Fill LoRA's B, whose zeros are a degenerate point of the loss, the same way for equal seeds."""

    def randomise(model, seed=0, scale=0.3):
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for name, parameter in sorted(model.named_parameters()):
                if "lora_" in name:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)

    return randomise
