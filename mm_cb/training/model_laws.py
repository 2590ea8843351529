"""The laws of a model family on the weights that a user has: what training and attacks rest on, asked of this model.

A family is shown to keep them on small random models. A published checkpoint may bring another chat template, other
processor files or another version of its code; where it breaks a law, no number of an attack on it means anything.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mm_cb.core.errors import UserError, one_line
from mm_cb.models import ModelInputs, VisionModel, load_model
from mm_cb.models.chat import Message, chat
from mm_cb.training.hidden_states import lay_out, reference_states, use_row_attention

_NEAR = {torch.float32: 2e-5, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Largest difference of two ways to the same numbers, see `_apart`, by the model's type.

Rounding alone was up to 9e-6, 1.6e-2 and 2.1e-3 on random models of 32 blocks, on a CPU, and 0 for logits; through 60
random recurrent blocks 6e-5, 2.5e-2 and 1.5e-2. Row attention that sees other rows makes 0.2 and more, places of text
for those of pictures 0.2 and more, token types left out 0.1 and more.
"""
_KEPT = 8
"""Last tokens whose logits are compared: those of all would take gigabytes."""
_SIZES = ((64, 96), (200, 120), (97, 331))
"""Height and width of the pictures."""


class Kept(NamedTuple):
    """What came of a law.

    Attributes:
        law: What it says.
        ok: Whether the model keeps it.
        detail: What was seen.
    """

    law: str
    ok: bool
    detail: str


def ask(name: str) -> list[Kept]:
    """Load a model, on a GPU in bfloat16 if there is one, and ask every law of it.

    Raises:
        UserError: If it cannot be loaded here, or sees nothing.
    """
    device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else ("cpu", "float32")
    model = load_model(name, device=device, dtype=dtype)
    if not isinstance(model, VisionModel):
        raise UserError(f"`{name}` must be a model that sees, it is one of text alone: the laws are about pictures.")
    return check_model(model)


def check_model(model: VisionModel) -> list[Kept]:
    """Ask every law of a whole model with its processor; about a minute for 7B on a GPU.

    Returns:
        One result a law, in order; a law that fails with an error is broken, and its detail is that error.
    """
    return [_asked(law, model) for law in _LAWS]


def refuse_broken(model: VisionModel) -> None:
    """Ask what an attack rests on: tokens, logits, the end of a turn. Its own pixels are compared as it begins.

    Raises:
        UserError: If one is broken.
    """
    for kept in (_asked(law, model) for law in (_token_ids, _end_of_turn, _forward)):
        if not kept.ok:
            raise UserError(
                f"`{model.name}` breaks a law of its family ({kept.law[0].lower()}{kept.law[1:]}): {kept.detail}; no "
                f"number of an attack on it would mean anything. See `mm-cb doctor --model {model.name} --laws`."
            )


def _asked(law: Callable[[VisionModel], tuple[bool, str]], model: VisionModel) -> Kept:
    says = " ".join((law.__doc__ or "").split()).rstrip(".")
    try:
        with torch.no_grad():
            ok, detail = law(model)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a library makes of it, this model cannot be relied on
        told = str(error).rstrip(".") if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
        return Kept(says, False, one_line(told)[:300])
    return Kept(says, ok, detail)


def _token_ids(model: VisionModel) -> tuple[bool, str]:
    """Token ids and pixels are those of the model's own processor."""
    tokens = 0
    for messages, pictures in zip(*_chats(), strict=True):
        ours, own = model.encode_chats([messages], [pictures]), _by_the_processor(model, messages, pictures)
        tokens += ours.input_ids.numel()
        if not torch.equal(ours.input_ids.cpu(), own["input_ids"]):
            return False, f"other ids for a chat with {len(pictures)} pictures"
        given = {name: value.cpu() for name, value in model.picture_arguments(ours).items()}
        unlike = [name for name, value in given.items() if not torch.equal(value, own[name].to(value.dtype))]
        if unlike:
            return False, f"other {', '.join(unlike)} for a chat with {len(pictures)} pictures"
    return True, f"{tokens:,} tokens of 3 chats"


def _exact_pixels(model: VisionModel) -> tuple[bool, str]:
    """What an attack shows the model is, to the last bit, what the processor makes of the saved picture."""
    for number, size in enumerate(_SIZES):
        picture = _picture(number, size)
        pixels = torch.from_numpy(np.array(picture, dtype=np.float32)).permute(2, 0, 1).unsqueeze(0) / 255
        with torch.enable_grad():
            shown = model.preprocessing(size)(pixels.requires_grad_())
            (slope,) = torch.autograd.grad(shown.sum(), pixels)
        encoded = model.encode(["a"], [picture]).pixel_values
        if encoded is None or not torch.equal(shown.detach(), encoded.cpu()):
            return False, f"other pixels for a picture of {size[1]} x {size[0]}"
        if not bool(slope.any()):
            return False, f"no gradient reaches a picture of {size[1]} x {size[0]}"
    return True, f"pictures of {', '.join(f'{width} x {height}' for height, width in _SIZES)}"


def _forward(model: VisionModel) -> tuple[bool, str]:
    """Logits are the model's own on its processor's inputs, and the same with the image tower run beforehand."""
    apart = []
    for messages, pictures in zip(*_chats(), strict=True):
        own = {name: value.to(model.device) for name, value in _by_the_processor(model, messages, pictures).items()}
        if "pixel_values" in own:
            own["pixel_values"] = own["pixel_values"].to(model.base.dtype)
        inputs = model.encode_chats([messages], [pictures])
        seen = model.forward(inputs, logits_to_keep=_KEPT, hidden_states=True)
        last = max(k for k, state in enumerate(seen.hidden_states) if state.shape[1] == inputs.input_ids.shape[1])
        told = {"logits_to_keep": _KEPT, "use_cache": False, "output_hidden_states": True}
        for other in (model.model(**own, **told), model.model(**model.embed(inputs), **told)):
            apart.append(_apart(seen.logits, other.logits))
            if pictures:  # what goes wrong with their tokens may hardly reach the last ones
                apart.append(_apart(*(one.hidden_states[last][inputs.image_mask] for one in (seen, other))))
    return _near(model, apart)


def _packed(model: VisionModel) -> tuple[bool, str]:
    """Hidden states of three rows laid end to end are those of the padded batch."""
    batch = _answered(model)
    real, count = batch.attention_mask.bool(), len(model.decoder_blocks)
    padded = model.forward(batch, hidden_states=True).hidden_states
    with _row_attention(model):
        packed = reference_states(model, lay_out(model, batch, batch.attention_mask), 0, range(1, count + 1))
    return _near(model, [_apart(one, padded[k][real]) for k, one in enumerate(packed, 1)])


def _end_of_turn(model: VisionModel) -> tuple[bool, str]:
    """An answer ends in a token at which generation stops, and begins where the model goes on."""
    inputs = model.encode(["What is it?"], [None], completions=["It is red."])
    last = int(inputs.input_ids[inputs.completion_mask.bool()][-1])
    name = model.processor.tokenizer.convert_ids_to_tokens(last)
    ended = last in model.stops()
    if model.end_of_turn is not None and not ended:
        return False, f"it ends in `{name}`, at which generation does not stop"
    asked, answered = (  # as attacks write it
        model.prompt("What is it?", has_image=True, completion=said, close_turn=False) for said in (None, "It is red.")
    )
    if not answered[len(asked) :].lstrip().startswith("It is red.") or not answered.startswith(asked):
        return False, f"a prompt ends in {asked[-40:]!r}, a chat with an answer goes {answered[-60:]!r}"
    return True, f"`{name}`" if ended else "no token ends an answer in this template"


_LAWS = (_token_ids, _exact_pixels, _forward, _packed, _end_of_turn)


def _chats() -> tuple[list[list[Message]], list[list[Image.Image]]]:
    """Chats with one, no and two pictures, and the pictures of each."""
    content = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "Which one is larger?"}]
    chats = [chat("What is this?", images=1), chat("Say hello."), [{"role": "user", "content": content}]]
    return chats, [[_picture(0, _SIZES[0])], [], [_picture(1, _SIZES[1]), _picture(2, _SIZES[0])]]


def _answered(model: VisionModel) -> ModelInputs:
    chats, pictures = _chats()
    answers = ("It is a square.", "Hello!", "The second.")
    said = [[*one, chat("", completion=text)[1]] for one, text in zip(chats, answers, strict=True)]
    return model.encode_chats(said, pictures)


def _picture(number: int, size: tuple[int, int]) -> Image.Image:
    """Noise with a gradient over it, the same on every machine."""
    generator = torch.Generator().manual_seed(number)
    levels = torch.randint(0, 128, (*size, 3), generator=generator) + torch.arange(size[1]).view(1, -1, 1) % 128
    return Image.frombytes("RGB", (size[1], size[0]), bytes(levels.to(torch.uint8).flatten().tolist()))


def _by_the_processor(model: VisionModel, messages: Sequence[Message], pictures: list[Image.Image]) -> Any:
    """The processor's own inputs for a chat that ends where the model goes on."""
    processor = model.processor
    text = processor.apply_chat_template(
        list(messages), tokenize=False, add_generation_prompt=True, **model.template_settings
    )
    begun = bool(processor.tokenizer.bos_token) and text.startswith(processor.tokenizer.bos_token)
    given: Any = [pictures] if model.nested and pictures else pictures or None
    return processor(text=[text], images=given, return_tensors="pt", add_special_tokens=not begun)


def _apart(one: Tensor, other: Tensor) -> float:
    """How far two ways to the states of some tokens ``(..., H)`` are apart; NaN if one is.

    The mean over tokens of the length of the difference as a share of the state's. The largest entry of all would be no
    measure: in trained models a few tokens have entries a thousand times those of the others (Sun et al. 2024,
    massive activations).
    """
    lengths = torch.linalg.vector_norm(other.float(), dim=-1).clamp(min=1e-6)
    return float((torch.linalg.vector_norm(one.float() - other.float(), dim=-1) / lengths).mean())


def _near(model: VisionModel, apart: Sequence[float]) -> tuple[bool, str]:
    limit = _NEAR.get(model.base.dtype, _NEAR[torch.float32])
    worst = float(torch.tensor(apart).max())  # which keeps NaN
    return worst <= limit, f"{worst:.1e} of their length apart, at most {limit:.0e}"


@contextmanager
def _row_attention(model: VisionModel) -> Iterator[None]:
    """Attention within rows, as in training; put back afterwards."""
    config = model.tower.config
    held = config._attn_implementation
    use_row_attention(model)
    try:
        yield
    finally:
        config._attn_implementation = held
