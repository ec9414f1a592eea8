"""Installs what fastdisco needs on top of a base image's Python, and leaves alone what the base
built for itself.

    python3 docker/install.py

runs in the root of a checkout.  It is the Dockerfile's step before the source is copied, so that
only new dependencies repeat it.

NVIDIA's PyTorch images hold builds of their own (26.04: torch 2.12.0a0+0291f960b6.nv26.4.48445190,
torchvision 0.26.0a0+...), compiled against one another, and bind pip by the constraint file in
PIP_CONSTRAINT.  A plain `pip install fastdisco` goes wrong there in three ways:
- pip counts 0.26.0a0+... as older than 0.26 and takes PyPI's, and PyPI's torch with it.  Here the
  base's alpha of a release counts as that release.
- The constraint file does not name everything, in some images nothing.  Here each of the base's own
  builds is pinned to itself.
- It may pin a package to less than fastdisco needs: 26.07 has DALI 2.2.  Here such a package, with
  what it depends on, is freed: pip changes of these what it must.  If the base built it itself,
  that is an error, which only another base can cure.
A base without torch (python:3.12) gets PyPI's.
"""

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

# Pip's own copy, since a bare Python has no other.
from pip._vendor.packaging.requirements import InvalidRequirement, Requirement
from pip._vendor.packaging.utils import canonicalize_name
from pip._vendor.packaging.version import InvalidVersion, Version

PIP = [sys.executable, "-m", "pip"]
# These belong together even where their versions do not show it.
TORCH = {"torch", "torchvision", "triton"}


def main() -> None:
    """Installs what is missing and verifies the result.  Exits with a sentence where it cannot."""
    base, depends = installed()
    wanted = requirements(cuda(base))
    files = os.environ.get("PIP_CONSTRAINT", "").split()
    given = [line for path in files for line in Path(path).read_text().splitlines()]
    missing, constraints = plan(wanted, base, depends, given)
    if missing:
        print(
            f"to install: {', '.join(missing)}; {len(constraints)} constraints, from the "
            f"{len(given)} of the base",
            flush=True,
        )
        if pip_install(missing, constraints):
            sys.exit(
                "pip failed, see above; where it names a constraint, that is the base's: take "
                "another base (--build-arg BASE=...)"
            )
    verify(wanted, base, installed()[0])


def plan(
    wanted: list[Requirement], base: dict[str, str], depends: dict[str, list[str]], given: list[str]
) -> tuple[list[str], list[str]]:
    """What pip is to install, and the lines of its constraint file.

    wanted   requirement of each package that fastdisco imports
    base     {name: version} of what is installed
    depends  {name: names of all packages that its metadata mentions}
    given    lines of the base's own constraint file
    Exits where one of the base's own builds does not serve."""
    missing = [r for r in wanted if not serves(r, base)]
    own = builds(base)
    for r in missing:
        name = canonicalize_name(r.name)
        if name in own:
            sys.exit(
                f"{name}: the base has its own build {base[name]}, fastdisco needs {r.specifier}; "
                "take another base: docker build --build-arg BASE=..."
            )
    # Freed: what is too old, and all that it depends on.
    free: set[str] = set()
    todo = [canonicalize_name(r.name) for r in missing if canonicalize_name(r.name) in base]
    while todo:
        name = todo.pop()
        if name not in free | own:
            free.add(name)
            todo += depends.get(name, ())
    kept = [line for line in given if constrains(line) not in free | own]
    pinned = [f"{name}=={base[name]}" for name in sorted(own)]
    return [f"{r.name}{r.specifier}" for r in missing], kept + pinned


def pip_install(packages: list[str], constraints: list[str]) -> int:
    """Runs pip under these constraints alone; returns its exit status."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "constraint.txt"
        path.write_text("\n".join(constraints) + "\n")
        command = [*PIP, "install", "--no-cache-dir", *packages]
        return subprocess.run(command, env={**os.environ, "PIP_CONSTRAINT": str(path)}).returncode


def serves(requirement: Requirement, have: dict[str, str]) -> bool:
    """Whether the package is there, in a version that will do.  An alpha counts as its release, see
    above."""
    version = have.get(canonicalize_name(requirement.name))
    return version is not None and requirement.specifier.contains(Version(version).base_version)


def builds(base: dict[str, str]) -> set[str]:
    """Names of what the base built itself: a local version label (+nv26.8, +cu130) never comes from
    PyPI."""
    return {name for name, version in base.items() if name in TORCH or Version(version).local}


def constrains(line: str) -> str | None:
    """The package that a line of a constraint file is about; None for a comment or an option."""
    try:
        return canonicalize_name(Requirement(line.split(" #")[0].strip()).name)
    except InvalidRequirement:
        return None


def installed() -> tuple[dict[str, str], dict[str, list[str]]]:
    """{name: version} and {name: names of its dependencies} of everything on sys.path.  Of several
    with one name the first counts, as for Python's import."""
    versions, depends = {}, {}
    for dist in importlib.metadata.distributions():
        try:
            name, version = canonicalize_name(dist.metadata["Name"]), str(Version(dist.version))
        # A broken or an ancient package; none of ours.
        except (TypeError, InvalidVersion):
            continue
        if name not in versions:
            versions[name] = version
            names = [re.match(r"[\w.-]+", r).group() for r in dist.requires or ()]
            depends[name] = [canonicalize_name(n) for n in names]
    return versions, depends


def requirements(cuda: str) -> list[Requirement]:
    """What the checkout in the working directory declares, with its extra for that CUDA version.

    pip is asked, so that setup.py stays the only list."""
    options = ["--dry-run", "--no-deps", "--ignore-installed", "--quiet", "--report=-"]
    report = subprocess.run([*PIP, "install", *options, "."], stdout=subprocess.PIPE, check=True)
    (package,) = json.loads(report.stdout)["install"]
    metadata = package["metadata"]
    extra = f"cuda{cuda}"
    if extra not in metadata["provides_extra"]:
        sys.exit(
            f"the base has CUDA {cuda}, and fastdisco no extra {extra} for its DALI; it has "
            f"{', '.join(metadata['provides_extra'])}"
        )
    every = [Requirement(r) for r in metadata["requires_dist"]]
    return [r for r in every if r.marker is None or r.marker.evaluate({"extra": extra})]


def cuda(base: dict[str, str]) -> str:
    """Major version of the CUDA that torch is built with.  13, as PyPI's torch has, where there is
    no torch or one without CUDA."""
    if "torch" not in base:
        return "13"
    import torch

    return (torch.version.cuda or "13").split(".")[0]


def verify(wanted: list[Requirement], base: dict[str, str], now: dict[str, str]) -> None:
    """Exits unless every requirement is met and every build of the base is still the base's.
    Prints what changed."""
    own = sorted(builds(base))
    other = {
        name: f"{name} {version} -> {now.get(name)}"
        for name, version in sorted(base.items())
        if now.get(name) != version
    }
    changed = [other[name] for name in own if name in other]
    unmet = [
        f"{r.name}{r.specifier} (found {now.get(canonicalize_name(r.name))})"
        for r in wanted
        if not serves(r, now)
    ]
    if changed or unmet:
        sys.exit(
            f"after the install: changed builds of the base: {changed}; unmet requirements: {unmet}"
        )
    row = lambda title, items: print(f"{title:9} {', '.join(items) or 'nothing'}")
    row("kept", [f"{name} {base[name]}" for name in own])
    row("replaced", other.values())
    row("added", [f"{name} {now[name]}" for name in sorted(now.keys() - base)])


if __name__ == "__main__":
    main()
