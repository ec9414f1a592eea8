"""What a teacher can be read from: checkpoint formats, told apart by their keys, and the folders of
our own runs.

A new format is a row of FORMATS, at the end."""

import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from fastdisco import models
from fastdisco.common.console import shorten
from fastdisco.common.errors import UserError
from fastdisco.teacher.architectures import ARCHS, FULL_CHECKPOINTS, recognise
from fastdisco.teacher.head_kinds import (
    DINO,
    DINO_BN,
    LINEAR,
    MLP,
    MLP_BN,
    Head,
    nearest,
    widths,
)


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


class Parts(NamedTuple):
    """A file's contents, sorted."""

    # backbone.* and head.*; what is neither keeps a name that fits no network.
    weights: dict[str, Tensor]
    ignored: dict[str, list[str]]


class Format(NamedTuple):
    """A kind of checkpoint."""

    name: str
    # Whether what the file holds is of this format.
    detect: Callable[[dict], bool]
    split: Callable[[dict], Parts]
    # Those that it can have, and under which keys.
    heads: tuple[Head, ...]
    head_keys: str


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


def _from_file(file: Path, arch: str | None, kwargs: dict[str, Any]) -> Source:
    found = models.read(file)
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
    head = nearest(row.heads, weights)
    hidden, dim = (_rows(weights.get(name)) for name in ("head.0.weight", head.last))
    # What is drawn here is overwritten.  A seed gives the same student with and without a teacher.
    with torch.random.fork_rng(devices=[]):
        make = lambda features: head.make(features, hidden, dim)
        net = models.create(arch or detected, make, kwargs)
    models.load_weights(net, weights, file, _remedy(arch, kwargs, detected, share))
    kind = f"{head.name}: {widths(net.head)}"
    return Source(net, row.name, arch or detected, kwargs, kind, dim, ignored)


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
    state = _unwrapped(found)
    heads = ("fc.", "head.", "classifier.")
    backbone = {f"backbone.{k}": x for k, x in state.items() if not k.startswith(heads)}
    arch, share = recognise(_from_xcit(backbone))
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


# ---- reading the formats


def _unwrapped(found: dict) -> dict[str, Any]:
    """The weights of a dict that holds them under a key, as trainings save them, or that is them;
    without the prefix of DistributedDataParallel."""
    nested = (found[key] for key in ("state_dict", "model") if isinstance(found.get(key), dict))
    return {str(k).removeprefix("module."): x for k, x in next(nested, found).items()}


def _sort(state: dict[str, Any], part: Callable[[str], tuple[str | None, str]]) -> Parts:
    """part: gives for a key its new name; or None, and the reason why it is ignored."""
    weights, ignored = {}, {}
    for key, x in state.items():
        name, why = part(key)
        if name is None:
            ignored.setdefault(why, []).append(key)
        else:
            # A name that fits no network, so that loading refuses it.
            weights[f"{key} (twice)" if name in weights else name] = x
    return Parts(weights, ignored)


def _is_moco(found: dict) -> bool:
    wrapped = isinstance(found.get("state_dict"), dict)
    return wrapped and any(k.startswith("encoder_q.") for k in _unwrapped(found))


def _from_moco(found: dict) -> Parts:
    def part(key: str) -> tuple[str | None, str]:
        if key in ("queue", "queue_ptr"):
            return None, "negatives of its training"
        if key.startswith("encoder_k."):
            return None, "momentum encoder"
        if key.startswith(("teacher_encoder_q.", "teacher_encoder_k.")):
            return None, "teacher of its training by DisCo"
        own = key.removeprefix("encoder_q.")
        if own == key:
            return f"{key} (not of encoder_q)", ""
        # The head lies where ResNets, and others, keep the classifier.
        first, _, rest = own.partition(".")
        return (f"head.{rest}" if first in ("fc", "classifier") else f"backbone.{own}"), ""

    return _sort(_unwrapped(found), part)


def _is_swav(found: dict) -> bool:
    return any(k.startswith("projection_head.") for k in _unwrapped(found))


def _from_swav(found: dict) -> Parts:
    def part(key: str) -> tuple[str | None, str]:
        if key.startswith("prototypes"):
            return None, "prototypes"
        own = key.removeprefix("projection_head.")
        return (f"backbone.{key}" if own == key else f"head.{own}"), ""

    return _sort(_unwrapped(found), part)


def _is_dino(found: dict) -> bool:
    state = found.get("teacher")
    if not isinstance(state, dict):
        return False
    return any(str(k).removeprefix("module.").startswith("backbone.") for k in state)


def _from_dino(found: dict) -> Parts:
    def part(key: str) -> tuple[str | None, str]:
        if key.startswith("head.last_layer."):
            return None, "prototypes of the last layer"
        if key.startswith("head.mlp."):
            return f"head.{key.removeprefix('head.mlp.')}", ""
        return key, ""

    state = {str(k).removeprefix("module."): x for k, x in found["teacher"].items()}
    weights, ignored = _sort(state, part)
    if isinstance(found.get("student"), dict):
        ignored["student of its training"] = [f"student.{k}" for k in found["student"]]
    return Parts(_from_xcit(weights), ignored)


def _from_xcit(weights: dict[str, Any]) -> dict[str, Any]:
    """timm's names for XCiT: that of the position embedding, and three layers for query, key and
    value of class attention in place of one."""
    out = {}
    for key, x in weights.items():
        key = key.replace(".pos_embeder.", ".pos_embed.")
        joint = re.fullmatch(r"(backbone\.cls_attn_blocks\.\d+\.attn\.)qkv(\.\w+)", key)
        if joint and isinstance(x, Tensor) and x.ndim and len(x) % 3 == 0:
            before, after = joint.groups()
            out |= {f"{before}{name}{after}": part for name, part in zip("qkv", x.chunk(3))}
        else:
            out[key] = x
    return out


def _rows(x: Any) -> int:
    # 1 where there are none: loading then complains of another shape.
    return len(x) if isinstance(x, Tensor) and x.ndim else 1


FORMATS = (
    Format(
        "a MoCo v1 or v2 or official DisCo checkpoint ([module.]encoder_q.* in state_dict)",
        _is_moco,
        _from_moco,
        (MLP, LINEAR),
        "fc.* or classifier.*",
    ),
    Format(
        "a SwAV, DeepCluster-v2 or SeLa-v2 checkpoint ([module.]projection_head.*, bare or in "
        "state_dict)",
        _is_swav,
        _from_swav,
        (MLP_BN, MLP, LINEAR),
        "projection_head.*",
    ),
    Format(
        "a full DINO checkpoint ([module.]backbone.* and head.mlp.* in teacher)",
        _is_dino,
        _from_dino,
        (DINO, DINO_BN, LINEAR),
        "head.mlp.*",
    ),
)
