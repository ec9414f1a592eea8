"""Our side of bench/throughput.py: a training as train.py makes it, whose step can be taken
apart."""

import torch
from torch import Tensor

from fastdisco import config, data, engine, models, teacher
from fastdisco.engine import optim
from fastdisco.methods import Nets, Progress
from fastdisco.models import Out
from fastdisco.run import students


class Ours:
    """A training as train.py makes it.

    loader            its images
    live              the teacher, run at each step
    twin              the student without the engine, with an optimizer of its own
    student, ema ...  as in train.py's loop"""

    def __init__(self, cfg: config.Config, listing: data.Listing, micro: int, device: torch.device):
        self.cfg, self.device, self.done = cfg, device, 0
        torch.backends.cudnn.allow_tf32 = cfg.engine.tf32
        torch.backends.cudnn.benchmark = cfg.perf.cudnn_benchmark
        student = students.create("", cfg, micro, device)
        self.loader = students.loader(cfg, listing, micro, device, student.method.permuted)
        precision = cfg.engine.precision
        self.live = teacher.create(
            cfg.teacher, cfg.student.dim, precision, self.loader, cfg.perf.graphs
        )
        torch.manual_seed(cfg.run.seed)
        self.twin = models.of(cfg, train=True).to(device, memory_format=torch.channels_last)
        self.twin_optimizer = optim.create(self.twin, cfg.optim, student.lr)
        (student,) = students.prepare([student], self.live, self.loader)
        self.net, self.ema, self.student = student.net, student.ema, student.engine
        self.method, self.nets = student.method, student.nets(self.live)

    def plain(self, views: list[Tensor]) -> Out:
        """The student's forward without the engine."""
        with engine.autocast(self.cfg.engine.precision, self.device):
            return self.twin(views)

    def step(self, views: list[Tensor], recorded: teacher.CachedTeacher | None = None) -> Tensor:
        """One iteration of train.py's loop, with the teacher or with its recorded embeddings."""
        loss = self.loss(self.nets._replace(teacher=recorded) if recorded else self.nets, views)
        self.student.backward(loss)
        self.student.step()
        with engine.gathered(self.student):
            models.ema_update(self.ema, self.net, self.method.momentum(self.progress))
        self.method.after_step()
        self.done += 1
        return loss

    def compute(self, views: list[Tensor]) -> Tensor:
        """The same iteration without the engine and its exchange of gradients."""
        loss = self.loss(self.nets._replace(student=self.plain), views)
        self.twin_optimizer.zero_grad()
        loss.backward()
        self.twin_optimizer.step()
        models.ema_update(self.ema, self.twin, self.method.momentum(self.progress))
        self.method.after_step()
        return loss

    def loss(self, nets: Nets, views: list[Tensor]) -> Tensor:
        return self.method.loss(self.method.step(nets, views, self.progress))

    @property
    def progress(self) -> Progress:
        return Progress(self.done, 0.5, 0.5 * self.cfg.run.epochs, self.done)
