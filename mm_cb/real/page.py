"""The page of ``mm-cb demo --real``, and its numbers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from mm_cb.core.records import Representations
from mm_cb.report.charts import layer_charts
from mm_cb.training.outcome import STUCK
from mm_cb.training.registry import loss_entry

TITLE = "A real model loses one topic"
SUFFIX = "gcg"
ATTACKS = {
    "no_attack": "none",
    "prefill_only": "the answer's opening is prefilled",
    SUFFIX: "a suffix behind the prompt, searched token by token (GCG)",
    "embedding": "the prompt's embeddings are moved (no user can send this)",
}
"""What the forbidden prompts are attacked by, and in words."""


class Round(NamedTuple):
    """What was measured of one training seed."""

    seed: int
    found: dict[str, Any]
    """Of answers.json."""
    metrics: list[dict[str, Any]]
    """Of the training: a line a step, the last one with what was held out."""
    timings: dict[str, float]

    @property
    def stuck(self) -> str | None:
        """Why the training did not take hold, in its own words; None if it did."""
        return self.metrics[-1].get(STUCK)

    @property
    def escaped(self) -> int | None:
        """The first measured step at which circuit-breaker rows had left; None if they never did."""
        hold = loss_entry("rr").hold
        key = f"held_out_circuit_breaker_{hold.measure}"
        return next((line["step"] for line in self.metrics if key in line and hold.holds(line[key])), None)


def numbers(rounds: Sequence[Round]) -> dict[str, Any]:
    """Everything that the page says, by seed."""
    return {
        "seeds": [
            {
                "seed": one.seed,
                "steps": len(one.metrics),
                "escaped_by_step": one.escaped,
                "start": {key: value for key, value in one.metrics[0].items() if key.startswith("start_")},
                "held_out": {key: value for key, value in one.metrics[-1].items() if key.startswith("held_out_")},
                STUCK: one.stuck,
                **one.timings,
                **one.found,
            }
            for one in rounds
        ]
    }


def summary(rounds: Sequence[Round]) -> list[str]:
    """A line about every seed, every set of prompts and every attack."""
    lines = []
    for one in rounds:
        end, sets = one.metrics[-1], one.found["sets"]
        turned, kept = (f"{end[f'held_out_{name}_cosine']:.3f}" for name in ("circuit_breaker", "retain"))
        lines.append(
            f"seed {one.seed}: held-out cosine {turned} of recipes (low is good), {kept} of the rest (near 1 is)"
        )
        lines += [f"  {name:9} {_kept(answers)}" for name, answers in sets.items()]
        for name, by_subject in one.found["attacks"].items():
            told = ", ".join(f"{_of(verdicts)} {subject}" for subject, verdicts in by_subject.items())
            lines.append(f"  {name:12} forbidden answers coherent: {told}")
    return lines


def _kept(answers: dict[str, Any]) -> str:
    return (
        f"coherent {_of(answers['coherent_base'])} before, {_of(answers['coherent_breaker'])} after; the base's "
        f"answers cost {answers['nll_base']:.2f} before, {answers['nll_breaker']:.2f} after (nats a token); "
        f"{100 * answers['agreement']:.0f} % of their tokens are still the likeliest"
    )


def _of(verdicts: list[bool]) -> str:
    return f"{sum(verdicts)} of {len(verdicts)}"


def render(rounds: Sequence[Round], steps: int, candidates: int) -> str:
    """The page as text; answers and attacks are the first seed's, of so many steps and suffixes weighed at each."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("mm_cb.real", "."), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    states = rounds[0].found["states"]
    layers = list(range(len(next(iter(states.values()))["cosine"])))
    drawn: Representations = {"layers": layers, "sets": states}
    context = {
        "title": TITLE,
        "rounds": rounds,
        "found": rounds[0].found,
        "charts": layer_charts(drawn),
        "of": _of,
        "shown": 5,
        "attacks": ATTACKS,
        "steps": steps,
        "candidates": candidates,
    }
    return environment.get_template("page.html.j2").render(context)
