"""LLaVA-Bench-in-the-Wild: answers judged beside a reference answer, and what the judgements add up to."""
