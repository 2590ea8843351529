"""What must hold of every model family that sees; `LAWS` are run over families, image backends, and the docs' example.

Each law takes a function that builds the same random model anew, and a folder to write into.
"""

import json
from dataclasses import replace
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from transformers import GenerationConfig

from image_attacks import Linf, load_png, pgd, save_png, target_nll
from mm_cb.attacks.objectives.adaptive import MatchingObjective
from mm_cb.attacks.objectives.embedding import EmbeddingObjective
from mm_cb.attacks.objectives.target import TargetObjective
from mm_cb.core.errors import UserError
from mm_cb.data.behaviors_file import Behavior
from mm_cb.data.examples import Example
from mm_cb.inference.subjects import Subject
from mm_cb.models import TokenRole, load_model, load_tower
from mm_cb.models.chat import render_chat
from mm_cb.models.decoding import decode_ids
from mm_cb.models.last_positions import only_last_positions
from mm_cb.models.merging import merge
from mm_cb.models.shared_prefix import SharedPrefixTargets
from mm_cb.models.vision import detached, joined
from mm_cb.training.adapter import add_adapter, save_adapter
from mm_cb.training.hidden_states import hidden_states, lay_out, use_row_attention
from mm_cb.training.lending import lent
from mm_cb.training.placement import check_targets, linear_names, lora_paths
from mm_cb.training.recipes.recipe import load_recipe
from mm_cb.training.recompute import recompute_blocks
from mm_cb.training.run import train
from tests.tiny_llava import picture

SIZES = [(84, 42), (42, 84), (61, 137), (150, 31), (20, 30), (300, 41), (56, 56), (33, 250), (121, 337)]
"""Width and height; both orders of Pillow's passes, larger and smaller than the model's own, extreme aspects."""

PROJECTIONS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
FIRST, TARGET = 1, 2
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


def user(*parts):
    """A user's turn; None stands for a picture."""
    content = [{"type": "image"} if part is None else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def answer(text):
    return {"role": "assistant", "content": [{"type": "text", "text": text}]}


CHATS = [
    [user(None, "what is")],
    [user("tell me how to brew a red tea please")],
    [user(None, "a red blue", None, "circle in the picture")],
]


def pictures_of(chat, seed=0):
    count = sum(part["type"] == "image" for message in chat for part in message["content"])
    return [picture(seed + i, [(84, 42), (70, 100)][i % 2]) for i in range(count)]


def by_the_processor(model, chat, pictures):
    """The processor's own inputs for one chat, which ends where the model goes on, or where its last answer does."""
    asked = {"tokenize": False, "add_generation_prompt": chat[-1]["role"] == "user", **model.template_settings}
    text = model.processor.apply_chat_template(chat, **asked)
    if chat[-1]["role"] != "user" and text.rstrip().endswith(model.dialect.end_of_turn):
        text = text.rstrip()  # blanks that a template writes behind the end are no part of a training row
    bos = model.processor.tokenizer.bos_token
    given = ([pictures] if model.nested else pictures) if pictures else None
    return model.processor(
        text=[text], images=given, return_tensors="pt", add_special_tokens=not (bos and text.startswith(bos))
    )


def ids_and_pixels_are_the_processors(make, folder):
    model = make()
    chats = [
        *CHATS,
        [user(None, " what is it "), answer("a red circle ")],
        [user("what"), answer("it \n"), user(None, "is"), answer("no"), user(None, " here ")],
        [user(None, "\twhat"), answer("it"), user(" tell me ", None, None, "how "), answer(" no")],
    ]
    for chat in chats:
        pictures = pictures_of(chat)
        ours, own = model.encode_chats([chat], [pictures]), by_the_processor(model, chat, pictures)
        assert torch.equal(ours.input_ids, own["input_ids"])
        asks = chat[-1]["role"] == "user"  # blanks too, which the tiny tokenizers drop
        written = model.processor.apply_chat_template(
            chat, tokenize=False, add_generation_prompt=asks, **model.dialect.settings
        )
        rendered = render_chat(model.processor, chat, dialect=model.dialect).text
        assert written.startswith(rendered) and not written[len(rendered) :].strip()
        given = model.picture_arguments(ours)
        assert ("pixel_values" in given) == bool(pictures)
        assert all(torch.equal(value, own[name].to(value.dtype)) for name, value in given.items())
    ids, words = ours.input_ids[0].tolist(), model.processor.tokenizer
    while not words.decode(ids[-1:]).strip():  # what a template writes behind an end
        ids.pop()
    marks = set(words.get_added_vocab().values())
    if ids[-1] in marks:  # the turn is ended, perhaps by more than what ends the answer
        end = words.convert_tokens_to_ids(model.dialect.end_of_turn)
        last = max(place for place, token in enumerate(ids) if token == end)
        assert ours.roles[0, last] == TokenRole.COMPLETION and marks.issuperset(ids[last:])
    completion = (ours.roles == TokenRole.COMPLETION)[0]
    said = model.processor.tokenizer.decode(ours.input_ids[0, completion])
    assert said.startswith("it") and "no" in said


def by_the_processor_at_once(model, chats, shown):
    """The processor's own inputs for a batch: lists of pictures, one a chat, or one list, as its family wants them."""
    asked = {"tokenize": False, "add_generation_prompt": True, **model.template_settings}
    texts = [model.processor.apply_chat_template(chat, **asked) for chat in chats]
    bos = model.processor.tokenizer.bos_token
    model.processor.tokenizer.padding_side = "left"
    return model.processor(
        text=texts,
        images=shown if model.nested else [image for row in shown for image in row],
        return_tensors="pt",
        padding=True,
        add_special_tokens=not (bos and texts[0].startswith(bos)),
    )


def shown_pixels(made, like):
    """All pictures that a processor made, in their order; some have a place for each that a chat could have had."""
    made = made if made.ndim == like.ndim else made.flatten(0, 1)
    return made[made.flatten(1).any(1)] if len(made) > len(like) else made


def every_chat_of_a_batch_has_its_own_pictures_in_order(make, folder):
    """Of one size, so that none is told from another by its tokens; two, none, three and one."""
    model = make()
    chats = [
        [user(None, "what is", None)],
        [user("tell me")],
        [user(None, "a red"), answer("it"), user(None, "blue", None, "circle")],
        [user("what is", None)],
    ]
    shown = [[picture(10 * i + k) for k in range(count)] for i, count in enumerate((2, 0, 3, 1))]
    batch = model.encode_chats(chats, shown)
    at_once = by_the_processor_at_once(model, chats, shown)
    assert torch.equal(batch.input_ids, at_once["input_ids"])
    assert torch.equal(batch.pixel_values, shown_pixels(at_once["pixel_values"], batch.pixel_values))
    for name, value in (batch.beside | model.token_arguments(batch)).items():
        assert torch.equal(value, at_once[name].to(value.dtype)), name
    with torch.no_grad():
        logits = model.forward(batch).logits
        for i, (chat, pictures) in enumerate(zip(chats, shown, strict=True)):
            own, real = by_the_processor(model, chat, pictures), batch.attention_mask[i].bool()
            assert torch.equal(batch.input_ids[i][real], own["input_ids"][0])
            torch.testing.assert_close(logits[i][real], model.model(**own, use_cache=False).logits[0], **CLOSE)


def a_target_stands_where_the_model_goes_on(make, folder):
    """A prompt and its continuation are the chat with that answer, but for blanks: no block is between them."""
    model = make()
    for image in (False, True):
        asked = model.prompt("what is", has_image=image)
        answered = model.prompt("what is", has_image=image, completion="it", close_turn=False)
        assert answered.startswith(asked) and answered[len(asked) :].strip() == "it"


def logits_are_those_of_the_processors_own_inputs(make, folder):
    model = make()
    for chat in CHATS:
        pictures = pictures_of(chat)
        own = by_the_processor(model, chat, pictures)
        with torch.no_grad():
            expected = model.model(**own, use_cache=False).logits
            assert torch.equal(model.forward(model.encode_chats([chat], [pictures])).logits, expected)


def attacked_pixels_are_the_processors(make, folder):
    model = make()
    for size in SIZES:
        shown = [picture(seed, size) for seed in range(2)]
        pixels = torch.stack([as_pixels(one) for one in shown]).requires_grad_()
        preprocess = model.preprocessing((size[1], size[0]))
        made = preprocess(pixels)
        encoded = model.encode(["what"] * 2, shown).pixel_values
        assert torch.equal(made, encoded) and preprocess.exact_by == "emulation", size
        weights = torch.randn(made.shape, generator=torch.Generator().manual_seed(0))
        (gradient,) = torch.autograd.grad((made * weights).sum(), pixels)
        (smooth,) = torch.autograd.grad((preprocess.surrogate(pixels) * weights).sum(), pixels)
        assert (gradient.sign() == smooth.sign()).float().mean() > 0.9 and bool(gradient.any()), size


def as_pixels(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255


SMALL = [(1, 1), (3, 3), (40, 40), (1, 201), (201, 1)]
"""Width and height of pictures that nobody means, and that stand in data sets."""


def shown_or_refused(model, size):
    """Why a picture of this size is refused, by training and by an attack, or two Nones: then both are exact."""
    shown, why = [picture(seed, size) for seed in range(2)], []
    chats = [[user(None, "what is"), answer("it")], CHATS[1]]

    def trained():
        inputs = model.encode_chats(chats, [shown[:1], []])
        alone, own = model.encode_chats(chats[:1], [shown[:1]]), by_the_processor(model, chats[0], shown[:1])
        assert torch.equal(alone.input_ids, own["input_ids"]), size
        assert all(torch.equal(value, own[name]) for name, value in model.picture_arguments(alone).items()), size
        states = hidden_states(model, lay_out(model, inputs, inputs.attention_mask), FIRST, TARGET).adapted[-1]
        states.square().sum().backward()
        assert bool(states.isfinite().all()), size

    def attacked():
        objective = TargetObjective(subject_of(model), BEHAVIORS, shown)
        clean = torch.stack([as_pixels(one) for one in shown])
        assert torch.equal(objective.preprocess(clean), model.encode(["what"] * 2, shown).pixel_values), size
        found = pgd(objective, clean, threat_model=Linf(32 / 255), steps=2)
        with torch.no_grad():
            assert bool((found.losses <= objective(clean)).all()) and bool(found.losses.isfinite().all()), size

    for run in (trained, attacked):
        try:
            run()
            why.append(None)
        except UserError as error:
            why.append(str(error))
    return why


def an_open_answer_begins_where_the_model_goes_on(make, folder):
    model = make()
    asked = model.encode(["what"], SHOWN[:1])
    opened = model.encode(["what"], SHOWN[:1], completions=["it"], close_turn=False)
    behind = (opened.roles == TokenRole.COMPLETION)[0]
    assert torch.equal(opened.input_ids[0, ~behind], asked.input_ids[0]) and bool(behind[-1])


def as_many_tokens_as_features(make, folder):
    model, most = make(), 0
    for size in [*SIZES, (400, 400)]:
        inputs = model.encode(["what"], [picture(0, size)])
        tokens = int(inputs.image_mask.sum())
        assert tokens == len(joined(model.image_features(inputs).pooler_output))
        most = max(most, tokens)
    assert most <= model.largest_picture() < 2 * most
    height, width = model.canvas
    assert model.encode(["what"], [picture(0, (width, height))]).image_mask.any()


def the_embed_path_is_the_pixel_path(make, folder):
    model = make()
    inputs = model.encode_chats(CHATS, [pictures_of(chat) for chat in CHATS])
    losses, slopes = [], []
    for run in (
        lambda pixels: model.forward(inputs, pixel_values=pixels).logits,
        lambda pixels: model.model(**model.embed(inputs, pixels), use_cache=False).logits,
    ):
        pixels = inputs.pixel_values.clone().requires_grad_()
        logits = run(pixels)
        losses.append(logits.detach())
        slopes.append(torch.autograd.grad(logits.log_softmax(-1).square().sum(), pixels)[0])
    assert torch.equal(*losses) and torch.equal(*slopes) and bool(slopes[0].any())
    cut = detached(model.embed(inputs, inputs.pixel_values.clone().requires_grad_()))
    assert not model.model(**cut, use_cache=False).logits.requires_grad


def rows_of_a_mixed_batch_are_single_rows(make, folder):
    model = make()
    shown = [pictures_of(chat, 5 * i) for i, chat in enumerate(CHATS)]
    for side in ("left", "right"):
        batch = model.encode_chats(CHATS, shown, padding_side=side)
        with torch.no_grad():
            logits = model.forward(batch).logits
            for i, chat in enumerate(CHATS):
                real = batch.attention_mask[i].bool()
                alone = model.forward(model.encode_chats([chat], [shown[i]])).logits[0]
                torch.testing.assert_close(logits[i][real], alone, **CLOSE)
                part = model.forward(batch.rows(i, i + 1)).logits[0]
                torch.testing.assert_close(part[real], logits[i][real], **CLOSE)
    said = model.generate(model.encode_chats(CHATS, shown), 4)
    assert said == [model.generate(model.encode_chats([c], [s]), 4)[0] for c, s in zip(CHATS, shown, strict=True)]


def packed_states_are_the_padded_ones(make, folder):
    plain, batch = make(), None
    model, _ = with_adapter(make())
    chats = [[*chat, answer(text)] for chat, text in zip(CHATS, ("it", "no i can not", "a square"), strict=True)]
    for side in ("left", "right"):
        batch = plain.encode_chats(chats, [pictures_of(chat, 3 * i) for i, chat in enumerate(chats)], padding_side=side)
        real = batch.attention_mask.bool()
        with torch.no_grad():
            off = plain.forward(batch, hidden_states=True).hidden_states
            on = model.forward(batch, hidden_states=True).hidden_states
            states = hidden_states(model, lay_out(model, batch, batch.attention_mask), FIRST, len(off) - 1)
        for k, (reference, adapted) in enumerate(zip(*states, strict=True), FIRST + 1):
            torch.testing.assert_close(reference, off[k][real], **CLOSE)
            torch.testing.assert_close(adapted, on[k][real], **CLOSE)
            assert not torch.allclose(reference, adapted, atol=1e-3)


def tokens_that_count_have_the_states_and_gradients_of_the_whole_top_block(make, folder):
    model, _ = with_adapter(make())
    chats = [[*chat, answer(text)] for chat, text in zip(CHATS, ("it", "no i can not", "a square"), strict=True)]
    batch = model.encode_chats(chats, [pictures_of(chat, 3 * i) for i, chat in enumerate(chats)])
    rows = lay_out(model, batch, batch.completion_mask)
    counted, weights = rows.mask.bool(), [weight for weight in model.model.parameters() if weight.requires_grad]
    plain = [(block, vars(block).get("forward")) for block in model.decoder_blocks]
    for last in (TARGET, len(model.decoder_blocks)):  # below the final norm, and behind it

        def found(part, last=last):
            states = hidden_states(model, part, FIRST, last)
            loss = torch.stack([state[counted].float().abs().log1p() for state in states.adapted]).sum()
            return states, torch.autograd.grad(loss, weights, allow_unused=True)

        whole, slopes = found(rows._replace(counted=None))
        for recompute in (False, True):
            if recompute:
                recompute_blocks(model)
            alone, own = found(rows)
            for block, forward in plain:
                vars(block).pop("forward", None)
                if forward is not None:
                    vars(block)["forward"] = forward
            for side in ("reference", "adapted"):
                for one, other in zip(getattr(alone, side), getattr(whole, side), strict=True):
                    torch.testing.assert_close(one[counted], other[counted], **CLOSE)
                assert bool(getattr(alone, side)[-1].isfinite().all())
            for one, other in zip(own, slopes, strict=True):
                assert (one is None) == (other is None)
                if one is not None:
                    torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(other.abs().max()) + 1e-7)


def with_adapter(model, kept=None):
    """The model with a random LoRA behind its first block, and the paths of it."""
    blocks = len(model.decoder_blocks)
    kept = kept or check_targets((TARGET,), range(FIRST, blocks), blocks, "all")
    paths = lora_paths(model, range(FIRST, blocks), linear_names(model, range(FIRST, blocks)))
    head = model.base.lm_head
    model = add_adapter(model, paths, kept, r=4, lora_alpha=4, dropout=0.0)
    model.base.lm_head = head
    generator = torch.Generator().manual_seed(0)
    for name, parameter in sorted(model.model.named_parameters()):
        if "lora_" in name:
            parameter.data.copy_(0.3 * torch.randn(parameter.shape, generator=generator))
    use_row_attention(model)
    return model, paths


def the_adapter_sits_in_the_language_tower_and_off_is_the_base(make, folder):
    plain = make()
    model, paths = with_adapter(make())
    assert paths and all(path.startswith(f"{plain.language_path}.") for path in paths)
    assert {path.rpartition(".")[2] for path in paths} >= set(PROJECTIONS)
    adapted = {name.partition(".lora_")[0] for name, _ in model.base.named_parameters() if ".lora_" in name}
    assert adapted == set(paths)
    inputs = plain.encode_chats(CHATS, [pictures_of(chat) for chat in CHATS])
    with torch.no_grad(), model.adapter(False):
        assert torch.equal(model.forward(inputs).logits, plain.forward(inputs).logits)
    with torch.no_grad():
        on = model.forward(inputs).logits
        assert not torch.allclose(on, plain.forward(inputs).logits, atol=1e-3)
        with lent(model, check_targets((TARGET,), (FIRST,), len(model.decoder_blocks), "targets"), recompute=False):
            assert len(model.decoder_blocks) == TARGET
        assert torch.equal(model.forward(inputs).logits, on)


def generation_begins_as_the_forward_says_and_ends_with_the_turn(make, folder):
    model = make()
    inputs = model.encode_chats(CHATS, [pictures_of(chat) for chat in CHATS])
    seen: list[torch.Tensor] = []
    hook = model.base.lm_head.register_forward_hook(lambda module, given, logits: seen.append(logits[:, -1]))
    with torch.no_grad():
        best = model.forward(inputs, logits_to_keep=1).logits[:, -1].argmax(-1)
    first = model.generate(inputs, 1)
    hook.remove()
    torch.testing.assert_close(seen[1], seen[0], **CLOSE)
    assert first == model.processor.tokenizer.batch_decode(best[:, None], skip_special_tokens=True)
    named = [model.dialect.end_of_turn, *STOPS.get(model.base.config.model_type, ())]
    published = [model.processor.tokenizer.convert_tokens_to_ids(token) for token in named]
    assert set(model.stops()) <= {*published, model.processor.tokenizer.eos_token_id}, "it ends answers too early"
    calls: list[int] = []
    for end in published:

        def insist(module, given, logits, end=end):
            logits[..., end] = 1e4
            calls.append(end)

        hook = model.base.lm_head.register_forward_hook(insist)
        model.generate(inputs, 5)
        hook.remove()
    assert calls == published, "it went on behind a token that ends an answer"


ANSWERED, DIFFERENT = 24, 6
"""Tokens of an answer, and how many of them differ at least: a model that repeats one is right by chance."""


def eloquent(model):
    """The model with larger weights and a head of its own: it answers in words, by what was said and seen before.

    Padding is not zero, so that to see it is not to see nothing.
    """
    head, embeddings = model.base.lm_head, model.base.get_input_embeddings().weight
    drawn = torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(0))
    drawn[list(model.processor.tokenizer.get_added_vocab().values())] = 0  # the largest of many is above it
    for weights in model.base.parameters():
        if weights is not embeddings:
            weights.data *= 2
    embeddings.data[~embeddings.any(1)] = embeddings.data[embeddings.any(1)].mean(0)
    head.weight = torch.nn.Parameter(drawn, requires_grad=False)
    model.base.generation_config = GenerationConfig()
    model.stops = list  # that answers end is another law
    return model


def generated(model, inputs):
    """The tokens of `ChatModel.generate`."""
    rows: list[list[int]] = []

    def kept(*given):
        rows.extend(decode_ids(*given))
        return rows

    with patch("mm_cb.models.base.decode_ids", kept):
        model.generate(inputs, ANSWERED)
    return rows


def answers_are_transformers_own_to_the_last_token(make, folder):
    """Of a padded batch with pictures: as of each chat alone, and as of whole passes without a cache."""
    model = eloquent(make())
    shown, others = ([pictures_of(chat, seed + 3 * i) for i, chat in enumerate(CHATS)] for seed in (0, 50))
    inputs = model.encode_chats(CHATS, shown)
    said = generated(model, inputs)
    assert all(len(row) == ANSWERED and len(set(row)) >= DIFFERENT for row in said)
    differs = [a != b for a, b in zip(said, generated(model, model.encode_chats(CHATS, others)), strict=True)]
    assert differs == [bool(pictures) for pictures in shown], "answers do not depend on pictures alone"
    greedy = GenerationConfig(max_new_tokens=ANSWERED, do_sample=False, pad_token_id=0)
    for chat, pictures, row in zip(CHATS, shown, said, strict=True):
        own = by_the_processor(model, chat, pictures)
        alone = model.model.generate(**own, generation_config=greedy)[0, own["input_ids"].shape[1] :]
        assert alone.tolist() == row
    for column in torch.tensor(said).T:
        with torch.no_grad():
            assert torch.equal(model.forward(inputs, logits_to_keep=1).logits[:, -1].argmax(-1), column)
        added = {"input_ids": column, "attention_mask": 1, "roles": int(TokenRole.COMPLETION)}
        inputs = replace(inputs, **{name: behind(getattr(inputs, name), value) for name, value in added.items()})


def behind(tokens, column):
    """``(B, T)`` with a column behind it."""
    more = torch.as_tensor(column).expand(len(tokens)).to(tokens.dtype)
    return torch.cat([tokens, more[:, None]], dim=1)


_QWEN_STOPS = ("<|im_end|>", "<|endoftext|>")
STOPS = {
    # transformers' convert_gemma3_weights.py: 1 and 106 in config.json and generation_config.json
    "gemma3": ("<eos>", "<end_of_turn>"),
    # generation_config.json as quoted in public repositories: 1, 106 and 50, of which config.json has the first two
    "gemma4": ("<eos>", "<turn|>", "<|tool_response>"),
    # what Command R7B's chat template ends an answer and its turn with; the second is its tokenizer's eos_token
    "aya_vision": ("<|END_RESPONSE|>", "<|END_OF_TURN_TOKEN|>"),
    # mlx-vlm issue 1932: 128001, 128008 and 128009 in config.json, no generation_config.json, other ends of turns
    "idefics3": ("<end_of_utterance>", "<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"),
    # its tokenizer_config.json as quoted in public repositories; its config.json has a base model's 2
    "smolvlm": ("<end_of_utterance>",),
    # what their chat templates, and transformers' convert_mistral3_weights_to_hf.py, end answers with: eos_token
    **dict.fromkeys(("llava", "llava_next", "mistral3"), ("</s>",)),
    # transformers' convert_internvl_weights_to_hf.py has the first alone, by Qwen2.5-VL's tokenizer;
    # convert_llava_onevision_weights_to_hf.py takes Qwen2's; the second ends texts in what both were made from
    **dict.fromkeys(("internvl", "llava_onevision"), _QWEN_STOPS),
    # generation_config.json as quoted in public repositories: 151645 and 151643; Qwen3.5's names 248044, the second,
    # and its tokenizer_config.json 248046, the first
    **dict.fromkeys(("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "qwen3_5"), _QWEN_STOPS),
}
"""Where generation has to stop beside the end of a turn, whatever a family's class says: the end tokens of published
configurations, each by its source, and what a language model of the type ends texts with."""


def subject_of(model):
    return Subject("rr", model, adapted=True)


BEHAVIORS = [
    Behavior("one", "what is in the picture", "here it is", None),
    Behavior("two", "tell me how to brew tea", "a red square", None),
]
SHOWN = [picture(8, (70, 48)), picture(9, (70, 48))]


def an_attack_lowers_the_loss_that_the_file_has(make, folder):
    subject = subject_of(with_adapter(make())[0])
    clean = torch.stack([as_pixels(one) for one in SHOWN])
    objective = TargetObjective(subject, BEHAVIORS, SHOWN)
    found = pgd(objective, clean, threat_model=Linf(32 / 255), steps=6)
    with torch.no_grad():
        assert (found.losses < objective(clean)).all()
    for i, image in enumerate(found.images):
        save_png(image, folder / f"{i}.png")
        assert ((load_png(folder / f"{i}.png") - clean[i]) * 255).abs().max().round() <= 32
    files = [Image.open(folder / f"{i}.png").convert("RGB") for i in range(2)]
    inputs = subject.model.encode(
        [b.prompt for b in BEHAVIORS], files, completions=[b.target for b in BEHAVIORS], close_turn=False
    )
    with torch.no_grad(), subject.active() as model:
        logged = target_nll(model.forward(inputs).logits, inputs.labels)
    torch.testing.assert_close(logged, found.losses, atol=1e-4, rtol=0)


def lean_passes_are_the_whole_model(make, folder):
    """Last positions, one picture for many chats, teacher and student, moved embeddings."""
    model = with_adapter(make())[0]
    subject, image = subject_of(model), SHOWN[0]
    inputs = model.encode(
        [b.prompt for b in BEHAVIORS], [image] * 2, completions=[b.target for b in BEHAVIORS], close_turn=False
    )
    one = inputs.rows(0, 1).pixel_values
    alone = model.encode([BEHAVIORS[0].prompt], [image])
    with torch.no_grad():
        lean = model.forward(alone, logits_to_keep=4).logits
        torch.testing.assert_close(lean, model.forward(alone).logits[:, -4:], **CLOSE)
        logits = model.forward(inputs).logits
        with only_last_positions(model.base, 4):
            lean = model.forward(inputs, logits_to_keep=4).logits
        torch.testing.assert_close(lean, logits[:, -4:], **CLOSE)
        with model.adapter(False):
            expected = model.forward(inputs, hidden_states=True).hidden_states
    pixels = one.clone().requires_grad_()
    whole = target_nll(model.forward(inputs, pixel_values=torch.cat([pixels] * 2)).logits, inputs.labels)
    shared = SharedPrefixTargets(model, inputs)(pixels)
    torch.testing.assert_close(shared, whole, **CLOSE)
    slopes = [torch.autograd.grad(losses.sum(), pixels)[0] for losses in (shared, whole)]
    torch.testing.assert_close(*slopes, rtol=1e-3, atol=1e-3 * float(slopes[1].abs().max()))
    matching = MatchingObjective(subject, BEHAVIORS, SHOWN, max_new_tokens=2)
    pixels = torch.stack([as_pixels(one) for one in SHOWN]).requires_grad_()
    embeds = matching.passes.student_embeds(matching.preprocess(pixels))
    states = matching.passes.teacher_states(matching.passes.teacher_embeds(embeds, pixels), matching.layers)
    with torch.no_grad(), model.adapter(False):
        expected = model.forward(matching.forced.inputs, hidden_states=True).hidden_states
    for layer, found in zip(matching.layers, states, strict=True):
        torch.testing.assert_close(found, expected[layer][:, -matching.forced.keep :], **CLOSE)
    (gradient,) = torch.autograd.grad(matching(pixels).sum(), pixels)
    assert bool(gradient.flatten(1).any(1).all())
    embedding = EmbeddingObjective(subject, BEHAVIORS, SHOWN)
    start = embedding.start()
    with torch.no_grad():
        torch.testing.assert_close(embedding(start), embedding.loss(embedding.inputs.pixel_values), **CLOSE)
        tilted = start + torch.linspace(-0.2, 0.2, start.shape[-1])  # layer norms see neither a shift nor a scale
        assert not torch.allclose(embedding(tilted), embedding(start), atol=1e-3)
    asked = model.encode([b.prompt for b in BEHAVIORS], SHOWN)
    assert embedding.generate(asked, start, 3) == model.generate(asked, 3)


def a_cut_tower_has_the_whole_models_states(make, folder):
    model = saved(make(), folder / "model")
    inputs = model.encode_chats(CHATS, [pictures_of(chat) for chat in CHATS])
    tower = load_tower(folder / "model", TARGET)
    assert type(tower) is type(model) and tower.language_path == model.language_path
    assert len(tower.decoder_blocks) == TARGET < len(model.decoder_blocks)
    tower.keep_blocks(TARGET, final_norm=False)
    with torch.no_grad():
        seen = model.forward(inputs, hidden_states=True)
        whole = seen.hidden_states
        torch.testing.assert_close(model.logits(whole[-1]), seen.logits, **CLOSE)
        assert all(map(torch.equal, tower.forward(inputs, hidden_states=True).hidden_states[:TARGET], whole))
        use_row_attention(tower)
        states = hidden_states(tower, lay_out(tower, inputs, inputs.attention_mask), 0, TARGET).reference
    real = inputs.attention_mask.bool()
    for k, state in enumerate(states, 1):
        torch.testing.assert_close(state, whole[k][real], **CLOSE)


def saved(model, folder):
    """Write the model as a checkpoint, which it is then the model of."""
    model.model.save_pretrained(folder)
    model.processor.save_pretrained(folder)
    model.name = str(folder)
    return model


def an_adapter_is_saved_loaded_and_merged(make, folder):
    model = saved(make(), folder / "model")
    inputs = model.encode_chats(CHATS, [pictures_of(chat) for chat in CHATS])
    adapted, paths = with_adapter(model)
    (folder / "adapter").mkdir()
    save_adapter(adapted, paths, folder / "adapter")
    backend = "pil" if type(model.processor.image_processor).__name__.endswith("Pil") else "torchvision"
    loaded = load_model(folder / "model", adapter=folder / "adapter", image_backend=backend)
    plain = load_model(merge(folder / "model", folder / "adapter", folder / "merged"))
    with torch.no_grad():
        expected = adapted.forward(inputs).logits
        torch.testing.assert_close(loaded.forward(inputs).logits, expected, **CLOSE)
        torch.testing.assert_close(plain.forward(inputs).logits, expected, **CLOSE)
    again = loaded.encode_chats(CHATS, [pictures_of(chat) for chat in CHATS])
    assert torch.equal(again.input_ids, inputs.input_ids) and torch.equal(again.pixel_values, inputs.pixel_values)


def a_loaded_image_processor_is_the_saved_one(make, folder):
    """Of the same backend, with the same settings: it makes the same pixels."""
    made = make()
    shown = [pictures_of(chat) for chat in CHATS]
    inputs = made.encode_chats(CHATS, shown)
    backend = "pil" if type(made.processor.image_processor).__name__.endswith("Pil") else "torchvision"
    loaded = load_model(saved(made, folder / "model").name, image_backend=backend)
    assert type(loaded.processor.image_processor) is type(made.processor.image_processor)
    again = loaded.encode_chats(CHATS, shown)
    assert torch.equal(again.input_ids, inputs.input_ids) and torch.equal(again.pixel_values, inputs.pixel_values)


def training_reroutes(make, folder):
    """A run by recipe, with the picture adversary: the loss falls, and the result is an adapter of the whole model."""
    model = saved(make(), folder / "model")
    backend = "pil" if type(model.processor.image_processor).__name__.endswith("Pil") else "torchvision"
    settings = {
        "model": folder / "model",
        "image_backend": backend,
        "lora.layers_to_transform": [1, 2],
        "lora.modules": linear_names(model, (1, 2)),
        "circuit_breaker.target_layers": [2],
        "circuit_breaker.adversary.steps": 1,
        "circuit_breaker.keep_length": 0,
        "training.max_steps": 8,
        "training.batch_size": 2,
        "training.learning_rate": 0.05,
        "training.start_distance": 0,
        "training.held_out": 0,
        "training.tokens_per_pass": 100,
    }
    recipe = load_recipe("miniature", [f"{name}={value}" for name, value in settings.items()])
    out = train(recipe, folder / "rr", [example(n, s, i) for n in range(3) for s in SETS for i in (0, 1)])
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for modality in ("text", "multimodal"):
        losses = [line["reroute_loss"] for line in lines if line["modality"] == modality]
        assert losses[0] > 0.9 and losses[-1] < 0.85 * losses[0], (modality, losses)
    adapted = load_model(folder / "model", adapter=out)
    inputs = adapted.encode_chats(CHATS, [pictures_of(chat) for chat in CHATS])
    with torch.no_grad():
        assert not torch.allclose(adapted.forward(inputs).logits, model.forward(inputs).logits, atol=1e-3)


SETS = ("circuit_breaker", "retain")


def example(number, set_name, image):
    words = {"circuit_breaker": "tell me how to brew a red tea", "retain": "what is in the picture here please"}
    words = words[set_name].split()
    asked = [words[(number + i) % len(words)] for i in range(4)]
    content = [{"type": "image"}] * image + [{"type": "text", "text": " ".join(asked)}]
    messages = [{"role": "user", "content": content}, answer(" ".join(reversed(asked)))]
    pictures = [picture(number, (84 + 14 * number, 42))] if image else []
    return Example(f"{set_name}-{number}-{image}", messages, pictures, set_name, "made")


LAWS = [
    ids_and_pixels_are_the_processors,
    a_target_stands_where_the_model_goes_on,
    logits_are_those_of_the_processors_own_inputs,
    an_open_answer_begins_where_the_model_goes_on,
    attacked_pixels_are_the_processors,
    as_many_tokens_as_features,
    the_embed_path_is_the_pixel_path,
    every_chat_of_a_batch_has_its_own_pictures_in_order,
    rows_of_a_mixed_batch_are_single_rows,
    packed_states_are_the_padded_ones,
    tokens_that_count_have_the_states_and_gradients_of_the_whole_top_block,
    the_adapter_sits_in_the_language_tower_and_off_is_the_base,
    training_reroutes,
    an_attack_lowers_the_loss_that_the_file_has,
    lean_passes_are_the_whole_model,
    generation_begins_as_the_forward_says_and_ends_with_the_turn,
    answers_are_transformers_own_to_the_last_token,
    a_cut_tower_has_the_whole_models_states,
    an_adapter_is_saved_loaded_and_merged,
]

BY_PIXELS = [
    ids_and_pixels_are_the_processors,
    logits_are_those_of_the_processors_own_inputs,
    attacked_pixels_are_the_processors,
    as_many_tokens_as_features,
    a_loaded_image_processor_is_the_saved_one,
]
"""Those in which the image backend has a part; the others begin with its pixels, which the first compares."""

BEFORE_THE_TOWER = [
    ids_and_pixels_are_the_processors,
    a_target_stands_where_the_model_goes_on,
    an_open_answer_begins_where_the_model_goes_on,
    attacked_pixels_are_the_processors,
    as_many_tokens_as_features,
]
"""Those that look at ids, templates, pixels and features alone, which no language tower has a part in."""
