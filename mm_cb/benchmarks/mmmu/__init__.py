"""MMMU by the official rules: prompts, answer rules, scores, and what could make the number lie."""

from mm_cb.benchmarks.mmmu.parse import parse_multiple_choice, parse_open
from mm_cb.benchmarks.mmmu.score import Scored, score

__all__ = ["Scored", "parse_multiple_choice", "parse_open", "score"]
