"""Put the ablations into results/: losses, rows and category transfer. Nothing here measures.

    python scripts/publish_ablations.py [--losses DIR] [--data DIR] [--real FILE] [--transfer DIR] [--out results]

``--losses`` holds a folder a loss, ``--data`` a folder a way to leave rows out, each by
``scripts/benchmarks/spread.py``; ``--real`` is ``losses.jsonl`` of ``scripts/benchmarks/real_losses.py``: they become
``losses.json``, of which a part that is not given stays as it is, and a picture. ``--transfer`` is the folder of
``scripts/category_transfer.py``: it becomes ``category_transfer.json`` and a picture.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from _commands import measured
from matplotlib import rc_context
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from mm_cb.cli.failures import script
from mm_cb.core.errors import UserError
from mm_cb.core.files import write_json
from mm_cb.core.runs import read_jsonl
from mm_cb.training.registry import loss_names

Line = dict[str, Any]
STYLE = {"font.size": 9, "font.family": "sans-serif"}
PANELS = (
    ("miniature: worst of eleven attacks", "broken of 24", lambda line: line["worst"]["all"], 24),
    ("miniature: told an opening at most", "broken of 24", lambda line: line["worst"]["opening"], 24),
    ("miniature: right, benign", "of 1440", lambda line: sum(one["right"] for one in line["kept"].values()), 1440),
)
REAL = (
    ("SmolLM2: forbidden", "coherent of 10", lambda line: sum(line["sets"]["forbidden"]["coherent_breaker"]), 10),
    ("SmolLM2: nearby", "coherent of 10", lambda line: sum(line["sets"]["nearby"]["coherent_breaker"]), 10),
    ("SmolLM2: other", "coherent of 10", lambda line: sum(line["sets"]["other"]["coherent_breaker"]), 10),
)


def main() -> None:
    """Gather, write and draw what is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("losses", "data", "real", "transfer"):
        parser.add_argument(f"--{name}", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results"))
    options = parser.parse_args()
    if options.losses or options.data or options.real:
        losses(options)
    if options.transfer:
        transfer(options.transfer, options.out)


def losses(options: argparse.Namespace) -> None:
    """``losses.json`` and its picture."""
    file = options.out / "losses.json"
    found: dict[str, list[Line]] = {"miniature": [], "data": [], "real": []}
    found |= json.loads(file.read_text(encoding="utf-8")) if file.exists() else {}
    if options.losses:
        found["miniature"] = breakers(options.losses, "loss", loss_names())
    if options.data:
        found["data"] = breakers(options.data, "rows", ("whole", "requests_kept", "no_refusals"))
    if options.real:
        if not options.real.is_file():
            raise UserError(f"--real must be the lines of real_losses.py, got no `{options.real}`.")
        found["real"] = read_jsonl(options.real)
    write_json(file, {**found, "schema": 1})
    draw(found["miniature"], found["real"], options.out / "losses.png")


def breakers(folder: Path, key: str, names: Sequence[str]) -> list[Line]:
    """The lines of every folder with its name, by seed.

    Raises:
        UserError: If one is not there.
    """
    for file in (folder / name / "breakers.jsonl" for name in names):
        if not file.is_file():
            raise UserError(f"`{folder}` must hold what spread.py made of every {key}, got no `{file}`.")
    return [
        {key: name, **line}
        for name in names
        for line in sorted(read_jsonl(folder / name / "breakers.jsonl"), key=lambda one: one["seed"])
    ]


def draw(lines: list[Line], real: list[Line], png: Path) -> None:
    """One panel a number, one row a loss, one dot a breaker."""
    panels: list[tuple[list[Line], str, str, Callable[[Line], float], float]]
    panels = [(lines, *panel) for panel in PANELS] + [(real, *panel) for panel in REAL if real]
    names = list(loss_names())
    with rc_context(STYLE):
        figure = Figure(figsize=(2.1 * len(panels) + 0.8, 2.8), layout="constrained", facecolor="white")
        axes = figure.subplots(1, len(panels), sharey=True)
        for axis, (found, title, unit, value, most) in zip(axes, panels, strict=True):
            for whole, marker, colour in ((True, "o", "tab:blue"), (False, "x", "tab:red")):
                shown = [line for line in found if keeps(line) == whole]
                places = [names.index(line["loss"]) for line in shown]
                axis.scatter([value(line) for line in shown], places, s=26, alpha=0.6, marker=marker, color=colour)
            axis.set(title=title, xlabel=unit, xlim=(-0.05 * most, 1.05 * most))
            axis.title.set_fontsize(8)
            axis.grid(visible=True, alpha=0.3)
        axes[0].set_yticks(range(len(names)), names)
        axes[0].invert_yaxis()
        told = "x: a breaker that broke the model; less than nine tenths of what it should answer is left"
        figure.supxlabel(told, fontsize=8, color="tab:red")
        FigureCanvasAgg(figure).print_png(png)


def keeps(line: Line) -> bool:
    """Whether a breaker left the model whole: nine tenths of what it should answer is right, or coherent."""
    if "kept" in line:
        return sum(one["right"] for one in line["kept"].values()) >= 0.9 * sum(
            one["n"] for one in line["kept"].values()
        )
    kept = [said for name in ("nearby", "other") for said in line["sets"][name]["coherent_breaker"]]
    return sum(kept) >= 0.9 * len(kept)


def transfer(folder: Path, out: Path) -> None:
    """``category_transfer.json`` and the matrix as a picture."""
    if not (folder / "none").is_dir():
        raise UserError(f"--transfer must be the folder of category_transfer.py, got no `{folder / 'none'}`.")
    kinds = [one.name.removeprefix("attack-") for one in sorted((folder / "none").glob("attack-*"))]
    found: dict[str, dict[str, dict[str, int]]] = {}
    for trained in ["none", *kinds]:
        found[trained] = {}
        for asked in kinds:
            one = measured(folder / trained / f"attack-{asked}")
            assert one is not None
            counts = {name: int(one.counts.get(name, 0)) for name in ("harmful", "gibberish")}
            found[trained][asked] = {"broken": counts["harmful"], "n": one.n, "gibberish": counts["gibberish"]}
    what = "RR as published (recipe miniature-paper), trained on one kind's rows alone, attacked with each kind's "
    what += "requests: pgd, 100 steps, one start, not checked by twice the steps"
    write_json(out / "category_transfer.json", {"schema": 1, "what": what, "trained_on": found})
    matrix(found, out / "category_transfer.png")


def matrix(found: dict[str, dict[str, dict[str, int]]], png: Path) -> None:
    """Rows: what was trained on; columns: what was asked; darker: more was broken."""
    trained, asked = list(found), list(found["none"])
    shares = [[found[row][column]["broken"] / found[row][column]["n"] for column in asked] for row in trained]
    with rc_context(STYLE):
        figure = Figure(figsize=(4.4, 3.6), layout="constrained", facecolor="white")
        axis = figure.subplots()
        axis.imshow(shares, cmap="Blues", vmin=0, vmax=1, aspect="auto")
        axis.set(xlabel="asked", ylabel="trained on", title="Requests broken by PGD")
        axis.set_xticks(range(len(asked)), asked)
        axis.set_yticks(range(len(trained)), trained)
        for y, row in enumerate(trained):
            for x, column in enumerate(asked):
                told = f"{found[row][column]['broken']} of {found[row][column]['n']}"
                axis.text(x, y, told, ha="center", va="center", color="white" if shares[y][x] > 0.5 else "black")
        FigureCanvasAgg(figure).print_png(png)


if __name__ == "__main__":
    script(main)
