"""Which device this rank computes on, decided once, at the start, before any data are read.

On a machine with an NVIDIA GPU each thing that the first steps would trip over is looked at here,
and told in one sentence."""

import os
import re
import shutil
import subprocess
import sysconfig
from pathlib import Path

import torch

from fastdisco.common import dist, launch
from fastdisco.common.errors import UserError

# What the kernel driver shows of each GPU, and where it says its version.
NODES, DRIVER = Path("/dev"), Path("/proc/driver/nvidia/version")
LDCONFIG = "/sbin/ldconfig"


def choose() -> torch.device:
    """This rank's device: its GPU, or the CPU where the machine has none or hides it.

    Raises UserError where there is a GPU that cannot be used: a CPU build of torch, a driver that
    is too old, fewer visible GPUs than ranks, or a missing part that Triton's first launch needs."""
    if not torch.cuda.is_available():
        _refuse_unusable()
        return torch.device("cpu")
    if launch.local_rank() >= (count := torch.cuda.device_count()):
        raise UserError(
            f"rank {launch.rank()}: is process {launch.local_rank()} of its machine, counted from "
            f"0, and {count} GPUs are visible; start as many processes as GPUs, or correct "
            "CUDA_VISIBLE_DEVICES",
            anywhere=True,
        )
    device = dist.device()
    try:
        # The check above may have asked the driver alone (DeepSpeed sets it so): this starts CUDA.
        torch.zeros(1, device=device)
    except RuntimeError as e:
        raise UserError(
            f"{device}: CUDA does not start ({_first_line(e)}); {_driver()}", anywhere=True
        ) from e
    torch.cuda.set_device(device)
    if missing := launch_needs():
        raise UserError(
            f"{device}: Triton cannot launch a kernel: {'; '.join(missing)}", anywhere=True
        )
    return device


def describe(device: torch.device) -> str:
    """The device for the announcement, for example `NVIDIA H100 80GB HBM3`."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "the CPU"


def memory(device: torch.device) -> int:
    """Bytes of the device's memory: of the GPU, or of the machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def launch_needs(driver: bool = True) -> list[str]:
    """What is missing of that which Triton uses to build a kernel's launcher, each with its
    remedy.

    driver: whether the driver's library counts, which a machine without a GPU does not have"""
    header = Path(sysconfig.get_path("include"), "Python.h")
    missing = []
    if not compiler():
        missing.append("there is no C compiler: install gcc, or set CC")
    if not header.exists():
        missing.append(f"there is no {header}: install Python's headers (python3-dev)")
    if driver and not _lists_libcuda():
        missing.append(
            "ldconfig lists no libcuda.so.1: run ldconfig as root, or name its folder in "
            "TRITON_LIBCUDA_PATH"
        )
    return missing


def compiler() -> str | None:
    """The C compiler that Triton takes; None where there is none."""
    names = (os.environ.get("CC", ""), "gcc", "clang")
    return next(filter(None, map(shutil.which, names)), None)


def _lists_libcuda() -> bool:
    """Whether Triton finds the driver's library: it looks into these three places, in this order."""
    if os.environ.get("TRITON_LIBCUDA_PATH"):
        return True
    # Some systems have none, where Triton needs the variable above.
    if Path(LDCONFIG).exists():
        listed = subprocess.run([LDCONFIG, "-p"], capture_output=True, text=True, errors="replace")
        if "libcuda.so.1" in listed.stdout:
            return True
    folders = filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(":"))
    return any(Path(folder, "libcuda.so.1").exists() for folder in folders)


def _refuse_unusable() -> None:
    """Raises UserError where the machine has a GPU that torch cannot use, unless it is hidden on
    purpose."""
    gpus = [node.name for node in NODES.glob("nvidia[0-9]*")]
    # An empty list of devices is how a user asks for the CPU.
    if not gpus or os.environ.get("CUDA_VISIBLE_DEVICES", "unset") in ("", "-1"):
        return
    if torch.version.cuda is None:
        raise UserError(
            f"this machine has a GPU ({gpus[0]}), and torch {torch.__version__} is a build for the "
            "CPU; install torch for CUDA, or set CUDA_VISIBLE_DEVICES= to use the CPU"
        )
    raise UserError(
        f"this machine has a GPU ({gpus[0]}) that torch {torch.__version__} for CUDA "
        f"{torch.version.cuda} cannot use; {_driver()}, or set CUDA_VISIBLE_DEVICES= to use the CPU"
    )


def _driver() -> str:
    """What to do about the driver, with its version where it says one."""
    found = re.search(r"\d+\.\d+(\.\d+)?", DRIVER.read_text()) if DRIVER.is_file() else None
    has = f"its driver is {found[0]}" if found else "its driver gives no version"
    return (
        f"{has}: update it to one for CUDA {torch.version.cuda}, or install torch for an older CUDA "
        "(README, section Train)"
    )


def _first_line(e: Exception) -> str:
    return (str(e).splitlines() or [type(e).__name__])[0]
