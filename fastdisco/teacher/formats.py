"""What a teacher can be read from: checkpoint formats by their keys, and the folders of our own runs."""
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor

from fastdisco import heads, models
from fastdisco.config import UserError


class Format(NamedTuple):
    name: str
    detect: Callable[[dict], bool]  # of what the file holds
    rename: Callable[[dict], dict[str, Tensor]]  # to backbone.* and head.*; what is neither keeps a name that fits no network


def _is_moco(found: dict) -> bool:
    state = found.get("state_dict")
    return isinstance(state, dict) and any(str(k).removeprefix("module.").startswith("encoder_q.") for k in state)


def _from_moco(found: dict) -> dict[str, Tensor]:
    """The query encoder; the momentum encoder, the queue and the teachers in DisCo's own checkpoints are left out by name."""
    out = {}
    for key, x in found["state_dict"].items():
        key = str(key).removeprefix("module.")
        if key in ("queue", "queue_ptr") or key.startswith(("encoder_k.", "teacher_encoder_q.", "teacher_encoder_k.")):
            continue
        own = key.removeprefix("encoder_q.")
        part, _, rest = own.partition(".")
        name = f"head.{rest}" if part in ("fc", "classifier") else f"backbone.{own}"  # where ResNets, and others, keep the classifier
        out[f"{key} (not of encoder_q)" if own == key else f"{key} (twice)" if name in out else name] = x
    return out


FORMATS = (
    Format("MoCo v1 or v2 or the official DisCo code: a dict with state_dict, keys [module.]encoder_q.*", _is_moco, _from_moco),
)


def from_file(file: Path, arch: str, kwargs: dict[str, Any], dim: int) -> models.Net:
    found = models.read(file)
    row = next((f for f in FORMATS if f.detect(found)), None)
    if row is None:
        state = found["state_dict"] if isinstance(found.get("state_dict"), dict) else found
        raise UserError(f"{file}: holds {models.shorten([str(k) for k in state]) or 'nothing'}, which is no known format; give the folder "
                        f"of a fastdisco run, or a file of {', or of '.join(f.name for f in FORMATS)}")
    weights = row.rename(found)
    if not any(k.startswith("head.") for k in weights):
        raise UserError(f"{file}: has no projection head (no fc.* or classifier.* beside the backbone), whose output DisCo distils; "
                        "take the checkpoint as its training wrote it, not one stripped for evaluation")
    hidden = _rows(weights.get("head.0.weight"), 0)
    _same_dim(file, _rows(weights.get("head.2.weight" if hidden else "head.weight"), dim), dim)
    with torch.random.fork_rng(devices=[]):  # drawn and overwritten: with and without a teacher, a seed gives the same student
        net = models.create(arch, lambda features: heads.mlp(features, hidden, dim), kwargs)
    models.load_weights(net, weights, file, f"teacher.arch is {arch} with {kwargs}: set it to the model that this file was trained with")
    return net


def from_run(folder: Path, arch: str, kwargs: dict[str, Any], dim: int, student: str | None = None) -> models.Net:
    net, cfg = models.from_run(folder, student=student)
    if (cfg.student.arch, cfg.student.kwargs) != (arch, kwargs):
        raise UserError(f"{folder}: trained {cfg.student.arch} with {cfg.student.kwargs}, not teacher.arch {arch} with {kwargs}; "
                        f"set teacher.arch={cfg.student.arch} and teacher.kwargs to the same")
    _same_dim(folder, cfg.student.dim, dim)
    return net


def _rows(x: Any, default: int) -> int:
    return len(x) if isinstance(x, Tensor) and x.ndim else default  # the default's network then has another shape to complain of


def _same_dim(source: Path, found: int, dim: int):
    if found != dim:
        raise UserError(f"{source}: embeds into {found} numbers and the student into {dim}; set student.dim={found} or another teacher")
