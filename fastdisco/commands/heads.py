"""Evaluations that train classifiers on the frozen network: linear, semi, transfer and probe."""

import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastdisco import config, data, models
from fastdisco.commands.kept import Kept
from fastdisco.commands.measure import Work, named
from fastdisco.common import dist
from fastdisco.common.console import say
from fastdisco.common.errors import UserError
from fastdisco.data import cifar, pack
from fastdisco.evals import (
    choice,
    finetune,
    logistic,
    passes,
    protocols,
    results,
    ridge,
    settings,
    splits,
    steps,
)
from fastdisco.evals import features as feats
from fastdisco.evals import linear as heads
from fastdisco.evals.features import Features
from fastdisco.evals.linear import Training
from fastdisco.evals.protocols import Protocol
from fastdisco.evals.settings import Semi, Trained

# Values, the classes predicted for this rank's validation images, and the settings.
Probed = tuple[dict[str, float], Tensor, dict[str, Any]]


class Sets(NamedTuple):
    """What a classifier is trained and measured on."""

    train: data.Listing
    indices: np.ndarray  # training images
    val: data.Listing


def linear(work: Work) -> results.Result:
    """A classifier on all training images by a published protocol."""
    return _trained(
        work, "linear", Sets(work.train, work.train.kept, work.val), work.settings.linear
    )


def semi(work: Work) -> list[results.Result]:
    """A classifier on 1 % and 10 % of the labels; the mean and deviation over draws."""
    s, out = work.settings.semi, []
    train = _tuned if s.finetune else _trained
    kind = "finetune" if s.finetune else "semi"
    if s.lists:
        for path in s.lists:
            some = splits.published(path, work.train)
            sets = Sets(work.train, some, work.val)
            out.append(train(work, f"{kind}-{path.stem}", sets, s))
        return out
    for share in s.shares:
        tries = [
            splits.drawn(work.train.labels, work.train.kept, share, s.seed + i)
            for i in range(s.tries)
        ]
        what = f"{kind}-{100 * share:g}pct"
        found = [
            train(work, f"{what}-try{i}", Sets(work.train, some, work.val), s)
            for i, some in enumerate(tries)
        ]
        out += found if s.tries == 1 else [*found, _mean(work, what, found)]
    return out


def transfer(work: Work) -> results.Result:
    """A classifier on another data set."""
    s = work.settings.transfer
    if s.train is None:
        raise UserError("transfer.train: give another data set, as transfer.train=PATH")
    if cifar.is_archive(s.train) and s.val is not None:
        raise UserError(
            "transfer.val: CIFAR's archive has validation images of its own; leave it out"
        )
    train_path, val_path = (
        _archive(work, s.train) if cifar.is_archive(s.train) else (s.train, s.val)
    )
    if val_path is None:
        raise UserError(
            "transfer.val: give the validation images of that data set, or CIFAR's archive itself as "
            "transfer.train"
        )
    images = work.cfg.data
    train, val = (
        data.listing(path, images.quarantine, images=images) for path in (train_path, val_path)
    )
    data.same_classes(train, val)
    for check in (data.apart, data.no_copies):
        check(train, val, "give transfer.val other images")
    return _trained(work, f"transfer-{_short(s.train)}", Sets(train, train.kept, val), s)


def probe(work: Work) -> list[results.Result]:
    """Ridge, logistic regression and SGD on features that are computed once."""
    s, whole = work.settings.probe, work.train_features()
    val, classes = work.val_features(), len(work.val.classes)
    indices, held = work.train.kept, None
    if s.held:
        indices, some = splits.held_out(work.train.labels, indices, s.held, s.seed)
        held = work.train_features(some)
    train = whole if held is None else work.train_features(indices)
    _refuse_few(val, Sets(work.train, indices, work.val))
    kinds = {"ridge": _ridge, "logistic": _logistic, "sgd": _sgd}
    out = []
    for kind in s.kinds:
        begin = time.perf_counter()
        values, predicted, own = kinds[kind](work, train, held, val, classes)
        protocol = work.protocol(kind, own | {"held": s.held, "held_seed": s.seed}, work.train.kept)
        reported = f"{kind}_top1_{_reported(kind, held)}"
        out.append(_save(work, kind, values, protocol, begin, {reported: predicted}, val))
    return out


def _reported(kind: str, held: Features | None) -> str:
    """Which of a probe's accuracies its predictions are of."""
    if held is not None:
        return "selected"
    # Of the best epoch there are no weights any more.
    return "preset_last" if kind == "sgd" else "best_on_val"


def _ridge(
    work: Work, train: Features, held: Features | None, val: Features, classes: int
) -> Probed:
    s = work.settings.probe.strengths
    return *ridge.predict(train, held, val, classes, s), {"strengths": s}


def _logistic(
    work: Work, train: Features, held: Features | None, val: Features, classes: int
) -> Probed:
    s = work.settings.probe
    own = {"cs": s.cs, "iterations": s.iterations}
    with work.bar("logistic regression", len(s.cs), shared=False) as tick:

        def watch(ended: int) -> None:
            tick(ended)
            work.heard()

        return *logistic.predict(train, held, val, classes, s.cs, s.iterations, watch), own


def _sgd(work: Work, train: Features, held: Features | None, val: Features, classes: int) -> Probed:
    s, seed = work.settings.probe, work.settings.probe.seed
    mean, deviation = logistic.moments(train.x)
    even = lambda f: f._replace(x=logistic.standardised(f.x, mean, deviation))
    train, val, held = even(train), even(val), None if held is None else even(held)
    p = Protocol(epochs=s.epochs, batch=s.batch, lr=s.lrs[0], schedule="cosine")
    rates = heads.grid(p, s.lrs)
    training = Training(heads.Heads(rates, val.x.shape[1], classes, p, seed, work.device))
    with work.bar("sgd on features", s.epochs, shared=False) as tick:

        def watch(t: Training) -> None:
            if t.step == 0:
                tick(1)
                work.heard()

        training.run(steps.cached(train, s.batch, seed), val, held, watch)
    values, at = heads.report(training, "sgd")
    own = {"lrs": s.lrs, "epochs": s.epochs, "batch": s.batch, "seed": seed}
    return values, heads.predictions(training.heads, val, at), own


def _trained(work: Work, what: str, sets: Sets, block: Trained) -> results.Result:
    """A linear evaluation: trained from random crops, measured after each epoch; goes on where it
    was stopped."""
    begin = time.perf_counter()
    p = settings.protocol(block, work.cfg.data.eval_size, work.cfg.data.eval_resize)
    if p.trunk_lr is not None:
        raise UserError(f"{what}.preset: {block.preset} trains the backbone too; take a linear one")
    rates, seed = heads.grid(p, block.lrs, block.weight_decays), block.seed
    indices, some = sets.indices, None
    if len(rates) > 1 and block.held:
        indices, some = splits.held_out(sets.train.labels, indices, block.held, seed)
    val = _measured(work, sets.val, sets.val.kept, p)
    held = None if some is None else _measured(work, sets.train, some, p)
    _refuse_few(val, sets)
    own = {
        "protocol": p.model_dump(mode="json"),
        "preset": block.preset,
        "rates": rates,
        "held": block.held if some is not None else 0,
        "seed": seed,
    }
    protocol = _protocol(work, sets, work.cfg.engine.precision, "linear", own)
    training = Training(
        heads.Heads(rates, val.x.shape[1], len(sets.train.classes), p, seed, work.device)
    )
    state = Kept(work, what, protocol, training, f"{len(rates)} classifiers", p.epochs)
    source = steps.crops(
        _loader(work, sets.train, p, seed), indices, work.frozen(p.blocks), p.batch, seed
    )
    with state:
        training.run(source, val, held, state.watch)
    values, at = heads.report(training)
    reported = {"linear_top1_preset_last": heads.predictions(training.heads, val, 0)}
    if some is not None:
        reported["linear_top1_selected"] = heads.predictions(training.heads, val, at)
    result = _save(work, what, values, protocol, begin, reported, val)
    state.finish()
    return result


def _tuned(work: Work, what: str, sets: Sets, block: Semi) -> results.Result:
    """The whole network trained on these images; goes on where it was stopped."""
    begin = time.perf_counter()
    preset = block.tuning(len(sets.indices) / len(sets.train.kept))
    p = settings.protocol(block, work.cfg.data.eval_size, work.cfg.data.eval_resize, preset)
    if block.lrs or block.weight_decays:
        raise UserError("semi.lrs: a grid is for linear evaluations; set semi.lr with finetune")
    if not models.size(work.net):
        raise UserError(
            "semi.finetune: the weights of an exported file cannot be trained; give the run itself"
        )
    seed, view, size = block.seed, passes.of_protocol(p), work.network.about["features"]
    own = {"protocol": p.model_dump(mode="json"), "preset": preset, "seed": seed}
    protocol = _protocol(work, sets, "fp32", "finetune", own)
    classes = len(sets.train.classes)
    tuning = finetune.Tuning(work.net.backbone, size, classes, p, seed)

    def logits(net: torch.nn.Module) -> tuple[Tensor, Tensor]:
        one = lambda x: {"logits": net(x.float())}
        found = passes.features(one, sets.val, sets.val.kept, view, work.cfg.data, work.device)
        return found["logits"].x, found["logits"].label

    images = work.cfg.data.model_copy(update={"eval_batch": p.batch})
    source = steps.images(_loader(work, sets.train, p, seed, images), sets.indices, p.batch, seed)
    state = Kept(work, what, protocol, tuning, "fine-tuning", p.epochs)
    with state:
        tuning.run(source, logits, state.watch)
    last, label = logits(tuning.net.eval())
    index = passes.share(data.reading_order(sets.val, sets.val.kept), work.cfg.data.eval_batch)
    val = Features(last, label, torch.from_numpy(index).to(last.device))
    reported = {"finetune_top1_last": choice.classes_of(last)}
    result = _save(work, what, finetune.report(tuning), protocol, begin, reported, val)
    state.finish()
    return result


def _protocol(
    work: Work, sets: Sets, precision: str, what: str, own: dict[str, Any]
) -> dict[str, Any]:
    return {
        "network": work.network.about,
        "data": named(sets.val, sets.val.kept, "val") | named(sets.train, sets.indices, "train"),
        "precision": precision,
        what: own,
        "versions": work.versions,
    }


def _measured(work: Work, listing: data.Listing, indices: np.ndarray, p: Protocol) -> Features:
    """Features without augmentation; what another evaluation has seen alike costs no pass."""
    view = passes.of_protocol(p)
    if p.blocks == 1 and view == work.view and listing is work.val:
        return work.val_features()
    if p.blocks == 1 and view == work.view and listing is work.train:
        return work.train_features(indices)
    encode = work.frozen(p.blocks)
    one = lambda x: {"features": encode(x)}
    return work.pass_over(listing, indices, view, one, f"{p.blocks} blocks")["features"]


def _loader(
    work: Work,
    train: data.Listing,
    p: Protocol,
    seed: int,
    images: config.Data | None = None,
) -> data.TrainLoader:
    images = images or work.cfg.data
    fits = max(1, len(train.kept) // dist.world())
    return data.TrainLoader(
        train,
        [protocols.crop(p)],
        min(fits, steps.chunk(p.batch, images.eval_batch)),
        seed,
        p.epochs,
        1,
        images.threads,
        work.device,
        placement=data.place(images, work.device),
    )


def _save(
    work: Work,
    what: str,
    values: dict[str, float],
    protocol: dict[str, Any],
    begin: float,
    predicted: dict[str, Tensor],
    val: Features,
) -> results.Result:
    """With the predictions of all ranks, in the order of the images' indices."""
    order = feats.ragged(val.index).argsort(stable=True)
    every = {k: feats.ragged(p)[order].cpu().numpy() for k, p in predicted.items()}
    labels = feats.ragged(val.label)[order].cpu().numpy()
    return work.save(what, values, protocol, time.perf_counter() - begin, every, labels)


def _mean(work: Work, what: str, found: list[results.Result]) -> results.Result:
    """Mean and deviation of every value over draws of the part."""
    values = {}
    for key in found[0].values:
        each = np.array([r.values[key] for r in found])
        values |= {f"{key}_mean": float(each.mean()), f"{key}_deviation": float(each.std(ddof=1))}
    protocol = dict(found[0].protocol)
    protocol["tries"] = [r.protocol["data"]["train"]["indices"] for r in found]
    return work.save(what, values, protocol, sum(r.seconds for r in found))


def _refuse_few(val: Features, sets: Sets) -> None:
    classes = len(sets.train.classes)
    if len(sets.indices) < classes:
        raise UserError(
            f"{sets.train.source}: {len(sets.indices)} training images are fewer than {classes} "
            "classes; give more"
        )
    feats.refuse_few(val, classes, str(sets.val.source), learned=False)


def _archive(work: Work, path: Path) -> tuple[Path, Path]:
    """CIFAR's archive, packed beside the results where that was not done yet."""
    folder = work.network.folder / "data" / _short(path)
    if dist.rank() == 0:
        say(f"{path}: packed into {folder}")
        pack.pack(path, folder)
    dist.barrier()
    return folder / "train", folder / "val"


def _short(path: Path) -> str:
    """A name for files, of a data set's path."""
    name = path.name.removesuffix(".gz").removesuffix(".tar").removesuffix(".tgz")
    if name in ("train", "val"):
        name = path.parent.name
    return "".join(c if c.isalnum() or c in "._+" else "_" for c in name) or "data"
