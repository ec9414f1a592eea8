"""SwAV (arXiv:2006.09882), and with a teacher DisCo (arXiv:2104.09124, appendix): every crop
predicts the codes of the two large ones."""

import torch
from torch import Tensor, nn

from fastdisco import config, kernels
from fastdisco.common import dist
from fastdisco.methods import Method, Nets, Progress, distilled, spread
from fastdisco.models.queue import Queue

CODED = 2  # the first views, which are the large ones


class Swav(Method):
    def __init__(self, cfg: config.Swav, dim: int, seed: int, shuffle: str):
        super().__init__()
        self.cfg = cfg
        self.weights = {"swav": 1.0, "distill": cfg.distill}
        self.queues = nn.ModuleList(
            Queue(cfg.queue, dim, dist.mix(seed, v)) for v in range(CODED if cfg.queue else 0)
        )
        self.filled = 0  # rows of each queue that hold embeddings
        self.rows = []  # of this optimizer step's micro batches

    def frozen(self, progress: Progress) -> tuple[str, ...]:
        return ("prototypes.",) if progress.step < self.cfg.freeze_steps else ()

    def step(self, nets: Nets, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        """views: V >= 2 [B,3,S,S].  Terms swav and, with a teacher, distill over all views; logged
        beside them feat/std and distill/cosine."""
        cfg = self.cfg
        teacher = nets.teacher(views) if nets.teacher else None
        z, scores = nets.student(views)  # [V,B,d], [V,B,P]
        coded = scores[:CODED].detach()
        if cfg.queue and self.filled == cfg.queue:
            share = cfg.queue // dist.world()  # each rank scores its own
            # [2,K/ranks,d]
            rows = torch.stack([q.rows[dist.rank() * share :][:share] for q in self.queues])
            coded = torch.cat([nets.prototypes(rows), coded], 1)
        codes = sinkhorn(coded, cfg.epsilon, cfg.iterations)[:, -z.shape[1] :]  # [2,B,P]
        terms = {"swav": kernels.swapped(scores, codes, cfg.temp), "feat/std": spread(z[0])}
        if cfg.queue and progress.epoch >= cfg.queue_epoch:
            self.rows.append(dist.all_gather(z[:CODED].detach().transpose(0, 1)))  # [B*ranks,2,d]
        if teacher:
            terms |= distilled(kernels.distill(z, teacher.z), z)
        return terms

    def after_step(self):
        """All micro batches of a step saw the same queues; the next step sees their embeddings."""
        if self.rows:
            rows = torch.cat(self.rows)
            for v, queue in enumerate(self.queues):
                queue.enqueue(rows[:, v])
            self.filled = min(self.filled + len(rows), self.cfg.queue)
            self.rows.clear()

    def get_extra_state(self) -> int:
        return self.filled

    def set_extra_state(self, filled: int):
        self.filled = filled


METHOD = Swav


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Codes [...,n,P]: exp(scores / epsilon) scaled so that over the n of all ranks each prototype
    has the same share, and each row then sums to 1.

    scores  [...,n,P] of this rank, each entry of the leading dimensions a problem of its own;
    float32 inside, float64 if they are One problem whatever the number of ranks, each of which gets
    its own rows.  The potentials are kept as logarithms, so that no epsilon
    overflows.  SwAV, arXiv:2006.09882, equation 4 and section 3.1; Cuturi, arXiv:1306.0895."""
    x = scores.to(torch.promote_types(scores.dtype, torch.float32)) / epsilon
    row = x.new_zeros(*x.shape[:-1], 1)
    for _ in range(iterations):
        column = torch.logsumexp(x - row, -2, keepdim=True)  # [...,1,P] of this rank
        column = dist.all_gather(column[None]).logsumexp(0)
        row = torch.logsumexp(x - column, -1, keepdim=True)
    return torch.exp(x - column - row)
