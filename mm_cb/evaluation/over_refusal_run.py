"""Over-refusal: how a model answers benign requests that look alarming, alone or beside pictures of an attack run."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mm_cb import hub
from mm_cb.errors import UserError, unknown
from mm_cb.evaluation.judges.base import NOT_JUDGED, Case, Judge
from mm_cb.evaluation.over_refusal import BenignRequest, file_picture, read_requests, requests_file
from mm_cb.evaluation.source import Source

JUDGES = ("refusal-strings", "miniature")
"""Those that need no model; any other one judges the finished run: ``mm-cb judge RUN_DIR``."""


@dataclass(frozen=True)
class Settings:
    """Of a model that is asked."""

    max_new_tokens: int = 256
    limit: int = 0
    """First so many requests, for a trial; 0 = all."""
    batch: int = 8
    """Requests answered at once. No part of the run's identity."""

    def __post_init__(self) -> None:
        """Check the values."""
        for name in ("batch", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"`{name}` must be at least 1, got {getattr(self, name)}.")


def run_over_refusal(
    source: Source, settings: Settings, out: Path, *, data: str, judge: str | None, subject: str, seed: int
) -> None:
    """Ask all requests and classify the answers: refusal, partial refusal, compliance, incoherent.

    Raises:
        UserError: If the data are not as expected, or the endpoint fails; finished answers are kept.
    """
    from mm_cb.evaluation.attack_run import weights_of
    from mm_cb.evaluation.base_nll import likelihood_fields
    from mm_cb.evaluation.generation import Request, complete_all, refusal_note
    from mm_cb.evaluation.judges.choose import JudgeOptions, open_judge
    from mm_cb.evaluation.results import measure, write_results
    from mm_cb.evaluation.served import open_engine
    from mm_cb.progress import Progress
    from mm_cb.runs import RunDirectory, write_jsonl

    name = judge or ("miniature" if source.model == "miniature" else "refusal-strings")
    if name not in JUDGES:
        raise unknown("judge", name, JUDGES)
    hub.keep_to(out)
    file = requests_file(data)
    requests = read_requests(file)[: settings.limit or None]
    asked = [Request(r.id, r.prompt, () if r.image is None else (file_picture(r.image),)) for r in requests]
    kept = {key: value for key, value in asdict(settings).items() if key != "batch"}
    recipe = {"benchmark": "over-refusal", **source.identity(), "subject": subject, "judge": name, "settings": kept}
    pictures = [r.image for r in requests if r.image is not None]
    weights = [] if source.endpoint else weights_of(source.model, source.adapter)
    inputs = [file, *pictures, *hub.used(data, kind="dataset"), *weights]
    with RunDirectory(out, "eval", recipe, seed, inputs=inputs) as run, Progress() as progress:
        store = run.path / "parts" / "completions.jsonl"
        if not run.finished:
            task = progress.task(f"{subject}: over-refusal", total=len(asked))
            engine = open_engine(source, subject, settings.batch)
            completions = complete_all(engine, asked, store, settings.max_new_tokens, task)
            opened = open_judge(JudgeOptions(name))
            likelihood = likelihood_fields(engine, asked, completions, settings.batch)
            items = classify(requests, completions, opened, likelihood, subject, seed)
            write_jsonl(run.path / "items.jsonl", items)
            proxy = {"proxy": len(items)} if opened.source.get("proxy") else {}
            write_results(run.path / "results.json", with_counts(measure(items, pairs=[], seed=seed), proxy))
            run.finish()
        progress.say(summary(run.path, subject))
        if note := refusal_note(store):
            progress.say(note)


def classify(
    requests: Sequence[BenignRequest],
    completions: Mapping[str, str],
    judge: Judge,
    likelihood: Mapping[str, Mapping[str, Any]],
    subject: str,
    seed: int,
) -> list[dict[str, Any]]:
    """Records of items.jsonl, in the order of the requests; what is incoherent is no answer, whatever a judge says."""
    cases = [Case(r.id, r.prompt, completions[r.id], metric="over_refusal", image=r.image) for r in requests]
    verdicts = dict(judge.judge(cases))
    items = []
    for request in requests:
        fields = likelihood.get(request.id, {})
        outcome = "gibberish" if fields.get("incoherent") else verdicts[request.id].outcome
        item: dict[str, Any] = {
            "id": request.id,
            "metric": "over_refusal",
            "subject": subject,
            "condition": "no_attack",
        }
        item |= {"split": "all", "category": request.category, "prompt": request.prompt}
        item |= {"completion": completions[request.id], "outcome": None if outcome == NOT_JUDGED else outcome}
        item |= {"score": None, "gibberish": outcome == "gibberish", "judge": judge.name, "seed": seed, **fields}
        items.append(item)
    return items


def with_counts(measurements: Iterable[Any], counts: Mapping[str, int]) -> list[Any]:
    """Measurements of over-refusal with further counts, a proxy's label among them."""
    from dataclasses import replace

    return [replace(m, counts={**m.counts, **counts}) if m.metric == "over_refusal" else m for m in measurements]


def summary(folder: Path, subject: str) -> str:
    """One line about a finished run."""
    from mm_cb.evaluation.results import find, read_results

    m = find(read_results(folder / "results.json"), subject, "over_refusal", "no_attack")
    assert m is not None
    low, high = m.ci95 or (0.0, 100.0)
    label = " by refusal strings, a PROXY" if m.counts.get("proxy") else ""
    value = "none" if m.value is None else f"{m.value:.1f} % ({low:.1f} to {high:.1f})"
    classes = ", ".join(f"{m.counts.get(key, 0):.0f} {name}" for key, name in _CLASSES.items())
    return f"over-refusal{label}: {value} of {m.n}; {classes}; results {folder / 'results.json'}"


_CLASSES = {
    "refusal": "full refusals",
    "partial_refusal": "partial",
    "compliance": "answered",
    "gibberish": "incoherent",
    "unscored": "not judged",
}
