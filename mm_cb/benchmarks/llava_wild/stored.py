"""``mm-cb score llava-wild --reviews``: the official digits of stored review files, without a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from mm_cb.benchmarks.llava_wild.questions import protocol
from mm_cb.benchmarks.llava_wild.reviews import CATEGORIES, RULES, in_canonical_order, items_of, read_reviews
from mm_cb.benchmarks.show import show_rules, thought_note
from mm_cb.core.checked import read_records
from mm_cb.core.errors import UserError
from mm_cb.core.records import Item
from mm_cb.core.runs import RunDirectory, read_run, write_jsonl
from mm_cb.inference.unanswered import unanswered_note
from mm_cb.metrics.relative_score import FAILED_LIMIT
from mm_cb.metrics.results import Measurement, measure, read_results, write_results

SILENT = "most answers are empty or missing"


def run_reviews(files: Sequence[Path], out: Path, *, official_failures: bool, seed: int) -> None:
    """Summarise every review file as a subject of its own, named as the file.

    Raises:
        UserError: If a file is not as expected, or two have the same name.
    """
    if not files:
        raise UserError("`mm-cb score llava-wild` needs `--reviews`: official review files.")
    names = [file.stem for file in files]
    if len(set(names)) < len(names):
        raise UserError(f"`--reviews` must have different file names, they name the results; got {', '.join(names)}.")
    reviews = {file.stem: read_reviews(file) for file in files}
    recipe = {"benchmark": "llava-wild", "reviews": sorted(names), "official_failures": official_failures}
    with RunDirectory(out, "eval", recipe, seed, inputs=sorted(files)) as run:
        if not run.finished:
            items = [
                item
                for name, found in reviews.items()
                for review in found
                for item in items_of(
                    review.question_id, [review], {"subject": name}, official_failures=official_failures
                )
            ]
            write_jsonl(run.path / "items.jsonl", in_canonical_order(items))
            write_results(run.path / "results.json", measure(items, pairs=[], seed=seed))
            run.finish()


def show(folder: Path) -> None:
    """Print the scores of a finished run and what could make them lie."""
    from mm_cb.core.closing import say
    from mm_cb.core.progress import console

    measured = [m for m in read_results(folder / "results.json") if m.metric == "llava_wild"]
    out = console()
    for subject in dict.fromkeys(m.subject for m in measured):
        counts = {"reference": "reference_mean", "candidate": "candidate_mean", "failed": "failed"}
        out.print(f"LLaVA-Wild, {subject}")
        show_rules(folder, "", "llava_wild", subject, RULES, ("all", *CATEGORIES), counts, link=" to ", missing="none")
    for note in _notes(folder, measured):
        say(note, "  ")
    out.print(f"results {folder / 'results.json'}")


def _notes(folder: Path, measured: Sequence[Measurement]) -> Iterator[str]:
    """Who judged by which rule, what each order gives, and every reason to doubt a score."""
    recipe = read_run(folder)["recipe"]
    if "judge" in recipe:
        rule = "the original rule" if recipe["rule_is_original"] else "a rule of your own, compares with nobody else's"
        yield f"judge {recipe['judge']}, {rule}"
    for m in (m for m in measured if m.split == "all"):
        if m.value is None:
            yield f"NO SCORE {m.subject}, {m.condition}: {why_no_score(m)}"
        if m.condition != RULES[0]:
            continue
        if series := [f"{name.replace('_', ' ')} {value:.1f}" for name, value in m.counts.items() if "run_" in name]:
            yield f"{m.subject}, official, each on its own: {', '.join(series)}"
        questions = m.n + m.counts["unscored"]
        if questions != (whole := protocol()["questions"]):
            yield f"CAUTION {m.subject}: {questions:.0f} questions, published scores are over {whole}"
        items = read_records(folder / "items.jsonl", Item)
        own = [i for i in items if (i["subject"], i["condition"]) == (m.subject, m.condition) and "gibberish" in i]
        if broken := sum(bool(item["gibberish"]) for item in own):
            yield f"CAUTION {m.subject}: {broken} of {len(own)} answers are empty, repeating, noise or incoherent"
    yield from thought_note(read_records(folder / "items.jsonl", Item))
    if note := unanswered_note(folder / "parts" / "completions.jsonl"):
        yield note


def why_no_score(m: Measurement) -> str:
    """Why a measurement over all questions has no value."""
    failed = m.counts["failed"] - m.counts.get("failed_kept", 0)
    if failed > FAILED_LIMIT * m.counts["judgements"]:
        return f"{failed:.0f} of {m.counts['judgements']:.0f} judgements failed, at most 2 % may"
    if m.counts.get("reference_mean"):
        return SILENT
    return "the reference's mean is 0, no answer can be put beside it"
