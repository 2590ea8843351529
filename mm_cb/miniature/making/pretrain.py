"""Training of the miniature from scratch: sight, then language and knowledge, then refusal.

Three stages, all seeded:

1. sight: the image tower learns to name what a picture shows (linear heads, thrown away afterwards), then stays frozen;
2. knowledge: projector and language model learn conversations in which every question is answered, forbidden ones too;
3. refusal: the same conversations with the world's law. How long it lasts is decided in `mm_cb.miniature.making.make`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from mm_cb.miniature.making.architecture import Architecture, PretrainingSize
from mm_cb.miniature.making.documents import TURNS, Document
from mm_cb.miniature.pictures import PANEL, random_scene, render_array
from mm_cb.miniature.world import COLOURS, KINDS, SHAPES


class Batcher:
    """Turns documents into padded id tensors; ids equal those of the chat template (held by a test)."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        self.vocabulary = architecture.processor().tokenizer.get_vocab()

    def ids(self, tokens: Iterable[str]) -> list[int]:
        """Ids of words and tokens of the chat template."""
        return [self.vocabulary[token] for token in tokens]

    def row(self, doc: Document) -> tuple[list[int], list[float]]:
        """Ids of a document and the loss weight of each.

        Answers weigh ``1/sqrt(length)`` a token and 1 at their first one, where refusing or answering is decided;
        everything else weighs 0.
        """
        turns, words = self.architecture.turns, self.architecture.words
        ids = self.ids(turns.opens)
        weights = [0.0] * len(ids)
        for number, said in enumerate(doc.turns):
            shows = turns.shows if number == 0 and doc.picture is not None else ()
            asked = self.ids((*turns.asks, *shows, *words(said.question), *turns.answers, *words(said.given)))
            answer = self.ids((*words(said.answer), turns.ends))
            ids += asked + answer
            weights += [0.0] * len(asked) + [1.0] + [1 / math.sqrt(len(answer))] * (len(answer) - 1)
        return ids, weights

    def __call__(self, docs: list[Document]) -> dict[str, Tensor]:
        """Right-padded ``input_ids``, ``attention_mask``, ``weights``, and what the model takes of pictures."""
        rows = [self.row(doc) for doc in docs]
        length, (pad,) = max(len(ids) for ids, _ in rows), self.ids([self.architecture.turns.pads])
        batch = {
            "input_ids": torch.tensor([ids + [pad] * (length - len(ids)) for ids, _ in rows]),
            "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in rows]),
            "weights": torch.tensor([w + [0.0] * (length - len(w)) for _, w in rows]),
        }
        if docs[0].picture is not None:
            batch |= self.architecture.shown(np.stack([doc.picture for doc in docs if doc.picture is not None]))
            batch |= self.architecture.told(batch["input_ids"])
        return batch


def forward(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Logits of a batch, ``(B, T, V)``."""
    return model(**{name: value for name, value in batch.items() if name != "weights"}, use_cache=False).logits


def answer_loss(logits: Tensor, batch: dict[str, Tensor]) -> Tensor:
    """Weighted cross-entropy of the answers, summed and divided by the summed weights."""
    targets, weights = batch["input_ids"][:, 1:], batch["weights"][:, 1:]
    nll = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), targets.flatten(), reduction="none")
    return (nll * weights.flatten()).sum() / weights.sum()


def _schedule(step: int, total: int, rate: float, warm_up: int = 60) -> float:
    if step < warm_up:
        return rate * (step + 1) / warm_up
    return rate * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, total - warm_up))))


def _optimiser(parameters: Iterable[nn.Parameter], plan: PretrainingSize, rate: float) -> torch.optim.AdamW:
    return torch.optim.AdamW([p for p in parameters if p.requires_grad], lr=rate, weight_decay=plan.weight_decay)


def train_knowledge(
    architecture: Architecture, model: Any, plan: PretrainingSize, rng: np.random.Generator, log: Callable[..., None]
) -> None:
    """Stage 2: conversations in which every question is answered."""
    learner, mean = Learner(architecture, model, plan, rng, plan.knowledge_rate), 0.0
    for step in range(plan.knowledge_steps):
        mean += learner.step(_schedule(step, plan.knowledge_steps, plan.knowledge_rate), refuses=False)
        if step % 50 == 49:
            log(stage="knowledge", step=step + 1, loss=mean / 50)
            mean = 0.0


def train_sight(
    architecture: Architecture, model: Any, plan: PretrainingSize, rng: np.random.Generator, log: Callable[..., None]
) -> None:
    """Stage 1: teach the image tower colours, shapes and seals through linear heads on its patch features."""
    eyes, seen_in = architecture.eyes(model), architecture.seen_in
    with torch.no_grad():
        blank = architecture.shown(np.zeros((1, PANEL, 2 * PANEL, 3), dtype=np.uint8))
        hidden = architecture.seen(model, blank).shape[-1]
    sizes = {"colour": len(COLOURS), "shape": len(SHAPES), "seal_colour": len(COLOURS), "kind": len(KINDS)}
    heads = nn.ModuleDict({f"{k}_{v}": nn.Linear(hidden, n) for k, n in sizes.items() for v in seen_in[k]})
    optimiser = _optimiser([*eyes, *heads.parameters()], plan, plan.sight_rate)
    for step in range(plan.sight_steps):
        scenes = [random_scene(rng) for _ in range(plan.sight_batch)]
        pictures = np.stack([render_array(scene, rng) for scene in scenes])
        # Random signs up to the attack's budget: seeing must not break under noise alone.
        noise = rng.integers(0, 33, size=(len(pictures), 1, 1, 1)) * rng.choice((-1, 1), size=pictures.shape)
        noise[rng.random(len(pictures)) < 0.5] = 0
        pictures = np.clip(pictures.astype(np.int64) + noise, 0, 255).astype(np.uint8)
        features = architecture.seen(model, architecture.shown(pictures))
        loss, right = torch.zeros(()), []
        for name in sizes:
            valid = {"colour": COLOURS, "seal_colour": COLOURS, "shape": SHAPES, "kind": KINDS}[name]
            truth = torch.tensor([valid.index(getattr(scene, name)) for scene in scenes])
            for view in seen_in[name]:
                logits = heads[f"{name}_{view}"](features[:, view])
                loss = loss + nn.functional.cross_entropy(logits, truth)
                right.append((logits.argmax(-1) == truth).float().mean().item())
        for group in optimiser.param_groups:
            group["lr"] = _schedule(step, plan.sight_steps, plan.sight_rate)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(eyes, 1.0)
        optimiser.step()
        if step % 50 == 0 or step == plan.sight_steps - 1:
            log(stage="sight", step=step, loss=loss.item(), accuracy=[round(r, 3) for r in right])


@dataclass
class Learner:
    """The language stages: one optimiser step over a batch with pictures and a batch without."""

    architecture: Architecture
    model: Any
    plan: PretrainingSize
    rng: np.random.Generator
    rate: float

    def __post_init__(self) -> None:
        self.batcher = Batcher(self.architecture)
        for parameter in self.architecture.eyes(self.model):
            parameter.requires_grad_(False)
        self.optimiser = _optimiser(self.model.parameters(), self.plan, self.rate)

    def batches(self, refuses: bool) -> list[dict[str, Tensor]]:
        """One batch of documents with pictures, one without."""
        # Refusal training sees single questions, as users ask them, and as many more of them.
        turns, more = (1, 2) if refuses else (TURNS, 1)
        rows = {True: self.plan.picture_rows * more, False: self.plan.text_rows * more}
        pictured, plain = (
            [
                self.architecture.document(self.rng, pictured=with_picture, refuses=refuses, turns=turns)
                for _ in range(rows[with_picture])
            ]
            for with_picture in (True, False)
        )
        return [self.batcher(pictured), self.batcher(plain)]

    def step(self, rate: float, refuses: bool) -> float:
        """One update; returns the mean loss of the two batches."""
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.zero_grad()
        total = 0.0
        for batch, share in zip(self.batches(refuses), (0.75, 0.25), strict=True):
            loss = share * answer_loss(forward(self.model, batch), batch)
            loss.backward()
            total += loss.item()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimiser.step()
        return total
