"""Asking a judge to compare an answer with the reference answer, several times if wanted, every judgement kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, Required, TypedDict

from mm_cb.benchmarks.llava_wild.questions import WildQuestion, protocol
from mm_cb.benchmarks.llava_wild.reviews import CATEGORIES, SWAPPED, Review, parse_scores
from mm_cb.core.chat_replies import unread
from mm_cb.core.checked import read_records
from mm_cb.core.endpoint import UNANSWERED, Endpoint, EndpointFailure
from mm_cb.core.errors import UserError
from mm_cb.core.progress import Progress
from mm_cb.core.reading import file_bytes, read_plain
from mm_cb.core.records import Message
from mm_cb.core.runs import append_jsonl, write_jsonl
from mm_cb.core.thoughts import first_line_cut

ORDERS = ("reference_first", SWAPPED)
UNREADABLE = "unreadable.jsonl"
"""Beside the store of judgements: those of the last start that begin with no two scores."""


@dataclass(frozen=True)
class JudgeRule:
    """What the judge is told to do, per category."""

    texts: Mapping[str, str]
    role: str
    sha256: str
    original: bool


def read_rule(path: Path) -> JudgeRule:
    """The original rule file, known by its git blob.

    Raises:
        UserError: If it cannot be read or is another file.
    """
    content = _bytes(path)
    blob = hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()  # noqa: S324 (git's own name for the file)
    if blob != protocol()["rule_blob"]:
        raise UserError(
            f"`{path}` must be the original llava/eval/table/rule.json (git blob {protocol()['rule_blob'][:7]}), got "
            f"blob {blob[:7]}; take it from the LLaVA repository, or give a text of your own with `--own-rule`."
        )
    entries = {name: json.loads(content)[protocol()["rule_key"].format(category=name)] for name in CATEGORIES}
    texts = {name: entry["prompt"] for name, entry in entries.items()}
    return JudgeRule(texts, entries[CATEGORIES[0]]["role"], hashlib.sha256(content).hexdigest(), original=True)


def read_own_rule(path: Path) -> JudgeRule:
    """A user's rule text, for all categories; it must ask for two scores on the first line.

    Raises:
        UserError: If it cannot be read or is empty.
    """
    text = read_plain(path, "rule text").strip()
    if not text:
        raise UserError(f"`{path}` must hold a rule text, it is empty.")
    return JudgeRule(
        dict.fromkeys(CATEGORIES, text), "Assistant", hashlib.sha256(text.encode()).hexdigest(), original=False
    )


def _bytes(path: Path) -> bytes:
    try:
        return file_bytes(path, "rule file")
    except OSError as e:
        raise UserError(f"the rule file `{path}` cannot be read: {e.strerror}.") from e


class Judgement(TypedDict, total=False):
    """One line of parts/judgements.jsonl: what the judge said of one answer."""

    key: Required[str]
    """Run, order and question."""
    content: Required[str | None]
    """None where it said nothing to this one."""
    refused: str
    """Why."""
    run: int
    order: str


class Comparer(Protocol):
    """A judge that reads a chat and answers with text."""

    def compare(self, chats: Mapping[str, Sequence[Message]]) -> Iterator[tuple[str, str | EndpointFailure]]:
        """Key and answer of every chat, each as soon as it is there."""


class ServedComparer:
    """A judge behind an endpoint."""

    def __init__(self, endpoint: Endpoint, temperature: float) -> None:
        """Sample at ``temperature``: 0.2 in the original."""
        self._endpoint, self._temperature = endpoint, temperature

    def compare(self, chats: Mapping[str, Sequence[Message]]) -> Iterator[tuple[str, str | EndpointFailure]]:
        """Answers as they come."""
        limit = protocol()["judge_max_tokens"]
        return self._endpoint.map(chats.items(), max_tokens=limit, temperature=self._temperature)


class LocalComparer:
    """A text model in this process; greedy, so that further runs would only repeat the first."""

    def __init__(self, model: Any) -> None:
        """Judge with a `mm_cb.judges.local.LanguageModel`."""
        self._model = model

    def compare(self, chats: Mapping[str, Sequence[Message]]) -> Iterator[tuple[str, str | EndpointFailure]]:
        """Answers batch by batch."""
        prompts = {key: self._model.chat_prompt(messages) for key, messages in chats.items()}
        yield from self._model.continuations(prompts, protocol()["judge_max_tokens"])


def request(question: WildQuestion, answer: str, rule: JudgeRule, order: str, system: str) -> list[dict[str, str]]:
    """The judge's chat; the original puts the reference first, always."""
    first, second = (question.reference, answer) if order == ORDERS[0] else (answer, question.reference)
    blocks = {"context": question.caption, "question": question.text, "first": first, "second": second}
    text = protocol()["request"].format(**blocks, role=rule.role, rule=rule.texts[question.category])
    asked = [{"role": "system", "content": system}] if system else []
    return [*asked, {"role": "user", "content": text}]


@dataclass(frozen=True)
class JudgingSettings:
    """Which judgements a run wants."""

    rule: JudgeRule
    runs: int = 1
    orders: tuple[str, ...] = (ORDERS[0],)
    system: str = ""
    """System message; the original sends one sentence, later harnesses none."""


def judge_answers(
    questions: Sequence[WildQuestion],
    answers: Mapping[str, str],
    plan: JudgingSettings,
    comparer: Comparer,
    store: Path,
    progress: Progress,
) -> dict[str, list[Judgement]]:
    """All judgements of all answers; those in ``store`` are not asked for again.

    A judgement is kept where it can be read. Others lie beside the store as ``unreadable.jsonl``, for the eye alone:
    the next start asks for them again, because a judge may be corrected.

    Args:
        questions: Those that were answered.
        answers: By question id.
        plan: How often and in which orders.
        comparer: The judge.
        store: JSON lines, one per judgement, written as they come.
        progress: Shows the count.

    Returns:
        WildQuestion id -> records with ``run``, ``order``, ``content`` (None when the judge gave none to this one).

    Raises:
        UserError: If requests failed for a reason that may pass; what was judged is kept.
    """
    wanted = {
        _key(q.id, run, o): (q, run, o) for run in range(1, plan.runs + 1) for o in plan.orders for q in questions
    }
    done = {
        record["key"]: record
        for record in read_records(store, Judgement)
        if record["key"] in wanted and readable(record)
    }
    chats = {
        key: request(q, answers[q.id], plan.rule, order, plan.system)
        for key, (q, _, order) in wanted.items()
        if key not in done
    }
    task = progress.task("judge", total=len(wanted), done=len(done))
    failures: list[str] = []
    unreadable: dict[str, Judgement] = {}
    for key, content in comparer.compare(chats):
        if not isinstance(content, str) and content.kind not in UNANSWERED:
            failures.append(content.reason)
            continue
        record: Judgement = {"key": key, "content": content if isinstance(content, str) else None}
        if not isinstance(content, str):
            record["refused"] = content.reason
        elif first_line_cut(content):  # `8 1` may be the beginning of `8 10`
            limit = protocol()["judge_max_tokens"]
            record |= {"content": None, "refused": f"{unread(content)}, which was cut at its limit of {limit} tokens"}
        if readable(record):
            append_jsonl(store, record)
            done[key] = record
        else:
            unreadable[key] = record
        task.advance()
    if failures:
        raise UserError(
            f"{len(failures)} of {len(wanted)} judgements failed, the first: {failures[0].rstrip('.')}. The others are "
            "kept: run the same command again."
        )
    store.with_name(UNREADABLE).unlink(missing_ok=True)
    if unreadable:
        write_jsonl(store.with_name(UNREADABLE), unreadable.values())
    found: dict[str, list[Judgement]] = {q.id: [] for q in questions}
    for key, (q, run, order) in wanted.items():
        found[q.id].append({**(done | unreadable)[key], "run": run, "order": order})
    return found


def readable(record: Judgement) -> bool:
    """Whether a judgement begins with two scores."""
    return isinstance(record["content"], str) and parse_scores(record["content"]) is not None


def _key(id: str, run: int, order: str) -> str:
    return f"{run}/{order}/{id}"


def review_of(question: WildQuestion, judgement: Judgement) -> Review:
    """What a judgement says, reference's score first whichever came first."""
    scores = parse_scores(judgement["content"]) if judgement["content"] is not None else None
    if scores is not None and judgement["order"] != ORDERS[0]:
        scores = (scores[1], scores[0])
    return Review(question.id, question.category, scores)
