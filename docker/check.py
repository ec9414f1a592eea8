"""Says what a container can do, and fails where something that training needs is missing.  It is
the last step of the image's build.

    docker run --rm --gpus all fastdisco python3 docker/check.py

on a new machine also shows the GPUs, and whether this user can write.  Each function below checks
the thing of its name: it returns what it found, or raises with what to do."""

import importlib.metadata
import os
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path

# The operators of DALI that the graphs use on each device, by DALI's own names.
OPERATORS = {
    "CPU": {
        "readers__File",
        "readers__Webdataset",
        "PeekImageShape",
        "Resize",
        "Filter",
        "Hsv",
        "BrightnessContrast",
    },
    "Mixed": {"decoders__Image"},
    "GPU": {"Resize", "Slice", "GaussianBlur", "Hsv", "CropMirrorNormalize"},
}


def main() -> int:
    """Runs every check; returns the number of those that failed."""
    failed = []
    for check in (torch, triton, dali, deepspeed, apex, fastdisco, folders):
        try:
            print(f"ok    {check.__name__:10} {check()}", flush=True)
        # Every part is looked at: one missing library must not hide another.
        except Exception as e:
            failed.append(check.__name__)
            print(f"FAIL  {check.__name__:10} {type(e).__name__}: {e}", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}")
    return len(failed)


def torch() -> str:
    """torch and torchvision load, and see the GPUs."""
    import torch
    import torchvision

    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    versions = (
        f"{torch.__version__}, CUDA {torch.version.cuda}, torchvision {torchvision.__version__}"
    )
    return f"{versions}, {len(gpus)} GPUs {sorted(set(gpus))}"


def triton() -> str:
    """Triton compiles a launcher in C for each kernel, so it needs a compiler and Python's
    header."""
    import triton

    compilers = [shutil.which(name) for name in (os.environ.get("CC", ""), "gcc", "clang")]
    compiler = next(filter(None, compilers), None)
    header = Path(sysconfig.get_path("include")) / "Python.h"
    assert compiler, "no C compiler: install gcc, or set CC"
    assert header.exists(), f"no {header}: install python3-dev"
    return f"{triton.__version__}, {compiler}, {header}"


def dali() -> str:
    """One DALI, for torch's CUDA, with the operators that the graphs use."""
    import nvidia.dali.backend as backend
    import torch

    installed = {d.metadata["Name"] or "" for d in importlib.metadata.distributions()}
    names = sorted(name for name in installed if name.startswith("nvidia-dali-cuda"))
    assert len(names) == 1, f"{names} write into one folder: uninstall all, then install one"
    (name,) = names
    for kind, needed in OPERATORS.items():
        lacking = needed - set(getattr(backend, f"Registered{kind}Ops")())
        assert not lacking, f"{name}: no {kind} operators {sorted(lacking)}"
    if torch.version.cuda:
        want = f"nvidia-dali-cuda{torch.version.cuda.split('.')[0]}0"
        assert name == want, f"{name} beside torch for CUDA {torch.version.cuda}: install {want}"
    version = importlib.metadata.version(name)
    return f"{name} {version}, readers, mixed decoder and GPU operators"


def deepspeed() -> str:
    """DeepSpeed and its launcher."""
    import deepspeed

    assert shutil.which("deepspeed"), "the launcher `deepspeed` is not on PATH"
    return deepspeed.__version__


def apex() -> str:
    """Optional, so never a failure: timm.optim takes its optimizers from it."""
    from timm.optim import list_optimizers

    try:
        from apex import optimizers
    except ImportError as e:
        return f"not usable ({e}): optim.name=fusedsgd, fusedlamb ... are refused, all others work"
    names = set(list_optimizers("fused*")) & {name.lower() for name in vars(optimizers)}
    return f"optim.name may be {', '.join(sorted(names))}"


def fastdisco() -> str:
    """The package and its command."""
    import fastdisco
    from fastdisco.run.environment import environment

    assert shutil.which("fastdisco"), "the command `fastdisco` is not on PATH"
    folder, commit = Path(fastdisco.__file__).parent, environment()["commit"]
    return f"{fastdisco.__version__} in {folder}, commit {commit}"


def folders() -> str:
    """The folders that the user of this container writes to."""
    paths = [
        Path.home(),
        Path(os.environ["TRITON_CACHE_DIR"]),
        Path(os.environ["TORCH_EXTENSIONS_DIR"]),
        Path("out"),
    ]
    for path in paths:
        path.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=path).close()
    return f"user {os.getuid()} writes to {', '.join(map(str, paths))}"


if __name__ == "__main__":
    sys.exit(main())
