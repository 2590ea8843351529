"""Rows that are mostly unknown to the model: its tokenizer has one token for all words that it does not have."""

from collections.abc import Callable

from mm_cb.data.examples import Example


class Unknown:
    """Counts the rows of one source, and those of which the model reads next to nothing."""

    def __init__(self, mostly: Callable[[Example], str | None] | None) -> None:
        """Begin.

        Args:
            mostly: The token that more than half of an example's texts come to, if there is one; None = not known here.
        """
        self._mostly = mostly
        self._rows = self._unknown = 0
        self._first: object = None
        self._token = ""

    def count(self, example: Example) -> None:
        """Take one more row."""
        self._rows += 1
        if self._mostly is not None and (token := self._mostly(example)):
            self._unknown += 1
            self._first = self._first if self._unknown > 1 else example.place
            self._token = token

    def warning(self) -> str | None:
        """What to say of a source that holds any; None if it holds none."""
        if not self._unknown:
            return None
        return (
            f"{self._first}: {self._unknown} of {self._rows} rows are mostly `{self._token}` to the model (the first "
            "here), words that its tokenizer does not have: leave them out, write them in words that it has, or train "
            "a model that reads them"
        )
