"""How the ranks of one machine are started: by which command, how many, and as whose children."""

import contextlib
import ctypes
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

from fastdisco import config
from fastdisco.common.errors import UserError
from fastdisco.config import Config


def starting(launcher: str, ranks: int) -> list[str]:
    """The beginning of a command that starts so many ranks on this machine."""
    if launcher == "torchrun":
        module = ["torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    else:
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            port = s.getsockname()[1]
        # A list of hosts that lies about would start other machines.
        module = ["deepspeed.launcher.runner", "--hostfile=/dev/null"]
        module += [f"--num_accelerators={ranks}", f"--master_port={port}"]
    return [sys.executable, "-m", *module]


def devices() -> int:
    """How many GPUs a process that starts now would see."""
    if not any(Path("/dev").glob("nvidia[0-9]*")):
        return 0
    # A process of its own: torch counts once.
    ask = [sys.executable, "-c", "import torch; print(torch.cuda.device_count())"]
    found = subprocess.run(ask, capture_output=True, text=True).stdout.split()
    return int(found[-1]) if found else 0


def divisible(cfg: Config, most: int, goes_on: bool = False) -> int:
    """The largest number of ranks, up to `most`, that the batch can be divided by.

    goes_on  from a checkpoint, so that data.accumulate follows the number of ranks
    Raises UserError, which is that of `most` ranks, where there is none."""
    for ranks in range(most, 0, -1):
        if goes_on and config.can_follow(cfg, ranks):
            return ranks
        try:
            config.micro_batch(cfg, ranks)
        except UserError:
            continue
        return ranks
    config.micro_batch(cfg, most)
    return most


def kill(pid: int, number: int) -> None:
    """Sends a signal to a process, which may have just ended."""
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def end_with_parent() -> None:
    """Of a child, before it becomes the launcher: it gets SIGTERM when its parent dies."""
    # Number 1 is PR_SET_PDEATHSIG.
    ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))
