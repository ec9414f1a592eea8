"""What the benches' commands have in common."""

import argparse
from pathlib import Path

from harness import pictures, results, tables


def parser(doc: str) -> argparse.ArgumentParser:
    """A parser whose help begins with the bench's docstring, line by line as it stands."""
    return argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )


def finish(
    bench: str, device: str, summary: list[dict], samples, folder: Path | None = None, **more
) -> Path:
    """Writes the result as `results.write` does, draws its pictures where the bench has some, prints
    the rows, and returns the JSON file's path."""
    path = results.write(bench, device, summary, samples, folder, **more)
    tables.show_rows(summary)
    drawn = [picture.name for picture in pictures.write(path)]
    print(" and ".join([f"kept in {path}", *drawn]))
    return path
