"""Nested dicts of settings: one laid over another, and flat."""

from typing import Any


def overlay(below: dict, above: dict) -> dict:
    """`above` laid over `below`, block by block; null blocks stay null."""
    return below | {
        k: overlay(below[k], v) if isinstance(v, dict) and isinstance(below.get(k), dict) else v
        for k, v in above.items()
    }


def flatten(d: dict, prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}; empty dicts stay values."""
    out = {}
    for k, v in d.items():
        out |= flatten(v, f"{prefix}{k}.") if isinstance(v, dict) and v else {f"{prefix}{k}": v}
    return out
