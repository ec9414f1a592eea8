"""GPUs and their driver, by the words of nvidia-smi.  No check here starts CUDA, but `usable`."""

import re
import shutil
import subprocess
from typing import NamedTuple

import torch

from fastdisco.common.errors import UserError
from fastdisco.doctor.finding import Finding, failure, ok, skipped, warning
from fastdisco.engine import device

# What is asked for each GPU.
_FIELDS = (
    "index",
    "name",
    "driver_version",
    "compute_mode",
    "memory.free",
    "memory.total",
    "ecc.errors.uncorrected.volatile.total",
    "ecc.errors.uncorrected.aggregate.total",
    "pcie.link.width.current",
    "pcie.link.width.max",
    "pcie.link.gen.current",
    "pcie.link.gen.max",
)
# Less of a GPU's memory is free where another program uses it.  The driver alone takes some.
FREE = 0.9


class Gpu(NamedTuple):
    """A GPU as the driver describes it; None where it does not say."""

    index: int
    name: str
    driver: str
    compute_mode: str
    free_mib: int | None
    total_mib: int | None
    # Uncorrected errors of its memory: since the driver was loaded, and ever.
    ecc_now: int | None
    ecc_ever: int | None
    width: int | None
    width_max: int | None
    gen: int | None
    gen_max: int | None


def ask() -> str | None:
    """nvidia-smi's answer; None where there is no nvidia-smi.  Raises OSError where it fails."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, f"--query-gpu={','.join(_FIELDS)}", "--format=csv,noheader,nounits"]
    done = subprocess.run(query, capture_output=True, text=True, timeout=30)
    if done.returncode:
        said = (done.stdout + done.stderr).strip().splitlines() or ["nothing"]
        raise OSError(f"nvidia-smi ended with {done.returncode} and said: {said[-1]}")
    return done.stdout


def parse(answer: str) -> list[Gpu]:
    """The GPUs of nvidia-smi's answer, one a line; `[N/A]` and the like are None."""
    found = []
    for line in filter(str.strip, answer.splitlines()):
        words = [x.strip() for x in line.split(",")]
        # A name may hold a comma.
        extra = len(words) - len(_FIELDS)
        if extra < 0:
            raise ValueError(f"nvidia-smi answered {line!r}, which has not {len(_FIELDS)} fields")
        name = ", ".join(words[1 : 2 + extra])
        driver, mode, *numbers = words[2 + extra :]
        found.append(Gpu(int(words[0]), name, driver, mode, *map(_number, numbers)))
    return found


def visible(gpus: list[Gpu], asked: str | None) -> list[Gpu]:
    """Those that CUDA_VISIBLE_DEVICES lets a process see, where it names them by number."""
    words = (asked or "").split(",")
    if not all(word.strip().isdecimal() for word in words):
        return gpus
    return [g for g in gpus if g.index in map(int, words)]


def present(gpus: list[Gpu]) -> Finding:
    """Which GPUs there are."""
    if not gpus:
        nodes = sorted(node.name for node in device.NODES.glob("nvidia[0-9]*"))
        if nodes:
            remedy = "reinstall the driver, or start the container with --gpus all"
            return failure("gpu", f"/dev has {nodes[0]}, and nvidia-smi names no GPU", remedy)
        return skipped("gpu", "no NVIDIA GPU here: a training runs on the CPU")
    return ok("gpu", ", ".join(f"{g.index} {g.name}" for g in gpus))


def driver(gpus: list[Gpu], cuda: str | None, supports: int | None) -> Finding:
    """torch's CUDA is one that the driver can run.

    cuda      torch's, such as 13.0; None: a build for the CPU
    supports  the driver's newest CUDA as cuDriverGetVersion gives it, 12080 for 12.8; None: it
              cannot be asked"""
    if cuda is None:
        remedy = "install torch for CUDA (README, section Train)"
        return failure("driver", f"torch {torch.__version__} is a build for the CPU", remedy)
    version = gpus[0].driver
    others = {g.driver for g in gpus}
    assert len(others) == 1, f"one machine, several drivers: {others}"
    if supports is None:
        return skipped("driver", f"{version}: torch cannot ask which CUDA it runs")
    newest = f"{supports // 1000}.{supports % 1000 // 10}"
    has, needs = (tuple(map(int, x.split("."))) for x in (newest, cuda))
    found = f"{version} runs CUDA up to {newest}, torch and DALI are for CUDA {cuda}"
    if has[0] < needs[0]:
        remedy = f"update the driver to one for CUDA {cuda}, or install torch and DALI for CUDA"
        return failure("driver", found, f"{remedy} {has[0]}")
    if has < needs:
        # Within one major number CUDA promises to work, without what is new.
        return warning("driver", found, f"update the driver to one for CUDA {cuda}")
    return ok("driver", found)


def cuda_of_driver() -> int | None:
    """The newest CUDA that the driver runs, such as 12080; None where it cannot be asked."""
    ask_driver = getattr(torch._C, "_cuda_getDriverVersion", None)
    return ask_driver() or None if ask_driver and torch.version.cuda else None


def compute_mode(gpus: list[Gpu]) -> Finding:
    """Processes may use the GPUs."""
    if closed := [g for g in gpus if g.compute_mode == "Prohibited"]:
        numbers = ",".join(str(g.index) for g in closed)
        remedy = f"nvidia-smi -i {numbers} -c DEFAULT, as root"
        return failure("compute mode", f"GPU {numbers}: no process may use it (Prohibited)", remedy)
    if single := [g for g in gpus if g.compute_mode.startswith("Exclusive")]:
        numbers = ",".join(str(g.index) for g in single)
        found = f"GPU {numbers}: one process at a time, so an evaluation beside a training fails"
        return warning("compute mode", found, f"nvidia-smi -i {numbers} -c DEFAULT, as root")
    return ok("compute mode", "Default")


def free_memory(gpus: list[Gpu], needed_mib: float) -> Finding:
    """No other program holds the GPUs' memory.

    needed_mib: what a rank needs at least for weights, gradients and states"""
    known = [g for g in gpus if g.free_mib is not None and g.total_mib]
    if not known:
        return skipped("gpu memory", "the driver does not say how much is free")
    least = min(known, key=lambda g: g.free_mib or 0)
    found = f"GPU {least.index} has {least.free_mib} of {least.total_mib} MiB free"
    remedy = f"see with nvidia-smi -i {least.index} who uses it, or choose by CUDA_VISIBLE_DEVICES"
    if (least.free_mib or 0) < needed_mib:
        return failure("gpu memory", f"{found}, a rank needs {needed_mib:.0f} and more", remedy)
    if (least.free_mib or 0) < FREE * (least.total_mib or 0):
        return warning("gpu memory", found, remedy)
    return ok("gpu memory", found)


def ecc(gpus: list[Gpu]) -> Finding:
    """The GPUs' memory has had no errors that could not be corrected."""
    if bad := [g for g in gpus if g.ecc_now]:
        told = ", ".join(f"GPU {g.index} {g.ecc_now}" for g in bad)
        remedy = "reset or restart that GPU; have it replaced if the errors come back"
        return failure("ecc", f"uncorrected memory errors since the driver's start: {told}", remedy)
    if bad := [g for g in gpus if g.ecc_ever]:
        told = ", ".join(f"GPU {g.index} {g.ecc_ever}" for g in bad)
        found = f"uncorrected memory errors in its life: {told}"
        return warning("ecc", found, "look at nvidia-smi -q -d ROW_REMAPPER,PAGE_RETIREMENT")
    if all(g.ecc_now is None for g in gpus):
        return skipped("ecc", "these GPUs do not count memory errors, or ECC is off")
    return ok("ecc", "no uncorrected memory errors")


def pcie(gpus: list[Gpu]) -> Finding:
    """Each GPU has all the lanes that it can have.

    The generation is only told: an idle GPU lowers it to save power."""
    known = [g for g in gpus if g.width and g.width_max]
    if not known:
        return skipped("pcie", "the driver does not say how wide the links are")
    if narrow := [g for g in known if (g.width or 0) < (g.width_max or 0)]:
        told = ", ".join(f"GPU {g.index} {g.width} of {g.width_max} lanes" for g in narrow)
        remedy = "look at the slot, the riser and the BIOS; images come to the GPU that much slower"
        return warning("pcie", told, remedy)
    widths = sorted({f"x{g.width} (generation {g.gen} of {g.gen_max})" for g in known})
    return ok("pcie", ", ".join(widths))


def usable() -> Finding:
    """This process can compute on its device, as a training would choose it.  It starts CUDA."""
    try:
        return ok("device", device.describe(device.choose()))
    except UserError as e:
        what, _, remedy = str(e).rpartition("; ")
        return failure(
            "device", what or str(e), remedy if what else "see the README, section Train"
        )


def _number(word: str) -> int | None:
    return int(word) if re.fullmatch(r"\d+", word) else None
