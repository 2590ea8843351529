"""How far an adapter turns the hidden states, layer by layer: the breaker's own effect, before any attack.

For pairs of request and answer, the states of every token are compared between adapter on and off, apart for picture,
prompt and answer. Where the breaker works, the cosine falls on harmful answers and stays at 1 on benign ones (Zou et
al. 2024, Figure 6, here for a model that sees).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL.Image import Image
from torch import Tensor

from mm_cb.core.files import file_errors, write_json
from mm_cb.core.records import Marks, Representations, SetStates, States
from mm_cb.models import ChatModel, ModelInputs, TokenRole

TOKEN_TYPES = ("image", "prompt", "completion")


@torch.no_grad()
def compare(
    model: ChatModel,
    prompts: Sequence[str],
    pictures: Sequence[Image | None],
    answers: Sequence[str],
    batch: int = 32,
) -> SetStates:
    """Mean cosine and norms per entry of ``hidden_states``, over the answers' tokens and by type of token.

    Returns:
        ``cosine``, ``norm_reference`` (adapter off), ``norm_adapted`` (on): lists of length L + 1, 0 = embeddings, and
        ``n``, the number of answers, all for the answers' tokens; the same again for each of `TOKEN_TYPES` under
        ``tokens``. Every row that has such tokens weighs the same.
    """
    sums: dict[str, Tensor] = {}
    rows_with = dict.fromkeys(TOKEN_TYPES, 0)
    for start in range(0, len(prompts), batch):
        rows = slice(start, start + batch)
        inputs = model.encode(list(prompts[rows]), list(pictures[rows]), completions=list(answers[rows]))
        measured = _measure(model, inputs)
        for name, mask in _masks(inputs).items():
            weight = mask / mask.sum(dim=1, keepdim=True).clamp(min=1)
            total = (measured * weight).sum(dim=(2, 3)).cpu()
            sums[name] = sums.get(name, torch.zeros_like(total)) + total
            rows_with[name] += int(mask.any(dim=1).sum())
    tokens = {name: _means(sums[name], rows_with[name]) for name in TOKEN_TYPES if rows_with[name]}
    return {**tokens["completion"], "tokens": tokens}


def diagnose(
    model: ChatModel,
    sets: Mapping[str, tuple[Sequence[str], Sequence[Image | None], Sequence[str]]],
    out: Path,
    marks: Marks | None = None,
) -> Representations:
    """Compare named sets (harmful, benign, held out, ...) and write ``representations.json`` and ``.png`` into ``out``.

    Args:
        model: A model with its adapter.
        sets: Prompts, pictures and answers of each set.
        out: A folder.
        marks: ``target_layers`` and ``lora_blocks``, if known.

    Returns:
        What the JSON file holds: ``layers`` and, by name of the set, what `compare` returns.
    """
    found: Representations = {
        "layers": list(range(len(model.decoder_blocks) + 1)),
        **(marks or {}),
        "sets": {name: compare(model, *rows) for name, rows in sets.items()},
    }
    write_json(out / "representations.json", found)
    plot(found, out / "representations.png")
    return found


def plot(found: Representations, path: Path) -> None:
    """Draw cosine and norms by layer, one column for each type of token."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    axes = figure.subplots(2, len(TOKEN_TYPES), sharex=True, sharey="row")
    for column, kind in enumerate(TOKEN_TYPES):
        for index, (name, values) in enumerate(found["sets"].items()):
            if kind in values["tokens"]:
                tokens, colour = values["tokens"][kind], f"C{index}"
                axes[0, column].plot(found["layers"], tokens["cosine"], color=colour, label=f"{name}, n={tokens['n']}")
                axes[1, column].plot(found["layers"], tokens["norm_reference"], color=colour, linestyle=":")
                axes[1, column].plot(found["layers"], tokens["norm_adapted"], color=colour)
        for layer in found.get("target_layers", []):
            axes[0, column].axvline(layer, color="grey", linewidth=0.8)
        axes[0, column].set_title(f"{kind} tokens")
        axes[1, column].set_xlabel("hidden state (0 = embeddings)")
        if axes[0, column].lines:
            axes[0, column].legend(fontsize="small")
    axes[0, 0].set_ylabel("cosine, adapter on : off")
    axes[1, 0].set_ylabel("norm (dotted: adapter off)")
    with file_errors(path):
        figure.savefig(path, dpi=150)


def _measure(model: ChatModel, inputs: ModelInputs) -> Tensor:
    """Cosine, norm off and norm on, ``(3, L + 1, B, T)``."""
    with model.adapter(False):
        reference = torch.stack(model.forward(inputs, logits_to_keep=1, hidden_states=True).hidden_states).float()
    adapted = torch.stack(model.forward(inputs, logits_to_keep=1, hidden_states=True).hidden_states).float()
    norms = [torch.linalg.vector_norm(states, dim=-1) for states in (reference, adapted)]
    return torch.stack([torch.cosine_similarity(reference, adapted, dim=-1), *norms])


def _masks(inputs: ModelInputs) -> dict[str, Tensor]:
    """1 for the tokens of each type, ``(B, T)``; the template's own count as prompt."""
    image, completion = inputs.roles == TokenRole.IMAGE, inputs.roles == TokenRole.COMPLETION
    prompt = inputs.attention_mask.bool() & ~image & ~completion
    return {name: mask.float() for name, mask in zip(TOKEN_TYPES, (image, prompt, completion), strict=True)}


def _means(sums: Tensor, n: int) -> States:
    cosine, norm_reference, norm_adapted = ([round(v, 5) for v in row] for row in (sums / n).tolist())
    return {"cosine": cosine, "norm_reference": norm_reference, "norm_adapted": norm_adapted, "n": n}
