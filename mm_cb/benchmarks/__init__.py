"""Benchmarks: items, prompt, score, metric."""
