"""How large the things of a run are that a machine must hold or send, found without starting it."""

from typing import NamedTuple

import torch

from fastdisco import config, methods, models
from fastdisco.config import Config
from fastdisco.engine import optim
from fastdisco.methods import Progress
from fastdisco.run import plan
from fastdisco.teacher.cache import BLOCK
from fastdisco.teacher.cache_files import Files


class Sizes(NamedTuple):
    """Bytes."""

    # Gradients that all ranks average in a step, of all students, in float32.
    gradients: int
    # Keys or queries of one rank that all ranks gather in a step, in float32.
    keys: int
    # Weights, gradients and states on each rank, without the teacher and without what forwards
    # save for their backwards.
    held: float
    # A checkpoint, all ranks' files together.
    checkpoint: int


def sizes(cfg: Config, world: int) -> Sizes:
    """The sizes for `world` ranks.

    Raises UserError for what the run would refuse: a batch that does not divide, an optimizer or a
    network that cannot be made."""
    micro = config.micro_batch(cfg, world)
    lr = optim.base_lr(cfg.optim, cfg.data.batch)
    found = [_student(own, lr, micro, world) for own in config.students(cfg).values()]
    return Sizes(*(sum(column) for column in zip(*found)))


def cache_bytes(cfg: Config, images: int) -> int:
    """Bytes of the recorded embeddings of that many images; 0 where none are to be recorded."""
    teacher = cfg.teacher
    if teacher is None or teacher.cache != "record":
        return 0
    views = config.crops(cfg)[: methods.kind(cfg.method.name).teacher_views]
    slots = -(-images // BLOCK) * BLOCK
    files = Files(teacher.cache_folder, slots, (len(views), cfg.student.dim))
    return sum(files.sizes(teacher.cache_rounds).values())


def _student(cfg: Config, lr: float, micro: int, world: int) -> Sizes:
    method = plan.method_of(cfg)
    with torch.device("meta"):
        net = models.of(cfg, train=True)
    weights = sum(plan.bytes_of(p) for p in net.parameters())
    trained = sum(plan.bytes_of(p) for p in net.parameters() if p.requires_grad)
    buffers = sum(plan.bytes_of(b) for b in net.buffers())
    saved = sum(map(plan.bytes_of, net.state_dict().values()))
    state = plan.optimizer_bytes(cfg, net, lr, micro)
    copies = 1 if method.momentum(Progress(0, 0.0)) is None else 2
    stage = cfg.engine.stage
    # ZeRO parts the optimizer's state, then gradients, then weights.
    part = lambda size, at: size / (world if stage >= at else 1)
    held = part(weights, 3) + part(trained, 2) + part(state, 1) + (copies - 1) * weights
    kept = sum(plan.bytes_of(x) for x in method.state_dict().values())
    # Each rank's file has its own statistics of the batch norms.
    checkpoint = copies * saved + state + kept + world * copies * buffers
    return Sizes(trained, 4 * micro * cfg.student.dim, held, checkpoint)
