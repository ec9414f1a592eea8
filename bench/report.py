"""Rewrites what is made from bench/results/: the tables in README.md and docs/, and the pictures.

    python bench/report.py            rewrites them; `make results` runs this
    python bench/report.py --check    fails where one does not show the results as they are

bench/harness/tables.py says how a page marks the place of a table."""

import sys
from pathlib import Path

from harness import ROOT, parser, pictures, tables
from harness.results import RESULTS


def main(argv: list[str] | None = None) -> int:
    options = parser(__doc__)
    options.add_argument("--check", action="store_true", help="write nothing")
    check = options.parse_args(argv).check
    if check:
        stale = [page.name for page in pages() if filled(page) != page.read_text()]
        stale += pictures.stale(RESULTS)
    else:
        stale = [page.name for page in pages() if rewrite(page, filled(page).encode())]
        stale += [p.name for p, image in drawings() if rewrite(p, image)]
    if stale:
        print(("stale, run make results: " if check else "rewrote ") + ", ".join(stale))
    return 1 if check and stale else 0


def pages() -> list[Path]:
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def filled(page: Path) -> str:
    return tables.fill(page.read_text(), RESULTS)


def drawings() -> list[tuple[Path, bytes]]:
    """(path, PNG) of every picture of a result."""
    found = (pictures.drawn(p) for p in sorted(RESULTS.glob("*.json")))
    return [pair for images in found for pair in images.items()]


def rewrite(path: Path, content: bytes) -> bool:
    """Whether the file's content was another one."""
    if path.exists() and path.read_bytes() == content:
        return False
    path.write_bytes(content)
    return True


if __name__ == "__main__":
    sys.exit(main())
