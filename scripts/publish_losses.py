"""Put the loss ablation into results/: ``python scripts/publish_losses.py DIR [--real FILE]``.

DIR holds a folder a loss, each by ``scripts/benchmarks/spread.py``; FILE is ``losses.jsonl`` of
``scripts/benchmarks/real_losses.py``. Writes ``results/losses.json`` and a picture of it. Nothing here measures.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mm_cb.core.files import write_json
from mm_cb.core.runs import read_jsonl
from mm_cb.training.registry import loss_names

PANELS = (
    ("miniature: PGD, 100 steps", "broken of 24", lambda line: line["attacks"]["pgd"]["harmful"], 24),
    ("miniature: dialled up, 300 steps", "broken of 24", lambda line: line["attacks"]["pgd_homotopy"]["harmful"], 24),
    ("miniature: right, benign", "of 1440", lambda line: sum(one["right"] for one in line["kept"].values()), 1440),
)
REAL = (
    ("SmolLM2: forbidden", "coherent of 10", lambda line: sum(line["sets"]["forbidden"]["coherent_breaker"]), 10),
    ("SmolLM2: nearby", "coherent of 10", lambda line: sum(line["sets"]["nearby"]["coherent_breaker"]), 10),
    ("SmolLM2: other", "coherent of 10", lambda line: sum(line["sets"]["other"]["coherent_breaker"]), 10),
)


def main() -> None:
    """Gather, write and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--real", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    lines = [
        {"loss": loss, **line}
        for loss in loss_names()
        for line in sorted(read_jsonl(options.folder / loss / "breakers.jsonl"), key=lambda one: one["seed"])
    ]
    real = read_jsonl(options.real) if options.real else []
    write_json(options.out / "losses.json", {"schema": 1, "miniature": lines, "real": real})
    draw(lines, real, options.out / "losses.png")


def draw(lines: list[dict[str, Any]], real: list[dict[str, Any]], png: Path) -> None:
    """One panel a number, one row a loss, one dot a breaker."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    panels = [(lines, *panel) for panel in PANELS] + [(real, *panel) for panel in REAL if real]
    names = list(loss_names())
    with matplotlib.rc_context({"font.size": 9, "font.family": "sans-serif"}):
        figure = Figure(figsize=(2.1 * len(panels) + 0.8, 2.6), layout="constrained", facecolor="white")
        axes = figure.subplots(1, len(panels), sharey=True)
        for axis, (found, title, unit, value, most) in zip(axes, panels, strict=True):
            axis.scatter(
                [value(line) for line in found], [names.index(line["loss"]) for line in found], s=26, alpha=0.6
            )
            axis.set(title=title, xlabel=unit, xlim=(-0.05 * most, 1.05 * most))
            axis.title.set_fontsize(8)
            axis.grid(visible=True, alpha=0.3)
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
        FigureCanvasAgg(figure).print_png(png)


if __name__ == "__main__":
    main()
