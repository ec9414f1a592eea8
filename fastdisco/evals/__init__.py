"""Evaluations: each module has `run(...) -> dict of named numbers`."""
