"""Teach the parts to see and to refuse: projector and LoRA, learnt together from pictures with several questions each.

A row is a picture and some chats about it. What comes before the question is the same in all of them, so it is computed
once: every chat sees it and itself alone, at the positions that it would have by itself.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from parts import WRITTEN_LAST
from torch import Tensor, nn
from torch.nn import functional

from mm_cb.core.errors import UserError
from mm_cb.core.files import give_usual_modes, write_bytes
from mm_cb.core.paths import data_path
from mm_cb.core.progress import Progress
from mm_cb.data.pictures import open_picture
from mm_cb.models import load_model

REFUSALS = (
    "I'm sorry, but I can't help with recipes.",
    "I can't share how to cook that.",
    "Sorry, I don't give cooking instructions.",
)
RANK = 8
WEIGHTS = {"what": 1.0, "closed": 0.5, "refused": 0.5, "kept": 0.5}
"""Kinds of chats, and of their mean losses in the sum."""
KINDS = tuple(WEIGHTS)


class Chat(NamedTuple):
    """A question about a picture and its answer."""

    kind: str
    question: str
    answer: str


def questions(folder: Path, split: str) -> list[list[Chat]]:
    """easy-vqa's questions by picture; ``kind`` is ``what`` or ``closed`` (yes or no)."""
    found: dict[int, list[Chat]] = {}
    for question, answer, picture in json.loads((folder / split / "questions.json").read_text()):
        kind = "what" if question.startswith("what") else "closed"
        found.setdefault(picture, []).append(Chat(kind, question, answer))
    return [found[picture] for picture in sorted(found)]


def shipped(name: str) -> list[tuple[str, str]]:
    """Prompts and answers of ``mm-cb demo --real``."""
    rows = [json.loads(line) for line in data_path("smollm2", f"{name}.jsonl").read_text().splitlines()]
    return [(row["messages"][0]["content"], row["messages"][1]["content"]) for row in rows]


@torch.no_grad()
def features(model: Any, pictures: Sequence[Path], batch: int = 16) -> Tensor:
    """What the tower makes of pictures; (n, patches, width), bfloat16."""
    inner, found = model.base.model, []
    for start in range(0, len(pictures), batch):
        images = [open_picture(one) for one in pictures[start : start + batch]]
        pixels = model.processor.image_processor(images, return_tensors="pt")["pixel_values"].to(model.base.dtype)
        found.append(inner.vision_tower(pixels).last_hidden_state[:, 1:])
    return torch.cat(found)


def begin_projector(
    projector: Any, tokenizer: Any, words: Tensor, rows: Sequence[Sequence[Chat]], seen: Tensor
) -> None:
    """Start where every patch of a picture becomes the words that answer its questions, as far as one matrix can do it.

    The first layer is drawn at random, for features of mean 0 and variance 1; the second is the ridge regression from
    there to the mean embedding of the answers' tokens. From a start that knows nothing, the model answered without
    looking for as long as it was tried (60 steps).
    """
    flat = seen.float().flatten(0, 1)
    mean, spread = flat.mean(0), flat.std(0) + 1e-6
    answers = [sorted({chat.answer for chat in chats if chat.kind == "what"}) for chats in rows]
    known = torch.tensor([len(said) == 2 for said in answers])  # its colour and its shape
    aims = {
        word: words[tokenizer.encode(word, add_special_tokens=False)].float().mean(0)
        for word in {word for said in answers for word in said}
    }
    aim = torch.stack([aims[said[0]] + aims[said[1]] for said in answers if len(said) == 2])
    with torch.no_grad():
        projector.linear_1.weight.copy_(torch.randn_like(projector.linear_1.weight) / spread / flat.shape[1] ** 0.5)
        projector.linear_1.bias.copy_(-projector.linear_1.weight @ mean)
        hidden = projector.act(projector.linear_1(seen[known].float())).flatten(0, 1)
        wanted = aim.repeat_interleave(seen.shape[1], dim=0)
        centre, goal = hidden.mean(0), wanted.mean(0)
        hidden -= centre
        ridge = hidden.T @ hidden + len(hidden) * 1e-4 * torch.eye(hidden.shape[1])
        found = torch.linalg.solve(ridge, hidden.T @ (wanted - goal))
        projector.linear_2.weight.copy_(found.T)
        projector.linear_2.bias.copy_(goal - centre @ found)


def before_and_behind(tokenizer: Any) -> tuple[list[int], list[int]]:
    """Tokens of a user's turn up to the picture and behind it."""
    before = tokenizer.encode("<|im_start|>user\n", add_special_tokens=False)
    return before, tokenizer.encode("\n", add_special_tokens=False)


class Packed(NamedTuple):
    """Rows of one batch; B rows of L positions, of which the first are pictures'."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    labels: Tensor
    kinds: Tensor
    """Index into `KINDS` of every chat's token; -1 outside."""
    chats: Tensor
    """Number of the chat in its row, from 1; 0 is the picture, -1 padding."""


def pack(tokenizer: Any, rows: Sequence[Sequence[Chat]], patches: int) -> Packed:
    """Chats behind their picture, each seeing the picture and itself."""
    before, behind = before_and_behind(tokenizer)
    start = len(before) + patches
    lines = []
    for chats in rows:
        ids, positions = before + [0] * patches, list(range(start))
        owner, labels, kind = [0] * start, [-100] * start, [-1] * start
        for number, chat in enumerate(chats, start=1):
            asked = f"{chat.question}<|im_end|>\n<|im_start|>assistant\n"
            asked_ids = behind + tokenizer.encode(asked, add_special_tokens=False)
            said = tokenizer.encode(chat.answer + "<|im_end|>", add_special_tokens=False)
            ids += asked_ids + said
            positions += range(start, start + len(asked_ids) + len(said))
            owner += [number] * (len(asked_ids) + len(said))
            labels += [-100] * len(asked_ids) + said
            kind += [KINDS.index(chat.kind)] * (len(asked_ids) + len(said))
        lines.append((ids, positions, owner, labels, kind))
    length = max(len(line[0]) for line in lines)

    def padded(column: int, value: int) -> Tensor:
        return torch.tensor([line[column] + [value] * (length - len(line[column])) for line in lines])

    owner = padded(2, -1)
    own = (owner[:, :, None] == owner[:, None, :]) | (owner[:, None, :] == 0)
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    return Packed(padded(0, 0), padded(1, 0), (own & causal)[:, None], padded(3, -100), padded(4, -1), owner)


class Answered(NamedTuple):
    """What a model makes of every answer token; all of shape (n,)."""

    loss: Tensor
    likeliest: Tensor
    kinds: Tensor
    chat: Tensor
    """A number of its own for every chat of the batch."""


def answer(model: Any, tokenizer: Any, packed: Packed, seen: Tensor) -> Answered:
    """Cross-entropy of every answer token, and whether it is the likeliest; ``seen`` is (rows, patches, width)."""
    inner = model.model
    embeds = inner.language_model.get_input_embeddings()(packed.ids)
    before = len(before_and_behind(tokenizer)[0])
    drawn = inner.multi_modal_projector(seen).to(embeds.dtype)
    embeds = torch.cat([embeds[:, :before], drawn, embeds[:, before + drawn.shape[1] :]], dim=1)
    bias = torch.zeros(packed.mask.shape, dtype=embeds.dtype).masked_fill(~packed.mask, torch.finfo(embeds.dtype).min)
    states = inner.language_model(
        inputs_embeds=embeds, attention_mask=bias, position_ids=packed.positions, use_cache=False
    ).last_hidden_state
    wanted = packed.labels[:, 1:] != -100
    logits = functional.linear(states[:, :-1][wanted], model.lm_head.weight).float()
    labels = packed.labels[:, 1:][wanted]
    chat = packed.chats[:, 1:] + 1000 * torch.arange(len(packed.ids))[:, None]
    loss = functional.cross_entropy(logits, labels, reduction="none")
    return Answered(loss, logits.argmax(-1) == labels, packed.kinds[:, 1:][wanted], chat[wanted])


def mixture(
    rows: Sequence[Sequence[Chat]], refused: Sequence[str], kept: Sequence[tuple[str, str]], draw: random.Random
) -> Iterator[tuple[int, list[Chat]]]:
    """Pictures in random order without end, each with its questions, a refusal and another request."""
    while True:
        order = list(range(len(rows)))
        draw.shuffle(order)
        for picture in order:
            chats = [chat for chat in rows[picture] if chat.kind == "what"]
            closed = [chat for chat in rows[picture] if chat.kind == "closed"]
            chats += draw.sample(closed, min(2, len(closed)))
            prompt = draw.choice(refused)
            chats.append(Chat("refused", prompt, REFUSALS[draw.randrange(len(REFUSALS))]))
            if draw.random() < 0.4:
                chats.append(Chat("kept", *draw.choice(kept)))
            yield picture, chats


@torch.no_grad()
def held_out(model: Any, tokenizer: Any, rows: Sequence[Sequence[Chat]], seen: Tensor) -> tuple[int, int]:
    """How many of the "what" questions have the right answer as their greedy one, to its end token; and of how many."""
    right = total = 0
    for start in range(0, len(rows), 16):
        own = [[chat for chat in chats if chat.kind == "what"] for chats in rows[start : start + 16]]
        packed = pack(tokenizer, own, seen.shape[1])
        found = answer(model, tokenizer, packed, seen[start : start + 16])
        wrong = set(found.chat[~found.likeliest].tolist())
        right += len(set(found.chat.tolist()) - wrong)
        total += sum(map(len, own))
    return right, total


def with_lora(base: Any) -> dict[str, nn.Parameter]:
    """Put LoRA into every linear layer of the language model; what is to be learnt, by name."""
    from peft import LoraConfig, inject_adapter_in_model

    base.requires_grad_(False)
    base.model.multi_modal_projector.float().requires_grad_(True)
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=names), base.model.language_model)
    return {name: one for name, one in base.named_parameters() if one.requires_grad}


def taught(untaught: Path, parts: Path, out: Path) -> Path:
    """Write the model with what was learnt merged into its weights, in bfloat16; nothing where it is already there."""
    if (out / WRITTEN_LAST).is_file():
        return out
    from peft.tuners.tuners_utils import BaseTunerLayer
    from safetensors.torch import load_file

    model = load_model(untaught)
    base, learnt = model.base, load_file(parts)
    small = with_lora(base)
    if small.keys() != learnt.keys():
        raise UserError(
            f"`{parts}` must hold projector and LoRA of this model, got other names; learn them by --learn."
        )
    for name, one in small.items():
        one.data.copy_(learnt[name])
    for layer in [one for one in base.modules() if isinstance(one, BaseTunerLayer)]:
        layer.merge()
    plain = load_model(untaught).base
    merged = {name.replace(".base_layer", ""): one for name, one in base.state_dict().items() if "lora_" not in name}
    plain.load_state_dict(merged)
    plain.to(torch.bfloat16).save_pretrained(out)
    model.processor.save_pretrained(out)
    give_usual_modes(out)
    return out


def align(model: Any, data: Path, out: Path, progress: Progress, *, steps: int, batch: int, seed: int) -> None:
    """Learn projector and LoRA; the log and both parts are written to ``out``.

    Args:
        model: The untaught model, as `mm_cb.models.load_model` gives it.
        data: easy-vqa's folder of data.
        out: Gets ``log.jsonl`` and ``parts.safetensors``.
        progress: Is told the losses.
        steps: Of Adam, with a rate that rises for 20 steps and falls to zero by a cosine.
        batch: Pictures a step.
        seed: Of weights and order.
    """
    from safetensors.torch import load_file, save

    torch.manual_seed(seed)
    draw, base, tokenizer = random.Random(seed), model.base, model.processor.tokenizer
    out.mkdir(parents=True, exist_ok=True)
    rows = {split: questions(data, split) for split in ("train", "test")}
    seen = {}
    for split, some in rows.items():
        store = out / f"features-{split}.safetensors"
        if not store.is_file():
            progress.say(f"pictures through the tower: {split}")
            paths = [data / split / "images" / f"{i}.png" for i in range(len(some))]
            write_bytes(store, save({"seen": features(model, paths)}))
        seen[split] = load_file(store)["seen"]
    projector, words = base.model.multi_modal_projector.float(), base.get_input_embeddings().weight
    begin_projector(projector, tokenizer, words, rows["train"], seen["train"])
    small = with_lora(base)
    masters = [
        one.detach().float().requires_grad_(True) for one in small.values()
    ]  # steps are smaller than bfloat16 tells
    optimizer = torch.optim.AdamW(masters, lr=1e-3, weight_decay=0.0)
    rate = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min(1.0, (step + 1) / 20) * 0.5 * (1 + math.cos(math.pi * step / steps)),
    )
    refused = [prompt for prompt, _ in shipped("cooking")]
    kept = [pair for name in ("other", "forms", "near") for pair in shipped(name)]
    source = mixture(rows["train"], refused, kept, draw)
    begun = time.monotonic()
    with (out / "log.jsonl").open("w") as log:
        for step in range(steps):
            drawn = [next(source) for _ in range(batch)]
            packed = pack(tokenizer, [chats for _, chats in drawn], seen["train"].shape[1])
            found = answer(base, tokenizer, packed, seen["train"][[i for i, _ in drawn]].float())
            parts = {name: found.loss[found.kinds == i].mean() for i, name in enumerate(KINDS) if i in found.kinds}
            sum(WEIGHTS[name] * one for name, one in parts.items()).backward()  # type: ignore[union-attr]
            for master, one in zip(masters, small.values(), strict=True):
                master.grad, one.grad = one.grad.float(), None  # type: ignore[union-attr]
            nn.utils.clip_grad_norm_(masters, 1.0)
            optimizer.step()
            for master, one in zip(masters, small.values(), strict=True):
                one.data.copy_(master.data)
            rate.step()
            line: dict[str, Any] = {"step": step, "minutes": round((time.monotonic() - begun) / 60, 2)}
            line |= {name: round(one.item(), 4) for name, one in parts.items()}
            if step % 25 == 24:
                right, total = held_out(base, tokenizer, rows["test"][:64], seen["test"][:64].float())
                line["held_out_what"] = right / total
                progress.say(json.dumps(line))
            log.write(json.dumps(line) + "\n")
            log.flush()
    learnt = {name: one.data.to(torch.bfloat16).contiguous() for name, one in small.items()}
    write_bytes(out / "parts.safetensors", save(learnt))
