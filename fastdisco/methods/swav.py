"""SwAV (arXiv:2006.09882), and with a teacher DisCo (arXiv:2104.09124, appendix): every crop
predicts the codes of the two large ones."""

from typing import cast

import torch
from torch import Tensor, nn

from fastdisco import config, kernels
from fastdisco.common import dist
from fastdisco.methods import Method, Nets, Progress, distilled, spread
from fastdisco.models.queue import Queue

# The first views are the large crops, which get codes.
CODED = 2


class Swav(Method):
    def __init__(self, cfg: config.Swav, dim: int, seed: int, shuffle: str) -> None:
        super().__init__()
        self.cfg = cfg
        self.weights = {"swav": 1.0, "distill": cfg.distill}
        views = CODED if cfg.queue else 0
        queues = (Queue(cfg.queue, dim, dist.mix(seed, v)) for v in range(views))
        # To a type checker the items of a ModuleList are any modules.
        self.queues = cast(list[Queue], nn.ModuleList(queues))
        # Rows of each queue that hold embeddings.
        self.filled = 0
        # Embeddings [B*ranks,2,d] of this optimizer step's micro batches.
        self.rows: list[Tensor] = []

    def frozen(self, progress: Progress) -> tuple[str, ...]:
        return ("prototypes.",) if progress.step < self.cfg.freeze_steps else ()

    def step(self, nets: Nets, views: list[Tensor], progress: Progress) -> dict[str, Tensor]:
        """views: V >= 2 [B,3,S,S].  Losses swav and, with a teacher, distill over all views; logged
        beside them feat/std and distill/cosine."""
        cfg = self.cfg
        teacher = nets.teacher(views) if nets.teacher else None
        z, scores = nets.student(views)  # [V,B,d], [V,B,P]
        assert scores is not None and nets.prototypes, "SwAV's networks have prototypes"
        coded = scores[:CODED].detach()
        if cfg.queue and self.filled == cfg.queue:
            coded = torch.cat([nets.prototypes(self._share()), coded], 1)
        # The batch's own codes are the last rows: what the queues add is thrown away.
        codes = sinkhorn(coded, cfg.epsilon, cfg.iterations)[:, -z.shape[1] :]  # [2,B,P]
        terms = {"swav": kernels.swapped(scores, codes, cfg.temp), "feat/std": spread(z[0])}
        if cfg.queue and progress.epoch >= cfg.queue_epoch:
            self.rows.append(dist.all_gather(z[:CODED].detach().transpose(0, 1)))
        if teacher:
            terms |= self._distilled(z, teacher.z)
        return terms

    def after_step(self) -> None:
        """All micro batches of a step see the same queues; the next step sees their embeddings."""
        if self.rows:
            rows = torch.cat(self.rows)
            for v, queue in enumerate(self.queues):
                queue.enqueue(rows[:, v])
            self.filled = min(self.filled + len(rows), self.cfg.queue)
            self.rows.clear()

    def _distilled(self, z: Tensor, t: Tensor) -> dict[str, Tensor]:
        """z, t: [V,B,d] of student and teacher."""
        if self.cfg.target == "normalised":
            return distilled(kernels.distill(z, t), z)
        cosine = torch.cosine_similarity(z.detach().float(), t.float(), dim=-1).mean()
        return {"distill": kernels.distill(z, t, raw_targets=True), "distill/cosine": cosine}

    def _share(self) -> Tensor:
        """[2,K/ranks,d]: the part of both queues that this rank scores."""
        share = self.cfg.queue // dist.world()
        return torch.stack([q.rows[dist.rank() * share :][:share] for q in self.queues])

    # `filled` is no tensor; torch keeps it in the state dict by these two.
    def get_extra_state(self) -> int:
        return self.filled

    def set_extra_state(self, state: int) -> None:
        self.filled = state


METHOD = Swav


@torch.no_grad()
def sinkhorn(scores: Tensor, epsilon: float, iterations: int) -> Tensor:
    """Codes [...,n,P]: exp(scores / epsilon), scaled so that over the n of all ranks each prototype
    has the same share, and each row then sums to 1.

    scores  [...,n,P] of this rank, where each entry of the leading dimensions is a problem of its
            own; computed in float32, or in float64 if they are
    All ranks together solve one problem, whatever their number, and each gets its own rows.  The
    potentials are kept as logarithms, so that no epsilon overflows.
    SwAV, arXiv:2006.09882, equation 4 and section 3.1; Cuturi, arXiv:1306.0895."""
    assert iterations > 0, iterations
    x = scores.to(torch.promote_types(scores.dtype, torch.float32)) / epsilon
    row = x.new_zeros(*x.shape[:-1], 1)
    column = x.new_zeros(())
    for _ in range(iterations):
        column = torch.logsumexp(x - row, -2, keepdim=True)  # [...,1,P] of this rank
        column = dist.all_gather(column[None]).logsumexp(0)
        row = torch.logsumexp(x - column, -1, keepdim=True)
    return torch.exp(x - column - row)
