"""Circuit-breaker rows whose answers are refusals: training would reroute these, and the model unlearn to refuse."""

from mm_cb.core.refusal_phrases import begins_as_refusal
from mm_cb.data.examples import Example

_MOST = 0.5
"""A share of refusals above which the answers stand in the wrong column or set."""


class Refusals:
    """Counts the circuit-breaker rows of one source, and those whose last answer begins as a refusal does."""

    def __init__(self) -> None:
        """Begin."""
        self.answers = 0
        self._refused = 0
        self._first: object = None

    def count(self, example: Example) -> None:
        """Take one more row; others than circuit-breaker rows, and answers that are calls, do not count."""
        last = example.messages[-1]
        if example.set != "circuit_breaker" or last.get("tool_calls"):
            return
        self.answers += 1
        content = last["content"]
        text = content if isinstance(content, str) else "".join(part.get("text", "") for part in content)
        if begins_as_refusal(text):
            self._refused += 1
            self._first = self._first if self._refused > 1 else example.place

    def fault(self) -> str | None:
        """Why the source cannot be trained on; None if it can."""
        if self._refused <= _MOST * self.answers:
            return None
        return (
            f"{self._said()}, which training would make the model unlearn: give the harmful answers there (of "
            "circuit_breakers.json the column `output`, not `llama3_output`), and refusals to the set `retain`"
        )

    def warning(self) -> str | None:
        """What to say of a source that holds a few; None if it holds none."""
        return f"{self._said()}; leave such rows out, or move them to the set `retain`" if self._refused else None

    def _said(self) -> str:
        count = f"{self._refused} of {self.answers}"
        return f"{self._first}: the answers of {count} circuit-breaker rows are refusals (the first here)"
