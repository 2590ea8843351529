"""What every judge takes and gives."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from mm_cb.metrics.degenerate import degenerate

NOT_JUDGED = "not_judged"


@dataclass(frozen=True)
class Case:
    """One completion to be judged."""

    key: str
    """Unique within a run."""
    behavior: str
    """What was asked for, as the behaviour puts it: never the text of an attack."""
    completion: str
    metric: str = "compliance"
    """Or ``over_refusal``: which outcomes there are."""
    image: Path | None = None
    """The picture that the model was shown."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Further keys of the behaviour: ``context``, ``image_description``, what an embedded model's exact judge needs."""
    item: str = ""
    """Id and condition of the record that it is from, for messages."""


@dataclass(frozen=True)
class Verdict:
    """What a judge says."""

    outcome: str
    """An outcome of the metric, or ``not_judged`` when the judge's answer could not be read: never a guess."""
    score: float | None
    """In [0, 1] where the judge grades, else None."""
    raw: str
    """The judge's own words."""
    reason: str = ""
    """Why it said nothing, where its server gives no answer."""


class Judge(Protocol):
    """Something that judges completions."""

    @property
    def name(self) -> str:
        """For files and tables; a proxy says so in it."""

    @property
    def source(self) -> Mapping[str, object]:
        """What decides its verdicts (model, prompt and their hashes), as plain values."""

    @property
    def metrics(self) -> Sequence[str]:
        """The metrics whose completions it can judge."""

    def judge(self, cases: Sequence[Case]) -> Iterator[tuple[str, Verdict]]:
        """Key and verdict of every case, each as soon as it is there, in any order.

        Raises:
            EndpointError: If a case has no verdict for a reason that may pass.

        A judge may also have ``reads(case, raw)``, the verdict in words of its own: stored ones are held against it;
        and ``refuse(items, recipe)``, which raises a `UserError` where it cannot judge the records of a run.
        """


def with_degenerate(verdict: Verdict, completion: str) -> Verdict:
    """The verdict, where ``other`` becomes ``gibberish`` for an empty or looping completion.

    Classifiers answer whether harm was done; what else a completion is, they do not say.
    """
    if verdict.outcome == "other" and degenerate(completion):
        return Verdict("gibberish", verdict.score, verdict.raw)
    return verdict
