"""The result functions of bench/harness/ under the module name that benches used before it."""

from pathlib import Path

from harness import ROOT, results, row, row_of_rounds

__all__ = ["RESULTS", "ROOT", "row", "row_of_rounds", "write"]

RESULTS = results.RESULTS


def write(
    bench: str, device: str, summary: list[dict], samples, folder: Path | None = None, **more
) -> Path:
    """As `harness.results.write`."""
    return results.write(bench, device, summary, samples, folder or RESULTS, **more)
