"""The evaluations of one network, one after the other: what they share is made once."""

import hashlib
import importlib.metadata
import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from fastdisco import data
from fastdisco.commands.networks import Network
from fastdisco.common import dist
from fastdisco.common.console import console, say
from fastdisco.common.errors import UserError
from fastdisco.evals import features as feats
from fastdisco.evals import frozen, intervals, neighbours, passes, results, retrieve
from fastdisco.evals.features import Features
from fastdisco.evals.passes import View
from fastdisco.evals.settings import Settings
from fastdisco.run.signals import Stop


class Stopped(Exception):
    """SIGTERM or Ctrl-C; what was finished is kept."""


class Work:
    """One network and its images.  Features of a split are computed when first asked for, and then
    kept."""

    def __init__(
        self, network: Network, settings: Settings, device: torch.device, stop: Stop | None = None
    ) -> None:
        self.network, self.settings, self.device, self.stop = network, settings, device, stop
        self.cfg, self.net = network.cfg, network.net.to(device)
        self.view = passes.of_config(self.cfg)
        self._kept: dict[tuple, dict[str, Features]] = {}
        # What stands side by side: several networks, which see the same images.
        self.shown: list[Work] = [self]
        # Whether the command trains several times, and the finished trainings that are kept until it
        # ends.
        self.in_parts, self.finished = False, list[Path]()

    def beside(self, network: Network) -> "Work":
        """The work of another network on the same images, which it sees as this one does."""
        found = Work(network._replace(cfg=self.cfg), self.settings, self.device, self.stop)
        found.val = self.val
        return found

    @cached_property
    def val(self) -> data.Listing:
        if self.cfg.data.val is None:
            raise UserError(
                "data.val: the run was trained without validation images; give some as "
                "data.val=FOLDER"
            )
        # Also images without classes, for what needs none.
        return data.listing(self.cfg.data.val, self.cfg.data.quarantine, True, self.cfg.data)

    @cached_property
    def train(self) -> data.Listing:
        if not self.network.has_train:
            raise UserError(
                "data.train: this evaluation needs training images; give data.train=PATH"
            )
        found = data.listing(self.cfg.data.train, self.cfg.data.quarantine, images=self.cfg.data)
        data.same_classes(found, self.val)
        data.apart(found, self.val)
        data.no_copies(found, self.val)
        return found

    @cached_property
    def bank(self) -> np.ndarray:
        """Training images of the kNN bank, ascending: drawn as during training."""
        kept, size = self.train.kept, self.cfg.eval.bank
        if not size or size >= len(kept):
            return kept
        return np.sort(np.random.default_rng(self.cfg.run.seed).permutation(kept)[:size])

    @cached_property
    def encode(self) -> Callable[[Tensor], Tensor]:
        return self.frozen()

    def frozen(self, blocks: int = 1) -> Callable[[Tensor], Tensor]:
        """[B,3,S,S] -> [B,F] float32; see `Network.encoder`."""
        encode = self.network.encoder(blocks)
        precision, graphs = self.cfg.engine.precision, self.cfg.perf.graphs
        return frozen.encoder(encode, precision, self.device, graphs)

    def val_kinds(self) -> dict[str, Features]:
        """Features of the validation images and, from the same pass, embeddings: this rank's part."""
        return self.pass_over(self.val, self.val.kept, self.view, self.with_embedding)

    def val_features(self) -> Features:
        return self.val_kinds()["features"]

    def train_features(self, indices: np.ndarray | None = None) -> Features:
        """Of these training images, of all by default; a part of what is there already costs no
        pass."""
        return self.part_of(self.train, self.train.kept if indices is None else indices)

    def part_of(self, listing: data.Listing, wanted: np.ndarray) -> Features:
        """Features of these images: taken from those of the whole split where they are there, else
        from a pass over these alone."""
        one = lambda x: {"features": self.encode(x)}
        whole = self._kept.get(self._key(listing, listing.kept, self.view))
        if whole is not None:
            here = torch.isin(whole["features"].index.cpu(), torch.from_numpy(wanted))
            return whole["features"].take(here.to(self.device))
        return self.pass_over(listing, wanted, self.view, one)["features"]

    def pass_over(
        self,
        listing: data.Listing,
        indices: np.ndarray,
        view: View,
        encode: Callable[[Tensor], dict[str, Tensor]],
        what: str = "",
    ) -> dict[str, Features]:
        """One pass; checked to be of use, and kept for who asks for the same.  what: sets kinds of
        features apart."""
        key = self._key(listing, indices, view, what)
        if key in self._kept:
            return self._kept[key]
        text = f"features of {len(indices)} images of {listing.source}"
        with self.bar(text, len(indices)) as tick:
            found = passes.features(
                encode, listing, indices, view, self.cfg.data, self.device, tick
            )
        for name, f in found.items():
            feats.refuse_useless(f, f"{listing.source}, {name}")
        self._kept[key] = found
        return found

    def protocol(
        self,
        what: str,
        own: dict[str, Any],
        train: np.ndarray | None = None,
        val: np.ndarray | None = None,
    ) -> dict[str, Any]:
        """Everything that can change a number of this evaluation.  train, val: the images that it
        uses, of training and validation; by default none and all."""
        images = named(self.val, self.val.kept if val is None else val, "val")
        if train is not None:
            images |= named(self.train, train, "train")
        return {
            "network": self.network.about,
            "data": images,
            "view": self.view._asdict(),
            "precision": self.cfg.engine.precision,
            what: own,
            "versions": self.versions,
        }

    @cached_property
    def versions(self) -> dict[str, str]:
        """What computed a number."""
        decode = data.place(self.cfg.data, self.device).decode
        found = {"device": self.device.type, "decode": decode}
        for name in ("torch", "timm", "nvidia-dali-cuda130", "nvidia-dali-cuda120", "fastdisco"):
            try:
                found[name] = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                continue
        return found

    def save(
        self,
        what: str,
        values: dict[str, float],
        protocol: dict[str, Any],
        seconds: float,
        predictions: dict[str, np.ndarray] | None = None,
        labels: np.ndarray | None = None,
    ) -> results.Result:
        """The result, written by rank 0."""
        result = results.make(what, values, plain(protocol), seconds, predictions, labels)
        if dist.rank() == 0:
            results.write(self.network.folder, result)
        dist.barrier()
        return result

    @contextmanager
    def bar(self, text: str, total: int, shared: bool = True) -> Iterator[Callable[[int], None]]:
        """Yields what is told of every piece done on this rank; a stop asked for is heard there,
        where no other rank waits.  shared: each rank does its part of the total."""
        shown = dist.rank() == 0 and console.is_terminal
        if not console.is_terminal:
            # In a log no bar moves, and minutes without a line look like a hang.
            say(text)
        with Progress(console=console, transient=True, disable=not shown) as progress:
            task = progress.add_task(text, total=total)

            def tick(n: int) -> None:
                progress.advance(task, n * (dist.world() if shared else 1))
                if dist.world() == 1 and self.stop and self.stop.asked:
                    raise Stopped

            yield tick

    def with_embedding(self, x: Tensor) -> dict[str, Tensor]:
        f = self.encode(x)
        if not self.network.embeds:
            return {"features": f}
        return {"features": f, "embedding": self.net.head(f)}

    def heard(self) -> None:
        """Called by all ranks at the same places; raises Stopped on each where any was asked to stop."""
        if self.stop and dist.any_rank(self.stop.asked):
            raise Stopped

    def heard_alone(self) -> None:
        """`heard` where each rank has a number of pieces of its own: one rank alone hears."""
        if dist.world() == 1:
            self.heard()

    def end(self) -> None:
        """Everything is measured; nothing is to be continued."""
        if dist.rank() == 0:
            for path in self.finished:
                path.unlink(missing_ok=True)

    @staticmethod
    def _key(listing: data.Listing, indices: np.ndarray, view: View, what: str = "") -> tuple:
        return str(listing.source), indices.tobytes(), view, what


def knn(work: Work) -> results.Result:
    """Nearest neighbours among the training images."""
    begin = time.perf_counter()
    s, classes = work.settings.knn, len(work.val.classes)
    most = len(work.bank)
    own = min(work.cfg.eval.k, most)
    ks = s.k or tuple(sorted({k for k in (*neighbours.KS, own) if k <= most}))
    temps = s.temp or (work.cfg.eval.temp,)
    bank, val = work.train_features(work.bank), work.val_features()
    _refuse_few(work, bank, val, max(ks))
    found = neighbours.predict(bank, val, classes, ks, temps, work.heard)
    label = feats.gathered(val).label
    # Under the name and with the settings that training logs.
    usual = neighbours.name(own, work.cfg.eval.temp)
    if usual in found:
        found["knn_top1"] = found[usual]
    values = {k: (p == label).double().mean().item() for k, p in found.items()}
    protocol = work.protocol("knn", {"k": ks, "temp": temps, "usual": usual}, work.bank)
    predictions = {k: p.cpu().numpy() for k, p in found.items()}
    return work.save(
        "knn", values, protocol, time.perf_counter() - begin, predictions, label.cpu().numpy()
    )


def retrieval(work: Work) -> results.Result:
    """Validation images among each other."""
    begin = time.perf_counter()
    val, ks = work.val_features(), work.settings.retrieve.k
    classes, source = len(work.val.classes), str(work.val.source)
    feats.refuse_few(val, classes, source, max(ks) + 1, learned=False)
    values = retrieve.run(val, ks, work.heard_alone)
    return work.save(
        "retrieve", values, work.protocol("retrieve", {"k": ks}), time.perf_counter() - begin
    )


def _refuse_few(work: Work, train: Features, val: Features, least: int = 1) -> None:
    classes = len(work.val.classes)
    feats.refuse_few(train, classes, str(work.train.source), least)
    feats.refuse_few(val, classes, str(work.val.source), learned=False)


def named(listing: data.Listing, indices: np.ndarray, part: str) -> dict[str, Any]:
    """What says which images these are."""
    chosen = hashlib.sha256(np.ascontiguousarray(indices).tobytes()).hexdigest()
    return {
        part: {
            "fingerprint": listing.fingerprint,
            "bytes": listing.sampled[:16],
            "classes": len(listing.classes),
            "images": len(indices),
            "indices": chosen[:16],
        }
    }


def plain(tree: Any) -> Any:
    """As JSON gives it back, so that a hash now is a hash then."""
    return json.loads(json.dumps(tree, default=str))


def summary(result: results.Result) -> str:
    """A line of values with their intervals, for people."""
    parts = []
    for name, value in result.values.items():
        ends = result.intervals.get(name)
        around = f" [{ends[0]:.2%}, {ends[1]:.2%}]" if ends else ""
        shown = f"{value:.2%}" if results.is_share(name) else results.number(value)
        parts.append(f"{name} {shown}{around}")
    return f"{result.what} ({result.seconds:.1f} s, {result.hash}): " + ", ".join(parts)


def pairs(found: dict[str, intervals.Paired]) -> list[str]:
    """Lines of a comparison of two runs."""
    return [
        f"{name}: {p.difference:+.2%} [{p.interval.low:+.2%}, {p.interval.high:+.2%}], "
        f"p {p.p:.2g} (only the first right: {p.only_first}, only the second: {p.only_second})"
        for name, p in found.items()
    ]
