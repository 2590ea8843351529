"""Judges: what a completion is, decided by a classifier, a served model, a rule, or nobody."""

from mm_cb.judges.base import Case, Judge, Verdict

__all__ = ["Case", "Judge", "Verdict"]
