"""The training loop: `deepspeed fastdisco/train.py --config configs/mobv3.yaml`."""
import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # started as a script: sys.path holds this folder instead of the root
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import argparse
import copy
import math

import torch

from fastdisco import checkpoint, compiled, config, cudagraph, data, dist, engine, methods, models, optim, plan, runs, teacher
from fastdisco.config import Config, UserError
from fastdisco.evals import knn
from fastdisco.log import Log, Meter, say
from fastdisco.methods import Nets, Progress


def train(cfg: Config, overwrite: bool = False):
    """One run, from its last checkpoint if it has one to its last step."""
    device = engine.start(cfg.engine.precision)
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = cfg.engine.tf32, False
    torch.backends.cudnn.benchmark = cfg.perf.cudnn_benchmark
    micro = config.micro_batch(cfg, dist.world())
    listing = data.listing(cfg.data.train, cfg.data.quarantine)
    if val := cfg.data.val and data.listing(cfg.data.val, cfg.data.quarantine):
        knn.check(listing, val)
    lr = optim.base_lr(cfg.optim, cfg.data.batch)

    shuffle = cfg.bn.shuffle if dist.world() * cfg.bn.groups > 1 else "off"

    torch.manual_seed(cfg.run.seed)  # the same weights on every rank
    method = methods.create(cfg.method.name, cfg=cfg.method, dim=cfg.student.dim, seed=cfg.run.seed, shuffle=shuffle).to(device)
    net = models.of(cfg, train=True).to(device)
    size = sum(p.numel() for p in net.parameters())
    loader = data.TrainLoader(listing, config.crops(cfg), micro, cfg.run.seed, cfg.run.epochs, cfg.data.accumulate, cfg.data.threads, device,
                              way=data.way(cfg.data, device, cfg.engine.precision), rounds=teacher.rounds(cfg.teacher), permuted=shuffle == "load")
    teacher_net = cfg.teacher and teacher.create(cfg.teacher, cfg.student.dim, cfg.engine.precision, loader, cfg.perf.graphs)
    recorded = isinstance(teacher_net, teacher.Recorded)
    ema = None if method.momentum(Progress(0, 0.0)) is None else models.ema_copy(net)  # before the engine hooks into the net's forward
    optimizer = optim.create(net, cfg.optim, lr, cfg.engine.stage)
    student = engine.create(net, optimizer, cfg.engine, micro, cfg.data.accumulate, 0.0 if cfg.optim.clip_each else cfg.optim.clip)
    if ema and cfg.engine.stage == 0:
        ema.to(memory_format=torch.channels_last)  # as the engine has the net
    torch.manual_seed(dist.mix(cfg.run.seed, dist.rank()))  # what a network draws in training differs by rank

    folder = runs.claim(cfg, overwrite)
    state = checkpoint.items(student, ema, method, loader)
    meta = {"data": listing.fingerprint, "teacher": teacher_net.fingerprint if teacher_net else "none"}
    start = checkpoint.restore(folder, state, meta)
    runs.describe(cfg, folder)
    if recorded:
        teacher_net.complete()
    steps = min(cfg.run.max_steps or math.inf, loader.steps_per_epoch * cfg.run.epochs)
    _announce(cfg, listing, size, micro, lr, steps, start, folder)

    nets = Nets(student, ema and _frozen(ema, cfg, device), teacher_net, net.prototypes and _frozen(net.prototypes, cfg, device))
    if start < steps and (cfg.perf.compile or cfg.perf.graphs and device.type == "cuda"):
        nets = _prepare(nets, net, ema, method, loader, cfg)
    meter, stop = Meter(method.weights, cfg.data.batch, folder, start), runs.Stop()
    with Log(folder, start, steps) as log:
        for step in range(start, steps):
            epoch = step / loader.steps_per_epoch
            rate = optim.rate(cfg.optim, lr, epoch, cfg.run.epochs)
            optim.move(optimizer, rate, optim.decay(cfg.optim, epoch, cfg.run.epochs))
            for _ in range(cfg.data.accumulate):
                progress = Progress(loader.position, epoch / cfg.run.epochs, epoch, step)
                with meter.waiting():
                    batch = next(loader)
                if recorded:
                    teacher_net.at(batch.index, batch.epoch)
                terms = method.step(nets, batch.views, progress)
                loss = sum(weight * terms[name] for name, weight in method.weights.items() if name in terms)
                student.backward(loss)
                optim.freeze(net, method.frozen(progress))
                student.step()
                meter.add({"loss": loss, **terms})
            if ema:
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
                    log.write(done, {f"eval/{k}": v for k, v in evaluate(state["student"].get(), listing, val, cfg, device).items()})
            if save:
                with meter.paused():
                    checkpoint.save(folder, done, state, meta, cfg.checkpoint.keep)
                if asked and not last:
                    say(f"stopped as asked after step {done}; the same command continues from there")
                    break
        else:
            say(f"done: {steps} steps, outputs in {folder}")
    engine.stop()


def evaluate(weights: dict[str, torch.Tensor], listing: data.Listing, val: data.Listing, cfg: Config, device: torch.device) -> dict[str, float]:
    """kNN of the features of the student with the weights and batch-norm statistics that a checkpoint holds: the mean over ranks."""
    with torch.random.fork_rng(devices=[]):  # drawn and overwritten
        net = models.of(cfg)
    net.load_state_dict(weights)
    net.to(device, memory_format=torch.channels_last)
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
        with torch.no_grad(), engine.autocast(cfg.engine.precision, device, cache=False):
            return net(views)
    return call


def _prepare(nets: Nets, net: models.Net, ema: models.Net | None, method: methods.Method, loader: data.TrainLoader, cfg: Config) -> Nets:
    """Compiles and captures what the configuration asks for, on noise: before there is a data pipeline, for where one of its threads waits for
    the GPU, a capture breaks.  Nothing that training reads changes."""
    device, live = loader.device, isinstance(nets.teacher, teacher.Teacher)  # recorded embeddings have nothing to prepare
    g, dtype = torch.Generator().manual_seed(0), torch.float16 if loader.way.half else torch.float32
    views = [torch.randn(loader.batch, 3, c.size, c.size, generator=g).to(device, dtype, memory_format=torch.channels_last) for c in loader.crops]
    if cfg.perf.compile in ("student", "both"):
        with engine.autocast(cfg.engine.precision, device):
            compiled.compile("student", net.backbone, lambda: compiled.forward_backward(net.backbone, views), cfg.perf.backend)
    if cfg.perf.compile in ("teacher", "both") and live:
        compiled.compile("teacher", nets.teacher.net.backbone, lambda: nets.teacher.eager(views), cfg.perf.backend)
    if cfg.perf.graphs and device.type == "cuda":
        nets = nets._replace(ema=ema and cudagraph.Graphed("mean student", nets.ema, ema.buffers()))
        stand_in = copy.deepcopy(ema) if ema else models.of(cfg, train=True).to(device)
        _rehearse(nets._replace(student=_frozen(stand_in, cfg, device), teacher=nets.teacher if live else None), ema, method, views)
    return nets


def _rehearse(nets: Nets, ema: models.Net | None, method: methods.Method, views: list[torch.Tensor]):
    """One step of a copy of the method, so that teacher and mean student are called with what training will call them with."""
    with cudagraph.rehearsal(*filter(None, (ema,))), torch.no_grad():
        copy.deepcopy(method).step(nets, views, Progress(0, 0.0))


def _announce(cfg: Config, listing, size: int, micro: int, lr: float, steps: int, start: int, folder: Path):
    say(f"{folder}: {cfg.student.arch} ({size / 1e6:.1f} M weights with its head), {f'teacher {cfg.teacher.file}' if cfg.teacher else 'no teacher'}")
    say(f"{len(listing.files)} images of {len(listing.classes)} classes, batch {cfg.data.batch} = {dist.world()} ranks x {micro} images x "
        f"{cfg.data.accumulate} accumulated, {steps} steps, {cfg.engine.precision}, ZeRO stage {cfg.engine.stage}")
    if left := len(listing.left_out):
        say(f"{left} of them {'is' if left == 1 else 'are'} left out by the quarantine (data.quarantine: {cfg.data.quarantine})")
    if dist.world() * cfg.bn.groups == 1 and getattr(cfg.method, "contrast", 0):
        say("one rank and bn.groups 1: MoCo can leak through the batch statistics; set bn.groups (the paper's: 32 images a group)")
    if cfg.optim.lr_scale != "none":
        say(f"optim.lr_scale: {cfg.optim.lr_scale}, lr {lr:.4g} for optim.lr {cfg.optim.lr:.4g} at batch 256")
    if start:
        say(f"continuing after step {start}")


if __name__ == "__main__":
    sys.exit(main())
