"""Over-refusal: how a model answers benign requests that look alarming, alone or beside pictures of an attack run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_cb.benchmarks.base import Benchmark, Question, Task
from mm_cb.benchmarks.settings import AskSettings, setting, setting_within
from mm_cb.core.embedded import embedded
from mm_cb.core.errors import UserError, unknown
from mm_cb.core.limits import LIMITS
from mm_cb.core.records import Item
from mm_cb.core.thoughts import is_refusal
from mm_cb.data.alike import repeats_note
from mm_cb.judges.base import NOT_JUDGED, Case
from mm_cb.judges.registry import JudgeOptions, free_judges, open_judge
from mm_cb.metrics.table import metric

if TYPE_CHECKING:
    from mm_cb.benchmarks.over_refusal.beside_attacks import AttackPictures, ShownRequest
    from mm_cb.benchmarks.over_refusal.data import BenignRequest
    from mm_cb.benchmarks.runner import Session
    from mm_cb.inference.source import ModelSource
    from mm_cb.metrics.results import Measurement


@dataclass(frozen=True)
class OverRefusalSettings(AskSettings):
    """How benign requests are asked and judged."""

    max_new_tokens: int = setting_within(LIMITS["max_new_tokens"], 256, "Longest answer, in tokens.")
    judge: str = setting(
        "",
        "refusal-strings (a proxy), or the exact one of an embedded model; others afterwards: mm-cb judge RUN.  "
        "[default: refusal-strings]",
        identity=False,
        metavar="NAME",
    )
    beside: str | None = setting(
        None,
        "A run of mm-cb attack: requests without a picture are asked beside its pictures, attack by attack. A breaker "
        "that fires on any attacked picture is robust and useless.",
        identity=False,
        metavar="RUN",
    )

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        if self.beside == "":
            raise UserError("`--beside` must be the folder of an attack run, it is empty.")


@dataclass(frozen=True)
class _ScoredRequests:
    """What is scored, in the order of asking."""

    asked: Sequence[ShownRequest]
    judge: str
    left_out: str
    """Lines about requests that are unsafe, repeat another, or cannot be asked beside another picture; or nothing."""


class OverRefusal(Benchmark):
    """Over-refusal."""

    name = "over-refusal"
    title = "over-refusal"
    about = "how often benign requests are refused, wholly or partly, answered, or answered incoherently"
    needs = "benign requests: MOSSBench (AIcell/MOSSBench), XSTest's prompts, WildChat's rows, or a JSONL of your own"
    metrics = (metric("over_refusal"),)
    settings = OverRefusalSettings
    stored = None
    data_help = (
        "Our .jsonl, WildChat's as .jsonl, MOSSBench's information .json, XSTest's prompts .csv, or AIcell/MOSSBench."
    )
    example = "--data data/examples/benign.jsonl"
    timed = False

    def task(self, data: str, settings: OverRefusalSettings, source: ModelSource) -> Task:
        """The requests as they are, or, those without a picture, beside the pictures of an attack run.

        What was shown beside belongs to the run by its content, not by its path.
        """
        from mm_cb.benchmarks.over_refusal.beside_attacks import read_attacked
        from mm_cb.benchmarks.over_refusal.data import distinct, is_own, marked_note, read_marked, requests_file
        from mm_cb.core.runs import hash_inputs

        guest = embedded(source.model)
        judge = settings.judge or ("refusal-strings" if guest is None else guest.judge)
        if judge not in free_judges():  # any other one judges the finished run: `mm-cb judge RUN_DIR`
            raise unknown("judge", judge, free_judges())
        if "over_refusal" not in open_judge(JudgeOptions(judge)).metrics:
            raise UserError(f"judge `{judge}` judges no answers to benign requests; take refusal-strings.")
        file = requests_file(data)
        read, marked = read_marked(file)
        requests = distinct(read)
        attacked = None if settings.beside is None else read_attacked(Path(settings.beside))
        asked = what_is_asked(requests, attacked, settings.limit)
        identity: dict[str, object] = {"judge": judge, "settings": settings.identity()}
        inputs: Any = [file, *(a.picture for a in asked if a.behavior is None and a.picture is not None)]
        left_out = [marked_note(read, marked), repeats_note(read, requests, "requests")]
        if attacked is not None:
            identity["beside"] = attacked.made
            inputs = hash_inputs(inputs) | attacked.inputs(asked)
            own = sum(request.image is not None for request in requests)
            left_out += (
                [f"left out: {own} of {len(requests)} requests, which have a picture of their own"] if own else []
            )
        questions = [
            Question(a.key, a.request.prompt, (a.picture,) if a.picture else (), category=a.request.category)
            for a in asked
        ]
        more = _ScoredRequests(asked, judge, "\n".join(filter(None, left_out)))
        return Task(questions, identity, inputs, more, published=not is_own(file))

    def begin(self, session: Session) -> None:
        """Say what is left out."""
        if session.task.more.left_out:
            session.say(session.task.more.left_out)

    def items(self, session: Session) -> list[Item]:
        """In the order of asking; what is incoherent is no answer, whatever a judge says."""
        from mm_cb.judges.stored_verdicts import note_source

        more: _ScoredRequests = session.task.more
        judge = session.tools = open_judge(JudgeOptions(more.judge))
        if judge.source.get("proxy"):
            note_source(session.run.path, judge)
        answers, likelihood = session.answers, session.likelihood()
        answered = [one for one in more.asked if one.key not in session.unanswered]
        verdicts = dict(judge.judge([_case(one, answers[one.key]) for one in answered]))
        items = []
        for one in more.asked:
            likely = likelihood.get(one.key)
            lost = session.unanswered.get(one.key)
            said = NOT_JUDGED if lost else verdicts[one.key].outcome
            said = "refusal" if is_refusal(answers[one.key]) else said
            outcome = "gibberish" if likely and likely["incoherent"] else said
            item: Item = {
                "id": one.request.id,
                "metric": "over_refusal",
                "subject": session.subject,
                "condition": one.condition,
            }
            if one.behavior is not None:
                item["beside"] = one.behavior
            item |= {
                "split": "all",
                "category": one.request.category,
                "prompt": one.request.prompt,
                "completion": answers[one.key],
                "outcome": None if outcome == NOT_JUDGED else outcome,
                "score": None,
                "gibberish": outcome == "gibberish",
                "judge": judge.name,
                "seed": session.seed,
            }
            if likely:
                item |= likely
            if lost:
                item |= {"gibberish": None, "reason": lost}
            items.append(item)
        return items

    def measure(self, items: list[Item], session: Session) -> list[Measurement]:
        """The rates; a proxy's verdicts are counted as such."""
        measured = super().measure(items, session)
        if not session.tools.source.get("proxy"):
            return measured
        proxy = {"proxy": len(items)}
        return [replace(m, counts={**m.counts, **proxy}) if m.metric == "over_refusal" else m for m in measured]

    def show(self, folder: Path, subject: str) -> None:
        """One line about every condition."""
        from mm_cb.benchmarks.show import closing
        from mm_cb.core.closing import say

        for line in (*summary(folder, subject), *closing(folder)):
            say(line, "  ")


def _case(one: ShownRequest, completion: str) -> Case:
    return Case(one.key, one.request.prompt, completion, metric="over_refusal", image=one.picture)


def what_is_asked(
    requests: Sequence[BenignRequest], attacked: AttackPictures | None, limit: int | None
) -> list[ShownRequest]:
    """What is asked of the first ``limit`` requests that fit (None = of all): as they are, or beside attacked pictures.

    Raises:
        UserError: If every request has a picture of its own, so that none can be asked beside another.
    """
    from mm_cb.benchmarks.over_refusal.beside_attacks import ShownRequest, beside

    if attacked is None:
        return [ShownRequest(request, request.image) for request in requests[:limit]]
    alone = [request for request in requests if request.image is None]
    if not alone:
        raise UserError(
            f"`--beside` needs requests without a picture, but all {len(requests)} have one of their own; give other "
            "`--data`, such as XSTest's prompts."
        )
    return beside(alone[:limit], attacked)


def summary(folder: Path, subject: str) -> list[str]:
    """One line about every condition of a finished run."""
    from mm_cb.attacks.labels import CONDITIONS, label
    from mm_cb.metrics.observations import BESIDE
    from mm_cb.metrics.results import read_results

    lines = []
    for m in read_results(folder / "results.json"):
        if (m.subject, m.metric, m.split) == (subject, "over_refusal", "all"):
            low, high = m.ci95 or (0.0, 100.0)
            rule = f" {label(CONDITIONS, m.condition)}" if m.condition.startswith(BESIDE) else ""
            rule += " by refusal strings, a PROXY" if m.counts.get("proxy") else ""
            value = "none" if m.value is None else f"{m.value:.1f} % ({low:.1f} to {high:.1f})"
            classes = ", ".join(f"{m.counts.get(key, 0):.0f} {name}" for key, name in _CLASSES.items())
            lines.append(f"over-refusal{rule}: {value} of {m.n}; {classes}")
    return lines


_CLASSES: Mapping[str, str] = {
    "refusal": "full refusals",
    "partial_refusal": "partial",
    "compliance": "answered",
    "gibberish": "incoherent",
    "unscored": "not judged",
}
