"""Libraries: which there are, and whether they fit each other.

Packages are looked up by name: those with an owner elsewhere are used by that owner alone."""

import importlib
import importlib.metadata
import re
import shutil
from pathlib import Path

import torch
from packaging.requirements import Requirement
from packaging.version import Version

from fastdisco import data
from fastdisco.common.errors import UserError
from fastdisco.doctor.finding import Finding, failure, ok, skipped, warning
from fastdisco.engine import device
from fastdisco.engine.deepspeed_engine import import_deepspeed


def requirements(wanted: list[str] | None = None) -> Finding:
    """The installed versions are those that fastdisco asks for.

    wanted: as in setup.py; None: what the installed package says"""
    wanted = _wanted() if wanted is None else wanted
    if wanted is None:
        return skipped("requirements", "fastdisco runs from a checkout that is not installed")
    needed = [
        r for r in map(Requirement, wanted) if not r.marker or r.marker.evaluate({"extra": ""})
    ]
    wrong = [f"{r} (found {_version(r.name)})" for r in needed if not _serves(r)]
    if not wrong:
        return ok("requirements", f"{len(needed)} packages have versions that fastdisco takes")
    bare = " ".join(f"'{x.split(' (')[0]}'" for x in wrong)
    return failure("requirements", ", ".join(wrong), f"pip install {bare}")


def torch_loads() -> Finding:
    """torch and torchvision are built for each other, and torch understands numpy's arrays."""
    import torchvision

    cuda = torch.version.cuda
    built = f"for CUDA {cuda}" if cuda else "for the CPU"
    both = f"{torch.__version__} {built}, torchvision {torchvision.__version__}"
    return ok("torch", f"{both}, {torch.cuda.device_count()} GPUs")


def numpy_fits() -> Finding:
    """torch and numpy exchange arrays: a torch that was built for numpy 1 cannot take numpy 2's."""
    import numpy as np

    try:
        torch.from_numpy(np.zeros(1)).numpy()
    except (RuntimeError, TypeError) as e:
        return failure(
            "numpy",
            f"{np.__version__} does not work with torch {torch.__version__} ({e})",
            "install a numpy that this torch was built for: pip install 'numpy<2'",
        )
    return ok("numpy", f"{np.__version__}, arrays go to torch and back")


def triton(needs_driver: bool | None = None) -> Finding:
    """Triton has what it needs to build a kernel's launcher: a C compiler, Python's header and, on a
    machine with a GPU, the driver's library.

    needs_driver  None: where torch sees a GPU"""
    if needs_driver is None:
        needs_driver = torch.cuda.is_available()
    missing = device.launch_needs(needs_driver)
    if missing:
        what, _, remedy = "; ".join(missing).partition(": ")
        return failure("triton", what, remedy)
    version, compiler = importlib.import_module("triton").__version__, device.compiler()
    return ok("triton", f"{version}, compiler {compiler}, Python's header")


def dali(wheels: dict[str, str] | None = None, cuda: str | None = torch.version.cuda) -> Finding:
    """One DALI, for torch's CUDA, with the operators that the graphs use.

    wheels  names and versions of those installed; None: looked up
    cuda    torch's version of it; None: a build for the CPU, beside which any DALI works"""
    wheels = dali_wheels() if wheels is None else wheels
    want = f"nvidia-dali-cuda{cuda.split('.')[0]}0" if cuda else "nvidia-dali-cuda130"
    if not wheels:
        return failure("dali", "NVIDIA DALI is not installed", f"pip install {want}")
    if len(wheels) > 1:
        return failure(
            "dali",
            f"{' and '.join(wheels)} write into one folder",
            f"pip uninstall -y {' '.join(wheels)}, then pip install {want}",
        )
    ((name, version),) = wheels.items()
    if cuda and name != want:
        return failure(
            "dali",
            f"{name} beside torch for CUDA {cuda}",
            f"pip uninstall -y {name}, then pip install {want}",
        )
    try:
        lacking = data.missing_operators()
    except UserError as e:
        return failure("dali", f"{name} {version} does not load ({e})", f"pip install {want}")
    if lacking:
        return failure(
            "dali", f"{name} {version}: no {lacking}", f"pip install --force-reinstall {want}"
        )
    return ok("dali", f"{name} {version}, readers, mixed decoder and GPU operators")


def dali_wheels() -> dict[str, str]:
    """Names and versions of DALI's installed wheels."""
    found = {
        re.sub(r"[-_.]+", "-", d.metadata["Name"] or "").lower(): d.version
        for d in importlib.metadata.distributions()
    }
    return {name: found[name] for name in sorted(found) if name.startswith("nvidia-dali-cuda")}


def deepspeed() -> Finding:
    """DeepSpeed loads, and its launcher is on PATH."""
    version = import_deepspeed().__version__
    if not shutil.which("deepspeed"):
        return warning(
            "deepspeed",
            "the launcher `deepspeed` is not on PATH",
            "put the folder of Python's scripts on PATH, or start with torchrun",
        )
    return ok("deepspeed", f"{version} with its launcher")


def apex(optimizer: str = "") -> Finding:
    """NVIDIA's apex is optional: some optimizers come from it.  PyPI's `apex` is something else.

    optimizer: optim.name of the configuration, empty without one"""
    why = ""
    try:
        found = importlib.import_module("apex")
    # Another package of that name may raise anything.
    except Exception as e:
        found, why = None, str(e)
    if found and hasattr(found, "optimizers"):
        return ok("apex", "NVIDIA's, so optim.name may be fusedsgd, fusedlamb and the like")
    names = "optim.name=fusedsgd, fusedlamb and the like are refused, all others work"
    what = "the package apex here is not NVIDIA's" if found else f"not usable ({why})"
    remedy = "pip uninstall apex" if found else "build NVIDIA's apex"
    if optimizer.startswith("fused"):
        return failure(
            "apex",
            f"{what}, and optim.name={optimizer} needs it",
            f"{remedy}, or take an optimizer of torch's",
        )
    return warning("apex", f"{what}; {names}", remedy) if found else ok("apex", f"{what}; {names}")


def fastdisco(commit: str | None) -> Finding:
    """The package and its command.  commit: of the checkout or the image, where it is known."""
    import fastdisco as package

    folder = Path(package.__file__).parent
    found = f"{package.__version__} in {folder}, commit {commit}"
    if not shutil.which("fastdisco"):
        return warning(
            "fastdisco",
            "the command `fastdisco` is not on PATH",
            f"pip install {folder.parent}, or put the folder of Python's scripts on PATH",
        )
    return ok("fastdisco", found)


def _wanted() -> list[str] | None:
    """What the installed package asks for; None where it is not installed."""
    try:
        return importlib.metadata.requires("fastdisco") or []
    except importlib.metadata.PackageNotFoundError:
        return None


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "none"


def _serves(wanted: Requirement) -> bool:
    """Whether the installed version will do.  A base image's alpha (2.11.0a0+a6c236b) counts as its
    release."""
    found = _version(wanted.name)
    if found == "none":
        return False
    return wanted.specifier.contains(Version(found).base_version, prereleases=True)
