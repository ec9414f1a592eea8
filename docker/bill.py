"""Writes what Python packages an image holds, and under which licences:

    python3 docker/bill.py FOLDER

makes FOLDER/sbom.cdx.json (CycloneDX, which scanners read) and FOLDER/licences.txt (a line for each
package).  The tool that lists them is installed apart, so that it is not in the list.  Packages of the
base's system are not Python's; `docker sbom` or syft lists those."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

TOOL = "cyclonedx-bom>=7,<8"
# In a process that finds the tool where the Python that it looks at does not.
RUN = "import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); runpy.run_module('cyclonedx_py', run_name='__main__')"


def main(folder: Path) -> None:
    """Writes both files of this Python's packages."""
    bill, licences = folder / "sbom.cdx.json", folder / "licences.txt"
    with tempfile.TemporaryDirectory() as tool:
        install = [sys.executable, "-m", "pip", "install", "--quiet", "--no-cache-dir"]
        # The base's constraints are about the image's packages.
        free = {**os.environ, "PIP_CONSTRAINT": ""}
        subprocess.run([*install, "--target", tool, TOOL], env=free, check=True)
        options = ["environment", "--output-reproducible", "-o", str(bill), sys.executable]
        subprocess.run([sys.executable, "-c", RUN, tool, *options], check=True)
    lines = table(json.loads(bill.read_text())["components"])
    licences.write_text("".join(f"{line}\n" for line in lines))
    print(f"{len(lines)} packages, their licences in {licences}")


def table(components: list[dict]) -> list[str]:
    """Name, version and licences of each package, by name."""
    rows = []
    for part in sorted(components, key=lambda x: x["name"].lower()):
        named = [licence(x) for x in part.get("licenses", ())]
        told = "; ".join(dict.fromkeys(named)) or "not declared"
        rows.append(f"{part['name']} {part.get('version', '')}: {told}")
    return rows


def licence(entry: dict) -> str:
    """A licence by its SPDX expression, its identifier, or the name that the package gives."""
    if "expression" in entry:
        return entry["expression"]
    inner = entry["license"]
    return inner.get("id") or inner["name"].removeprefix("License :: OSI Approved :: ")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
