"""MMMU by the official rules: prompts, answer rules, scores, and what could make the number lie."""
