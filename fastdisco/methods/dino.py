"""DINO (arXiv:2104.14294), and with a teacher DisCo (arXiv:2104.09124, appendix): every crop
predicts the centred and sharpened scores of the mean student (EMA)."""

import math

import torch
from torch import Tensor

from fastdisco import config, kernels
from fastdisco.common import dist
from fastdisco.methods import Method, Nets, Progress, distilled, spread

# The first views are the large crops, which EMA and teacher see.
LARGE = 2


class Dino(Method):
    teacher_views = LARGE
    # [P]: running mean of the EMA's scores.
    centre: Tensor

    def __init__(self, cfg: config.Dino, dim: int, seed: int, shuffle: str) -> None:
        super().__init__()
        self.cfg = cfg
        self.weights = {"dino": 1.0, "distill": cfg.distill}
        self.register_buffer("centre", torch.zeros(cfg.prototypes))
        # Mean scores [P] of this optimizer step's micro batches.
        self.means: list[Tensor] = []

    def momentum(self, progress: Progress) -> float:
        """A cosine over the schedule, from cfg.momentum to 1."""
        return 1 - (1 - self.cfg.momentum) * 0.5 * (1 + math.cos(math.pi * progress.share))

    def frozen(self, progress: Progress) -> tuple[str, ...]:
        return ("prototypes.",) if progress.epoch < self.cfg.freeze_epochs else ()

    def step(self, nets: Nets, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        """views: V >= 2 [B,3,S,S].  Losses dino and, with a teacher, distill over the first two;
        logged beside them feat/std and distill/cosine."""
        assert nets.ema, "made wherever momentum() is a number"
        # Both may run beside the student's forward, until their output is read.
        teacher = nets.teacher(views[:LARGE]) if nets.teacher else None
        mean = nets.ema(views[:LARGE])
        z, scores = nets.student(views)  # [V,B,d], [V,B,P]
        targets = mean.scores  # [2,B,P]
        assert targets is not None, "DINO's networks have prototypes"
        targets = targets.to(torch.promote_types(targets.dtype, torch.float32))
        probs = torch.softmax((targets - self.centre) / self.temp(progress.epoch), 2)
        terms = {"dino": kernels.swapped(scores, probs, self.cfg.temp), "feat/std": spread(z[0])}
        self.means.append(targets.mean((0, 1)))
        if teacher:
            terms |= distilled(kernels.distill(z[:LARGE], teacher.z), z[:LARGE])
        return terms

    def after_step(self) -> None:
        """The centre follows the mean over all ranks and micro batches.  Equation 4."""
        self.centre.lerp_(dist.all_mean(torch.stack(self.means).mean(0)), 1 - self.cfg.centre)
        self.means.clear()

    def temp(self, epoch: float) -> float:
        """The EMA's temperature: it moves once an epoch, from temp_mean_start to temp_mean."""
        cfg, done = self.cfg, math.floor(epoch)
        if done >= cfg.temp_warmup_epochs:
            return cfg.temp_mean
        # The last epoch of the warm-up has the final temperature.
        steps = max(1, cfg.temp_warmup_epochs - 1)
        return cfg.temp_mean_start + (cfg.temp_mean - cfg.temp_mean_start) * done / steps


METHOD = Dino
