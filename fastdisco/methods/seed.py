"""SEED (arXiv:2101.04731): the student's similarities to a queue of the teacher's embeddings
towards the teacher's own, with or without MoCo's contrast beside it."""

import torch
from torch import Tensor

from fastdisco import config, kernels
from fastdisco.common import dist
from fastdisco.methods import Method, Nets, Progress, queue_dtype, spread
from fastdisco.methods.moco import encode
from fastdisco.models.queue import Queue


class Seed(Method):
    teacher_views = 1

    def __init__(self, cfg: config.Seed, dim: int, seed: int, shuffle: str):
        super().__init__()
        self.cfg, self.seed, self.shuffle, self.permuted = (
            cfg,
            seed,
            shuffle,
            shuffle == "load" and cfg.contrast > 0,
        )
        self.weights = {"seed": cfg.distill, "contrast": cfg.contrast}
        dtype = queue_dtype(
            "fp32" if cfg.queue_dtype == "auto" and cfg.temp_teacher < 0.01 else cfg.queue_dtype
        )
        self.queue = Queue(cfg.queue, dim, seed, dtype)  # of the teacher's embeddings
        # Of the mean student's.
        self.negatives = Queue(cfg.queue, dim, dist.mix(seed, 1), dtype) if cfg.contrast else None
        self.targets, self.keys = [], []  # of this optimizer step's micro batches

    def momentum(self, progress: Progress) -> float | None:
        return self.cfg.momentum if self.cfg.contrast else None

    def step(self, nets: Nets, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        """views: one [B,3,S,S], with contrast two.  Terms seed and contrast; logged beside them
        feat/std and distill/cosine."""
        cfg = self.cfg
        teacher = nets.teacher(views[:1])
        keys = (
            encode(nets.ema, views[1], self.shuffle, dist.mix(self.seed, progress.micro_step))
            if cfg.contrast
            else None
        )
        z = nets.student(views[:1]).z[0]  # [B,d]
        terms = {"feat/std": spread(z)}
        if cfg.contrast:
            terms["contrast"] = kernels.info_nce(z, keys.own(), self.negatives.rows, cfg.temp)
            self.keys.append(keys.every)
        t = teacher.z[0]
        terms["seed"] = kernels.seed(z, t, self.queue.rows, cfg.temp, cfg.temp_teacher)
        terms["distill/cosine"] = torch.cosine_similarity(z.detach().float(), t.float()).mean()
        self.targets.append(dist.all_gather_async(t))
        return terms

    def after_step(self):
        """All micro batches of a step saw the same queues; the next step sees what they add."""
        self.queue.enqueue(torch.cat([targets() for targets in self.targets]))
        self.targets.clear()
        if self.cfg.contrast:
            self.negatives.enqueue(torch.cat([keys() for keys in self.keys]))
            self.keys.clear()


METHOD = Seed
