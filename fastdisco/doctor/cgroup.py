"""The limits that a container or a job gives its processes, by the control groups of Linux, version
1 or 2.

A limit of any group above a process counts, too: the smallest wins."""

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT, PROC = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
# Version 1 writes no limit as the largest number of whole pages.
_UNLIMITED = 2**62


class Limits(NamedTuple):
    """What the process may use; inf: no limit."""

    cores: float = math.inf
    memory: float = math.inf  # bytes
    tasks: float = math.inf  # processes and threads
    # How much of the last two is in use, where the limit is.
    memory_used: float = 0
    tasks_used: float = 0


def limits(root: Path = ROOT, proc: Path = PROC) -> Limits:
    """The limits of this process.

    root, proc: where the control groups are mounted, and the file that names this process's"""
    groups = _groups(proc)
    cores = [math.inf]
    memory, tasks = [(math.inf, 0.0)], [(math.inf, 0.0)]
    for folder in _above(root, groups.get("", "/")):
        cores.append(_quota(_text(folder / "cpu.max")))
        memory.append((_limit(folder / "memory.max"), _held(folder, "memory.current", "")))
        tasks.append((_limit(folder / "pids.max"), _used(folder / "pids.current")))
    for folder in _controller(root, groups, "cpu"):
        names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
        cores.append(_quota(" ".join(_text(folder / x) for x in names)))
    for folder in _controller(root, groups, "memory"):
        used = _held(folder, "memory.usage_in_bytes", "total_")
        memory.append((_limit(folder / "memory.limit_in_bytes"), used))
    for folder in _controller(root, groups, "pids"):
        tasks.append((_limit(folder / "pids.max"), _used(folder / "pids.current")))
    (most, used), (threads, running) = min(memory), min(tasks)
    return Limits(min(cores), most, threads, used, running)


def _groups(proc: Path) -> dict[str, str]:
    """The process's group for each controller; version 2 has one for all, named ''."""
    found = {}
    for line in _text(proc).splitlines():
        _, names, path = line.split(":", 2)
        found |= dict.fromkeys(names.split(","), path)
    return found


def _controller(root: Path, groups: dict[str, str], name: str) -> Iterator[Path]:
    """Version 1: the folders of a controller, which is mounted under its own name or together with
    others (cpu,cpuacct)."""
    for mount in root.glob("*"):
        if name in mount.name.split(","):
            yield from _above(mount, groups.get(name, "/"))


def _above(mount: Path, group: str) -> Iterator[Path]:
    """The folder of a group and those above it.

    Inside a container only its own group is mounted, often as the root, whatever the name says."""
    folder = mount / group.strip("/")
    while folder != mount:
        yield folder
        folder = folder.parent
    yield mount


def _quota(text: str) -> float:
    """Cores of `quota period` in microseconds; `max` or -1 is no limit."""
    words = text.split()
    if len(words) != 2 or words[0] in ("max", "-1"):
        return math.inf
    return int(words[0]) / int(words[1])


def _limit(path: Path) -> float:
    text = _text(path)
    return int(text) if text.isdecimal() and int(text) < _UNLIMITED else math.inf


def _used(path: Path) -> float:
    text = _text(path)
    return int(text) if text.isdecimal() else 0.0


def _held(folder: Path, name: str, prefix: str) -> float:
    """Bytes in use without the cached files, which Linux gives up where a program needs memory."""
    rows = (line.split() for line in _text(folder / "memory.stat").splitlines())
    files = (f"{prefix}active_file", f"{prefix}inactive_file")
    cached = sum(int(row[1]) for row in rows if row[0] in files)
    return max(0.0, _used(folder / name) - cached)


def _text(path: Path) -> str:
    with contextlib.suppress(OSError):
        return path.read_text().strip()
    return ""
