"""MoCo-v2 (arXiv:1911.05722, 2003.04297), alone or with DisCo's distillation (arXiv:2104.09124)."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdisco import config, dist, kernels
from fastdisco.memory import Queue
from fastdisco.methods import Method, Nets, Progress
from fastdisco.models import mlp
from fastdisco.views import Crop


class Moco(Method):
    """Queries from view A, keys from view B by the mean student, negatives from the queue; distillation on both views if there is a teacher."""

    def __init__(self, cfg: config.Moco, dim: int, hidden: int, crop: Crop, seed: int, shuffle: bool):
        """dim, hidden: widths of the head; shuffle: whether the key batch is permuted, which costs a gather of images and does nothing where
        all statistics are of the whole batch."""
        super().__init__()
        self.views = (crop, crop)
        self.weights = {"contrast": cfg.contrast, "distill": cfg.distill}
        self.queue = Queue(cfg.queue, dim, seed)
        self.temp, self.m = cfg.temp, cfg.momentum
        self.dim, self.hidden, self.seed, self.shuffle = dim, hidden, seed, shuffle
        self.keys: list[Tensor] = []  # of this optimizer step's micro batches so far

    def head(self, dim: int) -> nn.Module:
        return mlp(dim, self.hidden, self.dim)

    def momentum(self, progress: Progress) -> float:
        return self.m

    def step(self, nets: Nets, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        z = nets.student(views).z  # [2,B,d]
        keys = self._keys(nets, views[1], progress)  # [B*ranks,d]
        own = keys[dist.rank() * len(views[1]):][:len(views[1])]  # [B,d]
        terms = {"contrast": kernels.info_nce(z[0], own, self.queue.rows, self.temp), "feat/std": _spread(z[0])}
        if nets.teacher:
            # mean over images where the official code sums over a rank's 32: the published weight is 32 at any number of ranks
            terms["distill"] = kernels.distill(z, nets.teacher(views).z)
            terms["distill/cosine"] = 1 - terms["distill"].detach() / (2 * len(views))  # ||s-t||^2 = 2 - 2 cos
        self.keys.append(keys)
        return terms

    def after_step(self):
        self.queue.enqueue(torch.cat(self.keys))
        self.keys = []

    @torch.no_grad()
    def _keys(self, nets: Nets, view: Tensor, progress: Progress) -> Tensor:
        """The mean student's outputs for view B of the global batch [B*ranks,d], the same on every rank."""
        if not self.shuffle:
            return dist.all_gather(nets.ema([view]).z[0])
        shuffle = dist.Shuffle(len(view), dist.mix(self.seed, progress.step))
        return shuffle.join(nets.ema([shuffle.split(view)]).z[0])


def _spread(z: Tensor) -> Tensor:
    """Standard deviation of unit rows over the batch, times sqrt(d): 1 when they fill the sphere, 0 when they collapse."""
    z = F.normalize(z.detach().float(), dim=1)
    return z.std(0, correction=0).mean() * z.shape[1] ** 0.5


METHOD = Moco
