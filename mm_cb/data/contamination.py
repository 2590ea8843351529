"""Which training requests come too close to the behaviours that a model is tested with."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from mm_cb.core.errors import UserError
from mm_cb.core.folding import as_drawn
from mm_cb.core.reading import json_lines, shown
from mm_cb.core.tables import is_table, read_table
from mm_cb.data.behaviors_file import behaviors_path, refuse_absent

THRESHOLD = 0.3
_ORDERS = (1, 2, 3, 4)
_COLUMNS = ("prompt", "Behavior")
_IDS = ("id", "BehaviorID")


class Tested(NamedTuple):
    """A behaviour that a model will be tested with."""

    prompt: str
    place: str
    """Its id where it has one, and file and line: ``17 (b.jsonl:17)``."""


class Match(NamedTuple):
    """The behaviour that a text is closest to."""

    behavior: int
    bleu: float


class Contamination:
    """Finds texts whose BLEU against any behaviour is above the threshold.

    The score is sacrebleu's (sentence level, lower case, effective order), taken per behaviour. Most pairs need not be
    scored: a pair that shares no n-gram of some order has a score below a bound that follows from the lengths alone.

    Source:
        Zou et al. 2024 (arXiv:2406.04313), appendix: texts with BLEU > 0.3 against any behaviour are dropped. Lower
        case, the per-pair maximum, and letters by how they look are our choice; the paper does not say.
    """

    def __init__(self, behaviors: Sequence[str], threshold: float = THRESHOLD) -> None:
        """Index the behaviours' n-grams.

        Args:
            behaviors: What a model is tested with.
            threshold: BLEU above which a text is too close; the paper's is 0.3, and 0.1 for function calls.

        Raises:
            UserError: If sacrebleu is not installed.
        """
        try:
            from sacrebleu.metrics.bleu import BLEU
            from sacrebleu.tokenizers.tokenizer_13a import Tokenizer13a
        except ImportError as error:
            raise UserError("comparing with behaviours needs the `data` extra: pip install -e '.[data]'") from error
        self._score = BLEU(lowercase=True, effective_order=True).sentence_score
        self._tokenize = Tokenizer13a()
        self._threshold = threshold
        self._behaviors = list(map(as_drawn, behaviors))
        self._lengths = [len(self._tokens(text)) for text in self._behaviors]
        self._index: list[dict[tuple[str, ...], set[int]]] = [defaultdict(set) for _ in _ORDERS]
        for number, text in enumerate(self._behaviors):
            tokens = self._tokens(text)
            for order in _ORDERS:
                for gram in _grams(tokens, order):
                    self._index[order - 1][gram].add(number)

    def match(self, text: str) -> Match | None:
        """The closest behaviour if it is above the threshold."""
        best: Match | None = None
        text = as_drawn(text)
        for number in self._candidates(text):
            bleu = self._score(text, [self._behaviors[number]]).score / 100
            if bleu > self._threshold and (best is None or bleu > best.bleu):
                best = Match(number, bleu)
        return best

    def _candidates(self, text: str) -> list[int]:
        """Behaviours whose score may be above the threshold, in order."""
        tokens = self._tokens(text)
        length = len(tokens)
        shared: dict[int, int] = {}
        needed = next((order for order in _ORDERS if bleu_bound(length, length, order) > self._threshold), None)
        if needed is None:
            return []
        for order in reversed(range(needed, 5)):
            for gram in _grams(tokens, order):
                for number in self._index[order - 1].get(gram, ()):
                    shared.setdefault(number, order)
        bounds = {number: bleu_bound(length, self._lengths[number], order) for number, order in shared.items()}
        return sorted(number for number, bound in bounds.items() if bound > self._threshold)

    def _tokens(self, text: str) -> list[str]:
        return self._tokenize(text.lower().rstrip()).split()


def bleu_bound(length: int, reference: int, shared: int) -> float:
    """The largest sentence BLEU that lengths allow.

    Args:
        length: Tokens of the text.
        reference: Tokens of the reference.
        shared: Highest order of an n-gram that both have; at least 1.

    Returns:
        An upper bound of sacrebleu's score with exponential smoothing and effective order.
    """
    orders = min(4, length)
    if not orders or not reference:
        return 0.0
    log, smoothing = 0.0, 1
    for order in range(1, orders + 1):
        total = length - order + 1
        if order <= shared:
            log += math.log(min(1.0, max(1, reference - order + 1) / total))
        else:
            smoothing *= 2
            log -= math.log(smoothing * total)
    brevity = 1.0 if length >= reference else math.exp(1 - reference / length)
    return brevity * math.exp(log / orders) * (1 + 1e-9)


def read_tested(path: Path) -> list[Tested]:
    """What behaviours ask for: a behaviours file (JSONL, ``prompt``), HarmBench's CSV (``Behavior``), `behaviors_path`.

    Raises:
        UserError: If the file cannot be read or has neither; names the line.
    """
    path = behaviors_path(path)
    refuse_absent(path)
    rows = read_table(path, _COLUMNS).rows if is_table(path) else json_lines(path, "behaviours")
    tested = []
    for where, record in rows:
        text = next((record[column] for column in _COLUMNS if column in record), None)
        if not isinstance(text, str) or not text.strip():
            raise UserError(
                f"{where}: `prompt` (JSONL) or `Behavior` (CSV) must be a text that is not empty, got {shown(text)} "
                f"and the keys {shown(sorted(record))}."
            )
        id = next((f"`{record[column]}` " for column in _IDS if record.get(column)), "")
        tested.append(Tested(text, f"{id}({where})"))
    if not tested:
        raise UserError(f"`{path}` must hold at least one behaviour, it is empty.")
    return tested


def _grams(tokens: Sequence[str], order: int) -> set[tuple[str, ...]]:
    return {tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1)}
