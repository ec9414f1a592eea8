"""The training loop: `deepspeed fastdisco/train.py --config configs/mobv3.yaml`."""
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # started as a script: sys.path holds this folder instead of the root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import copy
import math
from typing import Any, NamedTuple

import torch

from fastdisco import checkpoint, config, data, dist, engine, methods, models, optim, runs, teacher
from fastdisco.config import Config, UserError
from fastdisco.evals import knn
from fastdisco.log import Log, Meter, named, say
from fastdisco.methods import Method, Nets, Progress


def train(cfg: Config, overwrite: bool = False):
    """One run, from its last checkpoint if it has one to its last step."""
    device = engine.start(cfg.engine.precision)
    micro = config.micro_batch(cfg, dist.world())
    listing = data.listing(cfg.data.train, cfg.data.quarantine)
    if val := cfg.data.val and data.listing(cfg.data.val, cfg.data.quarantine):
        knn.check(listing, val)
    shuffle = cfg.bn.shuffle if dist.world() * cfg.bn.groups > 1 else "off"

    teacher_net = cfg.teacher and teacher.load(cfg.teacher.file, cfg.teacher.arch, cfg.teacher.kwargs, cfg.student.dim, device, cfg.teacher.student)
    pupils = [_pupil(name, own, micro, shuffle, device) for name, own in config.students(cfg).items()]
    loader = data.TrainLoader(listing, pupils[0].method.views, micro, cfg.run.seed, cfg.run.epochs, cfg.data.accumulate, cfg.data.threads, device,
                              permuted=pupils[0].method.permuted)
    torch.manual_seed(dist.mix(cfg.run.seed, dist.rank()))  # what a network draws in training differs by rank

    folder = runs.claim(cfg, overwrite)
    state = {k: item for p in pupils for k, item in checkpoint.items(p.student, p.ema, p.method, loader, p.name).items()}
    meta = {"data": listing.fingerprint, "teacher": teacher_net.fingerprint if teacher_net else "none"}
    start = checkpoint.restore(folder, state, meta)
    runs.describe(cfg, folder)
    steps = min(cfg.run.max_steps or math.inf, loader.steps_per_epoch * cfg.run.epochs)
    _announce(cfg, listing, pupils, micro, steps, start, folder)

    targets = teacher_net and _frozen(teacher_net, cfg, device)
    meter, stop = Meter(cfg.data.batch, folder, start), runs.Stop()
    with Log(folder, start, steps) as log:
        for step in range(start, steps):
            factor = optim.lr_factor(cfg.optim, step / loader.steps_per_epoch, cfg.run.epochs)
            for p in pupils:
                optim.set_lr(p.optimizer, p.lr * factor)
            for _ in range(cfg.data.accumulate):
                progress = Progress(loader.position, step / steps)
                with meter.waiting():
                    batch = next(loader)
                scalars, shared = {}, targets and _once(targets)
                for p in pupils:
                    terms = p.method.step(Nets(p.student, p.mean, shared), batch.views, progress)
                    loss = sum(weight * terms[name] for name, weight in p.method.weights.items() if name in terms)
                    p.student.backward(loss)
                    p.student.step()
                    scalars |= named({"loss": loss, **terms}, p.method.weights, p.name)
                meter.add(scalars)
            for p in pupils:
                with engine.gathered(p.student):
                    models.ema_update(p.ema, p.net, p.method.momentum(progress))  # arXiv:1911.05722, equation 2, for the next step's keys
                p.method.after_step()

            done, last = step + 1, step + 1 == steps
            save = last or done % cfg.checkpoint.every == 0
            if save or done % cfg.log.every == 0:
                rates = {k: v for p in pupils for k, v in named({"lr": p.lr * factor}, student=p.name).items()}
                log.write(done, meter.read(done, steps) | rates | {"train/epoch": done / loader.steps_per_epoch})
                save |= (asked := dist.any_rank(stop.asked))
            if val and (last or cfg.eval.every and done % cfg.eval.every == 0):
                with meter.paused():
                    log.write(done, {k: v for p in pupils for k, v in evaluate(p, listing, val, cfg, device).items()})
            if save:
                with meter.paused():
                    checkpoint.save(folder, done, state, meta, cfg.checkpoint.keep)
                if asked and not last:
                    say(f"stopped as asked after step {done}; the same command continues from there")
                    break
        else:
            say(f"done: {steps} steps, outputs in {folder}")
    engine.stop()


class Pupil(NamedTuple):
    """A student in training, with what belongs to it alone."""

    name: str  # '' where there is one
    net: models.Net
    student: Any  # the engine around it
    ema: models.Net
    mean: Any  # the mean student as a callable
    method: Method
    optimizer: torch.optim.Optimizer
    lr: float  # before the schedule


def evaluate(p: Pupil, listing: data.Listing, val: data.Listing, cfg: Config, device: torch.device) -> dict[str, float]:
    """kNN of the student's features, with the weights and batch-norm statistics that a checkpoint holds: the mean over ranks."""
    net = copy.deepcopy(p.ema)
    net.load_state_dict(engine.weights(p.student) | models.mean_buffers(p.net))
    encode = engine.autocast(cfg.engine.precision, device)(net.eval().features)
    scores = knn.score(encode, listing, val, cfg.data, cfg.view, cfg.eval, cfg.run.seed, device)
    return named({f"eval/{k}": v for k, v in scores.items()}, student=p.name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train.py", description="Trains a student with DisCo, or resumes the run of the same command.")
    parser.add_argument("--config", required=True, help="a YAML file, see configs/")
    parser.add_argument("--overwrite", action="store_true", help="start over, deleting the run's folder")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it; LOCAL_RANK says the same
    parser.add_argument("overrides", nargs="*", metavar="block.key=value", help="for example optim.lr=0.06")
    args = parser.parse_intermixed_args(argv)
    dist.defaults()
    try:
        train(config.load(args.config, args.overrides), args.overwrite)
    except UserError as e:
        if dist.rank() == 0 or getattr(e, "anywhere", False):  # most are found by every rank alike
            print(f"fastdisco: error: {e}", file=sys.stderr, flush=True)
        return 2
    return 0


def _pupil(name: str, cfg: Config, micro: int, shuffle: str, device: torch.device) -> Pupil:
    """A student from the configuration that it would have alone, its weights the same on every rank."""
    torch.manual_seed(cfg.run.seed)
    method = methods.create(cfg.method.name, cfg=cfg.method, dim=cfg.student.dim, hidden=cfg.student.hidden, crop=cfg.view, seed=cfg.run.seed,
                            shuffle=shuffle).to(device)
    net = models.create(cfg.student.arch, method.head, cfg.student.kwargs, cfg.bn.groups).to(device)
    ema = models.ema_copy(net)  # before the engine hooks into the net's forward
    lr = optim.base_lr(cfg.optim, cfg.data.batch)
    optimizer = optim.create(net, cfg.optim, lr, cfg.engine.stage)
    student = engine.create(net, optimizer, cfg.engine, micro, cfg.data.accumulate, cfg.optim.clip)
    if cfg.engine.stage == 0:
        ema.to(memory_format=torch.channels_last)  # as the engine has the net
    return Pupil(name, net, student, ema, _frozen(ema, cfg, device), method, optimizer, lr)


def _once(teacher):
    """The teacher for one batch: what several students ask is computed once."""
    known = {}

    def call(views):
        key = tuple(map(id, views))
        if key not in known:
            known[key] = teacher(views)
        return known[key]
    return call


def _frozen(net, cfg: Config, device: torch.device):
    """The network as a callable without gradient, in the precision of the forward passes."""
    def call(views):
        with torch.no_grad(), engine.autocast(cfg.engine.precision, device):
            return net(views)
    return call


def _announce(cfg: Config, listing, pupils: list[Pupil], micro: int, steps: int, start: int, folder: Path):
    for p, own in zip(pupils, config.students(cfg).values()):
        weights = sum(w.numel() for w in p.ema.parameters()) / 1e6
        say(f"{folder}: {p.name and f'{p.name}: '}{own.student.arch} ({weights:.1f} M weights with its head), "
            f"{f'teacher {cfg.teacher.file}' if cfg.teacher else 'no teacher'}")
    say(f"{len(listing.files)} images of {len(listing.classes)} classes, batch {cfg.data.batch} = {dist.world()} ranks x {micro} images x "
        f"{cfg.data.accumulate} accumulated, {steps} steps, {cfg.engine.precision}, ZeRO stage {cfg.engine.stage}")
    if left := len(listing.left_out):
        say(f"{left} of them {'is' if left == 1 else 'are'} left out by the quarantine (data.quarantine: {cfg.data.quarantine})")
    if dist.world() * cfg.bn.groups == 1:
        say("one rank and bn.groups 1: MoCo can leak through the batch statistics; set bn.groups (the paper's: 32 images a group)")
    if cfg.optim.lr_scale != "none":
        rates = ", ".join(f"{p.name and f'{p.name}: '}lr {p.lr:.4g} for optim.lr {own.optim.lr:.4g} at batch 256"
                          for p, own in zip(pupils, config.students(cfg).values()))
        say(f"optim.lr_scale: {cfg.optim.lr_scale}, {rates}")
    if start:
        say(f"continuing after step {start}")


if __name__ == "__main__":
    sys.exit(main())
