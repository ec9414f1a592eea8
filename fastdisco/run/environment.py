"""The environment of a run: versions, commit, hardware and command."""

import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path

import torch

from fastdisco.common import launch


def environment() -> dict:
    """Versions, commit, hardware and command of this process."""
    names = (
        "torch",
        "torchvision",
        "triton",
        "deepspeed",
        "timm",
        "nvidia-dali-cuda130",
        "nvidia-dali-cuda120",
        "apex",
        "numpy",
    )
    versions = {"python": platform.python_version()}
    for name in names:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            pass
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions,
        "commit": _commit(),
        "command": " ".join(sys.argv),
        "ranks": launch.world(),
        "host": platform.node(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    # A container image, which was told at its build, or an installed copy.
    if not (root / ".git").exists():
        return os.environ.get("FASTDISCO_COMMIT") or None
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None  # no git, or a repository of another user


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
