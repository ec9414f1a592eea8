"""All checks of one machine, in the order of the report."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from fastdisco.doctor import cgroup, disk, gpu, machine, versions
from fastdisco.doctor.finding import Finding, failure, looked, skipped

MIB = 2**20
# A rank needs as much at least, where no configuration says more: Python, torch and DALI.
_RANK_BYTES = 2**30
# MiB that are written: to measure, where the ranks have little time, and only to see that it works.
_WRITE_MIB, _SHORT_MIB, _LEAST_MIB = 64, 16, 1

Sections = dict[str, list[Finding]]


class Needs(NamedTuple):
    """What a training wants of the machine; the defaults are those without a configuration."""

    commit: str | None = None
    # Of this machine, and of all.
    ranks: int = 1
    nodes: int = 1
    threads: int = 1
    tars: int = 0
    optimizer: str = ""
    # Bytes: weights, gradients and states of a rank; a checkpoint; the embeddings to record.
    held: float = 0
    checkpoint: int = 0
    cache: int = 0
    # Checkpoints that are kept, and the run's folder; None: there is no configuration.
    keep: int = 1
    folder: Path | None = None
    cache_folder: Path | None = None


def checks(needs: Needs, quick: bool) -> Sections:
    """The findings by section.  quick: nothing is measured, and CUDA is not started."""
    return {
        "versions": libraries(needs.optimizer, needs.commit),
        "machine": gpus(needs.held, quick) + limits(needs),
        "disk": room(needs),
    }


def libraries(optimizer: str, commit: str | None) -> list[Finding]:
    """Versions, and whether they fit each other."""
    return [
        looked(versions.torch_loads),
        looked(versions.numpy_fits),
        looked(versions.triton),
        looked(versions.dali),
        looked(versions.deepspeed),
        looked(versions.apex, optimizer),
        looked(versions.requirements),
        looked(versions.fastdisco, commit),
    ]


def gpus(held: float, quick: bool, ask: Callable[[], str | None] = gpu.ask) -> list[Finding]:
    """The GPUs that the driver names.  held: bytes that a rank needs of its GPU at least."""
    if os.environ.get("CUDA_VISIBLE_DEVICES", "unset") in ("", "-1"):
        return [skipped("gpu", "CUDA_VISIBLE_DEVICES hides all GPUs: a training runs on the CPU")]
    try:
        found = gpu.parse(ask() or "")
    except (OSError, ValueError) as e:
        return [failure("gpu", str(e), "reinstall the driver, or restart the machine")]
    findings = [looked(gpu.present, found)]
    found = gpu.visible(found, os.environ.get("CUDA_VISIBLE_DEVICES"))
    if found:
        findings += [
            looked(gpu.driver, found, torch.version.cuda, gpu.cuda_of_driver()),
            looked(gpu.compute_mode, found),
            looked(gpu.free_memory, found, held / MIB),
            looked(gpu.ecc, found),
            looked(gpu.pcie, found),
        ]
    return findings if quick else [*findings, looked(gpu.usable)]


def limits(needs: Needs) -> list[Finding]:
    """Limits of the process and of its container."""
    group, ranks = cgroup.limits(), needs.ranks
    on_cpu = 0 if torch.cuda.is_available() else needs.held
    return [
        looked(machine.shared_memory, ranks),
        looked(machine.locked_memory),
        looked(machine.open_files, needs.tars),
        looked(machine.stack),
        looked(machine.cores, needs.threads, ranks, group),
        looked(machine.memory, max(on_cpu, _RANK_BYTES), ranks, group),
        looked(machine.tasks, needs.threads, ranks, group),
        looked(machine.hostname, needs.nodes),
        looked(machine.interface),
    ]


def room(needs: Needs) -> list[Finding]:
    """Space on the disks."""
    if needs.folder is None:
        return [skipped("space", "no --config says where a run would lie")]
    # The new one is written before the oldest is removed.
    size = (needs.keep + 1) * needs.checkpoint
    what = f"{needs.keep} + 1 checkpoints"
    space = looked(disk.space, "space", needs.folder, size, what, "run.out")
    return [space, *recorded(needs)]


def recorded(needs: Needs) -> list[Finding]:
    """Space for the embeddings that are to be recorded, where there are any."""
    if not needs.cache or needs.cache_folder is None:
        return []
    rest = (needs.cache_folder, needs.cache, "recorded embeddings", "teacher.cache_folder")
    return [looked(disk.space, "teacher cache", *rest)]


def tars(needs: Needs) -> list[Finding]:
    """Whether all tars may be open, where there are any."""
    return [looked(machine.open_files, needs.tars)] if needs.tars else []


def writing(
    needs: Needs, folder: Path, short: bool, quick: bool
) -> tuple[Finding, disk.Writing | None]:
    """Speed of writing into the folder.  short, quick: little is written, or hardly anything."""
    mib = _LEAST_MIB if quick else _SHORT_MIB if short else _WRITE_MIB
    try:
        measured: disk.Writing | OSError = disk.writes(folder, mib)
    except OSError as e:
        measured = e
    finding = disk.writable(disk.existing(needs.folder or folder), measured, needs.checkpoint)
    return finding, None if isinstance(measured, OSError) else measured
