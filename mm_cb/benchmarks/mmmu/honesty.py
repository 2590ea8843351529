"""What could make an MMMU number lie: luck, one letter for everything, broken text, missing questions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from mm_cb.benchmarks.mmmu.protocol import protocol
from mm_cb.benchmarks.mmmu.score import ScoredResponse
from mm_cb.core.records import Check

SIGNIFICANT = 0.05
ONE_LETTER = 0.9
"""Share of multiple-choice answers from which a model counts as saying one letter whatever it is asked."""
LUCK_POINTS = 0.5
"""Percentage points that random letters may be expected to add to the official number: the size of the usual claim."""
DEGENERATE = 0.02


@dataclass(frozen=True)
class Chance:
    """How the letters that a model gave compare with guessing."""

    answered: int
    """Multiple-choice questions with a letter that was not drawn."""
    correct: int
    level: float
    """What guessing earns there: a random letter, or always the commonest answer, whichever earns more."""
    p: float
    """One-sided binomial p of ``correct`` under ``level``; 1 when nothing was answered."""
    letter: str
    """The model's commonest letter."""
    share: float
    """Its share of the answers."""

    @property
    def above(self) -> bool:
        """Whether the answers beat guessing at the 5 % level."""
        return self.p < SIGNIFICANT

    @property
    def one_letter(self) -> bool:
        """Whether nearly all answers are the same letter."""
        return self.share >= ONE_LETTER


def against_chance(scored: Sequence[ScoredResponse]) -> Chance:
    """Compare the letters that were really given with guessing; open questions and drawn letters stay out."""
    from scipy.stats import binomtest

    given = [one for one in scored if not one.response.open and not one.fallback]
    if not given:
        return Chance(0, 0, 0.0, 1.0, "", 0.0)
    correct = sum(one.official for one in given)
    blind = sum(1 / len(one.response.letters) if one.response.letters else 0.0 for one in given) / len(given)
    answers: Counter[str] = Counter()
    for one in given:
        answers.update({one.response.answer} if isinstance(one.response.answer, str) else set(one.response.answer))
    level = min(1.0, max(blind, max(answers.values()) / len(given)))
    p = float(binomtest(correct, len(given), level, alternative="greater").pvalue)
    letter, times = Counter(one.letter or "" for one in given).most_common(1)[0]
    return Chance(len(given), correct, level, p, letter, times / len(given))


def luck_points(scored: Sequence[ScoredResponse]) -> float:
    """Percentage points that the drawn letters add to the official number on average."""
    return 100 * sum(1 / len(one.response.letters) for one in scored if one.fallback) / len(scored)


def flags(scored: Sequence[ScoredResponse]) -> dict[str, float]:
    """The comparison with chance as counts of a measurement over all questions."""
    chance = against_chance(scored)
    return {
        "chance_percent": 100 * chance.level,
        "chance_p": chance.p,
        "not_above_chance": int(not chance.above),
        "one_letter": int(chance.one_letter),
    }


def run_checks(scored: Sequence[ScoredResponse]) -> list[Check]:
    """Every check; of parsed answers those that need no text."""
    from mm_cb.metrics.checks import check

    n = len(scored)
    split = scored[0].response.id.partition("_")[0]
    expected = protocol().questions.get(split, 0) * len(protocol().subjects)
    chance = against_chance(scored)
    checks = [
        (
            "all MMMU questions of the split",
            n == expected,
            f"{n} ({split})",
            str(expected),
            "published numbers are over all 30 subjects",
        ),
        (
            "answers beat guessing",
            chance.above,
            f"{chance.correct} of {chance.answered} letters right, p {chance.p:.2g}"
            if chance.answered
            else "not one letter could be read",
            f"p < {SIGNIFICANT} against {100 * chance.level:.1f} %",
            "a random letter, or always the commonest one, earns that much",
        ),
        (
            "not one letter for everything",
            not chance.one_letter,
            f"{chance.letter or 'none'}: {100 * chance.share:.1f} %",
            f"below {100 * ONE_LETTER:.0f} %",
            "a model that always says one letter has lost the task",
        ),
    ]
    if scored[0].read_here:
        luck, broken = luck_points(scored), sum(one.degenerate is not None for one in scored)
        checks += [
            (
                "few broken completions",
                broken <= DEGENERATE * n,
                f"{broken} of {n} empty, repeating or noise",
                f"at most {100 * DEGENERATE:.0f} %",
                "broken text still earns random letters in the official number",
            ),
            (
                "little luck in the official number",
                luck <= LUCK_POINTS,
                f"{luck:.2f} points from {sum(one.fallback for one in scored)} random letters",
                f"at most {LUCK_POINTS}",
                "compare strict numbers where answers could not be read",
            ),
        ]
    return [check(*one) for one in checks]
