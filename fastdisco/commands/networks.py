"""The network that an evaluation is of: a run's, a teacher's file, an exported ONNX file, or timm's."""

import argparse
import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fastdisco import config, export, models
from fastdisco.common.errors import UserError
from fastdisco.common.files import expanded
from fastdisco.config import Config
from fastdisco.config.merge import overlay
from fastdisco.evals import settings
from fastdisco.teacher import formats, runtime

TIMM = "timm:"


class Network(NamedTuple):
    net: models.Net  # in eval mode
    about: dict[str, Any]  # fingerprint, architecture, where it was read: for a result's protocol
    cfg: Config  # of the run, or made of the defaults; overrides laid over it
    folder: Path  # for results
    has_train: bool  # whether the configuration names training images
    embeds: bool  # whether its head is one
    name: str  # a short one, for people

    def encoder(self, blocks: int = 1) -> Callable[[Tensor], Tensor]:
        """[B,3,S,S] -> [B,F]: the pooled output of the backbone, or of a ViT the normalised class
        tokens of its last blocks.  Raises UserError where the backbone has no such tokens."""
        if blocks == 1:
            return self.net.features
        tokens: Any = getattr(self.net.backbone, "get_intermediate_layers", None)
        if tokens is None or not getattr(self.net.backbone, "num_prefix_tokens", 0):
            raise UserError(
                f"blocks: {self.about['arch']} has no class tokens of {blocks} blocks; set "
                "linear.blocks=1"
            )

        def encode(x: Tensor) -> Tensor:
            found = tokens(x, n=blocks, return_prefix_tokens=True, norm=True)
            return torch.cat([prefix[:, 0] for _, prefix in found], 1)

        return encode


def read(args: argparse.Namespace, overrides: list[str], images: bool = True) -> Network:
    """The network that the arguments name; overrides: of the configuration.

    images  whether some are needed, which of a file or a timm network only overrides can name
    Raises UserError for what is none, or a checkpoint that is damaged or half written."""
    name = str(args.network)
    if name.startswith(TIMM):
        return _from_timm(name.removeprefix(TIMM), args, overrides, images)
    if args.weights or args.untrained:
        raise UserError("--weights and --untrained belong to timm:NAME; leave them out")
    try:
        path = expanded(Path(name))
    except ValueError as e:
        raise UserError(f"{name}: {e}") from None
    if export.is_onnx(path):
        return _from_onnx(path, args, overrides)
    if path.is_dir():
        return _from_run(path, args, overrides)
    return _from_file(path, args, overrides, images)


def read_all(
    args: argparse.Namespace, nets: list[str], overrides: list[str]
) -> tuple[list[Network], Network]:
    """The networks in their order, and the one of them whose images, view and precision all share:
    the first run, or the first where none is a run.

    Of the options each network takes those that belong to its kind."""
    if len(nets) == 1:
        only = read(_of(args, network=nets[0]), overrides)
        return [only], only
    leads = next((i for i, n in enumerate(nets) if Path(n).is_dir()), 0)
    lead = read(_for_one(args, nets[leads]), overrides)
    own = lead.cfg.data
    shared = {"data.val": own.val, "data.eval_size": own.eval_size}
    given = {o.partition("=")[0] for o in overrides}
    # A file brings no images of its own.  JSON is YAML that quotes any path.
    more = [f"{k}={json.dumps(v, default=str)}" for k, v in shared.items() if k not in given]
    found = []
    for i, name in enumerate(nets):
        theirs = overrides if Path(name).is_dir() else [*overrides, *more]
        found.append(lead if i == leads else read(_for_one(args, name), theirs))
    return found, lead


def _for_one(args: argparse.Namespace, name: str) -> argparse.Namespace:
    if name.startswith(TIMM):
        return _of(args, network=name)
    student = args.student if Path(name).is_dir() else None
    return _of(args, network=name, weights=None, untrained=False, student=student)


def _of(args: argparse.Namespace, **other: Any) -> argparse.Namespace:
    return argparse.Namespace(**(vars(args) | other))


def of_run(folder: Path, which: str = "student", student: str | None = None) -> models.Net:
    """The network of a run or of a file, for a comparison."""
    if folder.is_dir():
        return models.from_run(folder, which, student=student)[0]
    return formats.read(folder, student=student).net.eval()


def _from_run(path: Path, args: argparse.Namespace, overrides: list[str]) -> Network:
    net, cfg = models.from_run(path, args.net, overrides, args.student)
    own = path.absolute()
    run = own.parent.parent if (own / "state.pt").is_file() else own
    # Of one run several networks can be evaluated, and none stands in another's place.
    part = "-".join([*filter(None, [args.student]), *["ema"] * (args.net == "ema")])
    about = _about(net, cfg.student.arch, cfg.student.kwargs, f"{args.net} of a run")
    title = " ".join([run.name, *[own.name] * (own != run), *filter(None, [part])])
    return Network(net, about, cfg, _out(args, run / "eval" / part), True, True, title)


def _from_file(path: Path, args: argparse.Namespace, overrides: list[str], images: bool) -> Network:
    found = formats.read(path, args.arch, student=args.student)
    cfg, has_train = _config(path.stem, overrides, images)
    about = _about(found.net, found.arch, dict(found.kwargs), found.format)
    folder = _out(args, cfg.run.out / "eval" / path.name)
    return Network(found.net.eval(), about, cfg, folder, has_train, True, path.name)


def of_onnx(
    path: Path, told: dict[str, Any], cfg: Config, folder: Path, has_train: bool
) -> Network:
    """An ONNX file as a network: onnxruntime computes its features in its own precision, on the CPU.

    told    what the file says about itself
    folder  for results"""
    settings = cfg.model_copy(
        update={
            "engine": cfg.engine.model_copy(update={"precision": "fp32"}),
            "perf": cfg.perf.model_copy(update={"graphs": False}),
        }
    )
    net = models.Net(export.Session(path), nn.Identity()).eval()
    about = told["network"] | {
        "fingerprint": hashlib.sha256(path.read_bytes()).hexdigest(),
        "source": f"{path.name}, exported from {told['network']['source']}",
        "of": told["network"]["fingerprint"],
    }
    return Network(net, about, settings, folder, has_train, False, path.name)


def _from_onnx(path: Path, args: argparse.Namespace, overrides: list[str]) -> Network:
    told = export.about(path)
    view = told["view"]
    # Of the run that the file lies in come data and kNN's settings; of the file, how it sees images.
    own = [
        f"data.eval_resize={view['resize']}",
        f"data.eval_size={view['size']}",
        f"view.mean={view['mean']}",
        f"view.std={view['std']}",
    ]
    described = next((f for f in _runs_above(path) if f.is_file()), None)
    if described is None:
        cfg, has_train = _config(path.stem, [*own, *overrides])
    else:
        cfg, has_train = config.load(described, [*own, *overrides]), True
    if cfg.data.eval_size != view["size"]:
        raise UserError(
            f"{path}: takes images of {view['size']} pixels, not data.eval_size={cfg.data.eval_size};"
            " leave it out"
        )
    return of_onnx(path, told, cfg, _out(args, path.parent / "eval" / path.stem), has_train)


def _runs_above(path: Path) -> list[Path]:
    """Where the config.yaml of a run is that an export lies in: RUN/export/ or RUN/export/NAME/."""
    return [p.parent / "config.yaml" for p in path.absolute().parents[:2] if p.name == "export"]


def _from_timm(arch: str, args: argparse.Namespace, overrides: list[str], images: bool) -> Network:
    if bool(args.weights) == args.untrained:
        raise UserError(
            f"{TIMM}{arch}: give its weights as --weights FILE, or --untrained for random ones"
        )
    cfg, has_train = _config(arch, overrides, images)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(cfg.run.seed)
        net = models.create(arch, lambda features: nn.Identity(), sizes=(cfg.data.eval_size,))
    if args.weights:
        _load(net.backbone, args.weights)
    kind = "untrained" if args.untrained else "a file of weights"
    about = _about(net, arch, {}, kind)
    folder = _out(args, cfg.run.out / "eval" / f"{arch}{'-untrained' * args.untrained}")
    name = f"{arch}, untrained" if args.untrained else arch
    return Network(net.eval(), about, cfg, folder, has_train, False, name)


def _load(backbone: Any, file: Path) -> None:
    found = models.read(file)
    state = next(
        (found[k] for k in ("state_dict", "model") if isinstance(found.get(k), dict)), found
    )
    classifier = (backbone.pretrained_cfg or {}).get("classifier") or "fc"
    heads = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    own = {
        str(k).removeprefix("module."): x
        for k, x in state.items()
        if not str(k).removeprefix("module.").startswith(tuple(f"{h}." for h in heads))
    }
    models.load_weights(backbone, own, file, "name the timm model that the file was made with")


def _config(name: str, overrides: list[str], images: bool = True) -> tuple[Config, bool]:
    """The defaults with the overrides laid over them, and whether they name training images.
    Raises UserError where images are needed and none are named."""
    raw: dict[str, Any] = {}
    for item in overrides:
        raw = overlay(raw, settings.nested(item))
    given = raw.get("data") or {}
    if images and not given.keys() & {"train", "val"}:
        raise UserError("data.val: give the images, as data.val=PATH and data.train=PATH")
    # The configuration requires training images; where there are none, nothing asks for them.
    data = {"train": given.get("val") or "none"} | given
    label = "".join(c if c.isalnum() or c in "._+-" else "_" for c in name) or "network"
    base = {"run": {"name": label.lstrip(".")}, "views": [{"count": 2}]}
    return config.validate(overlay(base, raw | {"data": data}), "overrides"), "train" in given


def _about(net: models.Net, arch: str, kwargs: dict[str, Any], source: str) -> dict[str, Any]:
    width = getattr(net.backbone, "head_hidden_size", None) or net.backbone.num_features
    return {
        "fingerprint": runtime.fingerprint(net),
        "arch": arch,
        "kwargs": kwargs,
        "source": source,
        "features": width,
    }


def _out(args: argparse.Namespace, usual: Path) -> Path:
    return args.out or usual
