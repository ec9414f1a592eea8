"""The export of one network: what it needs is fetched once, and each of its files is measured."""

import argparse
import json
import math
import shutil
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastdisco import data, models
from fastdisco.commands import heads, measure, networks
from fastdisco.commands.measure import Work
from fastdisco.commands.networks import Network
from fastdisco.common.console import say, shorten
from fastdisco.evals import passes, settings
from fastdisco.evals.features import Useless
from fastdisco.export import bench, card, formats, int8, onnx, place
from fastdisco.export.formats import Subject
from fastdisco.run.environment import environment

CPU = torch.device("cpu")
# Images of a batch of the calibration, and those on which the ONNX file is compared.
BATCH, COMPARED = 32, 64
FLOAT, INT8 = "model.onnx", "model.int8.onnx"


class Job:
    """One network and where its files go."""

    def __init__(
        self, args: argparse.Namespace, net: str, overrides: list[str], folder: Path | None
    ) -> None:
        theirs, ours = settings.split(overrides)
        self.args, self.settings = args, settings.load(ours)
        named = argparse.Namespace(**vars(args) | {"network": net, "out": None})
        # Files in float32 and int8 are compared with the network in float32.
        own = [*theirs, "engine.precision=fp32"]
        self.network: Network = networks.read(named, own, images=self.asked("onnx", "int8"))
        self.name = Path(net.removeprefix(networks.TIMM)).name or self.network.about["arch"]
        self.folder = folder or _usual(self.network.folder)
        self.net = self.network.net.to(CPU).float().eval()
        self.work = Work(self.network, self.settings, CPU)
        self.earlier = place.earlier(self.folder, self.network.about["fingerprint"])
        self.run = _run(self.network.folder)
        self.checkpoint = _checkpoint(self.run, Path(net)) if self.run else ""

    def asked(self, *formats: str) -> bool:
        return bool({*formats} & {*self.args.to})

    @cached_property
    def subject(self) -> Subject:
        about = self.network.about
        return Subject(
            self.net.backbone,
            self.net.head,
            about["arch"],
            about["kwargs"],
            about["features"],
            self.work.view,
            self.origin.licence,
        )

    @cached_property
    def origin(self) -> card.Origin:
        network = self.network
        found = card.origin(network.cfg, network.about["source"], self.run, self.args.licence)
        return found._replace(checkpoint=self.checkpoint)

    @cached_property
    def images(self) -> Tensor:
        """[N,3,S,S] float32, normalised: what calibrates and compares; drawn by run.seed."""
        cfg = self.network.cfg
        sources = self.args.calibrate or [
            cfg.data.train if self.network.has_train else cfg.data.val
        ]
        each, parts = -(-self.args.calibration_images // len(sources)), []
        for source in sources:
            listing = data.listing(source, cfg.data.quarantine, bare=True)
            draw = np.random.default_rng(cfg.run.seed).permutation(listing.kept)[:each]
            whole = lambda x: {"image": x}
            found = passes.features(whole, listing, np.sort(draw), self.work.view, cfg.data, CPU)
            parts.append(found["image"].x)
        return torch.cat(parts).contiguous()

    def told(self) -> dict[str, Any]:
        """What goes into the files' metadata."""
        return {"network": self.network.about, "view": self.work.view._asdict()}

    def forms(self) -> list[bench.Form]:
        """The network in torch, and those of its files in ONNX that are there."""
        size = self.work.view.size
        found = [bench.Form(self.name, "torch", self.net.backbone, None, size)]
        for form, name in (("onnx", FLOAT), ("int8", INT8)):
            if self.asked(form) and (self.folder / name).exists():
                file = self.folder / name
                found.append(bench.Form(self.name, form, self.net.backbone, file, size))
        return found


def prepare(args: argparse.Namespace, net: str, overrides: list[str], folder: Path | None) -> Job:
    """Reads the network and refuses what could only fail later; nothing is written."""
    job = Job(args, net, overrides, folder)
    if job.asked("onnx", "int8"):
        onnx.needed()
    for name in formats.WRITERS:
        if job.asked(name):
            formats.refuse(name, job.subject)
    if job.asked("int8"):
        # Without these there is no accuracy to measure.
        job.work.val, job.work.bank  # noqa: B018
    return job


def ship(job: Job) -> dict[str, Any]:
    """Writes and measures what was asked for; the values for the last line of the command."""
    about: dict[str, Any] = dict(job.earlier) | job.told()
    with place.staged(job.folder, keep=bool(job.earlier)) as stage:
        for name, write in formats.WRITERS.items():
            if job.asked(name):
                about[name] = {"files": write(job.subject, stage), "within": formats.NEAR}
                say(f"{name}: {', '.join(about[name]['files'])}")
        if job.asked("onnx", "int8"):
            about["onnx"] = _onnx(job, stage / FLOAT)
        if job.asked("int8"):
            about["int8"] = _int8(job, stage)
        about["environment"] = environment()
        evaluated = card.results_of(job.network.folder) if job.run else []
        text = card.text(job.name, about, job.origin, evaluated)
        (stage / "README.md").write_text(text)
        (stage / place.ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    say(f"{job.folder}: {', '.join(sorted(p.name for p in job.folder.iterdir()))}")
    found = about.get("int8", {}) if job.asked("int8") else {}
    values: dict[str, Any] = {"folder": str(job.folder)}
    if job.asked("onnx", "int8"):
        values["onnx_parity"] = about["onnx"]["parity"]
    if found:
        values |= {f"fp32/{k}": x for k, x in found["fp32"].items()}
        values |= {f"int8/{k}": x for k, x in found["values"].items()}
        values |= {"int8_drop": found["drop"], "int8_rejected": not found["passed"]}
    return values


def _onnx(job: Job, file: Path) -> dict[str, Any]:
    onnx.write(job.net.backbone, job.work.view.size, file, job.told(), job.args.opset)
    images = job.images[:COMPARED]
    off = onnx.parity(job.net.backbone, file, images.split(BATCH))
    say(
        f"onnx: {FLOAT}, opset {job.args.opset}, {file.stat().st_size / 1e6:.1f} MB; features of "
        f"{len(images)} images within {off:.1e} of the largest"
    )
    return {"opset": job.args.opset, "parity": off, "images": len(images), "file": FLOAT}


def _int8(job: Job, stage: Path) -> dict[str, Any]:
    """The file in int8 beside model.onnx, and what is known of it."""
    file, results = stage / INT8, stage / "eval"
    want = _accuracies(job, stage / FLOAT, results / "model")
    say(f"fp32: {_percents(want)}")
    batches = [x.numpy() for x in job.images.split(BATCH)]
    quantiser = int8.Quantiser(stage / FLOAT, batches)
    tries = 0

    def measured() -> dict[str, float]:
        nonlocal tries
        tries += 1
        folder = stage / f"try-{tries}"
        folder.mkdir()
        try:
            return _accuracies(job, file, folder)
        except Useless as e:
            say(f"int8: {e}")
            return {}

    def told(t: int8.Try) -> None:
        n = len(t.floats)
        kept = f", {n} layer{'s' * (n > 1)} in float" if n else ""
        if t.values:
            say(f"int8{kept}: {_percents(t.values)}, {t.drop:+.2f} points lost")
        else:
            say(f"int8{kept}: nothing left")

    def costs() -> list[int8.Layer]:
        with job.work.bar("cost of each layer", len(quantiser.layers)) as tick:
            found = quantiser.costs(stage / FLOAT, tick)
        said = [f"{layer.name} {layer.cost:.2g}" for layer in found[:8]]
        say(f"costliest layers in int8 (error of the features by one alone): {shorten(said, 8)}")
        return found

    write = lambda layers: quantiser.write(file, layers)
    most = job.args.max_drop
    found = int8.search(quantiser.layers, write, measured, costs, want, most, told)
    best = stage / f"try-{found.tries.index(found.best) + 1}"
    best.rename(results / "model.int8")
    for left in stage.glob("try-*"):
        shutil.rmtree(left)
    first = int8.leading(onnx.Session(stage / FLOAT).run(job.images.numpy()))
    if found.passed:
        say(f"int8: {INT8}, {file.stat().st_size / 1e6:.1f} MB")
    else:
        file.rename(file.with_name(f"{INT8}.rejected"))
        say(
            f"int8: {INT8}.rejected, since even the best of {len(found.tries)} tries loses "
            f"{found.best.drop:.2f} points, more than --max-drop {most:g}"
        )
        say(
            f"int8: {first:.0%} of the variance of the float32 features lies in one direction; near "
            "100% small errors change the neighbours, whichever layers stay in float"
        )
    return {
        "fp32": want,
        "values": found.best.values,
        "drop": found.best.drop,
        "max_drop": most,
        "passed": found.passed,
        "first_direction": first,
        "floats": found.best.floats,
        "layers": len(quantiser.layers),
        # JSON has no infinity.
        "costs": {x.name: x.cost if math.isfinite(x.cost) else None for x in found.layers},
        "tries": [t._asdict() for t in found.tries],
        "calibration": {
            "images": len(job.images),
            "from": [str(p) for p in job.args.calibrate] or "the training images",
        },
    }


def _accuracies(job: Job, file: Path, folder: Path) -> dict[str, float]:
    """kNN and, where the network has a linear result, ridge regression, on the file's features."""
    network = networks.of_onnx(file, job.told(), job.network.cfg, folder, job.network.has_train)
    one = job.settings.probe.model_copy(update={"kinds": ("ridge",)})
    work = Work(network, job.settings.model_copy(update={"probe": one}), CPU)
    # The listings are read once.
    work.val, work.train, work.bank = job.work.val, job.work.train, job.work.bank
    values = {"knn_top1": measure.knn(work).values["knn_top1"]}
    if _has_linear(job.network.folder):
        (result,) = heads.probe(work)
        # What images held out of training choose; where none are held out there is no such number.
        names = ("ridge_top1_selected", "ridge_top1_best_on_val")
        name = next(n for n in names if n in result.values)
        values[name] = result.values[name]
    return values


def _has_linear(folder: Path) -> bool:
    kinds = ("linear", "ridge", "logistic", "sgd")
    return any(path for kind in kinds for path in folder.glob(f"{kind}-????????.json"))


def _percents(values: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.2%}" for name, value in values.items())


def _usual(results: Path) -> Path:
    """RUN/eval -> RUN/export; RUN/eval/NAME -> RUN/export/NAME."""
    if results.name == "eval":
        return results.with_name("export")
    return results.parent.with_name("export") / results.name


def _run(results: Path) -> Path | None:
    """The run that these results are of; None where the network is of none."""
    folder = results.parent if results.name == "eval" else results.parent.parent
    return folder if (folder / "config.yaml").is_file() else None


def _checkpoint(run: Path, named: Path) -> str:
    """The name of the checkpoint that was read: the one that was named, or the run's last."""
    step = named if (named / "state.pt").is_file() else models.last(run)
    return step.resolve().name if step else ""
