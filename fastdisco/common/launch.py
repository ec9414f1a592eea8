"""Which rank this process is, and of how many: the launcher's environment variables; and whether
the launcher still lives.

`deepspeed` and `torchrun` set RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT.  Slurm's and
Open MPI's variables are translated into these five; those of other MPIs are refused."""

import ctypes
import functools
import os
import signal
import threading
import time
import zlib
from pathlib import Path

from fastdisco.common.errors import UserError

STOPPED = 75
"""Exit code of a training that was stopped, and that the same command continues: EX_TEMPFAIL."""

_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_REMEDY = "start it with deepspeed, torchrun, srun or Open MPI's mpirun"
# Other MPIs' variable with the number of processes.
_UNKNOWN = ("PMI_SIZE", "MV2_COMM_WORLD_SIZE")
# Programs and modules that start ranks and end when they end.
_LAUNCHERS = (
    "deepspeed",
    "deepspeed.launcher.",
    "torchrun",
    "torch.distributed.",
    "accelerate",
    "fastdisco.common.start",
)
# The launchers that this process follows: their numbers and start times.
_above: dict[int, int] = {}
# Seconds between two looks at the launcher, and from its death to the end of a rank that hangs.
_LOOK, _GRACE = 1.0, 600.0


def rank() -> int:
    """This process's number among all processes of the run, 0 without a launcher."""
    return _number("RANK", 0)


def local_rank() -> int:
    """This process's number on its machine, which is also the number of its GPU."""
    return _number("LOCAL_RANK", 0)


def world() -> int:
    """How many processes the run has, 1 without a launcher."""
    return _number("WORLD_SIZE", 1)


def defaults() -> None:
    """Makes the launcher's five variables complete: from Slurm's or Open MPI's, or for a plain
    `python train.py`, which is one process.

    Without them DeepSpeed would look for MPI.
    Raises UserError where the variables contradict each other or some are missing."""
    told = "RANK" in os.environ or "WORLD_SIZE" in os.environ
    adopt()
    _check()
    if not told and world() > 1 and "SLURM_PROCID" in os.environ:
        _say_waiting()
    single = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        # Any free port.
        "MASTER_PORT": "0",
    }
    for name, value in single.items():
        os.environ.setdefault(name, value)


def adopt() -> None:
    """Sets the five variables from those of Slurm's srun or of Open MPI's mpirun.

    Nothing happens where a launcher of PyTorch's has set them, or where there is one process.
    Raises UserError for several processes of another MPI: each would train for itself."""
    env = os.environ
    if "RANK" in env or "WORLD_SIZE" in env:
        return
    # Only srun sets it: in a batch script outside srun, which is one process, SLURM_NTASKS may be 8.
    if _number("SLURM_STEP_NUM_TASKS", 1) > 1 and "SLURM_PROCID" in env:
        found = _slurm()
    elif _number("OMPI_COMM_WORLD_SIZE", 1) > 1:
        found = _open_mpi()
    else:
        for name in _UNKNOWN:
            if _number(name, 1) > 1:
                raise _Refused(
                    f"{name} is {env[name]}: an MPI has started several processes, whose ranks "
                    f"fastdisco cannot tell; {_REMEDY}"
                )
        return
    # A process that sees one GPU alone calls it number 0.
    if len(env.get("CUDA_VISIBLE_DEVICES", ",").split(",")) == 1:
        found["LOCAL_RANK"] = "0"
    for name, value in found.items():
        env.setdefault(name, value)


def alone() -> list[str]:
    """Takes a launcher's variables out of the environment, for a command that is one process.

    Returns the names of those that said otherwise."""
    plain = {"RANK": "0", "WORLD_SIZE": "1"}
    told = [name for name, value in plain.items() if os.environ.get(name, value) != value]
    for name in _NAMES:
        os.environ.pop(name, None)
    return told


@functools.cache
def follow() -> None:
    """From now on this rank gets SIGTERM when one of its launchers dies: it must not train on as an
    orphan.

    Launchers are the processes above this one as far as they are deepspeed or torchrun.  A SIGTERM
    to `deepspeed` ends only its uppermost process; the one between it and the ranks lives on.
    A rank that has not ended ten minutes later is ended."""
    pid = os.getppid()
    while (seen := process(pid)) and _launches(pid):
        _above[pid], pid = seen[0], seen[1]
    if not _above:
        return
    # The kernel's own signal reaches a start-up that hangs in a library.  prctl's number 1 is
    # PR_SET_PDEATHSIG; where there is no prctl, the thread does it alone.
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl:
        prctl(1, int(signal.SIGTERM))
    threading.Thread(target=_watch, daemon=True, name="launcher").start()


def orphaned() -> bool:
    """Whether one of the launchers that this process follows has died."""
    return not all((seen := process(pid)) and seen[0] == start for pid, start in _above.items())


def process(pid: int) -> tuple[int, int] | None:
    """(start time in clock ticks since boot, parent) of a process; None where it is dead.

    A number may be given to another process later; number and start time together are not."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
    except OSError:
        return None
    # The second field, the name in brackets, may hold spaces.
    state, parent, *fields = text.rpartition(")")[2].split()
    # A zombie is dead and only waits for its parent to ask.
    return None if state in "ZX" else (int(fields[17]), int(parent))


class _Refused(UserError):
    """Said by every process: which of them is rank 0 is what nobody can tell."""

    def __init__(self, text: str) -> None:
        super().__init__(text, anywhere=True)


def _number(name: str, default: int) -> int:
    # `_check` complains of what is no number; the complaint itself must be printable.
    value = os.environ.get(name, "")
    return int(value) if value.isdecimal() else default


def _check() -> None:
    env = os.environ
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_PORT"):
        if name in env and not env[name].isdecimal():
            raise _Refused(f"{name} is {env[name]!r} in the environment, not a number; {_REMEDY}")
    if world() > 1:
        lacks = [x for x in ("RANK", "MASTER_ADDR", "MASTER_PORT") if x not in env]
        if lacks:
            raise _Refused(
                f"WORLD_SIZE is {world()} in the environment without {', '.join(lacks)}; {_REMEDY}, "
                "or unset WORLD_SIZE for one process"
            )
    if not rank() < world():
        raise _Refused(
            f"RANK is {rank()} and WORLD_SIZE {world()} in the environment, but ranks count from 0; "
            f"{_REMEDY}, or unset both for one process"
        )


def _say_waiting() -> None:
    """Says that Slurm's other processes must come: in an interactive shell there are none."""
    # Imports this module.
    from fastdisco.common.console import say

    others = world() - 1
    named = "1 other process" if others == 1 else f"{others} other processes"
    say(f"waiting for {named} of this Slurm step (unset SLURM_PROCID for one process)")


def _slurm() -> dict[str, str]:
    env = os.environ
    job, step = env.get("SLURM_JOB_ID", ""), env.get("SLURM_STEP_ID", "")
    nodes = env.get("SLURM_STEP_NODELIST", "")
    if not nodes and "MASTER_ADDR" not in env:
        raise _Refused("SLURM_STEP_NODELIST is not set: set MASTER_ADDR to the host of rank 0")
    return {
        "RANK": env["SLURM_PROCID"],
        "LOCAL_RANK": env.get("SLURM_LOCALID", "0"),
        "WORLD_SIZE": env["SLURM_STEP_NUM_TASKS"],
        "MASTER_ADDR": first_host(nodes),
        "MASTER_PORT": _port(f"{job}.{step}"),
    }


def _open_mpi() -> dict[str, str]:
    env = os.environ
    size = env["OMPI_COMM_WORLD_SIZE"]
    if env.get("OMPI_COMM_WORLD_LOCAL_SIZE") != size and "MASTER_ADDR" not in env:
        raise _Refused(
            "OMPI_COMM_WORLD_SIZE: Open MPI started processes on several hosts and does not say "
            "where rank 0 is; pass it on with mpirun -x MASTER_ADDR=HOST"
        )
    # On one host every process has the same parent.
    job = env.get("PMIX_NAMESPACE") or env.get("OMPI_MCA_ess_base_jobid") or str(os.getppid())
    return {
        "RANK": env["OMPI_COMM_WORLD_RANK"],
        "LOCAL_RANK": env.get("OMPI_COMM_WORLD_LOCAL_RANK", "0"),
        "WORLD_SIZE": size,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": _port(job),
    }


def first_host(nodes: str) -> str:
    """The first host of Slurm's list: gpu[01-04,9],login -> gpu01."""
    head, bracket, rest = nodes.partition("[")
    if not bracket or "," in head:
        return head.split(",")[0]
    numbers, _, tail = rest.partition("]")
    return head + numbers.split(",")[0].split("-")[0] + tail.split(",")[0]


def _port(job: str) -> str:
    """A port that all ranks of a job agree on, below those that systems give to any program."""
    return str(10_000 + zlib.crc32(job.encode()) % 20_000)


def _launches(pid: int) -> bool:
    """Whether a process is `deepspeed`, `torchrun` or the like, by its command line."""
    try:
        words = Path(f"/proc/{pid}/cmdline").read_text(errors="replace").split("\0")
    except OSError:
        return False
    if Path(words[0]).name.startswith("python"):
        # The script or the module that Python runs.
        words = [x for x in words[1:] if not x.startswith("-")]
    name = Path(words[0]).name if words else ""
    return any(name == x or (x[-1] == "." and name.startswith(x)) for x in _LAUNCHERS)


def _watch() -> None:
    while not orphaned():
        time.sleep(_LOOK)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(_GRACE)
    os._exit(STOPPED)
