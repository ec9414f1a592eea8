"""The training loop: `deepspeed fastdisco/train.py --config configs/mobv3.yaml`."""
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # started as a script: sys.path holds this folder instead of the root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import copy
import math

import torch

from fastdisco import checkpoint, config, data, dist, engine, methods, models, optim, plan, runs, teacher
from fastdisco.config import Config, UserError
from fastdisco.evals import knn
from fastdisco.log import Log, Meter, say
from fastdisco.methods import Nets, Progress


def train(cfg: Config, overwrite: bool = False):
    """One run, from its last checkpoint if it has one to its last step."""
    device = engine.start(cfg.engine.precision)
    micro = config.micro_batch(cfg, dist.world())
    listing = data.listing(cfg.data.train, cfg.data.quarantine)
    if val := cfg.data.val and data.listing(cfg.data.val, cfg.data.quarantine):
        knn.check(listing, val)
    lr = optim.base_lr(cfg.optim, cfg.data.batch)

    torch.manual_seed(cfg.run.seed)  # the same weights on every rank
    method = methods.create(cfg.method.name, cfg=cfg.method, dim=cfg.student.dim, hidden=cfg.student.hidden, crop=cfg.view, seed=cfg.run.seed,
                            shuffle=cfg.bn.shuffle and dist.world() * cfg.bn.groups > 1).to(device)
    net = models.create(cfg.student.arch, method.head, cfg.student.kwargs, cfg.bn.groups).to(device)
    teacher_net = cfg.teacher and teacher.load(cfg.teacher.file, cfg.teacher.arch, cfg.teacher.kwargs, cfg.student.dim, device)
    ema = models.ema_copy(net)  # before the engine hooks into the net's forward
    optimizer = optim.create(net, cfg.optim, lr, cfg.engine.stage)
    loader = data.TrainLoader(listing, method.views, micro, cfg.run.seed, cfg.run.epochs, cfg.data.accumulate, cfg.data.threads, device)
    student = engine.create(net, optimizer, cfg.engine, micro, cfg.data.accumulate, cfg.optim.clip)
    if cfg.engine.stage == 0:  # else the weights are slices of one flat tensor, contiguous each; channels_last views suffice for activations
        for n in (net, ema):
            n.to(memory_format=torch.channels_last)  # not before: DeepSpeed broadcasts the weights as bytes, which needs them contiguous
    torch.manual_seed(dist.mix(cfg.run.seed, dist.rank()))  # what a network draws in training differs by rank

    folder = runs.claim(cfg, overwrite)
    state = checkpoint.items(student, ema, method, loader)
    meta = {"data": listing.fingerprint, "teacher": teacher_net.fingerprint if teacher_net else "none"}
    start = checkpoint.restore(folder, state, meta)
    runs.describe(cfg, folder)
    steps = min(cfg.run.max_steps or math.inf, loader.steps_per_epoch * cfg.run.epochs)
    _announce(cfg, listing, ema, micro, lr, steps, start, folder)

    nets = Nets(student, _frozen(ema, cfg, device), teacher_net and _frozen(teacher_net, cfg, device))
    meter, stop = Meter(method.weights, cfg.data.batch, folder, start), runs.Stop()
    with Log(folder, start, steps) as log:
        for step in range(start, steps):
            rate = lr * optim.lr_factor(cfg.optim, step / loader.steps_per_epoch, cfg.run.epochs)
            optim.set_lr(optimizer, rate)
            for _ in range(cfg.data.accumulate):
                progress = Progress(loader.position, step / steps)
                with meter.waiting():
                    batch = next(loader)
                terms = method.step(nets, batch.views, progress)
                loss = sum(weight * terms[name] for name, weight in method.weights.items() if name in terms)
                student.backward(loss)
                student.step()
                meter.add({"loss": loss, **terms})
            with engine.gathered(student):
                models.ema_update(ema, net, method.momentum(progress))  # arXiv:1911.05722, equation 2, for the next step's keys
            method.after_step()

            done, last = step + 1, step + 1 == steps
            save = last or done % cfg.checkpoint.every == 0
            if save or done % cfg.log.every == 0:
                log.write(done, meter.read(done, steps) | {"train/lr": rate, "train/epoch": done / loader.steps_per_epoch})
                save |= (asked := dist.any_rank(stop.asked))
            if val and (last or cfg.eval.every and done % cfg.eval.every == 0):
                with meter.paused():
                    log.write(done, {f"eval/{k}": v for k, v in evaluate(ema, state["student"].get(), listing, val, cfg, device).items()})
            if save:
                with meter.paused():
                    checkpoint.save(folder, done, state, meta, cfg.checkpoint.keep)
                if asked and not last:
                    say(f"stopped as asked after step {done}; the same command continues from there")
                    break
        else:
            say(f"done: {steps} steps, outputs in {folder}")
    engine.stop()


def evaluate(like: models.Net, weights: dict[str, torch.Tensor], listing: data.Listing, val: data.Listing, cfg: Config,
             device: torch.device) -> dict[str, float]:
    """kNN of the features of a network of that form, with the weights and batch-norm statistics that a checkpoint holds: the mean over ranks."""
    net = copy.deepcopy(like)
    net.load_state_dict(weights)
    encode = engine.autocast(cfg.engine.precision, device)(net.eval().features)
    return knn.score(encode, listing, val, cfg.data, cfg.view, cfg.eval, cfg.run.seed, device)


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
        if dist.rank() == 0 or getattr(e, "anywhere", False):  # most are found by every rank alike
            print(f"fastdisco: error: {e}", file=sys.stderr, flush=True)
        return 2
    return 0


def _frozen(net, cfg: Config, device: torch.device):
    """The network as a callable without gradient, in the precision of the forward passes."""
    def call(views):
        with torch.no_grad(), engine.autocast(cfg.engine.precision, device):
            return net(views)
    return call


def _announce(cfg: Config, listing, net, micro: int, lr: float, steps: int, start: int, folder: Path):
    weights = sum(p.numel() for p in net.parameters()) / 1e6
    say(f"{folder}: {cfg.student.arch} ({weights:.1f} M weights with its head), {f'teacher {cfg.teacher.file}' if cfg.teacher else 'no teacher'}")
    say(f"{len(listing.files)} images of {len(listing.classes)} classes, batch {cfg.data.batch} = {dist.world()} ranks x {micro} images x "
        f"{cfg.data.accumulate} accumulated, {steps} steps, {cfg.engine.precision}, ZeRO stage {cfg.engine.stage}")
    if left := len(listing.left_out):
        say(f"{left} of them {'is' if left == 1 else 'are'} left out by the quarantine (data.quarantine: {cfg.data.quarantine})")
    if dist.world() * cfg.bn.groups == 1:
        say("one rank and bn.groups 1: MoCo can leak through the batch statistics; set bn.groups (the paper's: 32 images a group)")
    if cfg.optim.lr_scale != "none":
        say(f"optim.lr_scale: {cfg.optim.lr_scale}, lr {lr:.4g} for optim.lr {cfg.optim.lr:.4g} at batch 256")
    if start:
        say(f"continuing after step {start}")


if __name__ == "__main__":
    sys.exit(main())
