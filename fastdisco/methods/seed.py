"""SEED (arXiv:2101.04731), with or without MoCo's contrast beside it: the student's similarities to
a queue of the teacher's embeddings are drawn towards the teacher's own."""

from collections.abc import Callable

import torch
from torch import Tensor

from fastdisco import config, kernels
from fastdisco.common import dist
from fastdisco.methods import Method, Nets, Progress, queue_dtype, spread
from fastdisco.methods.moco import encode
from fastdisco.models.queue import Queue


class Seed(Method):
    teacher_views = 1

    def __init__(self, cfg: config.Seed, dim: int, seed: int, shuffle: str) -> None:
        super().__init__()
        self.cfg, self.seed, self.shuffle = cfg, seed, shuffle
        self.permuted = shuffle == "load" and cfg.contrast > 0
        self.weights = {"seed": cfg.distill, "contrast": cfg.contrast}
        # Cosines in bf16 are too coarse to divide by so small a temperature.
        fine = cfg.queue_dtype == "auto" and cfg.temp_teacher < 0.01
        dtype = queue_dtype("fp32" if fine else cfg.queue_dtype)
        # Of the teacher's embeddings.
        self.queue = Queue(cfg.queue, dim, seed, dtype)
        # Of the mean student's (EMA), for the contrast.
        self.negatives = Queue(cfg.queue, dim, dist.mix(seed, 1), dtype) if cfg.contrast else None
        # Both of this optimizer step's micro batches.
        self.targets: list[Callable[[], Tensor]] = []
        self.keys: list[Callable[[], Tensor]] = []

    def momentum(self, progress: Progress) -> float | None:
        return self.cfg.momentum if self.cfg.contrast else None

    def step(self, nets: Nets, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        """views: one [B,3,S,S], with contrast two.  Losses seed and contrast; logged beside them
        feat/std and distill/cosine."""
        cfg = self.cfg
        assert nets.teacher, "the configuration demands a teacher"
        teacher = nets.teacher(views[:1])
        keys = None
        if cfg.contrast:
            assert nets.ema, "made wherever momentum() is a number"
            seed = dist.mix(self.seed, progress.micro_step)
            keys = encode(nets.ema, views[1], self.shuffle, seed)
        z = nets.student(views[:1]).z[0]  # [B,d]
        terms = {"feat/std": spread(z)}
        if keys and self.negatives:
            terms["contrast"] = kernels.info_nce(z, keys.own(), self.negatives.rows, cfg.temp)
            self.keys.append(keys.every)
        t = teacher.z[0]  # [B,d]
        terms["seed"] = kernels.seed(z, t, self.queue.rows, cfg.temp, cfg.temp_teacher)
        terms["distill/cosine"] = torch.cosine_similarity(z.detach().float(), t.float()).mean()
        self.targets.append(dist.all_gather_async(t))
        return terms

    def after_step(self) -> None:
        """All micro batches of a step see the same queues; the next step sees what they add."""
        self.queue.enqueue(torch.cat([targets() for targets in self.targets]))
        self.targets.clear()
        if self.negatives:
            self.negatives.enqueue(torch.cat([keys() for keys in self.keys]))
            self.keys.clear()


METHOD = Seed
