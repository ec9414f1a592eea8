"""Weights from files, without running code from them, and strictly into a network; the networks of
our own runs."""

import argparse
import pathlib
import pickle
import re
import zipfile
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from fastdisco import config
from fastdisco.common.console import shorten
from fastdisco.common.errors import UserError
from fastdisco.models.build import of
from fastdisco.models.net import Net


def from_run(
    folder: Path, which: str = "student", overrides: list[str] = (), student: str | None = None
) -> tuple[Net, config.Config]:
    """A network of one of our runs in eval mode, and its configuration with the overrides laid over
    it.

    folder  the run (its last checkpoint is taken), or one of its folders checkpoints/step_XXXXXXXX
    which   student, or ema for the mean student
    student the name of one where the run has several
    Raises UserError when the folder holds no checkpoint, or one that does not fit its
    config.yaml."""
    folder = Path(folder).absolute()  # "." has parents too
    step = folder if (folder / "state.pt").is_file() else last(folder)
    if step is None:
        raise UserError(
            f"{folder}: no checkpoint of fastdisco here (no {folder / 'checkpoints' / 'last'}); "
            "give the folder of a run that has saved one"
        )
    cfg = config.load(step.parent.parent / "config.yaml", overrides)
    alone = config.students(cfg)
    if (student or "") not in alone:
        names = ", ".join(n for n in alone if n)
        raise UserError(
            f"{folder}: has {f'no student {student}' if student else 'several students'}; "
            + (
                f"name one of {names} (--student, or teacher.student)"
                if names
                else "it trained a single one: leave its name out"
            )
        )
    cfg = alone[student or ""]
    weights = read(step / "state.pt").get(f"{student}/{which}" if student else which)
    if not isinstance(weights, dict):
        why = (
            f"this run by {cfg.method.name} has no mean student"
            if which == "ema"
            else "give a checkpoint written by fastdisco/train.py"
        )
        raise UserError(f"{step / 'state.pt'}: holds no weights named {which}; {why}")
    # What is drawn here is overwritten: it must not shift the caller's random stream.
    with torch.random.fork_rng(devices=[]):
        net = of(cfg)
    load_weights(
        net,
        weights,
        step / "state.pt",
        f"{step.parent.parent / 'config.yaml'} must be the one that the run was trained with",
    )
    return net.eval().to(memory_format=torch.channels_last), cfg


def last(run: Path) -> Path | None:
    """The folder that RUN/checkpoints/last names; None where the run has none yet.  Raises
    UserError where that folder is not whole."""
    pointer = Path(run) / "checkpoints" / "last"
    if not pointer.exists():
        return None
    step = pointer.parent / pointer.read_text().strip()
    if not (step / "state.pt").is_file():
        raise UserError(
            f"{pointer}: names {step.name}, which holds no state.pt; write a complete folder's "
            "name into it"
        )
    return step


def read(file: Path) -> dict:
    """What torch.save wrote, never running code from the file (weights_only); tensors of a zip file
    are mapped, not read.  Or safetensors.

    Raises UserError for a missing, damaged or unsafe file, or one that holds no dict."""
    try:
        open(file, "rb").close()
    except OSError as e:
        raise UserError(
            f"{file}: cannot be read ({e.strerror}); give the path of an existing checkpoint"
        ) from None
    try:
        if Path(file).suffix == ".safetensors":
            return safetensors.torch.load_file(file)
        zipped = zipfile.is_zipfile(file)  # torch before 1.6 wrote none
        if zipped:
            with zipfile.ZipFile(file) as records:
                if records.testzip():  # torch does not look at the sums of what it maps
                    raise zipfile.BadZipFile
        with torch.serialization.safe_globals(_HARMLESS):
            found = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    # Torch's readers raise RuntimeError, EOFError, OSError, struct.error ... wherever the bytes
    # stop making sense.
    except Exception as e:
        asked = isinstance(e, pickle.UnpicklingError) and re.search(r"GLOBAL (\S+)", str(e))
        raise UserError(_unsafe(file, asked[1]) if asked else _damaged(file)) from None
    if not isinstance(found, dict):
        raise UserError(
            f"{file}: holds a {type(found).__name__}, not a dict of weights; give a checkpoint file"
        )
    return found


def load_weights(net: nn.Module, weights: dict[str, Tensor], source: Path | str, remedy: str):
    """Copies named weights into the network; every name and shape must agree.

    Raises UserError with what does not, and the remedy; and for weights that are no finite
    numbers."""
    own = net.state_dict()
    shape = {
        k: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for k, v in weights.items()
    }
    wrong = {
        # A counter that nothing here reads.
        "missing": [k for k in own if k not in weights and not k.endswith(".num_batches_tracked")],
        "unexpected": [k for k in weights if k not in own],
        "of another shape": [
            f"{k} {shape[k]} for {tuple(v.shape)}"
            for k, v in own.items()
            if k in weights and shape[k] != tuple(v.shape)
        ],
    }
    if any(wrong.values()):
        raise UserError(
            f"{source}: {'; '.join(f'{what}: {shorten(names)}' for what, names in wrong.items() if names)}; {remedy}"
        )
    if broken := [
        k
        for k, v in own.items()
        if k in weights and v.is_floating_point() and not v.is_meta and not _finite(weights[k])
    ]:
        raise UserError(
            f"{source}: not finite real numbers: {shorten(broken)}; its training broke down or the "
            "file is damaged: take another"
        )
    net.load_state_dict(weights, strict=False)  # all but the counters is there


# Plain values: the command line in DINO's checkpoints.
_HARMLESS = [argparse.Namespace, (pathlib.PosixPath, "pathlib.PosixPath")]


def _finite(x: Tensor) -> bool:
    plain = x.is_floating_point() and x.layout == torch.strided and not x.is_meta
    return plain and bool(x.isfinite().all())


def _unsafe(file: Path, asked: str) -> str:
    return (
        f"{file}: refused, since its pickle asks for {asked}, and building what a pickle asks for "
        "can run code; if you trust its author, run this in a throw-away container without network "
        f"and give what it writes: torch.save({{k: v for k, v in torch.load('{file}', "
        "map_location='cpu', weights_only=False).items() if k in ('state_dict', 'model', "
        f"'teacher') or torch.is_tensor(v)}}, 'weights.pth.tar')"
    )


def _damaged(file: Path) -> str:
    return (
        f"{file}: not a readable torch checkpoint (cut short, damaged, or of another kind); "
        "copy or download it again and compare its size or checksum"
    )
