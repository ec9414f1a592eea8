"""What a teacher can be read from: checkpoint formats by their keys, and the folders of our own
runs."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdisco import models
from fastdisco.common.console import shorten
from fastdisco.common.errors import UserError
from fastdisco.models import heads


class Source(NamedTuple):
    """A teacher's network and what is known of where it was read."""

    net: models.Net
    format: str
    arch: str
    kwargs: dict[str, Any]
    head: str  # its kind and widths
    dim: int  # of the embedding
    ignored: dict[str, list[str]]  # why -> names in the file that are no part of the network


class Parts(NamedTuple):
    # backbone.* and head.*; what is neither keeps a name that fits no network.
    weights: dict[str, Tensor]
    ignored: dict[str, list[str]]


class Head(NamedTuple):
    name: str
    # Of its layers in the state dict, () for a single one; the last is linear, its rows are the
    # embedding's width.
    places: tuple[int, ...]
    # Of the widths of features, hidden layers and embedding.
    make: Callable[[int, int, int], nn.Module]


LINEAR = Head("one linear layer", (), lambda features, hidden, dim: heads.mlp(features, 0, dim))
MLP = Head("linear, ReLU, linear", (0, 2), heads.mlp)
MLP_BN = Head(
    "linear, batch norm, ReLU, linear",
    (0, 1, 3),
    lambda features, hidden, dim: heads.mlp(features, hidden, dim, bn=True),
)
DINO = Head("3 linear layers with GELU", (0, 2, 4), heads.dino_mlp)
DINO_BN = Head(
    "3 linear layers with batch norm and GELU",
    (0, 1, 3, 4, 6),
    lambda features, hidden, dim: heads.dino_mlp(features, hidden, dim, bn=True),
)


class Format(NamedTuple):
    name: str
    detect: Callable[[dict], bool]  # of what the file holds
    split: Callable[[dict], Parts]
    heads: tuple[Head, ...]  # that it can have
    head_keys: str  # where it has it


# Told apart by names and shapes of the weights.  Numbers of attention heads leave no trace there: a
# file with others needs teacher.arch.
ARCHS = (
    "resnet50",
    "resnet18",
    "resnet34",
    "resnet101",
    "resnet152",
    *models.WIDE,
    "vit_small_patch16_224",
    "vit_tiny_patch16_224",
    "vit_base_patch16_224",
    "vit_small_patch8_224",
    "vit_base_patch8_224",
    "xcit_small_12_p16_224",
    "xcit_tiny_12_p16_224",
    "xcit_small_12_p8_224",
    "xcit_medium_24_p16_224",
    "xcit_medium_24_p8_224",
    "mobilenetv3_large_100",
    "efficientnet_b0",
    "efficientnet_b1",
)


def read(
    path: Path,
    arch: str | None = None,
    kwargs: dict[str, Any] = {},
    dim: int | None = None,
    student: str | None = None,
) -> Source:
    """The teacher of a checkpoint file of the kinds in FORMATS, or of the folder of one of our runs
    (or of one of its checkpoints).

    arch, kwargs  the timm model that its backbone belongs to; None: told by the file
    dim           width of the student's embedding, which the teacher's must have; None: any
    student       which one of a run that has several
    Raises UserError naming every weight that is missing, unexpected or of another shape, and a
    missing head."""
    if kwargs and arch is None:
        raise UserError(
            f"teacher.kwargs: {kwargs} belong to an architecture; name it as teacher.arch"
        )
    found = (
        _from_run(path, arch, kwargs, student)
        if Path(path).is_dir()
        else _from_file(path, arch, kwargs)
    )
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
    detected, share = _recognise(weights, (arch, *ARCHS) if arch else ARCHS)
    if arch is None and share < 0.5:
        raise UserError(
            f"{file}: is {row.name}, of no architecture known here (nearest: {detected}, of whose "
            f"weights {share:.0%} agree); set teacher.arch to the timm model that it was trained "
            "with"
        )
    head = _nearest(row.heads, weights)
    hidden, dim = (
        _rows(weights.get("head.0.weight")),
        _rows(weights.get(f"head.{head.places[-1]}.weight" if head.places else "head.weight")),
    )
    # Drawn and overwritten: with and without a teacher, a seed gives the same student.
    with torch.random.fork_rng(devices=[]):
        net = models.create(
            arch or detected, lambda features: head.make(features, hidden, dim), kwargs
        )
    if arch is None:
        remedy = (
            f"the nearest architecture known here is {detected}; if it is another, set teacher.arch"
        )
    elif share == 1 and (detected, {}) != (arch, kwargs):
        remedy = f"teacher.arch is {arch} with {kwargs}, but the weights are those of {detected}: set teacher.arch={detected} and no teacher.kwargs"
    else:
        remedy = f"teacher.arch is {arch} with {kwargs}: set it to the model that this file was trained with"
    models.load_weights(net, weights, file, remedy)
    return Source(
        net, row.name, arch or detected, kwargs, f"{head.name}: {_widths(net.head)}", dim, ignored
    )


def _from_run(
    folder: Path, arch: str | None, kwargs: dict[str, Any], student: str | None
) -> Source:
    net, cfg = models.from_run(folder, student=student)
    # DINO's mean student is the better network, which its authors publish and we distil.
    which = "ema" if cfg.method.name == "dino" else "student"
    if which == "ema":
        net, cfg = models.from_run(folder, which, student=student)
    net.prototypes = None  # what is distilled comes before them
    if arch is not None and (cfg.student.arch, cfg.student.kwargs) != (arch, kwargs):
        raise UserError(
            f"{folder}: trained {cfg.student.arch} with {cfg.student.kwargs}, not teacher.arch "
            f"{arch} with {kwargs}; set teacher.arch={cfg.student.arch} and teacher.kwargs to the "
            "same, or teacher.arch=null"
        )
    return Source(
        net,
        f"a run of fastdisco by {cfg.method.name}, its {which}",
        cfg.student.arch,
        cfg.student.kwargs,
        _widths(net.head),
        cfg.student.dim,
        {},
    )


def _wrapped(found: dict) -> dict:
    """The weights of a dict that holds them under a key as trainings save it, or that is them,
    without the prefix of DistributedDataParallel."""
    state = next(
        (found[k] for k in ("state_dict", "model") if isinstance(found.get(k), dict)), found
    )
    return {str(k).removeprefix("module."): x for k, x in state.items()}


def _sort(state: dict, part: Callable[[str], tuple[str | None, str]]) -> Parts:
    """part gives for a key its new name, or None and the reason why it is ignored."""
    weights, ignored = {}, {}
    for key, x in state.items():
        name, why = part(key)
        if name is None:
            ignored.setdefault(why, []).append(key)
        else:
            weights[f"{key} (twice)" if name in weights else name] = x
    return Parts(weights, ignored)


def _is_moco(found: dict) -> bool:
    return isinstance(found.get("state_dict"), dict) and any(
        k.startswith("encoder_q.") for k in _wrapped(found)
    )


def _from_moco(found: dict) -> Parts:
    def part(key):
        if key in ("queue", "queue_ptr"):
            return None, "negatives of its training"
        if key.startswith("encoder_k."):
            return None, "momentum encoder"
        if key.startswith(("teacher_encoder_q.", "teacher_encoder_k.")):
            return None, "teacher of its training by DisCo"
        own = key.removeprefix("encoder_q.")
        first, _, rest = own.partition(".")
        if own == key:
            return f"{key} (not of encoder_q)", ""
        # Where ResNets, and others, keep the classifier.
        return f"head.{rest}" if first in ("fc", "classifier") else f"backbone.{own}", ""

    return _sort(_wrapped(found), part)


def _is_swav(found: dict) -> bool:
    return any(k.startswith("projection_head.") for k in _wrapped(found))


def _from_swav(found: dict) -> Parts:
    def part(key):
        if key.startswith("prototypes"):
            return None, "prototypes"
        return f"head.{key.removeprefix('projection_head.')}" if key.startswith(
            "projection_head."
        ) else f"backbone.{key}", ""

    return _sort(_wrapped(found), part)


def _is_dino(found: dict) -> bool:
    state = found.get("teacher")
    return isinstance(state, dict) and any(
        str(k).removeprefix("module.").startswith("backbone.") for k in state
    )


def _from_dino(found: dict) -> Parts:
    def part(key):
        if key.startswith("head.last_layer."):
            return None, "prototypes of the last layer"
        if key.startswith("head.mlp."):
            return f"head.{key.removeprefix('head.mlp.')}", ""
        return key, ""

    weights, ignored = _sort(
        {str(k).removeprefix("module."): x for k, x in found["teacher"].items()}, part
    )
    if isinstance(found.get("student"), dict):
        ignored["student of its training"] = [f"student.{k}" for k in found["student"]]
    return Parts(_from_xcit(weights), ignored)


def _from_xcit(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """timm's names for XCiT: the position embedding's, and three layers for query, key and value of
    class attention in place of one."""
    out = {}
    for key, x in weights.items():
        key = key.replace(".pos_embeder.", ".pos_embed.")
        if (
            (m := re.fullmatch(r"(backbone\.cls_attn_blocks\.\d+\.attn\.)qkv(\.\w+)", key))
            and isinstance(x, Tensor)
            and x.ndim
            and len(x) % 3 == 0
        ):
            out |= {f"{m[1]}{name}{m[2]}": part for name, part in zip("qkv", x.chunk(3))}
        else:
            out[key] = x
    return out


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

# Where a network without head that may be one of theirs has its head.
_FULL = {
    arch: f"dino_{name}_pretrain_full_checkpoint.pth"
    for arch, name in (
        ("vit_small_patch16_224", "deitsmall16"),
        ("vit_small_patch8_224", "deitsmall8"),
        ("vit_base_patch16_224", "vitbase16"),
        ("vit_base_patch8_224", "vitbase8"),
        ("xcit_small_12_p16_224", "xcit_small_12_p16"),
        ("xcit_small_12_p8_224", "xcit_small_12_p8"),
        ("xcit_medium_24_p16_224", "xcit_medium_24_p16"),
        ("xcit_medium_24_p8_224", "xcit_medium_24_p8"),
    )
}


def _refuse(file: Path, found: dict):
    """Raises UserError for a file of no format: a backbone without head, or something else."""
    state = _wrapped(found)
    weights = _from_xcit(
        {
            f"backbone.{k}": x
            for k, x in state.items()
            if not k.startswith(("fc.", "head.", "classifier."))
        }
    )
    arch, share = _recognise(weights)
    if share == 1:
        full = f"DINO's is {_FULL[arch]}" if arch in _FULL else "see docs/teachers.md"
        raise UserError(
            f'{file}: holds {arch} alone, as timm, torchvision and DINO\'s "backbone only" files do, without the projection head of its '
            "self-supervised training, whose output DisCo distils; take the full checkpoint "
            f"({full})"
        )
    raise UserError(
        f"{file}: holds {shorten(list(state)) or 'nothing'}, which is no known format; give the "
        f"folder of a fastdisco run, or {', or '.join(f.name for f in FORMATS)}"
    )


def _recognise(weights: dict[str, Any], archs: tuple[str, ...] = ARCHS) -> tuple[str, float]:
    """The architecture nearest to the backbone's names and shapes, and which share of all names
    agrees; 1: every one."""
    counted = lambda k: not k.endswith(".num_batches_tracked")
    own = {
        k.removeprefix("backbone."): tuple(x.shape) if isinstance(x, Tensor) else None
        for k, x in weights.items()
        if not k.startswith("head.") and counted(k)
    }
    best = ("none", 0.0)
    for arch in archs:
        theirs = {k: s for k, s in models.shapes(arch).items() if counted(k)}
        share = sum(own.get(k) == s for k, s in theirs.items()) / len(own | theirs)
        best = max(best, (arch, share), key=lambda b: b[1])
        if share == 1:
            break
    return best


def _nearest(kinds: tuple[Head, ...], weights: dict[str, Any]) -> Head:
    """The head whose layers are the file's; else the nearest, for the loading to say what is wrong
    with it."""
    own = {int(m[1]) for k in weights if (m := re.match(r"head\.(\d+)\.", k))}
    return max(kinds, key=lambda head: -len(own ^ set(head.places)))


def _rows(x: Any) -> int:
    # A network of 1 row has another shape to complain of.
    return len(x) if isinstance(x, Tensor) and x.ndim else 1


def _widths(head: nn.Module) -> str:
    """'2048 -> 2048 -> 128'"""
    linear = [m for m in head.modules() if isinstance(m, nn.Linear)]
    return " -> ".join(map(str, [linear[0].in_features, *(m.out_features for m in linear)]))
