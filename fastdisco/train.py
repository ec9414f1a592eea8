"""The training loop: `deepspeed fastdisco/train.py --config configs/mobv3.yaml`."""
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # started as a script: sys.path holds this folder instead of the root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import math

import torch

from fastdisco.run import checkpoint, plan, students as pupils, folder as runs
from fastdisco import config, data, engine, models, teacher
from fastdisco.common import dist
from fastdisco.engine import optim
from fastdisco.config import Config, UserError
from fastdisco.evals import knn
from fastdisco.run.log import Log, Meter, named
from fastdisco.common.console import refuse, say
from fastdisco.methods import Progress
from fastdisco.run.students import Pupil


def train(cfg: Config, overwrite: bool = False):
    """One run, from its last checkpoint if it has one to its last step."""
    device = engine.start(cfg.engine)
    torch.backends.cudnn.benchmark = cfg.perf.cudnn_benchmark
    micro = config.micro_batch(cfg, dist.world())
    listing = data.listing(cfg.data.train, cfg.data.quarantine)
    if val := cfg.data.val and data.listing(cfg.data.val, cfg.data.quarantine):
        data.same_classes(listing, val)

    students = [pupils.create(name, own, micro, device) for name, own in config.students(cfg).items()]
    loader = pupils.loader(cfg, listing, micro, device, students[0].method.permuted)
    targets = cfg.teacher and teacher.create(cfg.teacher, cfg.student.dim, cfg.engine.precision, loader, cfg.perf.graphs, students[0].method.taught)
    recorded = isinstance(targets, teacher.Recorded)
    torch.manual_seed(dist.mix(cfg.run.seed, dist.rank()))  # what a network draws in training differs by rank

    folder = runs.claim(cfg, overwrite)
    state = {k: item for p in students for k, item in checkpoint.items(p.engine, p.ema, p.method, loader, p.name).items()}
    meta = {"data": listing.fingerprint, "teacher": targets.fingerprint if targets else "none"}
    start = checkpoint.restore(folder, state, meta)
    runs.describe(cfg, folder)
    if recorded:
        targets.complete()
    steps = min(cfg.run.max_steps or math.inf, loader.steps_per_epoch * cfg.run.epochs)
    _announce(cfg, listing, students, micro, steps, start, folder)

    if start < steps:
        students = pupils.prepare(students, targets, loader)
    meter, stop = Meter(cfg.data.batch, folder, start), runs.Stop()
    with Log(folder, start, steps) as log:
        for step in range(start, steps):
            epoch = step / loader.steps_per_epoch
            rates = {p.name: optim.rate(cfg.optim, p.lr, epoch, cfg.run.epochs) for p in students}
            for p in students:
                optim.move(p.optimizer, rates[p.name], optim.decay(cfg.optim, epoch, cfg.run.epochs))
            for _ in range(cfg.data.accumulate):
                progress = Progress(loader.position, epoch / cfg.run.epochs, epoch, step)
                with meter.waiting():
                    batch = next(loader)
                if recorded:
                    targets.at(batch.index, batch.epoch)
                scalars, shared = {}, targets and pupils.once(targets)
                for p in students:
                    terms = p.method.step(p.nets(shared), batch.views, progress)
                    loss = p.method.loss(terms)
                    p.engine.backward(loss)
                    optim.freeze(p.net, p.method.frozen(progress))
                    p.engine.step()
                    scalars |= named({"loss": loss, **terms}, p.method.weights, p.name)
                meter.add(scalars)
            for p in students:
                if p.ema:
                    with engine.gathered(p.engine):
                        models.ema_update(p.ema, p.net, p.method.momentum(progress))  # arXiv:1911.05722, equation 2, for the next step's keys
                p.method.after_step()

            done, asked = step + 1, False
            last = done == steps
            save = last or done % cfg.checkpoint.every == 0
            if save or done % cfg.log.every == 0:
                values = meter.read(done, steps) | {k: v for name, r in rates.items() for k, v in named({"lr": r}, student=name).items()}
                log.write(done, values | {"train/epoch": done / loader.steps_per_epoch})
                asked = dist.any_rank(stop.asked)
                save = save or asked
            if val and (last or cfg.eval.every and done % cfg.eval.every == 0):
                with meter.paused():
                    log.write(done, {k: v for p in students for k, v in evaluate(p, listing, val, device).items()})
            if save:
                with meter.paused():
                    checkpoint.save(folder, done, state, meta, cfg.checkpoint.keep)
                if asked and not last:
                    say(f"stopped as asked after step {done}; the same command continues from there")
                    break
        else:
            say(f"done: {steps} steps, outputs in {folder}")
    engine.stop()


def evaluate(p: Pupil, listing: data.Listing, val: data.Listing, device: torch.device) -> dict[str, float]:
    """kNN of the student's features, with the weights and batch-norm statistics that a checkpoint holds: the mean over ranks."""
    with torch.random.fork_rng(devices=[]):  # drawn and overwritten
        net = models.of(p.cfg)
    net.load_state_dict(engine.weights(p.engine) | models.mean_buffers(p.net))
    net.to(device, memory_format=torch.channels_last)
    encode = engine.autocast(p.cfg.engine.precision, device)(net.eval().features)
    scores = knn.score(encode, listing, val, p.cfg.data, p.cfg.view, p.cfg.eval, p.cfg.run.seed, device)
    return named({f"eval/{k}": v for k, v in scores.items()}, student=p.name)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="train.py", description="Trains a student with DisCo, or resumes the run of the same command.")
    parser.add_argument("--config", required=True, help="a YAML file, see configs/")
    either = parser.add_mutually_exclusive_group()
    either.add_argument("--overwrite", action="store_true", help="start over, deleting the run's folder")
    either.add_argument("--dry-run", action="store_true", help="say what the run would be and what it lacks, and start nothing")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # the deepspeed launcher passes it; LOCAL_RANK says the same
    parser.add_argument("overrides", nargs="*", metavar="block.key=value", help="for example optim.lr=0.06")
    args = parser.parse_intermixed_args(argv)
    dist.defaults()
    try:
        cfg = config.load(args.config, args.overrides)
        if args.dry_run:
            for line in plan.lines(cfg, dist.world(), runs.agree(cfg)):
                say(line)
        else:
            train(cfg, args.overwrite)
    except UserError as e:
        return refuse(e)
    return 0


def _announce(cfg: Config, listing, students: list[Pupil], micro: int, steps: int, start: int, folder: Path):
    for p in students:
        say(f"{folder}: {p.name and f'{p.name}: '}{p.cfg.student.arch} ({p.size / 1e6:.1f} M weights with its head), "
            f"{f'teacher {cfg.teacher.file}' if cfg.teacher else 'no teacher'}")
    say(f"{len(listing.files)} images of {len(listing.classes)} classes, batch {cfg.data.batch} = {dist.world()} ranks x {micro} images x "
        f"{cfg.data.accumulate} accumulated, {steps} steps, {cfg.engine.precision}, ZeRO stage {cfg.engine.stage}")
    if left := len(listing.left_out):
        say(f"{left} of them {'is' if left == 1 else 'are'} left out by the quarantine (data.quarantine: {cfg.data.quarantine})")
    if dist.world() * cfg.bn.groups == 1 and getattr(cfg.method, "contrast", 0):
        say("one rank and bn.groups 1: MoCo can leak through the batch statistics; set bn.groups (the paper's: 32 images a group)")
    if cfg.optim.lr_scale != "none":
        rates = ", ".join(f"{p.name and f'{p.name}: '}lr {p.lr:.4g} for optim.lr {p.cfg.optim.lr:.4g} at batch 256" for p in students)
        say(f"optim.lr_scale: {cfg.optim.lr_scale}, {rates}")
    if start:
        say(f"continuing after step {start}")


if __name__ == "__main__":
    sys.exit(main())
