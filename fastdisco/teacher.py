"""The teacher: a frozen network from a checkpoint, loaded strictly or not at all."""
import hashlib
from pathlib import Path
from typing import Any, Callable, NamedTuple

import torch
from torch import Tensor, nn

from fastdisco import models
from fastdisco.config import UserError
from fastdisco.models import Out


class Teacher:
    """Eval mode, no gradient, all views of a resolution in one forward.  Not a module: nothing that is checkpointed may hold it.

    The official DisCo code leaves its teacher in train mode, so that its targets depend on the other 31 images of a GPU and its running
    statistics drift away from the checkpoint; SEED's and SwAV+DisCo's teachers are in eval mode, as here."""

    def __init__(self, net: models.Net):
        self.net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.fingerprint = fingerprint(net)

    @torch.no_grad()  # not inference_mode: the loss saves the targets for its backward
    def __call__(self, views: list[Tensor]) -> Out:
        return self.net(views)


def load(file: Path, arch: str, kwargs: dict[str, Any], dim: int, device: torch.device | str) -> Teacher:
    """The teacher of a checkpoint of the kinds in FORMATS, or of the folder of one of our runs (or of one of its checkpoints).

    arch, kwargs  the timm model that its backbone belongs to
    dim           width of the student's embedding, which the teacher's must have
    Raises UserError naming every weight that is missing, unexpected or of another shape: there is no such thing as a random teacher."""
    file = Path(file)
    try:
        net = _from_run(file, arch, kwargs, dim) if file.is_dir() else _from_file(file, arch, kwargs, dim)
    except UserError as e:
        raise UserError(f"teacher: {e}; training stops here, for a teacher with random weights is never used") from None
    return Teacher(net.to(device))


def fingerprint(net: nn.Module) -> str:
    """sha256, hex, over names, shapes and values of the weights and running statistics, the same for every wrapping and file format."""
    digest = hashlib.sha256()
    for name, x in sorted(net.state_dict().items()):
        if x.is_floating_point():  # not the batch counters of batch norm, which old files lack and eval mode ignores
            digest.update(f"{name} {tuple(x.shape)} ".encode())
            digest.update(x.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


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


def _from_file(file: Path, arch: str, kwargs: dict[str, Any], dim: int) -> models.Net:
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
        net = models.create(arch, lambda features: models.mlp(features, hidden, dim), kwargs)
    models.load_weights(net, weights, file, f"teacher.arch is {arch} with {kwargs}: set it to the model that this file was trained with")
    return net


def _from_run(folder: Path, arch: str, kwargs: dict[str, Any], dim: int) -> models.Net:
    net, cfg = models.from_run(folder)
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
