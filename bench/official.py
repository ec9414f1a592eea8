"""The official DisCo recipe as bench/throughput.py times it, written from a description of
Yuting-Gao/DisCo-pytorch at commit 1d732c8.

Kept, for they are what is compared: torchvision transforms on PIL images in a DataLoader; float32
in NCHW; two forwards of the student and two of the teacher, which stays in train mode;
DistributedDataParallel around everything with find_unused_parameters and broadcast buffers; a clone
of the queue each step; all B x (K+1) logits in memory and top-5 accuracy over them; the mean
student moved tensor by tensor; three .item() and one int() of a device tensor a step.  Left out:
the second teacher, which is never called, and logging."""

import contextlib
import random

import torch
import torch.nn.functional as F
import torchvision
from PIL import ImageFilter
from torch import Tensor, nn
from torchvision import transforms as T

from fastdisco import models
from fastdisco.common import dist

TF32 = "convolutions in TF32, matrix products not: torch's defaults, which the official code leaves"


class Builder(nn.Module):
    """Student, mean student, teacher and queue; forward gives logits [B,1+K] and the embeddings of
    student and teacher for both views."""

    def __init__(
        self,
        student: models.Net,
        teacher: models.Net,
        queue: int,
        dim: int,
        momentum: float = 0.999,
        temp: float = 0.2,
    ):
        """The networks are taken as they are; the mean student starts as a copy of the student."""
        super().__init__()
        self.m, self.temp = momentum, temp
        self.encoder_q, self.encoder_k, self.teacher_q = (
            student,
            models.ema_copy(student),
            teacher.requires_grad_(False),
        )
        self.register_buffer("queue", F.normalize(torch.randn(dim, queue), dim=0))
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        qa, qb = (_embed(self.encoder_q, x) for x in (a, b))
        with torch.no_grad():
            for q, k in zip(self.encoder_q.parameters(), self.encoder_k.parameters()):
                k.data = k.data * self.m + q.data * (1 - self.m)
            tb = _embed(self.teacher_q, b)
            shuffled, undo = _shuffle(b)
            k = dist.all_gather(_embed(self.encoder_k, shuffled))[undo]
            ta = _embed(self.teacher_q, a)
        positive = torch.einsum("nc,nc->n", qa, k).unsqueeze(-1)
        negative = torch.einsum("nc,ck->nk", qa, self.queue.clone().detach())
        logits = torch.cat([positive, negative], dim=1) / self.temp
        self._enqueue(k)
        return logits, qa, qb, ta, tb

    @torch.no_grad()
    def _enqueue(self, k: Tensor):
        keys = dist.all_gather(k)
        at = int(self.queue_ptr)
        assert self.queue.shape[1] % len(keys) == 0
        self.queue[:, at : at + len(keys)] = keys.T
        self.queue_ptr[0] = (at + len(keys)) % self.queue.shape[1]


class Official:
    """One training step on views; call it once a step."""

    def __init__(
        self,
        student: models.Net,
        teacher: models.Net,
        queue: int,
        dim: int,
        device: torch.device,
        temp: float = 0.2,
        momentum: float = 0.999,
        lr: float = 0.03,
        eval_teacher: bool = False,
    ):
        """queue: a multiple of the global batch, as the official code asserts.  eval_teacher: not
        as published, but comparable with ours."""
        self.builder = (
            Builder(student, teacher, queue, dim, momentum, temp)
            .to(device, memory_format=torch.contiguous_format)
            .train()
        )
        if eval_teacher:
            self.builder.teacher_q.eval()
        self.net = self.builder
        if dist.world() > 1:
            self.net = nn.parallel.DistributedDataParallel(
                self.builder, find_unused_parameters=True
            )
        self.optimizer = torch.optim.SGD(
            [p for p in self.builder.parameters() if p.requires_grad],
            lr,
            momentum=0.9,
            weight_decay=1e-4,
        )

    def __call__(self, a: Tensor, b: Tensor) -> tuple[float, float, float]:
        """[B,3,S,S] twice -> (cross-entropy, squared error of view A, of view B; both summed over
        the images)."""
        logits, qa, qb, ta, tb = self.net(a, b)
        target = torch.zeros(len(logits), dtype=torch.long, device=logits.device)
        contrast = F.cross_entropy(logits, target)
        error_a, error_b = F.mse_loss(qa, ta, reduction="sum"), F.mse_loss(qb, tb, reduction="sum")
        self.accuracy = _accuracy(logits, target)
        told = contrast.item(), error_a.item(), error_b.item()
        self.optimizer.zero_grad()
        (contrast + error_a + error_b).backward()
        self.optimizer.step()
        return told


def loader(
    root: str, size: int, batch: int, workers: int, steps: int
) -> torch.utils.data.DataLoader:
    """Two views of each image of the class folders, MoCo-v2's augmentation; an epoch has `steps`
    batches of random images."""
    blur = T.RandomApply(
        [T.Lambda(lambda x: x.filter(ImageFilter.GaussianBlur(random.uniform(0.1, 2.0))))], p=0.5
    )
    jitter = T.RandomApply([T.ColorJitter(0.4, 0.4, 0.4, 0.1)], p=0.8)
    view = T.Compose(
        [
            T.RandomResizedCrop(size, scale=(0.2, 1.0)),
            jitter,
            T.RandomGrayscale(p=0.2),
            blur,
            T.RandomHorizontalFlip(),
            T.ToTensor(),
            T.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
        ]
    )
    images = torchvision.datasets.ImageFolder(root, lambda x: [view(x), view(x)])
    order = torch.utils.data.RandomSampler(images, replacement=True, num_samples=steps * batch)
    return torch.utils.data.DataLoader(
        images,
        batch,
        sampler=order,
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        drop_last=True,
        persistent_workers=workers > 0,
    )


@contextlib.contextmanager
def defaults():
    """torch's settings of TF32, as TF32 says, and the official code's cuDNN search, whatever the
    training has set."""
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul
    before = cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32
    cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = True, True, False
    try:
        yield
    finally:
        cudnn.allow_tf32, cudnn.benchmark, matmul.allow_tf32 = before


def _embed(net: models.Net, x: Tensor) -> Tensor:
    return F.normalize(net.head(net.features(x)), dim=1)


def _shuffle(x: Tensor) -> tuple[Tensor, Tensor]:
    """This rank's share of the permuted global batch, and where its own rows are in the gathered
    outputs."""
    whole = dist.all_gather(x)
    order = torch.randperm(len(whole), device=x.device)
    if dist.world() > 1:
        torch.distributed.broadcast(order, src=0)
    mine = slice(dist.rank() * len(x), (dist.rank() + 1) * len(x))
    return whole[order[mine]], torch.argsort(order)[mine]


def _accuracy(logits: Tensor, target: Tensor) -> list[Tensor]:
    """Top-1 and top-5, in per cent."""
    with torch.no_grad():
        hit = logits.topk(min(5, logits.shape[1]), 1)[1].T.eq(target[None])
        return [hit[:k].reshape(-1).float().sum() * (100 / len(target)) for k in (1, 5)]
