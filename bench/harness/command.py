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
    """Writes the result as `results.write` does, draws its picture where the bench has one, prints
    the rows, and returns the JSON file's path."""
    path = results.write(bench, device, summary, samples, folder, **more)
    tables.show_rows(summary)
    picture = pictures.write(path)
    print(f"kept in {path}" + (f" and {picture.name}" if picture else ""))
    return path
