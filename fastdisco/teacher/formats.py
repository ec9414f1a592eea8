"""What a teacher can be read from: checkpoint files, whose layouts are in layouts.py, and the folders
of our own runs."""

import hashlib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from fastdisco import models
from fastdisco.common.console import shorten
from fastdisco.common.errors import UserError
from fastdisco.common.files import open_regular
from fastdisco.teacher import strangers
from fastdisco.teacher.architectures import ARCHS, FULL_CHECKPOINTS, recognise
from fastdisco.teacher.head_kinds import nearest, widths
from fastdisco.teacher.layouts import FORMATS, from_xcit, unwrapped


class Source(NamedTuple):
    """A teacher's network, and what is known of where it was read."""

    net: models.Net
    format: str
    arch: str
    kwargs: Mapping[str, Any]
    # Its kind and widths.
    head: str
    # Width of the embedding.
    dim: int
    # Why -> names in the file that are no part of the network.
    ignored: dict[str, list[str]]


def read(
    path: Path,
    arch: str | None = None,
    kwargs: Mapping[str, Any] | None = None,
    dim: int | None = None,
    student: str | None = None,
) -> Source:
    """The teacher from a checkpoint file of the kinds in FORMATS, or from the folder of one of our
    runs (or of one of its checkpoints).

    arch, kwargs  the timm model that its backbone belongs to; None: the file tells
    dim           width of the student's embedding, which the teacher's must have; None: any
    student       the name of one, for a run that has several
    Raises UserError naming every weight that is missing, unexpected or of another shape, and a
    missing head."""
    kwargs = dict(kwargs or {})
    if kwargs and arch is None:
        raise UserError(
            f"teacher.kwargs: {kwargs} belong to an architecture; name it as teacher.arch"
        )
    run = Path(path).is_dir()
    found = _from_run(path, arch, kwargs, student) if run else _from_file(path, arch, kwargs)
    if dim not in (None, found.dim):
        raise UserError(
            f"{path}: embeds into {found.dim} numbers and the student into {dim}; set "
            f"student.dim={found.dim} or another teacher"
        )
    return found


def sha256(path: Path) -> str:
    """SHA-256 of the file that `read` would read: of a run's folder, its newest state.pt.

    Raises UserError where there is none."""
    file = path
    if path.is_dir():
        step = path if (path / "state.pt").is_file() else models.last(path)
        if step is None:
            raise UserError(f"{path}: holds no checkpoint; give the folder of a run that has one")
        file = step / "state.pt"
    h = hashlib.sha256()
    try:
        with open_regular(file) as f:
            while block := f.read(1 << 20):
                h.update(block)
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}); give an existing file") from None
    return h.hexdigest()


def refuse_other(path: Path, expected: str | None) -> None:
    """Raises UserError where the file's SHA-256 is not the one expected; None: any may be.

    Legacy torch files and safetensors have no checksum of their own, so a flipped bit is a weight
    like any other."""
    if expected and (found := sha256(path)) != expected:
        raise UserError(
            f"{path}: its SHA-256 is {found}, and teacher.sha256 says {expected}; copy or download "
            "it again, or correct teacher.sha256"
        )


def _from_file(file: Path, arch: str | None, kwargs: dict[str, Any]) -> Source:
    found = models.read(file)
    if told := strangers.told(found):
        raise UserError(f"{file}: {told}")
    row = next((f for f in FORMATS if f.detect(found)), None)
    if row is None:
        _refuse(file, found)
    weights, ignored = row.split(found)
    if not any(k.startswith("head.") for k in weights):
        raise UserError(
            f"{file}: is {row.name}, but has no projection head (no {row.head_keys} beside the "
            "backbone), whose output DisCo distils; take the checkpoint as its training wrote it, "
            "not one stripped for evaluation"
        )
    detected, share = recognise(weights, (arch, *ARCHS) if arch else ARCHS)
    if arch is None and share < 0.5:
        raise UserError(
            f"{file}: is {row.name}, of no architecture known here (nearest: {detected}, of whose "
            f"weights {share:.0%} agree); set teacher.arch to the timm model that it was trained "
            "with"
        )
    remedy = _remedy(arch, kwargs, detected, share)
    arch = arch or detected
    all_kwargs = {**row.kwargs.get(arch, {}), **kwargs}
    head = nearest(row.heads, weights)
    hidden, dim = (_rows(weights.get(name)) for name in ("head.0.weight", head.last))
    # What is drawn here is overwritten.  A seed gives the same student with and without a teacher.
    with torch.random.fork_rng(devices=[]):
        make = lambda features: head.make(features, hidden, dim)
        net = models.create(arch, make, all_kwargs)
    models.load_weights(net, weights, file, remedy)
    kind = f"{head.name}: {widths(net.head)}"
    return Source(net, row.name, arch, all_kwargs, kind, dim, ignored)


def _from_run(
    folder: Path, arch: str | None, kwargs: dict[str, Any], student: str | None
) -> Source:
    net, cfg = models.from_run(folder, student=student)
    which = "student"
    if cfg.method.name == "dino":
        # DINO's mean student (EMA) is the better network: its authors publish it and we distil it.
        which = "ema"
        net, cfg = models.from_run(folder, which, student=student)
    # The embedding is distilled, and prototypes come after it.
    net.prototypes = None
    trained = cfg.student
    if arch is not None and (trained.arch, trained.kwargs) != (arch, kwargs):
        raise UserError(
            f"{folder}: trained {trained.arch} with {trained.kwargs}, not teacher.arch {arch} with "
            f"{kwargs}; set teacher.arch={trained.arch} and teacher.kwargs to the same, or "
            "teacher.arch=null"
        )
    name = f"a run of fastdisco by {cfg.method.name}, its {which}"
    return Source(net, name, trained.arch, trained.kwargs, widths(net.head), trained.dim, {})


def _remedy(arch: str | None, kwargs: dict[str, Any], detected: str, share: float) -> str:
    """What to do where weights do not fit; share: of them, how many are those of `detected`."""
    if arch is None:
        return (
            f"the nearest architecture known here is {detected}; if it is another, set teacher.arch"
        )
    if share == 1 and (detected, {}) != (arch, kwargs):
        return (
            f"teacher.arch is {arch} with {kwargs}, but the weights are those of {detected}: set "
            f"teacher.arch={detected} and no teacher.kwargs"
        )
    return (
        f"teacher.arch is {arch} with {kwargs}: set it to the model that this file was trained with"
    )


def _refuse(file: Path, found: dict) -> NoReturn:
    """Raises UserError for a file of no format: a backbone without head, or something else."""
    state = unwrapped(found)
    names = [k.removeprefix("backbone.") for k in state]
    heads = ("fc.", "head.", "classifier.")
    backbone = {
        f"backbone.{k}": x for k, x in zip(names, state.values()) if not k.startswith(heads)
    }
    arch, share = recognise(from_xcit(backbone))
    layers = [k for k in names if re.fullmatch(r"(fc|head|classifier)\.\d+\.weight", k)]
    if share == 1 and len(layers) > 1:
        raise UserError(
            f"{file}: holds {arch} and {shorten(layers)}, perhaps its projection head, without the "
            "prefix that tells whose they are; if the head is linear, ReLU, linear, put encoder_q. "
            "before each name and give that (docs/teachers.md, Other layouts)"
        )
    if share == 1:
        full = "see docs/teachers.md"
        if arch in FULL_CHECKPOINTS:
            full = f"DINO's is {FULL_CHECKPOINTS[arch]}"
        raise UserError(
            f'{file}: holds {arch} alone, as timm, torchvision and DINO\'s "backbone only" files '
            "do, without the projection head of its self-supervised training, whose output DisCo "
            f"distils; take the full checkpoint ({full})"
        )
    raise UserError(
        f"{file}: holds {shorten(list(state)) or 'nothing'}, which is no known format; give the "
        f"folder of a fastdisco run, or {', or '.join(f.name for f in FORMATS)}"
    )


def _rows(x: Any) -> int:
    # 1 where there are none: loading then complains of another shape.
    return len(x) if isinstance(x, Tensor) and x.ndim else 1
