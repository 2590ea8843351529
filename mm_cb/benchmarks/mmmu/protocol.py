"""MMMU's own strings and subjects, read from ``data/protocols/mmmu.yaml``."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache

from mm_cb.core.errors import UserError, unknown
from mm_cb.core.paths import protocol_file
from mm_cb.core.records import JsonObject

MULTIPLE_CHOICE = "multiple-choice"
QUESTION_TYPES = (MULTIPLE_CHOICE, "open", "short-answer")
"""What the data set and the official answer files say; all but the first are open."""
"""The one question type that is not open: the hub says ``open``, the repository's answer file ``short-answer``."""


@dataclass(frozen=True)
class Protocol:
    """What the file holds."""

    dataset: str
    seed: int
    max_new_tokens: int
    questions: Mapping[str, int]
    prompts: Mapping[str, Mapping[str, str]]
    instructions: Mapping[str, str]
    stripped: tuple[str, ...]
    cues: tuple[str, ...]
    last_line_cue: str
    trivial: frozenset[str]
    domain: Mapping[str, str]
    """Subject -> domain, the subjects in alphabetical order, which is the official evaluator's order."""

    domains: tuple[str, ...]
    """In official order."""

    @property
    def subjects(self) -> tuple[str, ...]:
        """All 30 subjects in official order."""
        return tuple(self.domain)


@cache
def protocol() -> Protocol:
    """The protocol as shipped."""
    content: JsonObject = protocol_file("mmmu")
    domain = {subject: name for name, subjects in content["domains"].items() for subject in subjects}
    return Protocol(
        dataset=content["dataset"],
        seed=content["seed"],
        max_new_tokens=content["max_new_tokens"],
        questions=content["questions"],
        prompts=content["prompts"],
        instructions=content["instructions"],
        stripped=tuple(content["stripped"]),
        cues=tuple(content["cues"]),
        last_line_cue=content["last_line_cue"],
        trivial=frozenset(content["trivial"]),
        domain={subject: domain[subject] for subject in sorted(domain)},
        domains=tuple(content["domains"]),
    )


def subject_of(question_id: str) -> str:
    """The subject in an id: ``"validation_Art_Theory_7"`` -> ``"Art_Theory"``.

    Raises:
        UserError: If the id is not split, subject and number joined by underscores, or names no MMMU subject.
    """
    pieces = question_id.split("_")
    if len(pieces) < 3 or not pieces[-1].isdecimal():
        raise UserError(f"an MMMU id must look like `validation_Art_Theory_7`, got `{question_id[:80]}`.")
    subject = "_".join(pieces[1:-1])
    if subject not in protocol().domain:
        raise unknown("MMMU subject", subject, protocol().subjects)
    return subject


def chosen_subjects(names: Iterable[str]) -> tuple[str, ...]:
    """Subjects in official order; none named means all 30.

    Raises:
        UserError: If a name is no MMMU subject.
    """
    wanted = set(names) or set(protocol().subjects)
    for name in sorted(wanted):
        if name not in protocol().domain:
            raise unknown("MMMU subject", name, protocol().subjects)
    return tuple(subject for subject in protocol().subjects if subject in wanted)
