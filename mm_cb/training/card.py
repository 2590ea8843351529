"""The model card of an adapter: what it is, how its training went, the recipe to repeat it, how to load it."""

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import yaml

from mm_cb.core.errors import UserError
from mm_cb.core.hub import repository_of
from mm_cb.core.records import MetricsRow, RecipeFields
from mm_cb.data.examples import Example
from mm_cb.training.outcome import STUCK
from mm_cb.training.registry import loss_entry
from mm_cb.training.start import start_lines


def model_card(
    recipe: RecipeFields,
    examples: Sequence[Example],
    paths: Sequence[str],
    metrics: Sequence[MetricsRow],
    left_out: Mapping[str, int] | None = None,
) -> str:
    """The README.md of an adapter's folder.

    Args:
        recipe: The run's recipe as plain values.
        examples: What it was trained on.
        paths: The modules with LoRA.
        metrics: The lines of ``metrics.jsonl``.
        left_out: Why rows of the data were not used → how many.

    Returns:
        Markdown, with the front matter that the hub reads; recipe and data are quoted, so that nothing in them is
        read as markup.
    """
    base, _ = repository_of(recipe["model"])
    loss = recipe.get("circuit_breaker", {}).get("loss", "rr")
    method = "representation-rerouting" if loss == "rr" else json.dumps(loss)
    front = ["library_name: peft", f"tags: [circuit-breaker, {method}, lora]"]
    if re.fullmatch(r"[\w.-]+/[\w.-]+", base) and not Path(base).exists():  # a hub id; the hub checks this field
        front.append(f"base_model: {json.dumps(base)}")
    counts = Counter((example.set, example.modality, example.source) for example in examples)
    data = [(name, modality, source or "-", str(n)) for (name, modality, source), n in sorted(counts.items())]
    return "\n".join(
        [
            "---",
            *front,
            "---",
            "",
            f"# Circuit breaker `{_cell(recipe['name'])}` for `{_cell(base)}`",
            "",
            "A LoRA adapter on the language tower, trained as a circuit breaker (Zou et al. 2024, arXiv:2406.04313) "
            f"with mm-cb. {_purpose(metrics)}",
            "",
            *_loss(recipe),
            "",
            "```python",
            "from peft import PeftModel",
            "",
            "model = PeftModel.from_pretrained(base_model, adapter_folder)",
            "```",
            "",
            "With `model.disable_adapter()` the output is the base model's, bit for bit.",
            "",
            "## Results",
            "",
            *_start(metrics),
            *_held_out(metrics),
            "What it does to attacks, skills and refusals is measured afterwards (`mm-cb attack`, `mm-cb eval`) and "
            "put on one page by `mm-cb report`; nothing of that is in here.",
            "",
            "Losses of the first and last steps; every step is in `metrics.jsonl`.",
            "",
            *_losses(metrics),
            "",
            "## Data",
            "",
            *_table(["set", "rows", "source", "examples"], data),
            "",
            *_left_out(left_out or {}),
            "## Recipe",
            "",
            "With the text below as `recipe.yaml`, and the same data, `mm-cb train recipe.yaml --out DIR` trains this "
            f"adapter again. It has {len(paths)} linear layers, `{paths[0]}` to `{paths[-1]}`.",
            "",
            *_fenced(yaml.safe_dump(dict(recipe), sort_keys=False, allow_unicode=True, width=120), "yaml"),
            "",
        ]
    )


def _purpose(metrics: Sequence[MetricsRow]) -> str:
    """What to expect of it: nothing, where the training did not take hold."""
    if metrics and STUCK in metrics[-1]:
        return f"**It did not take hold: {_cell(str(metrics[-1][STUCK]))}.** It is no safeguard as it is."
    measured = any("held_out_retain_cosine" in one for one in metrics)
    unseen = "" if measured else "Whether it took hold was not measured. "
    return (
        f"{unseen}It is to lower how often the model complies with harmful requests; it does not make the model safe, "
        "and attacks made for it may still get through. Measure it before relying on it."
    )


def _loss(recipe: RecipeFields) -> list[str]:
    """What the loss on circuit-breaker states was, where it is from, and what stood beside it."""
    breaker = recipe.get("circuit_breaker", {})
    name = breaker.get("loss", "rr")
    try:
        entry = loss_entry(name)
    except UserError:
        return [f"Loss `{_cell(name)}`."]
    settings = "".join(f", {key} {value:g}" for key, value in breaker.get("loss_settings", {}).items())
    lines = [f"Loss `{name}`{settings}: {entry.about}. {entry.source} Where it took hold: {entry.took_hold}."]
    if breaker.get("keep_length"):
        lines.append("Beside it, not in the paper: a term that keeps states as long as they were.")
    if breaker.get("adversary", {}).get("steps"):
        lines.append("Not in the paper either: pictures' embeddings were moved to undo it before each pass.")
    return lines


_LOSS_KEYS: tuple[str, ...] = ("reroute_loss", "length_loss", "retain_loss")
_LOSS_KEYS += ("reroute_coeff", "retain_coeff", "grad_norm", "learning_rate")


def _losses(metrics: Sequence[MetricsRow]) -> list[str]:
    """The first and last steps; a dash for what a row lacks, as those of a training begun before there was a column."""
    shown = [
        [
            str(record["step"]),
            str(record["modality"]),
            *(f"{record[k]:.4g}" if k in record else "-" for k in _LOSS_KEYS),
        ]
        for record in (metrics if len(metrics) <= 4 else [*metrics[:2], *metrics[-2:]])
    ]
    return _table(["step", "rows", *_LOSS_KEYS], shown)


def _start(metrics: Sequence[MetricsRow]) -> list[str]:
    """What was measured before the first step."""
    found = start_lines(metrics[0]) if metrics else []
    return [*(f"{line}." for line in found), ""] if found else []


def _held_out(metrics: Sequence[MetricsRow]) -> list[str]:
    """Where the hidden states of rows never trained on went, at the first and at the last measurement."""
    measured = [record for record in metrics if "held_out_retain_cosine" in record]
    if not measured:
        return ["No rows were held out (`training.held_out`): how it fares on rows never trained on is unknown.", ""]
    prefix = "held_out_retain_"
    own = [key.removeprefix(prefix) for key in measured[-1] if key.startswith(prefix)]
    own = [key for key in own if key not in ("cosine", "norm_reference", "norm_adapted")]
    rows = []
    for name in ("circuit_breaker", "retain"):
        for record in [measured[0], measured[-1]][: len(measured)]:
            cosine, before, after = (
                record[f"held_out_{name}_{key}"] for key in ("cosine", "norm_reference", "norm_adapted")
            )
            more = [f"{record[f'held_out_{name}_{key}']:.3f}" for key in own]
            rows.append([name, str(record["step"]), f"{cosine:.3f}", f"{before:.4g}", f"{after:.4g}", *more])
    return [
        "Hidden states of held-out rows at the target layers, adapter on against off, averaged over the tokens that "
        "count in the loss. A breaker turns `circuit_breaker` states away (cosine towards 0 or below) and leaves "
        "`retain` states where they were (cosine 1, equal norms).",
        "",
        *_table(["held-out rows", "step", "cosine", "norm off", "norm on", *own], rows),
        "",
    ]


def _left_out(counts: Mapping[str, int]) -> list[str]:
    if not counts:
        return []
    rows = [(reason, str(count)) for reason, count in sorted(counts.items())]
    return ["Rows of the data that were left out:", "", *_table(["why", "rows"], rows), ""]


def _fenced(text: str, language: str) -> list[str]:
    """A block of code that no run of backticks inside it can end."""
    longest = max(map(len, re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return [f"{fence}{language}", *text.rstrip("\n").split("\n"), fence]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(_cell, line)) + " |" for line in lines]


def _cell(text: str) -> str:
    """Text that stays inside its table cell and is not read as markup."""
    folded = " ".join(text.split())
    return folded.replace("\\", "\\\\").replace("|", "\\|").replace("`", "'").replace("<", "&lt;")
