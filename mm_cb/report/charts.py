"""Line charts as inline SVG that takes the page's text colour, and the data of the outcome bars."""

import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mm_cb.core.records import Curve, Representations, SetStates
from mm_cb.metrics.results import Measurement
from mm_cb.report.labels import (
    CONDITIONS,
    OUTCOMES,
    OVER_REFUSAL_OUTCOMES,
    SET_COLOURS,
    SETS,
    SPARE_COLOURS,
    SUBJECT_COLOURS,
    label,
    rule_labels,
    subject_label,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK = "#010203"
"""Stands for the page's own text colour: replaced by ``currentColor`` in the finished SVG."""
_SIZE = (4.1, 2.9)
_WIDE = (9.6, 2.7)
_LAYERS = (4.1, 3.5)
_DRAWN = tuple(dict.fromkeys((*SUBJECT_COLOURS.values(), *SET_COLOURS.values(), *SPARE_COLOURS)))
"""Colours of lines: style.css may give another shade on a dark ground."""
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9.5,
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "axes.edgecolor": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.7,
    "axes.grid": True,
    "grid.color": "#808080",
    "grid.alpha": 0.25,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
}


@dataclass(frozen=True)
class Chart:
    """One drawing with its title and, for readers who cannot see it, its content in words."""

    title: str
    svg: str
    description: str
    small: str = ""
    """The same for a telephone, where the drawing is too wide to be read there."""


@dataclass(frozen=True)
class Bar:
    """Outcomes of one subject under one condition."""

    subject: str
    total: int
    parts: tuple[tuple[str, int, float], ...]
    """Outcome, count, share in percent; outcomes that did not occur are left out."""

    @property
    def description(self) -> str:
        """The bar in words."""
        return ", ".join(f"{label(OUTCOMES, name)} {count}" for name, count, _ in self.parts) + f", n = {self.total}"


def outcome_bars(measurements: Sequence[Measurement], subjects: Sequence[str]) -> list[tuple[str, list[Bar]]]:
    """Per condition the outcome counts of every subject, in canonical order; empty pairs are left out."""
    found = {(m.condition, m.subject): m for m in measurements if m.metric == "compliance" and m.split == "all"}
    conditions = [c for c in CONDITIONS if any(key[0] == c for key in found)]
    conditions += sorted({key[0] for key in found} - set(CONDITIONS))
    groups = []
    for condition in conditions:
        bars = [outcome_bar(found[condition, s], OUTCOMES) for s in subjects if (condition, s) in found]
        if bars:
            groups.append((label(CONDITIONS, condition), bars))
    return groups


def refusal_bars(measurements: Sequence[Measurement], subjects: Sequence[str]) -> list[tuple[str, list[Bar]]]:
    """How benign requests were answered by every subject: alone, then beside attacked pictures."""
    found = {(m.condition, m.subject): m for m in measurements if m.metric == "over_refusal" and m.split == "all"}
    conditions = sorted({condition for condition, _ in found}, key=lambda name: (name != "no_attack", name))
    names = rule_labels(("over_refusal", condition) for condition in conditions)
    groups = []
    for condition in conditions:
        measured = [found[condition, s] for s in subjects if (condition, s) in found]
        if measured:
            bars = [outcome_bar(m, OVER_REFUSAL_OUTCOMES) for m in measured]
            groups.append((names["over_refusal", condition], bars))
    return groups


def outcome_bar(measurement: Measurement, outcomes: Mapping[str, str]) -> Bar:
    """The stacked bar of one measurement's outcome counts."""
    counts = {name: int(measurement.counts.get(name, 0)) for name in outcomes}
    total = sum(counts.values())
    parts = tuple((name, count, 100 * count / total) for name, count in counts.items() if count)
    return Bar(measurement.subject, total, parts)


def curve_charts(curves: Sequence[Curve]) -> list[Chart]:
    """Per attack one panel: best-so-far or running loss of every subject, median with quartile band."""
    panels: dict[str, list[Curve]] = {}
    for curve in curves:
        if curve["q50"]:
            panels.setdefault(curve["condition"], []).append(curve)
    order = [c for c in CONDITIONS if c in panels] + sorted(set(panels) - set(CONDITIONS))
    return [_curve_chart(condition, panels[condition]) for condition in order]


def _curve_chart(condition: str, curves: Sequence[Curve]) -> Chart:
    from matplotlib.ticker import MaxNLocator

    names = [f"{subject_label(curve['subject'], short=True)} (n = {curve['n']})" for curve in curves]

    def draw(axes: "Axes") -> None:
        for index, curve in enumerate(curves):
            subject = curve["subject"]
            colour = SUBJECT_COLOURS.get(subject, SPARE_COLOURS[index % len(SPARE_COLOURS)])
            steps = range(len(curve["q50"]))
            axes.fill_between(steps, curve["q25"], curve["q75"], color=colour, alpha=0.2, linewidth=0)
            axes.plot(steps, curve["q50"], color=colour, linewidth=1.8, linestyle=_dash(index), label=names[index])
        axes.margins(x=0.01)
        axes.set_xlabel("step of the attack")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        lowest = min(min(curve["q25"]) for curve in curves)
        if lowest > 0:
            axes.set_yscale("log")
            _plain_numbers(axes)
        axes.set_ylabel("attack loss, log scale" if lowest > 0 else "attack loss")
        axes.legend(loc="best", fontsize=8.5)

    wide, small = (_svg(draw, f"curve-{condition}-{size[0]}", size) for size in (_WIDE, _SIZE))
    medians = (f"{curve['q50'][0]:.3g} at the start, {curve['q50'][-1]:.3g} at the end" for curve in curves)
    words = "; ".join(f"{name}: median {median}" for name, median in zip(names, medians, strict=True))
    return Chart(label(CONDITIONS, condition), wide, words, small)


def _plain_numbers(axes: "Axes") -> None:
    """0.5 and 2 on a logarithmic axis, where matplotlib would write powers of ten and leave small ranges bare."""
    from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

    low, high = axes.get_ylim()
    subs = (1.0,) if high >= 100 * low else (1.0, 2.0, 5.0) if high >= 4 * low else tuple(range(1, 10))
    axes.yaxis.set_major_locator(LogLocator(subs=subs))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def layer_charts(representations: Representations | None) -> list[Chart]:
    """Two panels over the layers: how far states turned away from the reference, and how long they are."""
    if representations is None:
        return []
    layers = representations["layers"]
    sets = {name: values for name, values in representations["sets"].items() if values["n"]}

    def cosine(axes: "Axes") -> None:
        for index, (name, values) in enumerate(sets.items()):
            axes.plot(layers, values["cosine"], **_set_style(name, index), label=_set_label(name, values))
        axes.axhline(0, color=_INK, linewidth=0.6)
        axes.set_ylabel("cosine, adapted to reference")
        axes.set_ylim(min(-0.1, axes.get_ylim()[0]), 1.08)
        _mark_layers(axes, representations)

    def norms(axes: "Axes") -> None:
        for index, (name, values) in enumerate(sets.items()):
            style = _set_style(name, index)
            axes.plot(layers, values["norm_adapted"], **style, label=_set_label(name, values))
            axes.plot(layers, values["norm_reference"], **{**style, "linestyle": ":", "linewidth": 1.1, "marker": ""})
        axes.set_ylabel("length of the state (dotted: before)")
        axes.set_ylim(bottom=0)
        _mark_layers(axes, representations)

    turned = (f"{_set_label(name, values)}: lowest {min(values['cosine']):.2f}" for name, values in sets.items())
    ends = (
        f"{_set_label(name, values)}: {values['norm_reference'][-1]:.1f} before, {values['norm_adapted'][-1]:.1f} after"
        for name, values in sets.items()
    )
    return [
        Chart("Direction: cosine to the state before training", _svg(cosine, "cosine", _LAYERS), "; ".join(turned)),
        Chart("Length: norm before and after training", _svg(norms, "norm", _LAYERS), f"At the end: {'; '.join(ends)}"),
    ]


def _set_label(name: str, values: SetStates) -> str:
    return f"{label(SETS, name)} (n = {values['n']})"


def _set_style(name: str, index: int) -> dict[str, Any]:
    colour = SET_COLOURS.get(name, SPARE_COLOURS[index % len(SPARE_COLOURS)])
    return {"color": colour, "linewidth": 1.8, "linestyle": _dash(index), "marker": "osD^v"[index % 5], "markersize": 4}


def _dash(index: int) -> Any:
    return ("-", (0, (5, 1.6)), (0, (1.5, 1.2)), "-.")[index % 4]


def _mark_layers(axes: "Axes", representations: Representations) -> None:
    """Shade the blocks that carry LoRA (block b leads from state b to state b + 1) and point at the target layers."""
    from matplotlib.ticker import MaxNLocator

    for block in representations.get("lora_blocks") or []:
        axes.axvspan(block, block + 1, color="#808080", alpha=0.14, linewidth=0)
    for layer in representations.get("target_layers", []):
        axes.axvline(layer, color=_INK, linewidth=0.8, linestyle=(0, (2, 2)), alpha=0.7)
    axes.set_xlabel("hidden state (0 = embeddings, k = after block k)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(loc="lower left", bbox_to_anchor=(-0.02, 1), fontsize=8.5, borderaxespad=0.3, labelspacing=0.25)


def _svg(draw: Any, salt: str, size: tuple[float, float] = _SIZE) -> str:
    """Run ``draw`` on fresh axes and return SVG text: same data, same bytes."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    style: Any = {**_STYLE, "svg.hashsalt": salt}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=size)
        top = 1 - (0.7 if size == _LAYERS else 0.08) / size[1]
        left, bottom = 0.75 / size[0], 0.5 / size[1]
        figure.subplots_adjust(left=left, right=1 - 0.15 / size[0], top=top, bottom=bottom)
        FigureCanvasSVG(figure)
        draw(figure.add_subplot())
        return _inline(figure)


def _inline(figure: "Figure") -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg)
    svg = re.sub(r'(<svg[^>]*?) (?:width|height)="[^"]*"', r"\1", svg)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font: \1px system-ui, sans-serif", svg)
    for colour in _DRAWN:
        svg = svg.replace(colour, f"var(--c-{colour[1:]},{colour})")
    return svg.replace("<svg", '<svg role="img" aria-hidden="true"', 1).replace(_INK, "currentColor")
