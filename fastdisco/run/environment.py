"""The environment of a run: versions, commit, hardware and command."""

import contextlib
import importlib.metadata
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from fastdisco import __version__
from fastdisco.common import launch

# Packages whose versions change speed or numbers.
_PACKAGES = (
    "torch",
    "torchvision",
    "triton",
    "deepspeed",
    "timm",
    "nvidia-dali-cuda130",
    "nvidia-dali-cuda120",
    "apex",
    "numpy",
    "onnx",
    "onnxruntime",
)


def environment() -> dict[str, Any]:
    """Versions, commit, hardware and command of this process; packages that are not installed are
    left out."""
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "versions": versions(),
        "commit": _commit(),
        "command": " ".join(sys.argv),
        "ranks": launch.world(),
        "host": platform.node(),
        "cpu": _cpu(),
        "cores": len(os.sched_getaffinity(0)),
        "gpus": gpus,
        "cuda": torch.version.cuda,
    }


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that change speed or numbers, of fastdisco, too."""
    found = {"python": platform.python_version(), "fastdisco": __version__}
    for name in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _commit() -> str | None:
    root = Path(__file__).resolve().parents[2]
    # A container image, whose build has set the variable, or an installed copy.
    if not (root / ".git").exists():
        return os.environ.get("FASTDISCO_COMMIT") or None
    git = ["git", "-C", str(root), "describe", "--always", "--dirty", "--exclude=*"]
    try:
        return subprocess.run(git, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        # No git here, or a repository that belongs to another user.
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(x.split(":", 1)[1].strip() for x in lines if x.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()
