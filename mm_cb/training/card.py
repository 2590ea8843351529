"""The model card of an adapter: what it is, what it was trained with, how to load it."""

import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mm_cb.training.examples import Example


def model_card(
    recipe: Mapping[str, Any],
    examples: Sequence[Example],
    paths: Sequence[str],
    metrics: Sequence[Mapping[str, Any]],
) -> str:
    """The README.md of an adapter's folder.

    Args:
        recipe: The resolved recipe, nested.
        examples: What it was trained on; only counted.
        paths: The adapted modules.
        metrics: One record per step, as in ``metrics.jsonl``.

    Returns:
        Markdown with YAML front matter.
    """
    base = recipe["model"]
    front = ["library_name: peft", "tags: [circuit-breaker, representation-rerouting, lora]"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():  # a hub id; the hub checks this field
        front.append(f"base_model: {json.dumps(base)}")
    values = [(key, json.dumps(value)) for key, value in _flat(recipe)]
    counts = Counter((example.set, example.modality, example.source) for example in examples)
    data = [(name, modality, source or "-", str(n)) for (name, modality, source), n in sorted(counts.items())]
    losses = [
        [str(record["step"]), record["modality"], *(f"{record[key]:.4g}" for key in _LOSS_KEYS)]
        for record in [*metrics[:2], *metrics[-2:]]
    ]
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            f"# Circuit breaker `{_cell(recipe['name'])}` for `{_cell(base)}`",
            "",
            "A LoRA adapter on the language tower, trained by representation rerouting (Zou et al. 2024, "
            "arXiv:2406.04313) with mm-cb. It lowers how often the model complies with harmful requests; it does not "
            "make the model safe, and attacks made for it may still get through. Measure it before relying on it.",
            "",
            "```python",
            "from peft import PeftModel",
            "",
            "model = PeftModel.from_pretrained(base_model, adapter_folder)",
            "```",
            "",
            "With `model.disable_adapter()` the output is the base model's, bit for bit.",
            "",
            "## Recipe",
            "",
            *_table(["field", "value"], values),
            "",
            f"Adapted: {len(paths)} linear layers, `{paths[0]}` to `{paths[-1]}`.",
            "",
            "## Data",
            "",
            *_table(["set", "rows", "source", "examples"], data),
            "",
            "## Training",
            "",
            "First and last steps; every step is in `metrics.jsonl`.",
            "",
            *_table(["step", "rows", *_LOSS_KEYS], losses),
            "",
        ]
    )


_LOSS_KEYS = ("reroute_loss", "retain_loss", "reroute_coeff", "retain_coeff", "grad_norm", "learning_rate")


def _flat(fields: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in fields.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield prefix + key, value


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(_cell, line)) + " |" for line in lines]


def _cell(text: str) -> str:
    """Text that stays inside its table cell and is not read as markup."""
    folded = " ".join(text.split())
    return folded.replace("\\", "\\\\").replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
