"""The battery's two plots: success and loss against epsilon, loss and gradient against steps. SVG and PNG."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mm_cb.attacks.sanity.measure import Measured
from mm_cb.core.runs import write_bytes


def draw(folder: Path, measured: Mapping[str, Measured]) -> None:
    """Draw what was measured; a subject whose attack could not run is left out."""
    from matplotlib.figure import Figure

    swept = {name: found for name, found in measured.items() if found.sweep}
    if swept:
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        success, loss = figure.subplots(1, 2)
        for name, found in swept.items():
            epsilons = list(found.sweep)
            success.plot(epsilons, [100 * float(e.float().mean()) for _, e in found.sweep.values()], "o-", label=name)
            loss.plot(epsilons, [float(v.mean()) for v, _ in found.sweep.values()], "o-", label=name)
        for axes, label in ((success, "answers that begin with the target, %"), (loss, "mean best target loss")):
            axes.set_xscale("symlog", base=2, linthresh=1)
            axes.set_xlabel("epsilon / 255")
            axes.set_ylabel(label)
            axes.legend()
        success.set_ylim(-3, 103)
        _save(figure, folder / "epsilon")
    curved = {name: found for name, found in measured.items() if found.curves}
    if curved:
        figure = Figure(figsize=(8, 3.2), layout="constrained")
        loss, norm = figure.subplots(1, 2)
        for name, found in curved.items():
            for arm in ("pgd", "double_steps"):  # adaptive ones minimise another loss
                curve = found.curves[arm]
                best, label = curve.cummin(dim=0).values.mean(dim=1), f"{name}, {arm.replace('_', ' ')}"
                loss.plot(range(len(best)), best.tolist(), label=label)
                norm.plot(range(len(best) - 1), found.norms[arm].median(dim=1).values.tolist(), label=label)
        loss.set_ylabel("mean best target loss so far")
        norm.set_ylabel("median norm of the gradient")
        norm.set_yscale("log")
        for axes in (loss, norm):
            axes.set_xlabel("step of the attack")
        loss.legend()
        _save(figure, folder / "steps")


def _save(figure: Any, stem: Path) -> None:
    from matplotlib import rc_context

    for suffix, metadata in ((".svg", {"Date": None}), (".png", {"Software": None})):
        buffer = io.BytesIO()
        with rc_context({"svg.hashsalt": "mm-cb"}):
            figure.savefig(buffer, format=suffix[1:], metadata=metadata)
        write_bytes(stem.with_suffix(suffix), buffer.getvalue())
