"""The training loop: `deepspeed fastdisco/train.py --config configs/mobv3.yaml`, or `fastdisco
train`."""

import sys
from pathlib import Path

# As a script this file only starts the command, which reads arguments and configuration, and then
# imports it.
if __name__ == "__main__":
    # Else sys.path holds this folder instead of the root.
    if not __package__:
        sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from fastdisco.commands.train import main

    sys.exit(main())

import math

import torch

from fastdisco import config, data, engine, models, teacher
from fastdisco.common import dist
from fastdisco.common.console import say
from fastdisco.config import Config
from fastdisco.engine import optim
from fastdisco.evals import knn
from fastdisco.methods import Progress
from fastdisco.run import checkpoint, students
from fastdisco.run.folder import claim, describe
from fastdisco.run.log import Log, Meter, named
from fastdisco.run.signals import Stop
from fastdisco.run.students import TrainState


def train(cfg: Config, overwrite: bool = False):
    """One run, from its last checkpoint if it has one to its last step."""
    device = engine.start(cfg.engine)
    torch.backends.cudnn.benchmark = cfg.perf.cudnn_benchmark
    micro = config.micro_batch(cfg, dist.world())
    listing = data.listing(cfg.data.train, cfg.data.quarantine)
    if val := cfg.data.val and data.listing(cfg.data.val, cfg.data.quarantine):
        data.same_classes(listing, val)

    states = [
        students.create(name, own, micro, device) for name, own in config.students(cfg).items()
    ]
    loader = students.loader(cfg, listing, micro, device, states[0].method.permuted)
    targets = cfg.teacher and teacher.create(
        cfg.teacher,
        cfg.student.dim,
        cfg.engine.precision,
        loader,
        cfg.perf.graphs,
        states[0].method.teacher_views,
    )
    recorded = isinstance(targets, teacher.CachedTeacher)
    # What a network draws in training differs by rank.
    torch.manual_seed(dist.mix(cfg.run.seed, dist.rank()))

    folder = claim(cfg, overwrite)
    state = {
        k: item
        for p in states
        for k, item in checkpoint.items(p.engine, p.ema, p.method, loader, p.name).items()
    }
    meta = {"data": listing.fingerprint, "teacher": targets.fingerprint if targets else "none"}
    start = checkpoint.restore(folder, state, meta)
    describe(cfg, folder)
    if recorded:
        targets.complete()
    steps = min(cfg.run.max_steps or math.inf, loader.steps_per_epoch * cfg.run.epochs)
    _announce(cfg, listing, states, micro, steps, start, folder)

    if start < steps:
        states = students.prepare(states, targets, loader)
    meter, stop = Meter(cfg.data.batch, folder, start), Stop()
    with Log(folder, start, steps) as log:
        for step in range(start, steps):
            epoch = step / loader.steps_per_epoch
            rates = {p.name: optim.rate(cfg.optim, p.lr, epoch, cfg.run.epochs) for p in states}
            for p in states:
                optim.move(
                    p.optimizer, rates[p.name], optim.decay(cfg.optim, epoch, cfg.run.epochs)
                )
            for _ in range(cfg.data.accumulate):
                progress = Progress(loader.position, epoch / cfg.run.epochs, epoch, step)
                with meter.waiting():
                    batch = next(loader)
                if recorded:
                    targets.at(batch.index, batch.epoch)
                scalars, shared = {}, targets and students.once(targets)
                for p in states:
                    terms = p.method.step(p.nets(shared), batch.views, progress)
                    loss = p.method.loss(terms)
                    p.engine.backward(loss)
                    optim.freeze(p.net, p.method.frozen(progress))
                    p.engine.step()
                    scalars |= named({"loss": loss, **terms}, p.method.weights, p.name)
                meter.add(scalars)
            for p in states:
                if p.ema:
                    with engine.gathered(p.engine):
                        # arXiv:1911.05722, equation 2, for the next step's keys.
                        models.ema_update(p.ema, p.net, p.method.momentum(progress))
                p.method.after_step()

            done, asked = step + 1, False
            last = done == steps
            save = last or done % cfg.checkpoint.every == 0
            if save or done % cfg.log.every == 0:
                values = meter.read(done, steps) | {
                    k: v
                    for name, r in rates.items()
                    for k, v in named({"lr": r}, student=name).items()
                }
                log.write(done, values | {"train/epoch": done / loader.steps_per_epoch})
                asked = dist.any_rank(stop.asked)
                save = save or asked
            if val and (last or (cfg.eval.every and done % cfg.eval.every == 0)):
                with meter.paused():
                    log.write(
                        done,
                        {
                            k: v
                            for p in states
                            for k, v in evaluate(p, listing, val, device).items()
                        },
                    )
            if save:
                with meter.paused():
                    checkpoint.save(folder, done, state, meta, cfg.checkpoint.keep)
                if asked and not last:
                    say(
                        f"stopped as asked after step {done}; the same command continues from there"
                    )
                    break
        else:
            say(f"done: {steps} steps, outputs in {folder}")
    engine.stop()


def evaluate(
    p: TrainState, listing: data.Listing, val: data.Listing, device: torch.device
) -> dict[str, float]:
    """kNN of the student's features, with the weights and batch-norm statistics that a checkpoint
    holds: the mean over ranks."""
    with torch.random.fork_rng(devices=[]):  # drawn and overwritten
        net = models.of(p.cfg)
    net.load_state_dict(engine.weights(p.engine) | models.mean_buffers(p.net))
    net.to(device, memory_format=torch.channels_last)
    encode = engine.autocast(p.cfg.engine.precision, device)(net.eval().features)
    scores = knn.score(
        encode, listing, val, p.cfg.data, p.cfg.view, p.cfg.eval, p.cfg.run.seed, device
    )
    return named({f"eval/{k}": v for k, v in scores.items()}, student=p.name)


def _announce(
    cfg: Config, listing, states: list[TrainState], micro: int, steps: int, start: int, folder: Path
):
    for p in states:
        say(
            f"{folder}: {p.name and f'{p.name}: '}{p.cfg.student.arch} ({p.size / 1e6:.1f} M "
            "weights with its head), "
            f"{f'teacher {cfg.teacher.file}' if cfg.teacher else 'no teacher'}"
        )
    say(
        f"{len(listing.files)} images of {len(listing.classes)} classes, batch {cfg.data.batch} = "
        f"{dist.world()} ranks x {micro} images x {cfg.data.accumulate} accumulated, {steps} steps, "
        f"{cfg.engine.precision}, ZeRO stage {cfg.engine.stage}"
    )
    if left := len(listing.left_out):
        say(
            f"{left} of them {'is' if left == 1 else 'are'} left out by the quarantine "
            f"(data.quarantine: {cfg.data.quarantine})"
        )
    if dist.world() * cfg.bn.groups == 1 and getattr(cfg.method, "contrast", 0):
        say(
            "one rank and bn.groups 1: MoCo can leak through the batch statistics; set bn.groups "
            "(the paper's: 32 images a group)"
        )
    if cfg.optim.lr_scale != "none":
        rates = ", ".join(
            f"{p.name and f'{p.name}: '}lr {p.lr:.4g} for optim.lr {p.cfg.optim.lr:.4g} at batch "
            "256"
            for p in states
        )
        say(f"optim.lr_scale: {cfg.optim.lr_scale}, {rates}")
    if start:
        say(f"continuing after step {start}")
