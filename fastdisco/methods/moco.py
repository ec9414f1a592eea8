"""MoCo-v2 (arXiv:2003.04297), and with a teacher DisCo (arXiv:2104.09124): the student on MoCo's
task and towards the teacher's embedding."""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdisco import config, kernels
from fastdisco.common import dist
from fastdisco.engine import cudagraph
from fastdisco.methods import Method, Nets, Progress, distilled, queue_dtype, spread
from fastdisco.models.queue import Queue


class Moco(Method):
    def __init__(self, cfg: config.Moco, dim: int, seed: int, shuffle: str):
        super().__init__()
        self.cfg, self.seed, self.shuffle, self.permuted = cfg, seed, shuffle, shuffle == "load"
        self.weights = {"contrast": cfg.contrast, "distill": cfg.distill}
        if cfg.rkd.distance or cfg.rkd.angle:
            self.weights |= {"rkd_distance": cfg.rkd.distance, "rkd_angle": cfg.rkd.angle}
        self.queue = Queue(cfg.queue, dim, seed, queue_dtype(cfg.queue_dtype))
        # Of this optimizer step's micro batches; empty between steps, so no part of the resume
        # state.
        self.keys = []

    def momentum(self, progress: Progress) -> float:
        return self.cfg.momentum

    def step(self, nets: Nets, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        """views: two [B,3,S,S].  Terms contrast and, with a teacher, distill; logged beside them
        feat/std and distill/cosine."""
        cfg = self.cfg
        # Without distillation nothing is asked of the student on view B.
        seen = views if nets.teacher and cfg.distill else views[:1]
        # May run beside the student's forward, until its z is read.
        teacher = nets.teacher(seen) if nets.teacher else None
        # Before the student: they travel while it computes.
        keys = encode(nets.ema, views[1], self.shuffle, dist.mix(self.seed, progress.micro_step))
        z = nets.student(seen).z  # [V,B,d]
        q = z[0]
        t = teacher.z if teacher else None  # [V,B,d]
        contrast, distill = kernels.moco(
            z, keys.own(), self.queue.rows, cfg.temp, t if cfg.distill else None
        )
        terms = {"contrast": contrast, "feat/std": spread(q)}
        if teacher and cfg.distill:
            terms |= distilled(distill, z)
        if teacher and "rkd_angle" in self.weights:
            terms["rkd_distance"], terms["rkd_angle"] = kernels.rkd(q, t[0])
        self.keys.append(keys.every)
        return terms

    def after_step(self):
        """All micro batches of a step saw the same queue; the next step sees their keys."""
        self.queue.enqueue(torch.cat([every() for every in self.keys]))
        self.keys.clear()


METHOD = Moco


class Keys(NamedTuple):
    """Raw keys under way between the ranks: calling waits for them."""

    own: Callable[[], Tensor]  # [B,d]: the positives of this rank's queries
    # [B*ranks,d]: of the whole global batch, in its order on every rank.
    every: Callable[[], Tensor]


@torch.no_grad()
def encode(ema, view: Tensor, shuffle: str, seed: int) -> Keys:
    """The keys of the global batch of view B, encoded in its own order (shuffle off) or in that of
    the seed.

    view  [B,3,S,S] of this rank's images, which gather sends around; with load, the loader has
          handed out the permuted batch's share"""
    # MoCo moves the mean student right here, towards the weights that the student has before this
    # step's update.  The loop moves it after the optimizer's step instead: the same sequence, for
    # the first mean student is a copy, which no move would change.
    assert shuffle in ("gather", "load", "off"), shuffle
    order = None if shuffle == "off" else dist.Shuffle(len(view), seed)
    out = ema([order.split(view) if shuffle == "gather" else view])
    send = lambda: (order.join if order else dist.all_gather_async)(out.z[0])
    # Reading z waits for it: not before the student's forward is under way.
    late = dist.world() == 1 or isinstance(out, cudagraph.Later)
    every = functools.cache((lambda: send()()) if late else send())
    return Keys(
        lambda: every()[dist.rank() * len(view) :][: len(view)] if order else out.z[0], every
    )
