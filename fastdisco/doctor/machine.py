"""Shared memory, limits of the process, cores and names of this machine."""

import math
import os
import resource
import shutil
import socket
import tempfile
from pathlib import Path

from fastdisco.doctor.cgroup import Limits
from fastdisco.doctor.finding import Finding, failure, ok, size, skipped, warning

MIB, GIB = 2**20, 2**30
SHM = Path("/dev/shm")
# NCCL's buffers of the ranks of one machine lie there.  Docker's default of 64 MiB is too little for
# several ranks, NVIDIA's advice is 1 GiB.
_SHM_LEAST, _SHM_WANTED = 64 * MIB, GIB
# Open files: a rank keeps tars, logs, sockets and libraries open.
_FILES_LEAST, _FILES_WANTED = 256, 1024
# Linux gives 8 MiB by default.
_STACK = 8 * MIB
# Threads of a rank besides DALI's: torch's, gloo's or NCCL's, the log's and the watch's.
_THREADS = 64
INFINIBAND = Path("/sys/class/infiniband")


def shared_memory(ranks: int, folder: Path = SHM) -> Finding:
    """The ranks of this machine can share memory.  ranks: of this machine."""
    remedy = "start the container with --ipc=host or --shm-size=1g"
    if not folder.is_dir():
        return failure("shared memory", f"there is no {folder}", remedy)
    try:
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as e:
        return failure("shared memory", f"{folder} cannot be written ({e.strerror})", remedy)
    return shared_memory_size(shutil.disk_usage(folder).free, ranks, folder)


def shared_memory_size(free: int, ranks: int, folder: Path = SHM) -> Finding:
    """The same once the free bytes are known."""
    remedy = "start the container with --ipc=host or --shm-size=1g"
    found = f"{free / MIB:.0f} MiB free in {folder} for {_count(ranks, 'rank')}"
    if ranks > 1 and free <= _SHM_LEAST:
        return failure("shared memory", found, remedy)
    if ranks > 1 and free < _SHM_WANTED:
        return warning("shared memory", found, remedy)
    return ok("shared memory", found)


def locked_memory(soft: int | None = None, infiniband: bool | None = None) -> Finding:
    """InfiniBand needs locked memory without a limit.

    soft        bytes, -1 for no limit; None: this process's
    infiniband  whether the machine has it; None: looked up"""
    soft = resource.getrlimit(resource.RLIMIT_MEMLOCK)[0] if soft is None else soft
    if infiniband is None:
        infiniband = INFINIBAND.is_dir() and any(INFINIBAND.iterdir())
    if soft == resource.RLIM_INFINITY:
        return ok("memlock", "no limit")
    found = f"{soft / MIB:.0f} MiB of memory may be locked"
    if not infiniband:
        return ok("memlock", f"{found}; only InfiniBand needs more, and there is none")
    remedy = "ulimit -l unlimited, in a container --ulimit memlock=-1"
    return failure("memlock", f"{found}, and this machine has InfiniBand", remedy)


def open_files(tars: int = 0, soft: int | None = None) -> Finding:
    """A rank may open enough files.  tars: of the training's data; soft: None: this process's."""
    soft = resource.getrlimit(resource.RLIMIT_NOFILE)[0] if soft is None else soft
    if soft == resource.RLIM_INFINITY:
        return ok("open files", "no limit")
    remedy = "ulimit -n 65536, in a container --ulimit nofile=65536"
    found = f"{soft} files may be open at once"
    if soft < _FILES_LEAST + tars:
        return failure("open files", f"{found}, {tars} tars are read", remedy)
    if soft < _FILES_WANTED:
        return warning("open files", found, remedy)
    return ok("open files", found)


def stack(soft: int | None = None) -> Finding:
    """Threads get a stack of the usual size.  soft: bytes; None: this process's."""
    soft = resource.getrlimit(resource.RLIMIT_STACK)[0] if soft is None else soft
    if soft == resource.RLIM_INFINITY:
        return ok("stack", "no limit")
    found = f"{soft / MIB:.1f} MiB"
    if soft < _STACK:
        remedy = "ulimit -s 8192, in a container --ulimit stack=67108864"
        return warning("stack", f"{found} for a thread, 8 are usual", remedy)
    return ok("stack", found)


def cores(threads: int, ranks: int, limits: Limits, affinity: int | None = None) -> Finding:
    """There are as many cores as DALI's threads want.

    threads   data.threads, of a rank
    ranks     of this machine
    affinity  cores that this process may run on; None: looked up"""
    affinity = len(os.sched_getaffinity(0)) if affinity is None else affinity
    has, wants = min(float(affinity), limits.cores), threads * ranks
    quota = "" if limits.cores == math.inf else f" (the container's limit is {limits.cores:g})"
    found = f"{has:g} cores{quota} for {_count(ranks, 'rank')} x data.threads={threads}"
    if wants <= has:
        return ok("cores", found)
    fits = max(1, int(has // ranks))
    remedy = f"set data.threads={fits}" if fits < threads else "start fewer ranks"
    return warning("cores", found, f"{remedy}, or give the process more cores")


def memory(needed: float, ranks: int, limits: Limits, available: float | None = None) -> Finding:
    """The ranks of this machine fit into its memory.

    needed     bytes of one rank at least, on the CPU
    available  bytes, of the machine; None: what Linux says"""
    if available is None:
        # What programs can still get, by Linux's own estimate.
        available = _meminfo("MemAvailable:")
    has = min(available, limits.memory - limits.memory_used)
    limited = has < available
    found = f"{size(has)} free{' under the limit of the container' if limited else ''}"
    found += f", {_count(ranks, 'rank')} at {size(needed)} or more"
    remedy = "raise the container's limit" if limited else "end other programs"
    if has < needed * ranks:
        return failure("memory", found, f"{remedy}, or start fewer ranks or a smaller data.batch")
    if has < 2 * needed * ranks:
        return warning("memory", found, f"{remedy}: data pipelines need memory, too")
    return ok("memory", found)


def tasks(threads: int, ranks: int, limits: Limits) -> Finding:
    """The container allows as many threads as the ranks start."""
    if limits.tasks == math.inf:
        return ok("threads", "no limit of the container")
    left, wants = limits.tasks - limits.tasks_used, (threads + _THREADS) * ranks
    found = f"{left:.0f} more threads are allowed, {_count(ranks, 'rank')} start up to {wants}"
    if left < wants:
        return failure("threads", found, "raise the container's limit (--pids-limit=-1)")
    return ok("threads", found)


def hostname(nodes: int, name: str | None = None, interface: str | None = None) -> Finding:
    """This machine's name leads to an address that other nodes can use.

    nodes      of the training
    name       None: the machine's
    interface  that gloo is told to take; None: GLOO_SOCKET_IFNAME"""
    name = socket.gethostname() if name is None else name
    interface = os.environ.get("GLOO_SOCKET_IFNAME", "") if interface is None else interface
    remedy = "set GLOO_SOCKET_IFNAME to the interface between the nodes, or correct /etc/hosts"
    try:
        address = socket.gethostbyname(name)
    except OSError as e:
        found = f"{name} has no address ({e})"
        if nodes > 1 and not interface:
            return failure("host name", found, remedy)
        return warning("host name", found, f"add it to /etc/hosts, or {remedy}")
    found = f"{name} is {address}"
    if nodes > 1 and address.startswith("127."):
        if interface:
            return ok("host name", f"{found}, but GLOO_SOCKET_IFNAME={interface} is taken")
        return failure("host name", f"{found}, which no other node can reach", remedy)
    return ok("host name", found)


def interface(name: str | None = None) -> Finding:
    """The network interface that gloo or NCCL is told to take is there."""
    told = os.environ.get("GLOO_SOCKET_IFNAME", "") if name is None else name
    if not told:
        return skipped("interface", "GLOO_SOCKET_IFNAME is not set: the host's name decides")
    there = [x for _, x in socket.if_nameindex()]
    if lacking := [x for x in told.split(",") if x not in there]:
        return failure(
            "interface",
            f"GLOO_SOCKET_IFNAME names {lacking[0]}, and there are {', '.join(there)}",
            "name one of these",
        )
    return ok("interface", told)


def total_memory() -> float:
    """Bytes of the machine."""
    return _meminfo("MemTotal:")


def _meminfo(name: str) -> float:
    """Bytes of a line of Linux's; inf where there is none."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(name):
            return 1024.0 * int(line.split()[1])
    return math.inf


def _count(n: int, what: str) -> str:
    return f"{n} {what}" if n == 1 else f"{n} {what}s"
