"""The training loop.

deepspeed fastdisco/train.py --config configs/mobv3.yaml     one process for each GPU
fastdisco train --config configs/mobv3.yaml                  one process

Level 4: nobody but the command (commands/train.py) imports it."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Run as a script, this file only starts the command.  The command reads arguments and configuration
# before it imports torch, and then imports this file again, as fastdisco.train.
if __name__ == "__main__":
    if not __package__:
        # Python has put this folder on sys.path; the package is found from the root above it.
        sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from fastdisco.common import leaving

    leaving.prepare()
    from fastdisco.commands.train import main

    sys.exit(leaving.with_code(main()))

import torch

from fastdisco import config, data, engine, models, teacher
from fastdisco.common import dist
from fastdisco.common.console import say
from fastdisco.common.heart import enter
from fastdisco.config import Config
from fastdisco.engine import optim
from fastdisco.methods import Progress
from fastdisco.run import agreement, checkpoint, following, loggers, students
from fastdisco.run.evaluation import Evaluation
from fastdisco.run.folder import claim, clear, describe
from fastdisco.run.lock import Lock
from fastdisco.run.log import Log
from fastdisco.run.meter import Meter, named
from fastdisco.run.mirror import Mirror
from fastdisco.run.remarks import announce, remarks
from fastdisco.run.saver import Saver
from fastdisco.run.signals import Stop
from fastdisco.run.watchdog import Watchdog


def train(cfg: Config, overwrite: bool = False) -> bool:
    """Trains one run to its last step; continues from its last checkpoint if it has one.

    overwrite: deletes the run that is in the folder, and starts over.
    Returns whether the run has come to its end; it has not where it was asked to stop."""
    with Watchdog(cfg.run.stall_seconds) as watchdog:
        device = engine.start(cfg.engine, patience=watchdog.longest)
        with agreement.together() as closing, Lock() as lock:
            closing.append(lock.release)
            agreement.same_settings(cfg, overwrite)
            dist.alike(lambda: None if dist.rank() else loggers.check(cfg.log.to))
            # Before data and teacher are read, and before memory on a GPU is taken.
            folder = claim(cfg, overwrite, lock)
            with watchdog.following(folder, closing):
                finished = _run(cfg, device, folder, lock, watchdog, closing, overwrite)
        engine.stop()
    return finished


def _run(
    cfg: Config,
    device: torch.device,
    folder: Path,
    lock: Lock,
    watchdog: Watchdog,
    closing: list[Callable[[], Any]],
    overwrite: bool,
) -> bool:
    """See `train`; `folder` is the run's, whose lock rank 0 holds, and `closing` that of
    `agreement.together`."""
    # ---- what is gone on with
    mirror, given = Mirror(cfg, folder), cfg
    if not overwrite:
        mirror.fetch()
        agreement.same_checkpoint(folder)
    follows = following.agreed(given, folder, overwrite)
    cfg = follows.cfg

    # ---- data, students, teacher
    torch.backends.cudnn.benchmark = cfg.perf.cudnn_benchmark
    micro = config.micro_batch(cfg, dist.world())
    config.refuse_beyond(cfg, dist.world(), engine.memory(device))
    listing, val = _listings(cfg)
    # One student is a list of one, named ''.
    alone = config.students(cfg).items()
    states = [students.create(name, own, micro, device) for name, own in alone]
    first = states[0].method
    loader = students.loader(cfg, listing, micro, device, first.permuted)
    targets = _teacher(cfg, loader, first.teacher_views)
    replayed = targets if isinstance(targets, teacher.CachedTeacher) else None
    # From here on networks draw (dropout, for example), and each rank draws its own.
    torch.manual_seed(dist.mix(cfg.run.seed, dist.rank()))

    # ---- resume
    meta = {"data": listing.fingerprint, "teacher": targets.fingerprint if targets else "none"}
    agreement.same_files(listing, val, meta["teacher"])
    if overwrite:
        clear(folder)
        mirror.fetch(overwrite)
    items = {}
    for s in states:
        items |= checkpoint.items(s.engine, s.ema, s.method, loader, s.name)
    start = checkpoint.restore(folder, items, meta)
    loader.recount(start)
    meta |= follows.meta
    describe(given, folder)
    if loader.aside:
        say(f"{len(loader.aside)} images that broke before stay set aside (data.bad_limit)")
    mirror.copy(start)
    if replayed:
        replayed.complete()
    steps = loader.steps_per_epoch * cfg.run.epochs
    steps = min(steps, cfg.run.max_steps or steps)
    announce(cfg, listing, states, micro, steps, start, folder, device)
    for remark in (*following.told(follows, [s.net for s in states]), *remarks(cfg, listing, val)):
        say(remark)
    if start < steps:
        states = students.prepare(states, targets, loader)

    # ---- the loop
    meter, stop = Meter(cfg.data.batch, folder, start), Stop()
    keep, background = cfg.checkpoint.keep, cfg.checkpoint.background
    saver = Saver(folder, items, meta, keep, background, lock.check, mirror.copy)
    evaluation = Evaluation(cfg, states, listing, val, device, steps)
    with Log(folder, start, steps, loggers.create(given, folder, start)) as log, saver:
        closing.append(log.close)
        # It was killed, or failed, when the checkpoint was saved.
        if start and evaluation.due(start) and dist.any_rank(log.lacks(start)):
            enter("evaluate", start)
            with meter.paused():
                log.write(start, evaluation.run(start, loader.remaining))
        for step in range(start, steps):
            watchdog.step(step)
            # ---- learning rate and weight decay
            epoch = step / loader.steps_per_epoch
            rates = {s.name: optim.rate(s.cfg.optim, s.lr, epoch, cfg.run.epochs) for s in states}
            decay = optim.decay(cfg.optim, epoch, cfg.run.epochs)
            for student in states:
                optim.move(student.optimizer, rates[student.name], decay)

            # ---- forward and backward, once for each micro batch
            for _ in range(cfg.data.accumulate):
                progress = Progress(loader.position, epoch / cfg.run.epochs, epoch, step)
                enter("data")
                with meter.waiting():
                    batch = next(loader)
                enter("forward")
                if replayed:
                    replayed.at(batch.index, batch.epoch)
                # One forward of the teacher serves all students.
                shared = students.once(targets) if targets else None
                scalars = {}
                for student in states:
                    method = student.method
                    terms = method.step(student.nets(shared), batch.views, progress)
                    loss = method.loss(terms)
                    student.engine.backward(loss)
                    optim.freeze(student.net, method.frozen(progress))
                    # Moves the weights after the last micro batch of the step only.
                    student.engine.step()
                    scalars |= named({"loss": loss, **terms}, method.weights, student.name)
                meter.add(scalars)

            # ---- mean student (EMA), and the method's own state such as a queue
            for student in states:
                momentum = student.method.momentum(progress)
                if student.ema and momentum is not None:
                    # For the next step's keys: arXiv:1911.05722, equation 2.
                    with engine.gathered(student.engine):
                        models.ema_update(student.ema, student.net, momentum)
                student.method.after_step()

            # ---- log, save, evaluate
            done = step + 1
            last = done == steps
            enter("exchange")
            # A rank may be asked alone; all stop together.
            asked = stop.agreed()
            save = last or asked or done % cfg.checkpoint.every == 0
            due = evaluation.due(done)
            if save or done % cfg.log.every == 0:
                lock.check()
                # Only here does the loop wait for the device.
                values = meter.read(done, steps)
                loader.agree()
                for name, rate in rates.items():
                    values |= named({"lr": rate}, student=name)
                if loader.aside:
                    values["data/set_aside"] = len(loader.aside)
                log.write(done, values | {"train/epoch": done / loader.steps_per_epoch})
            elif due:
                loader.agree()
            watchdog.done()
            if save:
                enter("save")
                with meter.saving():
                    saver.save(done, ends=last or asked)
            if asked and (due or not last):
                say(f"stopped as asked after step {done}; the same command continues from there")
                break
            if due:
                enter("evaluate")
                with meter.paused():
                    log.write(done, evaluation.run(done, loader.remaining))
        else:
            say(f"done: {steps} steps, outputs in {folder}")
            asked = False
    mirror.close()
    stop.finish()
    return not asked


def _listings(cfg: Config) -> tuple[data.Listing, data.Listing | None]:
    """The images of training and validation: the same classes, other images."""
    listing = data.listing(cfg.data.train, cfg.data.quarantine, images=cfg.data)
    if cfg.data.val is None:
        return listing, None
    val = data.listing(cfg.data.val, cfg.data.quarantine, images=cfg.data)
    data.same_classes(listing, val)
    data.apart(listing, val)
    return listing, val


def _teacher(
    cfg: Config, loader: data.TrainLoader, views: int | None
) -> teacher.Teacher | teacher.CachedTeacher | None:
    if cfg.teacher is None:
        return None
    precision, graphs = cfg.engine.precision, cfg.perf.graphs
    return teacher.create(cfg.teacher, cfg.student.dim, precision, loader, graphs, views)
