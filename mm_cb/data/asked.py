"""Answers of an endpoint that are kept as they come and asked for until one is fit: each is paid for once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, TypeVar

from mm_cb.core.checked import read_records
from mm_cb.core.endpoint import REFUSED, UNANSWERED, Endpoint, EndpointError, EndpointFailure
from mm_cb.core.files import append_jsonl
from mm_cb.core.limits import LIMITS, settle
from mm_cb.core.records import Message
from mm_cb.data.describe import CORRUPT

if TYPE_CHECKING:
    from mm_cb.core.progress import Progress

Accepted = TypeVar("Accepted")


class Counts(Protocol):
    """What a builder counts."""

    rejected: Counter[str]
    """Why answers, or what they were asked about, were not used → how many."""
    left: Counter[str]
    """Why there is no answer yet → how many; the same command asks for them again."""
    stopped: str
    """Why the endpoint was asked no further; empty if it was asked for all."""


class Asking(Protocol):
    """The numbers of a builder's recipe."""

    @property
    def limit(self) -> int | None:
        """Use a seeded sample of so many."""

    @property
    def attempts(self) -> int:
        """Answers to a question before it is given up."""

    @property
    def max_tokens(self) -> int:
        """Longest answer."""

    @property
    def temperature(self) -> float:
        """Of whoever answers."""

    @property
    def seed(self) -> int:
        """Of the sample."""


def refuse_numbers(asking: Asking) -> None:
    """Refuse what lies outside its limits, and keep the others as Python's own numbers.

    Raises:
        UserError: Naming the number.
    """
    limits = {name: LIMITS[name] for name in ("attempts", "max_tokens", "seed")}
    limits |= {"temperature": LIMITS["generator_temperature"]}
    limits |= {} if asking.limit is None else {"limit": LIMITS["limit"]}
    for name, limit in limits.items():
        settle(asking, name, limit)


class Failures:
    """What has no answer: counted, and kept with its reason for ``failures.jsonl``."""

    def __init__(self, what: str, names: Mapping[str, str], built: Counts) -> None:
        """Call things by name.

        Args:
            what: The records' key of a name.
            names: Key → name.
            built: Where they are counted.
        """
        self.built = built
        self.records: list[dict[str, str]] = []
        self._what, self._names = what, names

    def add(self, key: str, stage: str, failure: EndpointFailure) -> None:
        """Count one that the next run asks for again, unless it cannot be read."""
        self._note(key, stage, failure)
        if failure.kind == CORRUPT:
            self.built.rejected[CORRUPT] += 1
        else:
            self.built.left[f"{stage}: {failure.kind}"] += 1

    def reject(self, key: str, stage: str, reason: str) -> None:
        """Count a refusal that is an answer like any other: asking for ever would not mend it."""
        self._note(key, stage, EndpointFailure(REFUSED, reason))
        self.built.rejected[f"{stage} refused"] += 1

    def _note(self, key: str, stage: str, failure: EndpointFailure) -> None:
        name = self._names[key]
        self.records.append({self._what: name, "stage": stage, "kind": failure.kind, "reason": failure.reason})

    def stop(self, stage: str, left: int, error: EndpointError) -> None:
        """The endpoint can answer no more; ``left`` were not asked for."""
        self.built.stopped = str(error)
        self.built.left.update({f"{stage}: not asked": left} if left else {})


class Stage(NamedTuple):
    """One kind of question, and where its answers lie."""

    name: str
    """In failures."""
    doing: str
    """In progress."""
    journal: Path
    record: type[Any]
    """What a line of the journal holds: ``key``, and ``answer`` or ``refused``."""
    key: str
    """The lines' key of what was asked about."""
    attempts: int
    """Answers to a question before it is given up."""
    max_tokens: int
    temperature: float


def until_fit(
    requests: Mapping[str, Sequence[Message]],
    stage: Stage,
    endpoint: Endpoint,
    read: Callable[[str, str], Accepted | str],
    failures: Failures,
    progress: Progress | None,
) -> dict[str, tuple[Accepted, int]]:
    """Fit answers with the number of the attempt that gave them; each is journalled before it is looked at.

    Args:
        requests: Key → what is sent.
        stage: What it is, and how often it is asked.
        endpoint: Who answers.
        read: Key and answer → what is in it, or, as a text, why it is not used.
        failures: Where what has no answer is counted.
        progress: Shows counts.
    """
    tried: Counter[str] = Counter()
    accepted: dict[str, tuple[Accepted, int]] = {}

    def judge(record: Mapping[str, Any]) -> None:
        key = record[stage.key]
        tried[key] += 1
        if "answer" not in record:
            failures.reject(key, stage.name, record.get(REFUSED, "no answer"))
            return
        found = read(key, record["answer"])
        if isinstance(found, str):
            failures.built.rejected[found] += 1
        else:
            accepted.setdefault(key, (found, tried[key]))

    held: list[Mapping[str, Any]] = read_records(stage.journal, stage.record)
    for record in held:
        if record[stage.key] in requests:
            judge(record)
    task = progress.task(stage.doing, len(requests), done=len(accepted)) if progress else None
    given_up: set[str] = set()

    def waiting() -> list[str]:
        done = accepted.keys() | given_up
        return [key for key in requests if key not in done and tried[key] < stage.attempts]

    try:
        while keys := waiting():
            asked = ((key, list(requests[key])) for key in keys)
            for key, answer in endpoint.map(asked, max_tokens=stage.max_tokens, temperature=stage.temperature):
                if isinstance(answer, EndpointFailure) and answer.kind not in UNANSWERED:
                    failures.add(key, stage.name, answer)
                    given_up.add(key)
                    continue
                said = {REFUSED: answer.reason} if isinstance(answer, EndpointFailure) else {"answer": answer}
                reply = {stage.key: key, **said}
                append_jsonl(stage.journal, reply)
                judge(reply)
                if task and key in accepted:
                    task.advance()
    except EndpointError as error:
        failures.stop(stage.name, len(waiting()), error)
    return accepted
