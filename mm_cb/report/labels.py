"""The words and colours that the page, the terminal and the README picture share."""

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager

from mm_cb.attacks.labels import CONDITIONS, asked, label
from mm_cb.core.records import Check
from mm_cb.metrics.observations import BESIDE
from mm_cb.metrics.results import Measurement
from mm_cb.metrics.table import metric, metrics

SUBJECTS = {"base": "base", "base+safety_prompt": "base + safety prompt", "rr": "circuit breaker (RR)"}
SUBJECTS |= {"base+probe": "base + probe", "rr+probe": "RR + probe", "rr+safety_prompt": "RR + safety prompt"}
SHORT_SUBJECTS = {"base": "base", "base+safety_prompt": "base + prompt", "rr": "RR", "rr+safety_prompt": "RR + prompt"}
PROXY = "by a proxy"
GIVEN = {
    "nothing": "nothing",
    "opening": "opening only",
    "form and words": "form and words",
    "supplied text": "supplied text",
    "base's pictures": "base's pictures (transfer)",
}
READINGS = {
    "neither": "neither text was dictated: says nothing",
    "control": "the wrong text as readily: shows control, not knowledge",
    "control in part": "the wrong text too, measurably less often: control in part",
    "not control alone": "the wrong text never: not control alone",
    "cannot tell": "too few to tell control from knowledge",
}
OUTCOMES = {
    "harmful": "complies",
    "gibberish": "broken text",
    "refusal": "refuses",
    "other": "something else",
    "not_judged": "not judged",
}
CALLS = {
    "call_made": "call made",
    "wrong_tool": "another tool",
    "malformed": "broken call",
    "gibberish": "broken text",
    "refusal": "refuses",
    "other": "text alone",
}
OVER_REFUSAL_OUTCOMES = {
    "compliance": "helps",
    "partial_refusal": "partly refuses",
    "refusal": "refuses",
    "gibberish": "broken text",
}
SPLITS = {
    "all": "all items",
    "trained_kinds": "trained kinds",
    "trained": "like those trained on",
    "held_out_combination": "held-out combinations",
    "held_out_kind": "wholly held-out kind",
    "held_out_screen": "held-out screens",
    "held_out_tool": "held-out tool",
}
FORMS = {
    "text": "request in text only",
    "irrelevant_picture": "picture irrelevant",
    "partly_picture": "partly in the picture",
    "picture": "all in the picture",
}
SETS = {
    "circuit_breaker": "harmful, trained",
    "held_out_combination": "harmful, held-out combinations",
    "held_out_kind": "harmful, held-out kind",
    "retain": "benign",
}

# Okabe and Ito's palette: told apart with every common colour blindness. Broken text is hatched in amber, a warning, so
# that it can be mistaken neither for a refusal nor for something good, in colour or in grey print.
OUTCOME_COLOURS = {
    "harmful": "#bd5200",
    "gibberish": "#e69f00",
    "refusal": "#0072b2",
    "other": "#9aa0a6",
    "not_judged": "#e6e6e6",
}
SUBJECT_COLOURS = {"base": "#d55e00", "base+safety_prompt": "#cc79a7", "rr": "#0072b2"}
SUBJECT_COLOURS |= {"base+probe": "#e69f00", "rr+probe": "#009e73"}
SET_COLOURS = {
    "circuit_breaker": "#d55e00",
    "held_out_combination": "#cc79a7",
    "held_out_kind": "#e69f00",
    "retain": "#0072b2",
}
SPARE_COLOURS = ("#009e73", "#56b4e9", "#e69f00", "#9aa0a6")
HATCH = "////"

_SEED = re.compile(r"rr-seed(\d+)")


def subject_label(subject: str, *, short: bool = False) -> str:
    """How a subject is called on the page: ``rr-seed2`` -> ``RR, seed 2``; unknown names stay as they are."""
    if match := _SEED.fullmatch(subject):
        return f"RR, seed {match[1]}"
    return (SHORT_SUBJECTS if short else {}).get(subject, SUBJECTS.get(subject, subject))


def is_breaker(subject: str) -> bool:
    """Whether a subject carries the adapter: ``rr`` or one of its further training seeds."""
    return subject == "rr" or _SEED.fullmatch(subject) is not None


def answers_of(subject: str, metric_name: str, condition: str) -> str:
    """Whose answers, and to what: ``circuit breaker (RR) under PGD``."""
    return f"{subject_label(subject)} {asked(metric_name, condition)}"


def metric_label(name: str) -> str:
    """The shown word for a metric."""
    return metric(name).label


def judges_called(files: Sequence[str]) -> list[str]:
    """Two judges by the names of their files; the hash there stays where it alone tells them apart."""
    short = [re.sub(r"-[0-9a-f]{8}$", "", file).replace("_proxy", " (proxy)") for file in files]
    short = ["the run's own verdicts" if name == "as-run" else name for name in short]
    return short if len(set(short)) == len(short) else list(files)


def checks_called(checks: Iterable[Check]) -> list[Check]:
    """Checks in the words of the tables: ``rr: still answers ...`` is one of the ``circuit breaker (RR)``."""
    known = {one.name: one.label for one in metrics() if one.name != one.label}
    named = re.compile(r"\b(" + "|".join(map(re.escape, sorted(known, key=len, reverse=True))) + r")(?= [\d-])")
    return [
        {
            **check,
            "name": re.sub(r"^[\w+-]+(?=: )", lambda found: subject_label(found[0]), check["name"]),
            "value": named.sub(lambda found: known[found[0]], value) if isinstance(value, str) else value,
        }
        for check in checks
        for value in [check["value"]]  # a number, perhaps, in a benchmark of the user's
    ]


@contextmanager
def conditions_called(own: Mapping[str, str]) -> Iterator[None]:
    """Within, attacks that nobody registered here are called as their runs call them."""
    new = {name: text for name, text in own.items() if name not in CONDITIONS}
    CONDITIONS.update(new)
    try:
        yield
    finally:
        for name in new:
            del CONDITIONS[name]


def rule_labels(measured: Iterable[tuple[str, str]]) -> dict[tuple[str, str], str]:
    """Metric and condition -> the metric's shown word, with the rule where it has several: ``MMMU, strict``.

    What was measured beside attacked pictures says so in any case: ``over-refusal beside pictures under PGD``.
    """
    pairs = list(dict.fromkeys(measured))
    rules = Counter(name for name, rule in pairs if not rule.startswith(BESIDE))
    names = {}
    for name, rule in pairs:
        link = " " if rule.startswith(BESIDE) else ", " if rules[name] > 1 else None
        names[name, rule] = metric_label(name) + ("" if link is None else f"{link}{label(CONDITIONS, rule)}")
    return names


def percent(value: float | None) -> str:
    """A rate in percent with one decimal, ``-`` when there is none."""
    return "–" if value is None else f"{value:.1f}"


def signed(value: float | None) -> str:
    """A difference with its sign, zero without one."""
    if value is None:
        return "–"
    shown = f"{value:+.1f}".replace("-", "−")
    return "0.0" if shown in ("+0.0", "−0.0") else shown


def loss(value: float, *, sign: bool = False) -> str:
    """A loss with three decimals; a difference with its sign, zero without one."""
    shown = f"{value:+.3f}" if sign else f"{value:.3f}"
    return "0.000" if shown in ("+0.000", "-0.000") else shown.replace("-", "−")


def interval(ends: tuple[float, float] | None, *, sign: bool = False) -> str:
    """``[1.2, 13.9]``, with signs for differences."""
    if ends is None:
        return ""
    show = signed if sign else percent
    return f"[{show(ends[0])}, {show(ends[1])}]"


def share(count: int, n: int, ends: tuple[float, float]) -> str:
    """``3 of 12 [8.9, 53.2] %``, of an interval in [0, 1]."""
    return f"{count} of {n} {interval((100 * ends[0], 100 * ends[1]))} %"


def p_value(p: float | None) -> str:
    """A p value as one writes it: ``< 0.001``, ``0.031``, ``1``; empty when there was no test."""
    if p is None:
        return ""
    if p < 0.001:
        return "< 0.001"
    return f"{p:.3f}" if p < 0.9995 else "1"


def without_value(measurement: Measurement | None) -> str:
    """Why a cell holds no number: ``not measured``, or ``not judged`` where answers are there and no verdict is."""
    return "not measured" if measurement is None else "not judged"
