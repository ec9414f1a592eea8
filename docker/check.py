"""Says what a container can do, and fails where something that training needs is missing.  It is
the last step of the image's build.

    docker run --rm --gpus all fastdisco python3 docker/check.py

on a new machine also shows the GPUs, and whether this user can write.  The checks of the libraries
are those of `fastdisco doctor`, which has more for the machine that an image runs on."""

import os
import sys
import tempfile
from pathlib import Path

import torch

from fastdisco.doctor import Finding, looked, node
from fastdisco.run.environment import environment


def main() -> int:
    """Runs every check; returns the number of those that failed."""
    failed = []
    for found in [*node.libraries("", environment()["commit"]), looked(folders)]:
        # In an image even what only warns elsewhere is a fault of its build.
        bad = found.level in ("warning", "failure")
        remedy = f": {found.remedy}" if bad and found.remedy else ""
        print(f"{'FAIL' if bad else 'ok':5} {found.check:12} {found.found}{remedy}", flush=True)
        if bad:
            failed.append(found.check)
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"{len(gpus)} GPUs {sorted(set(gpus))}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return len(failed)


def folders() -> Finding:
    """The folders that the user of this container writes to."""
    paths = [
        Path.home(),
        Path(os.environ["TRITON_CACHE_DIR"]),
        Path(os.environ["TORCH_EXTENSIONS_DIR"]),
        Path("out"),
    ]
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    return Finding("folders", "ok", f"user {os.getuid()} writes to {', '.join(map(str, paths))}")


if __name__ == "__main__":
    sys.exit(main())
