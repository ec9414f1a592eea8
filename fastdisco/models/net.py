"""Networks: a timm backbone with a projection head and prototypes, split batch norm, the mean student, and strict loading of weights."""
import argparse
import copy
import difflib
import functools
import pathlib
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any, Callable, NamedTuple

import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, DropPath, convert_sync_batchnorm
from timm.models.resnet import Bottleneck, ResNet
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdisco import config
from fastdisco.common import dist
from fastdisco.models import heads
from fastdisco.config import UserError
from fastdisco.common.console import shorten


DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}  # by the names of a configuration


class Out(NamedTuple):
    z: Tensor  # [V,B,d] raw head outputs: the losses normalise them
    scores: Tensor | None = None  # [V,B,P] cosines to the prototypes, of nets that have them


class Net(nn.Module):
    """Backbone, head and prototypes; a list of views [B,3,S,S] in, Out.z [V,B,d] and Out.scores [V,B,P] out."""

    def __init__(self, backbone: nn.Module, head: nn.Module, prototypes: nn.Module | None = None, joint: bool = False):
        """joint: in training, too, the backbone runs once per resolution and the head once, so that batch-norm statistics are of all those views
        (SwAV, DINO); else once per view (MoCo).  In eval mode it always does."""
        super().__init__()
        self.backbone, self.head, self.prototypes, self.joint = backbone, head, prototypes, joint
        self.groups = 1  # of images in a joint forward, see `split_bn`

    def forward(self, views: list[Tensor]) -> Out:
        if self.training and not self.joint:
            z = torch.stack([self.head(self.features(v)) for v in views])
        else:
            z = self._jointly(views, self.groups if self.training else 1)
        return Out(z, None if self.prototypes is None else self.prototypes(z))

    def _jointly(self, views: list[Tensor], groups: int) -> Tensor:
        """[V,B,d].  Group after group of images, with all their views, so that the slices of a split batch norm hold what a rank would."""
        sizes = {}
        for i, v in enumerate(views):
            sizes.setdefault(v.shape[-2:], []).append(i)
        parts = [v.chunk(groups) for v in views]
        found = [self.features(torch.cat([parts[i][g] for g in range(groups) for i in same])).unflatten(0, (groups, len(same), -1))
                 for same in sizes.values()]  # [G,views of one size,B/G,F]
        z = self.head(torch.cat(found, 1).flatten(0, 2)).unflatten(0, (groups, len(views), -1)).transpose(0, 1).flatten(1, 2)
        place = {i: at for at, i in enumerate(i for same in sizes.values() for i in same)}
        return z if list(place) == sorted(place) else torch.stack([z[place[i]] for i in range(len(views))])

    def features(self, x: Tensor) -> Tensor:
        """[B,3,S,S] -> [B,F], the pooled output of the backbone: what evaluations use."""
        return self.backbone(x)


def of(cfg: config.Config, train: bool = False) -> Net:
    """The student that a configuration describes, its weights drawn from torch's global generator.

    train  its batch norms are split or synchronised as `bn` says.  Raises UserError where the arch does not exist or cannot do what is asked"""
    s, count = cfg.student, getattr(cfg.method, "prototypes", 0)
    head = {"mlp": heads.mlp, "dino": heads.dino_mlp}[s.head]
    sizes = dict.fromkeys([*(c.size for c in config.crops(cfg)), cfg.data.eval_size])
    net = create(s.arch, lambda dim: head(dim, s.hidden, s.dim, s.head_bn), s.kwargs, sizes=tuple(sizes))
    if count:
        net.prototypes, net.joint = heads.Prototypes(s.dim, count, not getattr(cfg.method, "norm_last_layer", True)), True
    if train:
        split_bn(net, cfg.bn.groups)
        net = sync_bn(net) if cfg.bn.sync else net
    return net


def create(arch: str, head: Callable[[int], nn.Module], kwargs: dict[str, Any] = {}, sizes: tuple[int, ...] = ()) -> Net:
    """A Net, its weights drawn from torch's global generator (timm's initialisation, torch's for the head).

    arch    a name of timm's, or one of WIDE
    head    makes the head for the backbone's number of features
    kwargs  for timm.create_model
    sizes   of the images, pixels: position embeddings are made for the first and interpolated for the others; (): the arch's own
    Raises UserError for a name, a keyword or a size that timm cannot make."""
    backbone = _backbone(arch, kwargs, sizes)
    return Net(backbone, head(backbone.head_hidden_size))  # num_features is what mobilenetv3 has before its head convolution


@functools.cache
def shapes(arch: str) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the weights and buffers of an architecture's backbone, which is made without memory."""
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in _backbone(arch, {}).state_dict().items()}


def size(net: nn.Module) -> int:
    """Number of weights, those of buffers not among them."""
    return sum(p.numel() for p in net.parameters())


def split_bn(net: nn.Module, groups: int):
    """Turns every batch norm of the module, in place, into one whose training statistics are per slice of B/groups consecutive images.

    Each slice is normalised as a rank of its own would do it; the running statistics become the mean of the slices' updates.
    State-dict keys and eval mode stay as they are, and at 1 group everything does.  Raises UserError for an unknown kind of batch norm."""
    if groups == 1:
        return
    net.groups = groups
    for name, m in net.named_modules():
        if isinstance(m, _BatchNorm) or getattr(m, "running_var", None) is not None:  # EvoNorm has batch statistics but is no batch norm
            if type(m) not in _SPLIT:
                raise UserError(f"bn.groups: the {type(m).__name__} at {name} cannot be split into {groups}; "
                                "set bn.groups=1 or take another student.arch")
            m.__class__ = _SPLIT[type(m)]  # the object stays: its parameters, buffers and hooks are shared with others
            m.groups = groups


def sync_bn(net: Net) -> Net:
    """Training statistics of every batch norm over all ranks.  Raises UserError on CPUs, where torch cannot."""
    if dist.world() == 1:
        return net
    if dist.device().type != "cuda":
        raise UserError(f"bn.sync: torch has no synchronised batch norm for the CPU, on which {dist.world()} ranks run here; set bn.sync=false")
    return convert_sync_batchnorm(net)


def ema_copy(net: Net) -> Net:
    """The mean student at its start: a copy without gradients, in train mode, for its batch-norm statistics are its own, but with every path
    (stochastic depth perturbs the student alone, as in DINO)."""
    ema = copy.deepcopy(net).requires_grad_(False).train()
    for m in ema.modules():
        if isinstance(m, DropPath):
            m.drop_prob = 0.0
    return ema


@torch.no_grad()
def ema_update(ema: nn.Module, net: nn.Module, m: float):
    """ema = m ema + (1 - m) net over the parameters alone; float32 or wider, since 1 - m drowns in half precision.  MoCo, equation 2."""
    torch._foreach_lerp_(list(ema.parameters()), list(net.parameters()), 1 - m)


def mean_buffers(net: nn.Module) -> dict[str, Tensor]:
    """Copies of the floating buffers, averaged over ranks, whose batch-norm statistics differ; every rank must call it."""
    return {k: dist.all_mean(b.detach().clone()) for k, b in net.named_buffers() if b.is_floating_point()}


def from_run(folder: Path, which: str = "student", overrides: list[str] = (), student: str | None = None) -> tuple[Net, config.Config]:
    """A network of one of our runs in eval mode, and its configuration with the overrides laid over it.

    folder  the run (its last checkpoint is taken), or one of its folders checkpoints/step_XXXXXXXX
    which   student, or ema for the mean student
    student the name of one where the run has several
    Raises UserError when the folder holds no checkpoint, or one that does not fit its config.yaml."""
    folder = Path(folder).absolute()  # "." has parents too
    step = folder if (folder / "state.pt").is_file() else last(folder)
    if step is None:
        raise UserError(f"{folder}: no checkpoint of fastdisco here (no {folder / 'checkpoints' / 'last'}); "
                        "give the folder of a run that has saved one")
    cfg = config.load(step.parent.parent / "config.yaml", overrides)
    alone = config.students(cfg)
    if (student or "") not in alone:
        names = ", ".join(n for n in alone if n)
        raise UserError(f"{folder}: has {f'no student {student}' if student else 'several students'}; "
                        + (f"name one of {names} (--student, or teacher.student)" if names else "it trained a single one: leave its name out"))
    cfg = alone[student or ""]
    weights = read(step / "state.pt").get(f"{student}/{which}" if student else which)
    if not isinstance(weights, dict):
        why = f"this run by {cfg.method.name} has no mean student" if which == "ema" else "give a checkpoint written by fastdisco/train.py"
        raise UserError(f"{step / 'state.pt'}: holds no weights named {which}; {why}")
    with torch.random.fork_rng(devices=[]):  # what is drawn here is overwritten: it must not shift the caller's random stream
        net = of(cfg)
    load_weights(net, weights, step / "state.pt", f"{step.parent.parent / 'config.yaml'} must be the one that the run was trained with")
    return net.eval().to(memory_format=torch.channels_last), cfg


def last(run: Path) -> Path | None:
    """The folder that RUN/checkpoints/last names; None where the run has none yet.  Raises UserError where that folder is not whole."""
    pointer = Path(run) / "checkpoints" / "last"
    if not pointer.exists():
        return None
    step = pointer.parent / pointer.read_text().strip()
    if not (step / "state.pt").is_file():
        raise UserError(f"{pointer}: names {step.name}, which holds no state.pt; write a complete folder's name into it")
    return step


def read(file: Path) -> dict:
    """What torch.save wrote, never running code from the file (weights_only); tensors of a zip file are mapped, not read.  Or safetensors.

    Raises UserError for a missing, damaged or unsafe file, or one that holds no dict."""
    try:
        open(file, "rb").close()
    except OSError as e:
        raise UserError(f"{file}: cannot be read ({e.strerror}); give the path of an existing checkpoint") from None
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
    except Exception as e:  # torch's readers raise RuntimeError, EOFError, OSError, struct.error ... wherever the bytes stop making sense
        asked = isinstance(e, pickle.UnpicklingError) and re.search(r"GLOBAL (\S+)", str(e))
        raise UserError(_unsafe(file, asked[1]) if asked else _damaged(file)) from None
    if not isinstance(found, dict):
        raise UserError(f"{file}: holds a {type(found).__name__}, not a dict of weights; give a checkpoint file")
    return found


def load_weights(net: nn.Module, weights: dict[str, Tensor], source: Path | str, remedy: str):
    """Copies named weights into the network; every name and shape must agree.

    Raises UserError with what does not, and the remedy; and for weights that are no finite numbers."""
    own = net.state_dict()
    shape = {k: tuple(v.shape) if isinstance(v, Tensor) else type(v).__name__ for k, v in weights.items()}
    wrong = {
        "missing": [k for k in own if k not in weights and not k.endswith(".num_batches_tracked")],  # a counter that nothing here reads
        "unexpected": [k for k in weights if k not in own],
        "of another shape": [f"{k} {shape[k]} for {tuple(v.shape)}" for k, v in own.items() if k in weights and shape[k] != tuple(v.shape)],
    }
    if any(wrong.values()):
        raise UserError(f"{source}: {'; '.join(f'{what}: {shorten(names)}' for what, names in wrong.items() if names)}; {remedy}")
    if broken := [k for k, v in own.items() if k in weights and v.is_floating_point() and not v.is_meta and not _finite(weights[k])]:
        raise UserError(f"{source}: not finite real numbers: {shorten(broken)}; its training broke down or the file is damaged: take another")
    net.load_state_dict(weights, strict=False)  # all but the counters is there


def _finite(x: Tensor) -> bool:
    plain = x.is_floating_point() and x.layout == torch.strided and not x.is_meta
    return plain and bool(x.isfinite().all())


_OURS = {"num_classes": "the head is ours", "in_chans": "images have 3 channels", "features_only": "the pooled features are used",
         "pretrained": "training starts from random weights", "checkpoint_path": "training starts from random weights"}


_HARMLESS = [argparse.Namespace, (pathlib.PosixPath, "pathlib.PosixPath")]  # plain values: the command line in DINO's checkpoints

# SwAV's ResNet-50 with every width multiplied (arXiv:2006.09882); timm's wide_resnet50_2 widens the inner convolutions alone.
WIDE = {"resnet50w2": 2, "resnet50w4": 4, "resnet50w5": 5}


def _wide(times: int, kwargs: dict[str, Any]) -> nn.Module:
    width = 64 * times
    net = ResNet(Bottleneck, (3, 4, 6, 3), channels=tuple(width * 2**i for i in range(4)), num_classes=0, **kwargs)
    first = net.layer1[0]  # timm's stem has 64 channels at any width: replaced, with what reads it, and drawn as timm draws its own
    net.conv1, net.bn1 = nn.Conv2d(3, width, 7, 2, 3, bias=False), nn.BatchNorm2d(width)
    first.conv1, first.downsample[0] = (nn.Conv2d(width, c, 1, bias=False) for c in (width, 4 * width))
    for conv in (net.conv1, first.conv1, first.downsample[0]):
        nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return net


def _backbone(arch: str, kwargs: dict[str, Any], sizes: tuple[int, ...] = ()) -> nn.Module:
    if not timm.is_model(arch) and arch not in WIDE:
        near = difflib.get_close_matches(arch, [*WIDE, *timm.list_models()], 3, 0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "timm.list_models() names all"
        raise UserError(f"arch: timm {timm.__version__} has no model '{arch}'; {hint}")
    for key in kwargs:
        if key in _OURS:
            raise UserError(f"kwargs: {key} of {arch} is not for you to set ({_OURS[key]}); remove it")
    own = arch not in WIDE and timm.get_pretrained_cfg(arch)
    fixed = own and own.fixed_input_size  # transformers, whose positions have embeddings
    make = lambda **more: timm.create_model(arch, pretrained=False, num_classes=0, **more | kwargs)  # noqa: E731
    try:
        if arch in WIDE:
            return _wide(WIDE[arch], kwargs)
        if not fixed or {*sizes} <= {own.input_size[-1]}:
            return make()
        try:
            net = make(img_size=sizes[0], dynamic_img_size=True)
        except TypeError as e:
            if "dynamic_img_size" not in str(e):
                raise
            net = make(img_size=sizes[0])  # XCiT: computed from the positions, so of any size
    except Exception as e:  # whatever the constructor trips over
        raise UserError(f"kwargs: timm cannot make {arch} with {kwargs} ({type(e).__name__}: {e}); correct or remove them") from e
    for size in dict.fromkeys(sizes):
        try:
            with torch.no_grad():
                net.eval()(torch.zeros(1, 3, size, size))
        except (AssertionError, RuntimeError, ValueError) as e:
            raise UserError(f"student.arch: {arch} cannot take crops of {size} px ({e}); set view.size, views and data.eval_size to what it can, "
                            "or take another") from e
    return net.train()


class _Split:
    """The forward of a split batch norm, before the kind of batch norm it is."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        if len(x) % self.groups:
            raise ValueError(f"a batch of {len(x)} does not split into {self.groups} groups")
        share, mean, var = 0.0, [None] * self.groups, [None] * self.groups
        if self.running_mean is not None:
            self.num_batches_tracked.add_(1)
            share = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
            mean, var = (b.repeat(self.groups, 1) for b in (self.running_mean, self.running_var))  # [groups,C]
        # Slices and one concatenation: in channels_last on CPU 24 % over the plain module, a reshape into groups*C channels 4 times it.
        y = torch.cat([F.batch_norm(part, mean[g], var[g], self.weight, self.bias, True, share, self.eps)
                       for g, part in enumerate(x.chunk(self.groups))])
        if self.running_mean is not None:
            self.running_mean.copy_(mean.mean(0))
            self.running_var.copy_(var.mean(0))
        return self.act(self.drop(y)) if isinstance(self, BatchNormAct2d) else y


class SplitBatchNorm1d(_Split, nn.BatchNorm1d):
    pass


class SplitBatchNorm2d(_Split, nn.BatchNorm2d):
    pass


class SplitBatchNormAct2d(_Split, BatchNormAct2d):
    pass


_SPLIT = {nn.BatchNorm1d: SplitBatchNorm1d, nn.BatchNorm2d: SplitBatchNorm2d, BatchNormAct2d: SplitBatchNormAct2d}


def _unsafe(file: Path, asked: str) -> str:
    return (f"{file}: refused, since its pickle asks for {asked}, and building what a pickle asks for can run code; if you trust its "
            f"author, run this in a throw-away container without network and give what it writes: torch.save({{k: v for k, v in torch.load("
            f"'{file}', map_location='cpu', weights_only=False).items() if k in ('state_dict', 'model', 'teacher') or torch.is_tensor(v)}}, "
            "'weights.pth.tar')")


def _damaged(file: Path) -> str:
    return (f"{file}: not a readable torch checkpoint (cut short, damaged, or of another kind); "
            "copy or download it again and compare its size or checksum")
