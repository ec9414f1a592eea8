"""MoCo-v2 (arXiv:2003.04297), and with a teacher DisCo (arXiv:2104.09124): the student on MoCo's task and towards the teacher's embedding."""
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdisco import config, dist, heads, kernels
from fastdisco.memory import Queue
from fastdisco.methods import Method, Nets, Progress
from fastdisco.views import Crop

QUEUE_DTYPE = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Moco(Method):
    def __init__(self, cfg: config.Moco, dim: int, hidden: int, crop: Crop, seed: int, shuffle: bool):
        """dim: width of the embedding; hidden: of the head's hidden layer, 0 for none; shuffle: permute the keys' batch over ranks and groups."""
        super().__init__()
        self.cfg, self.dim, self.hidden, self.seed, self.shuffle = cfg, dim, hidden, seed, shuffle
        self.views = (crop, crop)
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
        t = nets.teacher(views) if nets.teacher else None  # may run beside the student's forward, until t.z is read
        z = nets.student(views if nets.teacher else views[:1]).z  # [V,B,d]: without a teacher nothing is asked of the student on view B
        q = z[0]
        keys = self._encode(nets.ema, views[1], progress)  # [B*ranks,d]
        k = keys[dist.rank() * len(q):][:len(q)]  # the positives of this rank's queries
        contrast, distill = kernels.moco(z, k, self.queue.rows, self.cfg.temp, t and t.z)  # t.z [2,B,d]
        terms = {"contrast": contrast, "feat/std": _spread(q)}
        if nets.teacher:
            terms |= {"distill": distill, "distill/cosine": 1 - distill.detach() / (2 * len(z))}  # |s-t|^2 = 2 - 2 cos, summed over V
        self.keys.append(keys)
        return terms

    def after_step(self):
        """All micro batches of a step saw the same queue; the next step sees their keys."""
        self.queue.enqueue(torch.cat(self.keys))
        self.keys.clear()

    @torch.no_grad()
    def _encode(self, ema, view: Tensor, progress: Progress) -> Tensor:
        """[B,3,S,S] -> [B*ranks,d]: the keys of the whole global batch, raw, in its order on every rank."""
        # MoCo moves the mean student right here, towards the weights that the student has before this step's update.  The loop moves it
        # after the optimizer's step instead: the same sequence, for the first mean student is a copy, which no move would change.
        if not self.shuffle:
            return dist.all_gather(ema([view]).z[0])
        order = dist.Shuffle(len(view), dist.mix(self.seed, progress.step))
        return order.join(ema([order.split(view)]).z[0])


METHOD = Moco


@torch.no_grad()
def _spread(q: Tensor) -> Tensor:
    """Standard deviation over the batch of the unit rows, mean over d, times sqrt(d): 1 when they fill the sphere, 0 when collapsed."""
    return F.normalize(q.float(), dim=1).std(0, correction=0).mean() * q.shape[1] ** 0.5
