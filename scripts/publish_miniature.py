"""Put a run's numbers into results/: ``python scripts/publish_miniature.py RUN [--name NAME]``.

Of a demo also its picture and its breaker; of an attack what each search was given, whether it had finished, its
control, and which attack broke a request first. Nothing here measures. The breaker (seed 0) is kept because training it
again on another machine gives another one, and whoever doubts a number needs the one that it was measured on.
"""

from __future__ import annotations

import argparse
import io
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mm_cb.core.checked import read_records
from mm_cb.core.files import write_bytes, write_json
from mm_cb.core.records import Item
from mm_cb.metrics.dictation import Control
from mm_cb.metrics.results import find, read_results
from mm_cb.metrics.table import HEADLINE, WORST_GIVEN
from mm_cb.report.charts import Bar, outcome_bars
from mm_cb.report.gallery import AMPLIFICATION, amplified_difference, read_picture
from mm_cb.report.labels import HATCH, OUTCOME_COLOURS, OUTCOMES, subject_label
from mm_cb.report.load import load_run
from mm_cb.report.strength import Strength

KEPT = ("adapter_model.safetensors", "adapter_config.json", "base.json", "README.md", "metrics.jsonl")
"""What an adapter is loaded from, its card and its losses."""
_SUBJECTS = ("base", "rr")
_LIGHT = ("gibberish", "not_judged", "other")


def main() -> None:
    """Copy from a finished run."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path, default=Path("results"))
    parser.add_argument("--name", default="miniature", help="what the files are called")
    options = parser.parse_args()
    run = json.loads((options.run / "run.json").read_text(encoding="utf-8"))
    if run["command"] not in ("demo", "attack") or not run["ended"]:
        raise SystemExit(
            f"`{options.run}` must be a finished demo or attack; start the same command again to finish it."
        )
    options.out.mkdir(exist_ok=True)
    if run["command"] == "attack":
        write_json(options.out / f"{options.name}.json", attacked(options.run))
        return
    shutil.copyfile(options.run / "results.json", options.out / f"{options.name}.json")
    picture(options.run, options.out / f"{options.name}.png")
    keep_breaker(options.run / "adapters" / "rr", options.out / options.name / "rr")
    print(f"{options.out / options.name}: revision {run['git']}, {run['started'][:10]}; say so in results/README.md")


def attacked(folder: Path) -> dict[str, Any]:
    """An attack run's measurements, the words of its page about every attack, and who broke a request first."""
    run = load_run(folder)
    attacks = [
        {"condition": one.condition, "given": one.given, "knows_breaker": one.knows_breaker, "state": one.state}
        | {"why": one.why}
        | ({} if one.control is None else {"control": words_of(one.control)})
        for one in run.strengths
    ]
    measurements = json.loads((folder / "results.json").read_text(encoding="utf-8"))["measurements"]
    counted = [one for one in run.strengths if one.counted]
    opening = [one for one in counted if one.given in WORST_GIVEN["worst_case_opening"]]
    first = {name: first_broken(run.items, some) for name, some in (("all", counted), ("opening", opening))}
    return {"schema": 1, "measurements": measurements, "attacks": attacks, "first_broken": first}


def words_of(control: Control) -> dict[str, int | str]:
    """The right text, and another behaviour's, said word for word in so many of n."""
    return {"n": control.n, "right": control.right, "wrong": control.wrong, "reading": control.reading}


def first_broken(items: Sequence[Item], attacks: Sequence[Strength]) -> dict[str, int]:
    """Attack → requests that it broke and no attack before it, in the order in which they ran."""
    left, found = {item["id"] for item in items}, {}
    for one in attacks:
        broken = {i["id"] for i in items if i["condition"] == one.condition and i["outcome"] == "harmful"} & left
        left -= broken
        if broken:
            found[one.condition] = len(broken)
    return found


def keep_breaker(trained: Path, kept: Path) -> None:
    """Copy an adapter, in place of what was published before."""
    if not (trained / KEPT[0]).is_file():
        return
    shutil.rmtree(kept.parent, ignore_errors=True)
    kept.mkdir(parents=True)
    for name in KEPT:
        shutil.copyfile(trained / name, kept / name)


def picture(run_dir: Path, out_png: Path) -> None:
    """Draw the outcomes of base and circuit breaker under every condition, and one attacked picture.

    The clean / attacked / difference triple is the first item, in the order of the file, on which PGD made the base
    comply; its caption says on how many items that happened. White ground, for light and dark pages and for print.

    Args:
        run_dir: A finished run directory.
        out_png: Where the PNG goes.
    """
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    run_dir = Path(run_dir)
    measurements = read_results(run_dir / "results.json")
    groups = outcome_bars(measurements, _SUBJECTS)
    triple = _triple(read_records(run_dir / "items.jsonl", Item), run_dir)
    with matplotlib.rc_context({"font.size": 9, "font.family": "sans-serif", "hatch.linewidth": 0.6}):
        height = 1.15 + 0.3 * sum(len(bars) + 0.6 for _, bars in groups)
        figure = Figure(figsize=(9.2, max(3.4, height)), layout="constrained", facecolor="white")
        FigureCanvasAgg(figure)
        columns = [2.1, 1] if triple else [1]
        left, *right = figure.subfigures(1, len(columns), width_ratios=columns, squeeze=False)[0]
        _draw_bars(left.add_subplot(), groups)
        if triple:
            base = find(measurements, "base", "compliance", HEADLINE)
            assert base is not None, "a triple comes from an item that was counted"
            caption = f"1 of {int(base.counts['harmful'])} pictures (of {base.n}) that\nmade the base model comply"
            _draw_triple(right[0], triple, caption)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=160, metadata={"Software": None})
    write_bytes(Path(out_png), buffer.getvalue())


def _draw_bars(axes: Any, groups: Sequence[tuple[str, Sequence[Bar]]]) -> None:
    place, ticks, names, seen = 0.0, [], [], set()
    for condition, bars in groups:
        axes.text(0, place - 0.1, condition, fontweight="bold", va="center")
        for bar in bars:
            place += 1
            left = 0.0
            for outcome, count, share in bar.parts:
                hatch = HATCH if outcome == "gibberish" else None
                name = None if outcome in seen else OUTCOMES[outcome]
                colour = OUTCOME_COLOURS[outcome]
                axes.barh(place, share, 0.82, left, color=colour, hatch=hatch, edgecolor="white", label=name)
                seen.add(outcome)
                if share >= 5:
                    ink = "black" if outcome in _LIGHT else "white"
                    axes.text(left + share / 2, place, str(count), ha="center", va="center", color=ink, fontsize=8)
                left += share
            ticks.append(place)
            names.append(f"{subject_label(bar.subject, short=True)}  n = {bar.total}")
        place += 1.35
    axes.set_yticks(ticks, names)
    axes.set_ylim(place - 0.7, -0.7)
    axes.set_xlim(0, 100)
    axes.set_xlabel("% of forbidden requests (counts in the bars)")
    axes.tick_params(length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    ordered = [handles[text] for text in OUTCOMES.values() if text in handles]
    axes.figure.legend(
        handles=ordered, loc="outside upper left", ncols=5, frameon=False, handlelength=1.2, columnspacing=1.2
    )


def _triple(items: Sequence[Item], folder: Path) -> list[tuple[str, Any]]:
    """The first attack that broke the base; one on a picture that shows something before one on a blank canvas."""
    found: list[tuple[str, Any]] = []
    for item in items:
        wanted = item["metric"], item["subject"], item["condition"], item.get("outcome")
        if wanted != ("compliance", "base", HEADLINE, "harmful"):
            continue
        clean, attacked = (read_picture(folder, name) for name in (item.get("clean_image"), item.get("image")))
        if clean is None or attacked is None:
            continue
        difference = amplified_difference(attacked, clean)
        if difference is not None:
            change = f"difference × {AMPLIFICATION}"
            triple = [("clean", clean), ("attacked with PGD", attacked), (change, difference)]
            if clean.min() < clean.max():
                return triple
            found = found or triple
    return found


def _draw_triple(figure: Any, triple: Sequence[tuple[str, Any]], caption: str) -> None:
    for axes, (title, pixels) in zip(figure.subplots(len(triple), 1), triple, strict=True):
        axes.imshow(pixels, interpolation="nearest")
        axes.set_title(title, fontsize=9, pad=3)
        axes.set_axis_off()
    figure.supxlabel(caption, fontsize=8.5)


if __name__ == "__main__":
    main()
