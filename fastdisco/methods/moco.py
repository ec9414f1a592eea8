"""MoCo-v2 (arXiv:2003.04297), and with a teacher DisCo (arXiv:2104.09124): the student solves
MoCo's task and is drawn towards the teacher's embedding."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdisco import config, kernels
from fastdisco.common import dist
from fastdisco.engine import cudagraph
from fastdisco.methods import Forward, Method, Nets, Progress, distilled, queue_dtype, spread
from fastdisco.models.queue import Queue


class Moco(Method):
    def __init__(self, cfg: config.Moco, dim: int, seed: int, shuffle: str) -> None:
        super().__init__()
        self.cfg, self.seed, self.shuffle = cfg, seed, shuffle
        self.permuted = shuffle == "load"
        self.weights = {"contrast": cfg.contrast, "distill": cfg.distill}
        if cfg.rkd.distance or cfg.rkd.angle:
            self.weights |= {"rkd_distance": cfg.rkd.distance, "rkd_angle": cfg.rkd.angle}
        self.queue = Queue(cfg.queue, dim, seed, queue_dtype(cfg.queue_dtype))
        # The keys of this optimizer step's micro batches.  Empty between steps, so no part of the
        # resume state.
        self.keys: list[Callable[[], Tensor]] = []

    def momentum(self, progress: Progress) -> float:
        return self.cfg.momentum

    def step(self, nets: Nets, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        """views: two [B,3,S,S].  Losses contrast and, with a teacher, distill and those of rkd;
        logged beside them feat/std and distill/cosine."""
        cfg = self.cfg
        assert nets.ema, "made wherever momentum() is a number"
        # Without distillation nothing is asked of the student on the second view.
        seen = views if nets.teacher and cfg.distill else views[:1]
        # May run beside the student's forward, until its z is read.
        teacher = nets.teacher(seen) if nets.teacher else None
        # Before the student's forward: the keys travel between the ranks while it computes.
        keys = encode(nets.ema, views[1], self.shuffle, dist.mix(self.seed, progress.micro_step))
        z = nets.student(seen).z  # [V,B,d]
        t = teacher.z if teacher else None  # [V,B,d]
        contrast, distill = kernels.moco(
            z, keys.own(), self.queue.rows, cfg.temp, t if cfg.distill else None
        )
        terms = {"contrast": contrast, "feat/std": spread(z[0])}
        if t is not None and cfg.distill:
            terms |= distilled(distill, z)
        if t is not None and "rkd_angle" in self.weights:
            terms["rkd_distance"], terms["rkd_angle"] = kernels.rkd(z[0], t[0])
        self.keys.append(keys.every)
        return terms

    def after_step(self) -> None:
        """All micro batches of a step see the same queue; the next step sees their keys."""
        self.queue.enqueue(torch.cat([every() for every in self.keys]))
        self.keys.clear()


METHOD = Moco


class Keys(NamedTuple):
    """Raw keys under way between the ranks: calling either waits for them."""

    # [B,d]: the positives of this rank's queries.
    own: Callable[[], Tensor]
    # [B*ranks,d]: of the whole global batch, in its order on every rank.
    every: Callable[[], Tensor]


@torch.no_grad()
def encode(ema: Forward, view: Tensor, shuffle: str, seed: int) -> Keys:
    """The keys of the global batch's second view.

    view     [B,3,S,S] of this rank's images; with load, the loader has already handed out this
             rank's share of the permuted batch
    shuffle  off: encoded in the batch's own order.  gather and load: in a permutation by `seed`,
             for which gather sends the images between the ranks"""
    # MoCo moves the mean student (EMA) right here, towards the weights that the student has before
    # this step's update.  The loop moves it after the optimizer's step instead.  The sequence is
    # the same, for the first EMA is a copy of the student, which no move would change.
    assert shuffle in ("gather", "load", "off"), shuffle
    order = None if shuffle == "off" else dist.Shuffle(len(view), seed)
    out = ema([order.split(view) if order and shuffle == "gather" else view])
    join = order.join if order else dist.all_gather_async
    if dist.world() == 1 or isinstance(out, cudagraph.Later):
        # Sent when first asked for: reading z waits for it, and the student's forward comes first.
        every = functools.cache(lambda: join(out.z[0])())
    else:
        every = functools.cache(join(out.z[0]))
    first = dist.rank() * len(view)
    return Keys(lambda: every()[first:][: len(view)] if order else out.z[0], every)
