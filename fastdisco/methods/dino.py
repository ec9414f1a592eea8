"""DINO (arXiv:2104.14294), and with a teacher DisCo (arXiv:2104.09124, appendix): every crop
predicts the centred and sharpened mean student."""

import math

import torch
from torch import Tensor

from fastdisco import config, kernels
from fastdisco.common import dist
from fastdisco.methods import Method, Nets, Progress, distilled, spread

LARGE = 2  # the first views, which the mean student and the teacher see


class Dino(Method):
    teacher_views = LARGE
    centre: Tensor  # [P], running mean of the mean student's scores

    def __init__(self, cfg: config.Dino, dim: int, seed: int, shuffle: str):
        super().__init__()
        self.cfg = cfg
        self.weights = {"dino": 1.0, "distill": cfg.distill}
        self.register_buffer("centre", torch.zeros(cfg.prototypes))
        self.means = []  # of this optimizer step's micro batches

    def momentum(self, progress: Progress) -> float:
        return 1 - (1 - self.cfg.momentum) * 0.5 * (1 + math.cos(math.pi * progress.share))

    def frozen(self, progress: Progress) -> tuple[str, ...]:
        return ("prototypes.",) if progress.epoch < self.cfg.freeze_epochs else ()

    def step(self, nets: Nets, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        """views: V >= 2 [B,3,S,S].  Terms dino and, with a teacher, distill over the first two;
        logged beside them feat/std and distill/cosine."""
        teacher = nets.teacher(views[:LARGE]) if nets.teacher else None
        mean = nets.ema(views[:LARGE])  # may run beside the student's forward, too
        z, scores = nets.student(views)  # [V,B,d], [V,B,P]
        targets = mean.scores  # [2,B,P]
        targets = targets.to(torch.promote_types(targets.dtype, torch.float32))
        probs = torch.softmax((targets - self.centre) / self.temp(progress.epoch), 2)
        terms = {"dino": kernels.swapped(scores, probs, self.cfg.temp), "feat/std": spread(z[0])}
        self.means.append(targets.mean((0, 1)))
        if teacher:
            terms |= distilled(kernels.distill(z[:LARGE], teacher.z), z[:LARGE])
        return terms

    def after_step(self):
        """The centre follows the mean over all ranks and micro batches.  Equation 4."""
        self.centre.lerp_(dist.all_mean(torch.stack(self.means).mean(0)), 1 - self.cfg.centre)
        self.means.clear()

    def temp(self, epoch: float) -> float:
        """Of the mean student: once an epoch from temp_mean_start to temp_mean."""
        cfg, done = self.cfg, math.floor(epoch)
        if done >= cfg.temp_warmup_epochs:
            return cfg.temp_mean
        return cfg.temp_mean_start + (cfg.temp_mean - cfg.temp_mean_start) * done / max(
            1, cfg.temp_warmup_epochs - 1
        )


METHOD = Dino
