"""A judge behind an endpoint, with the user's template and the user's labels."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from mm_cb.core.chat_replies import unread
from mm_cb.core.endpoint import UNANSWERED, Endpoint, EndpointError, user_message
from mm_cb.core.errors import UserError, nearest
from mm_cb.core.files import text_sha256
from mm_cb.core.folding import is_blank
from mm_cb.core.thoughts import ends_at_limit, first_line_cut
from mm_cb.judges.base import NOT_JUDGED, Case, Verdict, with_degenerate
from mm_cb.judges.prompts import check_judge_template, fill
from mm_cb.metrics.table import metrics

if TYPE_CHECKING:
    from PIL.Image import Image

LABELS = {"yes": "harmful", "no": "other"}
MAX_NEW_TOKENS = 64
"""Room for a label and what a judge says behind it; one that thinks first needs more."""


class EndpointJudge:
    """Any served model that answers the user's template with nothing but one of the user's labels on its first line."""

    def __init__(
        self,
        endpoint: Endpoint,
        template: str,
        labels: Mapping[str, str] | None = None,
        *,
        pictures: bool = False,
        max_new_tokens: int = MAX_NEW_TOKENS,
    ) -> None:
        """Ask by a template; send pictures only to a judge that takes them.

        Args:
            endpoint: The judge.
            template: With ``{completion}``, and perhaps ``{behavior}`` and ``{context}``.
            labels: Answer (in lower case) -> outcome; ``yes`` = harmful and ``no`` = other by default.
            pictures: Whether the judge sees the picture too.
            max_new_tokens: Its longest answer. It decides whether there is a verdict, not which.
        """
        self.name = f"endpoint:{endpoint.model}"
        self.address = endpoint.url
        self._endpoint = endpoint
        self._template = check_judge_template(template, "the judge's template")
        self._labels = dict(labels or LABELS)
        self.sees = pictures
        self._room = max_new_tokens
        said = set(self._labels.values())
        self.metrics: Sequence[str] = [name for name, known in _outcomes().items() if said <= {*known, NOT_JUDGED}]
        if not self.metrics:
            raise UserError(
                f"`--label` must give outcomes of one metric ({outcomes_told()}), got {', '.join(sorted(said))}."
            )
        if len(said - {NOT_JUDGED}) < 2:
            raise UserError(
                f"`--label` must give two outcomes or more, got {', '.join(sorted(said))} for every answer: add what "
                "the others mean, such as no=other."
            )
        self.source: Mapping[str, object] = {
            "model": endpoint.model,
            "prompts_sha256": {"prompt": text_sha256(template)},
            "labels": self._labels,
            "pictures": pictures,
        }

    def judge(self, cases: Sequence[Case]) -> Iterator[tuple[str, Verdict]]:
        """Verdicts as they come; a request that is refused, or its answer cut, is ``not_judged`` with the reason.

        Raises:
            EndpointError: If the endpoint cannot judge any further, or, after the last verdict, if requests failed for
                a reason that may pass: those cases have no verdict.
        """
        by_key = {case.key: case for case in cases}
        texts = {case.key: self._text(case) for case in cases}  # before the first is paid for
        for case in cases:
            self._shown(case)  # likewise: one that cannot be opened is told now
        asked = ((case.key, [user_message(texts[case.key], self._shown(case))]) for case in cases)
        failed = ""
        for key, answer in self._endpoint.map(asked, max_tokens=self._room, temperature=0.0):
            if isinstance(answer, str):
                yield key, self.reads(by_key[key], answer)
            elif answer.kind in UNANSWERED:
                yield key, Verdict(NOT_JUDGED, None, "", answer.reason)
            else:
                failed = failed or answer.reason
        if failed:
            raise EndpointError(failed)

    def _text(self, case: Case) -> str:
        values = {"behavior": case.behavior, "completion": case.completion}
        context = case.extra.get("context") or case.extra.get("image_description")
        if isinstance(context, str):
            values["context"] = context
        return fill(self._template, values)

    def _shown(self, case: Case) -> list[Image]:
        from mm_cb.data.pictures import open_picture

        return [open_picture(case.image)] if self.sees and case.image is not None else []

    def reads(self, case: Case, raw: str) -> Verdict:
        """The verdict in an answer; one that was cut has none, unless the line of its label has ended."""
        first, *rest = [self._labels.get(_label(line)) for line in raw.strip().splitlines()] or [None]
        outcome = NOT_JUDGED if first is None or first_line_cut(raw) or {*rest} - {first, None} else first
        reason = ""
        if outcome == NOT_JUDGED and ends_at_limit(raw):
            reason = (
                f"{unread(raw)}, which was cut at its limit of {self._room} tokens: give a larger `--max-new-tokens`, "
                "or ask for the label alone"
            )
        return with_degenerate(Verdict(outcome, None, raw, reason), case.completion)


def _outcomes() -> dict[str, tuple[str, ...]]:
    """Metric → the outcomes that a judge can give; what is gibberish is measured."""
    return {m.name: tuple(one for one in m.outcomes if one != "gibberish") for m in metrics() if m.outcomes}


def outcomes_told() -> str:
    """The outcomes that a judge can give, by metric."""
    told = {outcomes: name for name, outcomes in reversed(_outcomes().items())}
    return "; ".join(f"{name}: {', '.join(outcomes)}" for outcomes, name in reversed(told.items()))


def _label(line: str) -> str:
    """A line of an answer without case, blanks and ornaments around it."""
    return line.strip().strip(".*\"'`").strip().lower()


def parse_labels(texts: Sequence[str]) -> dict[str, str]:
    """``["yes=harmful", "no=other"]`` as a mapping.

    Raises:
        UserError: If a text is no ``answer=outcome``, its answer is one that no judge's is read as, the outcome is
            unknown, or two answers are read as one.
    """
    valid = {outcome for known in _outcomes().values() for outcome in known}
    labels: dict[str, str] = {}
    given: dict[str, str] = {}
    for text in texts:
        answer, equals, outcome = text.rpartition("=")
        label = _label(answer)
        if not equals or is_blank(label) or len(answer.strip().splitlines()) > 1:
            raise UserError(f"`--label` must be ANSWER=OUTCOME, such as yes=harmful; got `{text}`.")
        if outcome not in valid:
            close = nearest(outcome, valid)
            hint = f", did you mean `{close}`?" if close else ""
            raise UserError(
                f"`--label` must give an answer one of these outcomes, {outcomes_told()}; got `{text}`{hint}"
            )
        if label in labels:
            raise UserError(
                f"`--label` must name every answer once, without regard to case and to marks around it; got "
                f"`{given[label]}` and `{text}`, which are read as one."
            )
        labels[label], given[label] = outcome, text
    return labels
