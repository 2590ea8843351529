"""Over-refusal: how a model answers benign requests that look alarming, alone or beside pictures of an attack run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mm_cb.benchmarks.over_refusal.beside_attacks import Asked, AttackPictures, beside, read_attacked
from mm_cb.benchmarks.over_refusal.data import BenignRequest, file_picture, read_requests, requests_file
from mm_cb.core import hub
from mm_cb.core.embedded import embedded
from mm_cb.core.errors import UserError, unknown
from mm_cb.inference.source import Source
from mm_cb.judges.base import NOT_JUDGED, Case, Judge
from mm_cb.metrics.observations import BESIDE

if TYPE_CHECKING:
    from mm_cb.inference.generation import Request


@dataclass(frozen=True)
class Settings:
    """Of a model that is asked."""

    max_new_tokens: int = 256
    limit: int = 0
    """First so many requests, for a trial; 0 = all."""
    batch: int = 8
    """Requests answered at once. No part of the run's identity."""
    pictures: str | None = None
    """A run of ``mm-cb attack``: requests without a picture are asked beside its pictures. Its content, not its path,
    belongs to the run's identity."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("batch", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        if self.pictures == "":
            raise UserError("`pictures` must be the folder of an attack run, it is empty.")


def run_over_refusal(
    source: Source, settings: Settings, out: Path, *, data: str, judge: str | None, subject: str, seed: int
) -> None:
    """Ask all requests and classify the answers: refusal, partial refusal, compliance, incoherent.

    With ``pictures``, requests without a picture of their own are asked instead, once beside the pictures of every
    attack of that run; those that have one are left out.

    Raises:
        UserError: If the data are not as expected, or the endpoint fails; finished answers are kept.
    """
    from mm_cb.attacks.run import weights_of
    from mm_cb.core.progress import Progress
    from mm_cb.core.runs import RunDirectory, hash_inputs, write_jsonl
    from mm_cb.inference.base_nll import likelihood_fields
    from mm_cb.inference.generation import complete_all, refusal_note
    from mm_cb.inference.served import open_engine
    from mm_cb.judges.registry import JudgeOptions, free_judges, open_judge
    from mm_cb.metrics.results import measure, write_results

    guest = embedded(source.model)
    name = judge or ("refusal-strings" if guest is None else guest.judge)
    if name not in free_judges():  # any other one judges the finished run: `mm-cb judge RUN_DIR`
        raise unknown("judge", name, free_judges())
    hub.keep_to(out)
    file = requests_file(data)
    requests = read_requests(file)
    attacked = None if settings.pictures is None else read_attacked(Path(settings.pictures))
    asked = questions(requests, attacked, settings.limit)
    turns = _turns(asked)
    kept = {key: value for key, value in asdict(settings).items() if key not in ("batch", "pictures")}
    recipe = {"benchmark": "over-refusal", **source.identity(), "subject": subject, "judge": name, "settings": kept}
    weights = [] if source.endpoint else weights_of(source.model, source.adapter)
    own = [a.picture for a in asked if a.behavior is None and a.picture is not None]
    inputs: Any = [file, *own, *hub.used(data, kind="dataset"), *weights]
    if attacked is not None:
        recipe["beside"] = attacked.made
        inputs = hash_inputs(inputs) | attacked.inputs(asked)
    with RunDirectory(out, "eval", recipe, seed, inputs=inputs) as run, Progress() as progress:
        store = run.path / "parts" / "completions.jsonl"
        if not run.finished:
            task = progress.task(f"{subject}: over-refusal", total=len(turns))
            engine = open_engine(source, subject, settings.batch)
            completions = complete_all(engine, turns, store, settings.max_new_tokens, task)
            verdicts = open_judge(JudgeOptions(name))
            likelihood = likelihood_fields(engine, turns, completions, settings.batch)
            items = classify(asked, completions, verdicts, likelihood, subject, seed)
            write_jsonl(run.path / "items.jsonl", items)
            proxy = {"proxy": len(items)} if verdicts.source.get("proxy") else {}
            write_results(run.path / "results.json", with_counts(measure(items, pairs=[], seed=seed), proxy))
            run.finish()
        for line in summary(run.path, subject):
            progress.say(line)
        if attacked is not None and (left_out := sum(r.image is not None for r in requests)):
            progress.say(f"left out: {left_out} of {len(requests)} requests, which have a picture of their own")
        if note := refusal_note(store):
            progress.say(note)


def questions(requests: Sequence[BenignRequest], attacked: AttackPictures | None, limit: int) -> list[Asked]:
    """What is asked of the first ``limit`` requests that fit (0 = of all): as they are, or beside attacked pictures.

    Raises:
        UserError: If every request has a picture of its own, so that none can be asked beside another.
    """
    if attacked is None:
        return [Asked(request, request.image) for request in requests[: limit or None]]
    alone = [request for request in requests if request.image is None]
    if not alone:
        raise UserError(
            f"`pictures` needs requests without a picture, but all {len(requests)} have one of their own; give other "
            "`--data`, such as XSTest's prompts."
        )
    return beside(alone[: limit or None], attacked)


def _turns(asked: Sequence[Asked]) -> list[Request]:
    """What the model is sent; every picture is opened once, so that a broken one is found before anything is asked."""
    from mm_cb.inference.generation import Request

    opened = {picture: file_picture(picture) for picture in {a.picture: None for a in asked} if picture is not None}
    return [Request(a.key, a.request.prompt, (opened[a.picture],) if a.picture else ()) for a in asked]


def classify(
    asked: Sequence[Asked],
    completions: Mapping[str, str],
    judge: Judge,
    likelihood: Mapping[str, Mapping[str, Any]],
    subject: str,
    seed: int,
) -> list[dict[str, Any]]:
    """Records of items.jsonl, in the order of asking; what is incoherent is no answer, whatever a judge says."""
    cases = [Case(a.key, a.request.prompt, completions[a.key], metric="over_refusal", image=a.picture) for a in asked]
    verdicts = dict(judge.judge(cases))
    items = []
    for one in asked:
        fields = likelihood.get(one.key, {})
        outcome = "gibberish" if fields.get("incoherent") else verdicts[one.key].outcome
        item: dict[str, Any] = {
            "id": one.request.id,
            "metric": "over_refusal",
            "subject": subject,
            "condition": one.condition,
        }
        item |= {} if one.behavior is None else {"beside": one.behavior}
        item |= {"split": "all", "category": one.request.category, "prompt": one.request.prompt}
        item |= {"completion": completions[one.key], "outcome": None if outcome == NOT_JUDGED else outcome}
        item |= {"score": None, "gibberish": outcome == "gibberish", "judge": judge.name, "seed": seed, **fields}
        items.append(item)
    return items


def with_counts(measurements: Iterable[Any], counts: Mapping[str, int]) -> list[Any]:
    """Measurements of over-refusal with further counts, a proxy's label among them."""
    from dataclasses import replace

    return [replace(m, counts={**m.counts, **counts}) if m.metric == "over_refusal" else m for m in measurements]


def summary(folder: Path, subject: str) -> list[str]:
    """One line about every condition of a finished run."""
    from mm_cb.metrics.results import read_results

    lines = []
    for m in read_results(folder / "results.json"):
        if (m.subject, m.metric, m.split) == (subject, "over_refusal", "all"):
            low, high = m.ci95 or (0.0, 100.0)
            label = f", {m.condition}" if m.condition.startswith(BESIDE) else ""
            label += " by refusal strings, a PROXY" if m.counts.get("proxy") else ""
            value = "none" if m.value is None else f"{m.value:.1f} % ({low:.1f} to {high:.1f})"
            classes = ", ".join(f"{m.counts.get(key, 0):.0f} {name}" for key, name in _CLASSES.items())
            lines.append(f"over-refusal{label}: {value} of {m.n}; {classes}")
    return [*lines, f"results {folder / 'results.json'}"]


_CLASSES = {
    "refusal": "full refusals",
    "partial_refusal": "partial",
    "compliance": "answered",
    "gibberish": "incoherent",
    "unscored": "not judged",
}
