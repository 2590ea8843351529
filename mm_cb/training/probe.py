"""Training a harmfulness probe on a recipe's rows: answers of circuit-breaker rows against those of retain rows."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

from mm_cb.core import hub
from mm_cb.core.embedded import embedded
from mm_cb.core.errors import UserError
from mm_cb.core.runs import RunDirectory
from mm_cb.data.examples import SETS, Example, SetName, kinds_of, rows_of
from mm_cb.models import ChatModel, load_model
from mm_cb.models.adapters import read_settings
from mm_cb.models.fingerprint import fingerprint
from mm_cb.models.probe import Flagged, ProbeFile, ProbeKind, ProbeNetwork, adapter_sha256, save_probe, states_of
from mm_cb.training.inputs import input_files, load_examples
from mm_cb.training.masks import loss_mask, without_ends
from mm_cb.training.recipes.recipe import deciding

if TYPE_CHECKING:
    from mm_cb.core.progress import Progress
    from mm_cb.training.recipes.config import Recipe

REFUSAL = "Sorry, I cannot help with that."
HELD_OUT = 5
"""One of so many rows is not trained on: the benign ones set the threshold, the harmful ones are counted."""
STEPS = 600
TOKENS = 1024
"""Of each step, half of them of harmful answers."""
RATE = 1e-3


@dataclass(frozen=True)
class ProbeSettings:
    """What decides a probe beside the recipe.

    Attributes:
        kind: ``linear`` or ``mlp``.
        layer: Hidden state; None = the recipe's last target.
        false_positives: Share of held-out benign rows that may be flagged.
        rows: At most so many of each set, a seeded sample.
        refusal: In place of a withheld answer; None = the embedded model's own, or `REFUSAL`.
    """

    kind: ProbeKind = "linear"
    layer: int | None = None
    false_positives: float = 0.01
    rows: int = 512
    refusal: str | None = None


def train_probe(
    recipe: "Recipe",
    out: Path,
    adapter: str | None,
    settings: ProbeSettings,
    progress: "Progress | None" = None,
) -> ProbeFile:
    """Train a probe on a recipe's model and rows, and write it to ``out``; a finished one is read back.

    Args:
        recipe: Its model, data, masks' modalities, seed, device and dtype are read.
        out: The probe's folder: new, empty, or this probe's own.
        adapter: An adapter that is on; None = the model alone.
        settings: The rest.
        progress: Shows the rows that are read.

    Raises:
        UserError: If there are too few rows, or model, adapter or layer do not fit.
    """
    hub.keep_to(out)
    if adapter is not None:
        read_settings(Path(adapter))
    layer = settings.layer or max(recipe.circuit_breaker.target_layers)
    guest = embedded(recipe.model)
    own = REFUSAL if guest is None or guest.refusal is None else guest.refusal()
    refusal = settings.refusal or own
    examples = load_examples(recipe)
    told = {**vars(settings), "layer": layer, "refusal": refusal, "adapter_sha256": adapter_sha256(adapter)}
    identity = {"recipe": deciding(recipe), "probe": told}
    inputs = [*getattr(examples, "inputs", []), *input_files(recipe)]
    with RunDirectory(out, "probe", identity, recipe.seed, inputs=inputs) as run:
        if not run.finished:
            model = load_model(
                recipe.model, adapter=adapter, device=recipe.device, dtype=recipe.dtype,
                image_backend=recipe.image_backend,
            )  # fmt: skip
            model.max_length = recipe.training.max_length
            if not 1 <= layer <= len(model.decoder_blocks):
                raise UserError(f"`--layer` must be in 1..{len(model.decoder_blocks)} for this model, got {layer}.")
            chosen = {name: choose(examples, name, recipe, settings.rows) for name in SETS}
            states = {name: _states(model, rows, layer, name, progress) for name, rows in chosen.items()}
            network, threshold = fit(states, settings, recipe.seed)
            benign, harmful = (flagged(network, states[name][1], threshold) for name in ("retain", "circuit_breaker"))
            save_probe(
                out,
                network,
                {
                    "model": recipe.model,
                    "fingerprint": fingerprint(recipe.model),
                    "adapter_sha256": told["adapter_sha256"],
                    "layer": layer,
                    "kind": settings.kind,
                    "hidden_size": int(network.mean.numel()),
                    "threshold": threshold,
                    "refusal": refusal,
                    "false_positive_rate": settings.false_positives,
                    "benign": benign,
                    "harmful": harmful,
                },
            )
            run.finish()
    from mm_cb.core.checked import read_record
    from mm_cb.models.probe import FILE

    return read_record(out / FILE, ProbeFile)


def choose(
    examples: Sequence[Example], name: SetName, recipe: "Recipe", most: int
) -> tuple[list[Example], list[Example]]:
    """Rows of a set to train on, and those that are held out, with every copy of theirs left out of the first.

    Raises:
        UserError: If there are fewer than two.
    """
    kinds, rows = kinds_of(examples), rows_of(examples)
    wanted = (name,) if recipe.batches == "alternate" else (name, recipe.batches)
    first = {rows[i]: i for i in reversed(range(len(rows))) if kinds[i][: len(wanted)] == wanted}
    pool = sorted(first.values())
    if len(pool) < 2:
        raise UserError(f"a probe needs 2 or more rows of the {name} set, the data holds {len(pool)}.")
    generator = torch.Generator().manual_seed(recipe.seed)
    order = [examples[pool[i]] for i in torch.randperm(len(pool), generator=generator)[:most].tolist()]
    aside = max(1, len(order) // HELD_OUT)
    return order[aside:], order[:aside]


def _states(
    model: ChatModel,
    parts: tuple[Sequence[Example], Sequence[Example]],
    layer: int,
    name: SetName,
    progress: "Progress | None",
) -> tuple[list[Tensor], list[Tensor]]:
    """States ``(tokens, H)`` of every row's answers, of both parts, on the CPU."""
    task = None if progress is None else progress.task(f"states of {name} rows", sum(map(len, parts)))

    def row(example: Example) -> Tensor:
        state = answer_states(model, example, layer)
        if task is not None:
            task.advance()
        return state

    trained, held_out = ([row(example) for example in part] for part in parts)
    return trained, held_out


@torch.no_grad()
def answer_states(model: ChatModel, example: Example, layer: int) -> Tensor:
    """States ``(tokens, H)`` of a row's answers, float32, without the tokens that end them."""
    try:
        inputs = model.encode_chats([example.messages], [example.open_images()], tools=[example.tools])
        mask = loss_mask(inputs, "completion")
    except ValueError as error:
        raise UserError(f"cannot train on {example.place or example.id}: {error}") from error
    if (end := model.dialect.end_of_turn) is not None:
        left = without_ends(inputs, mask, model.processor.tokenizer.convert_tokens_to_ids(end))
        mask = left if bool(left.any()) else mask
    return states_of(model, inputs, layer)[mask.bool()].float().cpu()


def fit(
    states: dict[SetName, tuple[list[Tensor], list[Tensor]]], settings: ProbeSettings, seed: int
) -> tuple[ProbeNetwork, float]:
    """Train on the first part of each set's rows and put the threshold where held-out benign rows allow it.

    Every step draws as many tokens of harmful answers as of benign ones.
    """
    pools = [torch.cat(states[name][0]) for name in ("circuit_breaker", "retain")]
    together = torch.cat(pools)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = ProbeNetwork(together.shape[1], settings.kind)
    network.mean.copy_(together.mean(0))
    network.scale.copy_(together.std(0).clamp_min(1e-6))
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(network.parameters(), lr=RATE)
    wanted = torch.cat([torch.ones(TOKENS // 2), torch.zeros(TOKENS // 2)])
    for _ in range(STEPS):
        drawn = [pool[torch.randint(len(pool), (TOKENS // 2,), generator=generator)] for pool in pools]
        optimizer.zero_grad()
        functional.binary_cross_entropy_with_logits(network(torch.cat(drawn)), wanted).backward()
        optimizer.step()
    network.eval().requires_grad_(False)
    return network, threshold_of([highest(network, row) for row in states["retain"][1]], settings.false_positives)


def highest(network: ProbeNetwork, row: Tensor) -> float:
    """The score of a row's most suspicious token."""
    return float(network(row).max())


def threshold_of(scores: Sequence[float], rate: float) -> float:
    """The lowest threshold above which no more than this share of benign rows' highest scores lie."""
    ordered = sorted(scores, reverse=True)
    return ordered[min(int(rate * len(ordered)), len(ordered) - 1)]


def flagged(network: ProbeNetwork, rows: Sequence[Tensor], threshold: float) -> Flagged:
    """How many rows have a token above the threshold."""
    return {"flagged": sum(highest(network, row) > threshold for row in rows), "of": len(rows)}
