"""MMMU by the official rules: prompts, random letters and all, and beside it the number without luck."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mm_cb.benchmarks.base import Benchmark, Task
from mm_cb.benchmarks.mmmu.protocol import chosen_subjects, protocol
from mm_cb.benchmarks.settings import AskSettings, Settings, setting
from mm_cb.core.errors import UserError
from mm_cb.core.records import Check, Item
from mm_cb.metrics.table import Metric

if TYPE_CHECKING:
    from mm_cb.benchmarks.mmmu.score import ScoredResponse
    from mm_cb.benchmarks.runner import Session
    from mm_cb.inference.source import ModelSource
    from mm_cb.metrics.results import Measurement

RULES = ("official", "strict")
_SUBJECTS = "MMMU subjects; none named means all 30."


@dataclass(frozen=True)
class MmmuSettings(AskSettings):
    """How MMMU is asked; 128 tokens is the reference harness's limit."""

    subjects: tuple[str, ...] = setting((), _SUBJECTS, metavar="Art,Music")
    split: str = setting("validation", "validation or dev; the answers of test are withheld.", metavar="NAME")
    prompt: str = setting("official", "Whose wording:", choices=("official", "lmms_eval"), metavar="NAME")
    pictures: str = setting(
        "named",
        "All pictures that a question names (as lmms-eval), or only the first (as the official code in effect):",
        choices=("named", "first"),
        metavar="WHICH",
    )

    def __post_init__(self) -> None:
        """Check the values."""
        super().__post_init__()
        chosen_subjects(self.subjects)
        if self.split not in protocol().questions:
            raise UserError(
                f"`split` must be one of {', '.join(protocol().questions)} (the answers of `test` are withheld), got "
                f"`{self.split}`."
            )


@dataclass(frozen=True)
class MmmuStored(Settings):
    """Answers that are there already."""

    responses: str = setting("", "Stored outputs: DIR/<Subject>/output.json, as the official code's.", metavar="DIR")
    predictions: str = setting("", "Parsed answers (JSON: id to answer), with --answers.", metavar="FILE")
    answers: str = setting("", "The official answer file.", metavar="FILE")
    subjects: tuple[str, ...] = setting((), _SUBJECTS, metavar="Art,Music")

    def __post_init__(self) -> None:
        """Check what belongs together."""
        chosen_subjects(self.subjects)
        if bool(self.responses) == bool(self.predictions):
            raise UserError("give one of `--responses` and `--predictions` (with `--answers`).")
        if bool(self.predictions) != bool(self.answers):
            raise UserError("`--predictions` and `--answers` belong together: give both or neither.")


class Mmmu(Benchmark):
    """MMMU."""

    name = "mmmu"
    title = "MMMU"
    about = "college-level questions about pictures in 30 subjects, by the official rules and without lucky guesses"
    needs = "nothing but the model: the questions come from the hub, or from a copy"
    metrics = (Metric("mmmu", "MMMU", "share of right answers", promised=True, seeded=False, shipped=True),)
    settings = MmmuSettings
    stored = MmmuStored
    dataset = "MMMU/MMMU"
    data_help = "Hub id, or a local copy: D/<Subject> of Parquet files or save_to_disk."
    example = "--data data/examples/mmmu --subjects Art"
    score_example = "--responses outputs"

    def task(self, data: str, settings: MmmuSettings, source: ModelSource) -> Task:
        """All questions of the chosen subjects, in official order."""
        from mm_cb.benchmarks.mmmu.questions import as_asked, fingerprint, read_questions

        questions = read_questions(data, settings)
        asked = [as_asked(question, settings.prompt, settings.pictures) for question in questions]
        identity = {"settings": settings.identity(), "questions_sha256": fingerprint(questions)}
        return Task(asked, identity, more=questions, published=True)

    def _scored(self, session: Session) -> list[ScoredResponse]:
        """What was answered, scored together: which letters are drawn depends on all answers."""
        from mm_cb.benchmarks.mmmu.score import score_responses

        if session.tools is None:
            answered = [q for q in session.task.more if q.id not in session.unanswered]
            session.tools = score_responses(q.answered(session.answers[q.id]) for q in answered)
        scored: list[ScoredResponse] = session.tools
        return scored

    def items(self, session: Session) -> list[Item]:
        """One record per question and rule."""
        from mm_cb.benchmarks.mmmu.score import ScoredResponse

        prompts = {question.id: question.prompt for question in session.task.questions}
        items = items_of(self._scored(session), session.subject, prompts, session.seed)
        if not session.unanswered:
            return items
        lost = [q.answered("") for q in session.task.more if q.id in session.unanswered]
        blank = [ScoredResponse(response, None, None, official=False, strict=None) for response in lost]
        for item in items_of(blank, session.subject, prompts, session.seed):
            items.append({**item, "score": None, "counts": {}, "reason": session.unanswered[item["id"]]})
        places = {question.id: place for place, question in enumerate(session.task.questions)}
        return sorted(items, key=lambda item: (RULES.index(item["condition"]), places[item["id"]]))

    def measure(self, items: list[Item], session: Session) -> list[Measurement]:
        """Every number of the run; those over all questions also say how they compare with guessing."""
        from mm_cb.benchmarks.mmmu.honesty import flags
        from mm_cb.metrics.results import measure

        extra = flags(self._scored(session))
        return [
            dataclasses.replace(m, counts=m.counts | extra) if (m.metric, m.split) == ("mmmu", "all") else m
            for m in measure(items, pairs=[])
        ]

    def checks(self, session: Session) -> list[Check]:
        """What could make the number lie."""
        from mm_cb.benchmarks.mmmu.honesty import run_checks

        return run_checks(self._scored(session))

    def score_stored(self, stored: MmmuStored, out: Path, *, data: str | None, subject: str, seed: int) -> None:
        """Score outputs in the official layout, or parsed answers, of which nobody knows which letters were drawn."""
        from mm_cb.benchmarks.mmmu.score import score_responses
        from mm_cb.benchmarks.mmmu.stored import read_predictions, read_responses, response_files
        from mm_cb.benchmarks.runner import finish_stored

        recipe: dict[str, object] = {"benchmark": self.name}
        if stored.responses:
            files: Sequence[Path] = response_files(Path(stored.responses), stored.subjects)
            scored = score_responses(read_responses(files))
            recipe |= {"responses": stored.responses, "subjects": list(stored.subjects)}
        else:
            files = [Path(stored.predictions), Path(stored.answers)]
            scored = read_predictions(files[0], files[1], stored.subjects)
            recipe |= {"predictions": stored.predictions, "answers": stored.answers}
            recipe |= {"subjects": ",".join(stored.subjects)}
        finish_stored(self, recipe | {"subject": subject}, files, out, subject=subject, seed=seed, tools=scored)

    def show(self, folder: Path, subject: str) -> None:
        """Overall and by domain, both rules, and every check that failed."""
        from mm_cb.benchmarks.show import closing, show_rules
        from mm_cb.core.closing import say

        counts = {"drawn": "fallback", "broken": "degenerate"}
        show_rules(folder, "MMMU", "mmmu", subject, RULES, ("all", *protocol().domains), counts)
        for line in closing(folder):
            say(line, "  ")


def items_of(scored: Iterable[ScoredResponse], subject: str, prompts: Mapping[str, str], seed: int = 0) -> list[Item]:
    """One record per question and rule; an unknown strict verdict is None, which counts as unscored.

    Where only parsed answers are known, nothing says whether the text was broken (no ``gibberish``).

    Args:
        scored: In canonical order.
        subject: Who answered: ``base``, ``rr``, ...
        prompts: Question id → the text that was asked, where it is known.
        seed: The run's seed.
    """
    kept = list(scored)
    return [_item(one, rule, subject, prompts.get(one.response.id), seed) for rule in RULES for one in kept]


def _item(one: ScoredResponse, rule: str, subject: str, prompt: str | None, seed: int) -> Item:
    from mm_cb.benchmarks.mmmu.score import plain

    response = one.response
    right = one.official if rule == "official" else one.strict
    counts = {"open_correct": int(response.open and one.official)}
    if one.read_here:
        counts |= {"degenerate": int(one.degenerate is not None), "fallback": int(one.fallback)}
    item: Item = {
        "id": response.id,
        "metric": "mmmu",
        "subject": subject,
        "condition": rule,
        "split": protocol().domain[response.subject],
        "category": response.subject,
        "question_type": response.question_type,
        "prompt": prompt,
        "completion": response.response,
        "parsed": plain(one.parsed),
        "letter": one.letter,
        "answer": response.answer if isinstance(response.answer, str) else list(response.answer),
        "outcome": None,
        "score": None if right is None else float(right),
    }
    if one.read_here:
        item["gibberish"] = one.degenerate is not None
    item |= {"counts": counts, "seed": seed}
    return item
