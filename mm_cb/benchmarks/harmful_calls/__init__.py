"""Harmful tool calls: forbidden requests to an agent, with and without a forced call, beside their harmless twins."""
