"""MoCo-v2 (arXiv:2003.04297), and with a teacher DisCo (arXiv:2104.09124): the student on MoCo's task and towards the teacher's embedding."""
from typing import Callable, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdisco import config, dist, heads, kernels
from fastdisco.memory import Queue
from fastdisco.methods import Method, Nets, Progress
from fastdisco.views import Crop

QUEUE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Moco(Method):
    def __init__(self, cfg: config.Moco, dim: int, hidden: int, crop: Crop, seed: int, shuffle: str):
        """dim: width of the embedding; hidden: of the head's hidden layer, 0 for none; shuffle: as bn.shuffle says, see `encode`."""
        super().__init__()
        self.cfg, self.dim, self.hidden, self.seed, self.shuffle = cfg, dim, hidden, seed, shuffle
        self.views, self.permuted = (crop, crop), shuffle == "load"
        self.weights = {"contrast": cfg.contrast, "distill": cfg.distill}
        auto = "bf16" if dist.device().type == "cuda" else "fp32"
        self.queue = Queue(cfg.queue, dim, seed, QUEUE_DTYPE[auto if cfg.queue_dtype == "auto" else cfg.queue_dtype])
        self.keys = []  # of this optimizer step's micro batches; empty between steps, so no part of the resume state

    def head(self, dim: int) -> nn.Module:
        return heads.mlp(dim, self.hidden, self.dim)

    def momentum(self, progress: Progress) -> float:
        return self.cfg.momentum

    def step(self, nets: Nets, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        """views: two [B,3,S,S].  Terms contrast and, with a teacher, distill; logged beside them feat/std and distill/cosine."""
        keys = encode(nets.ema, views[1], self.shuffle, dist.mix(self.seed, progress.step))  # first: they travel while the others compute
        z = nets.student(views if nets.teacher else views[:1]).z  # [V,B,d]: without a teacher nothing is asked of the student on view B
        q = z[0]
        t = nets.teacher(views).z if nets.teacher else None  # [2,B,d]
        contrast, distill = kernels.moco(z, keys.own(), self.queue.rows, self.cfg.temp, t)
        terms = {"contrast": contrast, "feat/std": _spread(q)}
        if nets.teacher:
            terms |= {"distill": distill, "distill/cosine": 1 - distill.detach() / (2 * len(z))}  # |s-t|^2 = 2 - 2 cos, summed over V
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
    every: Callable[[], Tensor]  # [B*ranks,d]: of the whole global batch, in its order on every rank


@torch.no_grad()
def encode(ema, view: Tensor, shuffle: str, seed: int) -> Keys:
    """The keys of the global batch of view B, encoded in its own order (shuffle off) or in that of the seed.

    view  [B,3,S,S] of this rank's images, which gather sends around; with load, the loader has handed out the permuted batch's share"""
    # MoCo moves the mean student right here, towards the weights that the student has before this step's update.  The loop moves it
    # after the optimizer's step instead: the same sequence, for the first mean student is a copy, which no move would change.
    if shuffle == "off":
        own = ema([view]).z[0]
        return Keys(lambda: own, dist.all_gather_async(own))
    order = dist.Shuffle(len(view), seed)
    every = order.join(ema([order.split(view) if shuffle == "gather" else view]).z[0])
    return Keys(lambda: every()[dist.rank() * len(view):][:len(view)], every)


@torch.no_grad()
def _spread(q: Tensor) -> Tensor:
    """Standard deviation over the batch of the unit rows, mean over d, times sqrt(d): 1 when they fill the sphere, 0 when collapsed."""
    return F.normalize(q.float(), dim=1).std(0, correction=0).mean() * q.shape[1] ** 0.5
