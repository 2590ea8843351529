"""Answers of a model in this process or behind an endpoint, every one paid for once."""
