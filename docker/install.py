"""Installs what fastdisco needs on top of a base image's Python, leaving alone what the base built
for itself.

    python3 docker/install.py     in the root of a checkout: the Dockerfile's step before the
    source, so that only new dependencies repeat it

NVIDIA's PyTorch images hold builds of their own (26.04: torch 2.12.0a0+0291f960b6.nv26.4.48445190,
torchvision 0.26.0a0+...), compiled against one another, and bind pip by the constraint file in
PIP_CONSTRAINT.  A plain `pip install fastdisco` goes wrong there in three ways: - pip counts
0.26.0a0+... as older than 0.26 and takes PyPI's, and PyPI's torch with it.  Here the base's alpha
of a release counts as it. - The constraint file does not name everything, in some images nothing.
Here each of the base's own builds is pinned to itself. - It may pin a package to less than
fastdisco needs: 26.07 has DALI 2.2.  Here such a package, with what it depends on, is set free: pip
changes of these what it must.  One that the base built itself is an error, as nothing but another
base can cure it.
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

# Pip's own copy: a bare Python has no other.
from pip._vendor.packaging.requirements import InvalidRequirement, Requirement
from pip._vendor.packaging.utils import canonicalize_name
from pip._vendor.packaging.version import InvalidVersion, Version

PIP = [sys.executable, "-m", "pip"]
# Belong together even where their versions do not show it.
TORCH = {"torch", "torchvision", "triton"}


def main():
    base, depends = installed()
    wanted = requirements(cuda(base))
    given = [
        line
        for path in os.environ.get("PIP_CONSTRAINT", "").split()
        for line in Path(path).read_text().splitlines()
    ]
    missing, constraints = plan(wanted, base, depends, given)
    if missing:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "constraint.txt"
            path.write_text("\n".join(constraints) + "\n")
            print(
                f"to install: {', '.join(missing)}; {len(constraints)} constraints, from the "
                f"{len(given)} of the base",
                flush=True,
            )
            if subprocess.run(
                [*PIP, "install", "--no-cache-dir", *missing],
                env={**os.environ, "PIP_CONSTRAINT": str(path)},
            ).returncode:
                sys.exit(
                    "pip failed, see above; where it names a constraint, that is the base's: take "
                    "another base (--build-arg BASE=...)"
                )
    verify(wanted, base, installed()[0])


def plan(wanted, base, depends, given) -> tuple[list[str], list[str]]:
    """What pip is to install, and the lines of its constraint file.

    wanted   Requirement of each package that fastdisco imports
    base     {name: version} of what is installed
    depends  {name: names of all that its metadata mentions}
    given    lines of the base's own constraint file
    Exits where one of the base's own builds does not serve."""
    missing = [r for r in wanted if not serves(r, base)]
    own = builds(base)
    for r in missing:
        if (name := canonicalize_name(r.name)) in own:
            sys.exit(
                f"{name}: the base has its own build {base[name]}, fastdisco needs {r.specifier}; "
                "take another base: docker build --build-arg BASE=..."
            )
    free, todo = set(), [name for r in missing if (name := canonicalize_name(r.name)) in base]
    while todo:  # what is too old, and all that it stands on
        if (name := todo.pop()) not in free | own:
            free.add(name)
            todo += depends.get(name, ())
    kept = [line for line in given if constrains(line) not in free | own]
    return [f"{r.name}{r.specifier}" for r in missing], kept + [
        f"{name}=={base[name]}" for name in sorted(own)
    ]


def serves(requirement, have: dict) -> bool:
    """Is it there, in a version that will do?  An alpha counts as its release, see above."""
    version = have.get(canonicalize_name(requirement.name))
    return version is not None and requirement.specifier.contains(Version(version).base_version)


def builds(base: dict) -> set[str]:
    """Names of what the base built itself: a local version label (+nv26.8, +cu130) never comes from
    PyPI."""
    return {name for name, version in base.items() if name in TORCH or Version(version).local}


def constrains(line: str) -> str | None:
    """The package that a line of a constraint file is about."""
    try:
        return canonicalize_name(Requirement(line.split(" #")[0].strip()).name)
    except InvalidRequirement:  # a comment, an option
        return None


def installed() -> tuple[dict, dict]:
    """{name: version} and {name: names of its dependencies} of everything on sys.path, the first of
    a name as Python finds it."""
    versions, depends = {}, {}
    for dist in importlib.metadata.distributions():
        try:
            name, version = canonicalize_name(dist.metadata["Name"]), str(Version(dist.version))
        except (TypeError, InvalidVersion):  # a broken or an ancient one; none of ours
            continue
        if versions.setdefault(name, version) is version:
            depends[name] = [
                canonicalize_name(re.match(r"[\w.-]+", r).group()) for r in dist.requires or ()
            ]
    return versions, depends


def requirements(cuda: str) -> list:
    """What the checkout in the working directory declares, asked of pip, with its extra for that
    CUDA version."""
    ask = [
        *PIP,
        "install",
        "--dry-run",
        "--no-deps",
        "--ignore-installed",
        "--quiet",
        "--report=-",
        ".",
    ]
    metadata = json.loads(subprocess.run(ask, stdout=subprocess.PIPE, check=True).stdout)[
        "install"
    ][0]["metadata"]
    extra = f"cuda{cuda}"
    if extra not in metadata["provides_extra"]:
        sys.exit(
            f"the base has CUDA {cuda}, and fastdisco no extra {extra} for its DALI; it has "
            f"{', '.join(metadata['provides_extra'])}"
        )
    every = [Requirement(r) for r in metadata["requires_dist"]]
    return [r for r in every if r.marker is None or r.marker.evaluate({"extra": extra})]


def cuda(base: dict) -> str:
    """Major version of the CUDA that torch is built with; 13, as PyPI's torch, where there is no
    torch or one without CUDA."""
    if "torch" not in base:
        return "13"
    import torch

    return (torch.version.cuda or "13").split(".")[0]


def verify(wanted, base: dict, now: dict):
    """Exits unless every requirement is met and every build of the base is still the base's; prints
    what changed."""
    changed = [
        f"{name} {base[name]} -> {now.get(name)}"
        for name in sorted(builds(base))
        if now.get(name) != base[name]
    ]
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
    row("kept", [f"{name} {base[name]}" for name in sorted(builds(base))])
    row(
        "replaced",
        [
            f"{name} {base[name]} -> {now.get(name)}"
            for name in sorted(base)
            if now.get(name) != base[name]
        ],
    )
    row("added", [f"{name} {now[name]}" for name in sorted(now.keys() - base)])


if __name__ == "__main__":
    main()
