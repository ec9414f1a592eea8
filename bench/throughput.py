"""How fast a training goes, what bounds it, and the official recipe beside it, in the same process
and interleaved.

    python bench/throughput.py                                    synthetic JPEGs,
    configs/mobv3.yaml: minutes on a GPU, or on a CPU python bench/throughput.py --config C --data
    FOLDER           one's own; overrides as block.key=value
    torchrun --nproc_per_node 8 bench/throughput.py               several ranks; deepspeed starts it
    too
    python bench/throughput.py --quick                            tiny networks and images: does it
    run?

Each part is measured alone, then all together.  A round runs every arm for some steps, in an order
drawn anew; figures are medians over rounds. Writes throughput-<device>.json and .png into
bench/results, or --out."""

import argparse
import copy
import gc
import os
import random
import re
import resource
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import official
import timm
import torch
from common import RESULTS, ROOT, jpeg, now, row, write
from PIL import Image
from rich.table import Table
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils.flop_counter import FlopCounterMode

from fastdisco import config, data, engine, models, teacher
from fastdisco.common import dist
from fastdisco.common.console import console, say
from fastdisco.config import UserError
from fastdisco.data import demo
from fastdisco.engine import optim
from fastdisco.methods import Nets, Progress
from fastdisco.models import Out, heads
from fastdisco.run import students

# Those in colour.
PHOTOS = (
    "astronaut",
    "chelsea",
    "china",
    "coffee",
    "flower",
    "hubble",
    "immuno",
    "motorcycle",
    "retina",
    "rocket",
)
# Batches of images: of synthetic ones, and of one's own those that are recorded and that the
# official recipe reads.
FEW = 8
DISTINCT = 256  # images that are encoded; the rest are links to them
# Pixels; ImageNet's median is the first.
SIZES = (
    (500, 375),
    (500, 375),
    (500, 375),
    (375, 500),
    (500, 333),
    (500, 400),
    (640, 480),
    (333, 500),
)
BYTES = 107_000  # median of a file
QUICK = [
    "student.arch=test_efficientnet",
    "student.hidden=32",
    "student.dim=16",
    "teacher.arch=test_resnet",
    "method.queue=256",
    "view.size=64",
    "data.threads=1",
    "student.kwargs={}",
    "teacher.kwargs={}",
]
AIMS = {
    "cpu": dict(step_vs_official=1.5, cached_vs_live_step=1.4),
    "gpu": dict(
        step_vs_official=3,
        step_vs_official_ready=2,
        step_share_of_slowest=0.9,
        teacher_mfu=0.25,
        data_wait=0.02,
        loader_vs_step=1.5,
    ),
}
ROWS = {  # name -> unit, better
    "step_vs_official": ("x of the official recipe's rate, loaders included", "higher"),
    "step_vs_official_ready": ("x of the official recipe's rate, on ready tensors", "higher"),
    "step_share_of_slowest": (
        "of the rate of the slowest of loader, compute and exchange alone",
        "higher",
    ),
    "teacher_mfu": ("of the measured matrix peak", "higher"),
    "teacher_mfu_ceiling": ("of that peak: what its memory traffic allows", "higher"),
    "student_mfu": ("of the measured matrix peak, forward and backward", "higher"),
    "student_mfu_ceiling": ("of that peak: what its memory traffic allows", "higher"),
    "data_wait": ("of the step's time", "lower"),
    "loader_vs_step": ("x of the step's rate", "higher"),
    "step_ips": ("images/s, all ranks, two views each", "higher"),
    "peak_memory_gb": ("GB, a rank", "lower"),
    "cached_vs_live_step": ("x of the live step's rate", "higher"),
    "step_vs_official_bf16": ("x of the official recipe's rate in float32, ours in bf16", "higher"),
}
# Of a step, in the order of the bar.
PARTS = ("teacher", "student", "ema", "loss", "exchange", "optimizer")
REMEDY = {
    "loader": "give it more CPU threads (data.threads) or cores, decode on a GPU, or pack the images smaller (fastdisco data pack)",
    "exchange": "take larger batches a rank, accumulate micro batches (data.accumulate), or a faster network between the ranks",
    "teacher": "record its embeddings once and replay them (teacher.cache), or lower its precision",
    "student": "lower the precision (engine.precision=bf16), compile it, or take a smaller student or view.size",
    "ema": "lower the precision (engine.precision=bf16)",
    "loss": "take a shorter queue (method.queue)",
    "optimizer": "take a simpler optimizer (optim.name=sgd)",
}


class Verdict(NamedTuple):
    bound: str  # loader, compute or exchange
    share: float  # of the bound's rate that the step reaches
    part: str  # what to change: the bound, or the largest part of the compute
    ceiling: tuple[str, float]  # what bounds next, and its rate
    text: str


def verdict(rates: dict[str, float], parts: dict[str, float], full: float) -> Verdict:
    """What bounds a run, what to change, and what would bound it next.

    rates  images/s of each resource alone: loader, compute and, with several ranks, exchange
    parts  seconds of each part of the compute; full: images/s of the whole step"""
    order = sorted(rates, key=rates.get)
    bound, share = order[0], full / rates[order[0]]
    text = f"The {bound} bounds this run: alone it gives {rates[bound]:.0f} images/s, and the whole step reaches {share:.0%} of that."
    if share < 0.9:
        text += " The rest is lost where loader, compute and exchange share cores or wait for each other."
    if bound == "compute":
        part, total = max(parts, key=parts.get), sum(parts.values())
        without = (
            rates[bound] * total / (total - parts[part]) if total > parts[part] else float("inf")
        )
        text += f" The {part} takes {parts[part] / total:.0%} of the compute: {REMEDY[part]}."
        rest = {
            "compute without it"
            if part == "teacher"
            else f"compute with the {part} at no cost": without
        } | {r: rates[r] for r in order[1:]}
    else:
        part, rest = bound, {r: rates[r] for r in order[1:]}
        text += f" To go faster, {REMEDY[bound]}."
    ceiling = min(rest.items(), key=lambda x: x[1])
    text += (
        f" The next ceiling is {ceiling[0]}, at {ceiling[1]:.0f} images/s."
        if np.isfinite(ceiling[1])
        else ""
    )
    return Verdict(bound, share, part, ceiling, text)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", type=Path, default=ROOT / "configs/mobv3.yaml")
    parser.add_argument(
        "--data", type=Path, help="as data.train; without it that of --config, or synthetic images"
    )
    parser.add_argument(
        "--batch",
        type=int,
        nargs="+",
        help="images per rank and step; on a GPU 256 and 1024, on a CPU 16",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds", type=float, default=1.0, help="of each arm in a round, at least a step"
    )
    parser.add_argument(
        "--minutes", type=float, default=8.0, help="after which no new round starts"
    )
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--out", type=Path, help="folder of the results")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="block.key=value")
    args = parser.parse_intermixed_args(argv)
    dist.defaults()
    warnings.filterwarnings("ignore", "`broadcast_buffers`", FutureWarning)
    device = engine.start(config.Engine())
    kind = "gpu" if device.type == "cuda" else "cpu"
    if args.quick:
        args.batch, args.rounds, args.seconds, args.out = (
            args.batch or [8],
            2,
            0.0,
            args.out or Path("out/bench"),
        )
        torch.set_num_threads(1)
    batches = args.batch or ([256, 1024] if kind == "gpu" else [16])
    if kind == "cpu" and not args.quick:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // dist.world()))
    summary, samples, details = [], {}, {}
    with tempfile.TemporaryDirectory(prefix="fastdisco-bench-") as folder:
        folder = Path(shared(folder))
        for n, batch in enumerate(batches):
            until = time.monotonic() + args.minutes * 60 / len(batches)
            cfg = configuration(args, folder, batch, batches, kind)
            names = {name: f"{name}_b{batch}_{kind}" if n else f"{name}_{kind}" for name in ROWS}
            try:
                found = measure(cfg, batch, folder, device, args.rounds, args.seconds, until)
            # Of a batch that is no longer the first: what was measured is kept.
            except torch.OutOfMemoryError as e:
                if not samples:
                    raise
                reason = f"batch {batch}: out of memory"
                say(f"{reason} ({e})")
                summary += [
                    row(names[k], None, ROWS[k][0], AIMS[kind].get(k), ROWS[k][1], reason)
                    for k in ROWS
                    if "bf16" not in k
                ]
                continue
            values = figures(found, batch)
            summary += [
                row(names[k], values[k], *(ROWS[k][0], AIMS[kind].get(k), ROWS[k][1]))
                for k in ROWS
                if k in values
            ]
            samples[batch], details[batch] = (
                found["seconds"],
                {k: v for k, v in found.items() if k != "seconds"}
                | dict(
                    rates={k: ips(found, k, batch) for k in found["seconds"] if k != "matmul"},
                    verdict=found["verdict"].text,
                ),
            )
            if dist.rank() == 0:
                show(found, batch, kind, values)
    if dist.rank():
        engine.stop()
        return 0
    out = args.out or RESULTS
    out.mkdir(parents=True, exist_ok=True)
    if kind == "cpu" and not list(out.glob("throughput-gpu*.json")):
        reason = "no GPU in this machine; python bench/throughput.py on one measures it"
        summary += [
            row(f"{name}_gpu", None, ROWS[name][0], AIMS["gpu"].get(name), ROWS[name][1], reason)
            for name in ROWS
            if "bf16" not in name
        ]
    name = kind if dist.world() == 1 else f"{kind}-{dist.world()}ranks"
    more = dict(
        rounds=args.rounds,
        seconds=args.seconds,
        batches=batches,
        details=details,
        official=official.TF32,
        quick=args.quick,
    )
    path = write("throughput", name, summary, samples, out, **more)
    picture(details, kind, path.with_suffix(".png"))
    say(f"{path}, {path.with_suffix('.png').name}")
    engine.stop()
    return 0


def configuration(args, folder: Path, batch: int, batches: list[int], kind: str) -> config.Config:
    """The run's configuration, with images and a teacher where it was given none; rank 0 makes them
    in the folder."""
    mine = [
        f"data.batch={batch * dist.world()}",
        "data.accumulate=1",
        "data.val=null",
        "eval.every=0",
        f"run.out={folder}/out",
        "run.epochs=1000000",
        "teacher.cache=off",
        f"teacher.cache_folder={folder}/cache-{batch}",
        "teacher.cache_rounds=1",
    ]
    own = args.config != ROOT / "configs/mobv3.yaml"
    synthetic = args.data is None and not own
    if synthetic:
        mine.append(f"data.train={folder}/images")
    if not own:
        mine += [
            f"teacher.file={folder}/teacher.pth.tar",
            f"data.threads={len(os.sched_getaffinity(0))}",
        ]
        mine += ["engine.precision=bf16"] if kind == "gpu" else []
    data_ = [f"data.train={args.data}"] if args.data else []
    cfg = config.load(args.config, [*mine, *data_, *(QUICK if args.quick else []), *args.overrides])
    if cfg.method.name != "moco":
        raise UserError(
            f"{args.config}: has method.name {cfg.method.name}; the bench takes MoCo's step apart, "
            "give a configuration with moco"
        )
    if cfg.teacher is None:
        raise UserError(
            f"{args.config}: has no teacher; the bench measures distillation, set teacher.file and "
            "teacher.arch"
        )
    if dist.rank() == 0:
        if synthetic and not (folder / "images").exists():
            jpegs(
                folder / "images",
                FEW * max(batches) * dist.world(),
                scale=0.3 if args.quick else 1.0,
            )
        if not own and not cfg.teacher.file.exists():
            random_teacher(
                cfg.teacher.file, cfg.teacher.arch, lambda dim: heads.mlp(dim, dim, cfg.student.dim)
            )
    dist.barrier()
    return cfg


def jpegs(root: Path, images: int, scale: float = 1.0):
    """Class folders of JPEGs like photographs from the web: random pieces of photographs at
    ImageNet's sizes, with a camera's grain, each encoded at the quality that gives its share of a
    log-normal spread of file sizes about BYTES."""
    rng = np.random.default_rng(0)
    sources = [Image.open(demo.find(demo.PHOTOS[name])).convert("RGB") for name in PHOTOS]
    distinct = min(images, DISTINCT)
    draws = [
        (i, rng.integers(2**31), float(BYTES * scale**2 * np.exp(0.4 * z)))
        for i, z in enumerate(rng.standard_normal(distinct))
    ]

    def encode(draw):
        i, seed, target = draw
        own = np.random.default_rng(seed)
        width, height = (round(s * scale) for s in SIZES[own.integers(len(SIZES))])
        photo = sources[i % len(sources)]
        zoom = min(photo.width / width, photo.height / height) * own.uniform(0.6, 1.0)
        w, h = width * zoom, height * zoom
        left, top = own.uniform(0, photo.width - w), own.uniform(0, photo.height - h)
        piece = np.asarray(
            photo.resize(
                (width, height), Image.Resampling.BICUBIC, box=(left, top, left + w, top + h)
            ),
            np.float32,
        )
        grain = piece + own.normal(0, own.uniform(1, 5), (height, width, 1)).astype(np.float32)
        image = Image.fromarray(grain.clip(0, 255).astype(np.uint8))
        path = root / PHOTOS[i % len(PHOTOS)] / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(image, target))
        return path

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        made = list(pool.map(encode, draws))
    for i in range(distinct, images):
        first = made[i % distinct]
        os.link(first, first.with_name(f"{i:05}.jpg"))


def random_teacher(
    file: Path,
    arch: str,
    head: Callable,
    backbone_keys: str = "module.encoder_q.",
    head_keys: str = "module.encoder_q.fc.",
    wrapped: str | None = "state_dict",
):
    """A teacher's checkpoint of random weights, whose batch norms have the statistics of its own
    activations, as after a training.

    head  makes the head for the backbone's number of features; *_keys, wrapped: names in the file,
          by default MoCo-v2's."""
    torch.manual_seed(0)
    net = models.create(arch, head).train()
    for m in net.modules():
        if isinstance(m, _BatchNorm):
            m.momentum = None  # the mean over what it sees
            if not m.weight.any():
                # Timm begins some at zero: nothing would flow, and zeros cost a device less power.
                nn.init.ones_(m.weight)
    own = timm.get_pretrained_cfg(arch)
    with torch.no_grad():
        net(
            [
                torch.randn(
                    8, 3, *([own.input_size[-1]] * 2 if own and own.fixed_input_size else (64, 64))
                )
            ]
        )
    state = {
        re.sub("^head[.]", head_keys, re.sub("^backbone[.]", backbone_keys, k)): v
        for k, v in net.state_dict().items()
    }
    torch.save({wrapped: state} if wrapped else state, file)


class Ours:
    """A training as train.py makes it, whose step can be taken apart."""

    def __init__(self, cfg: config.Config, listing: data.Listing, micro: int, device: torch.device):
        self.cfg, self.device, self.done = cfg, device, 0
        torch.backends.cudnn.allow_tf32, torch.backends.cudnn.benchmark = (
            cfg.engine.tf32,
            cfg.perf.cudnn_benchmark,
        )
        pupil = students.create("", cfg, micro, device)
        self.loader = students.loader(cfg, listing, micro, device, pupil.method.permuted)
        self.live = teacher.create(
            cfg.teacher, cfg.student.dim, cfg.engine.precision, self.loader, cfg.perf.graphs
        )
        torch.manual_seed(cfg.run.seed)
        # The student without the engine.
        self.twin = models.of(cfg, train=True).to(device, memory_format=torch.channels_last)
        self.twin_optimizer = optim.create(self.twin, cfg.optim, pupil.lr)
        (pupil,) = students.prepare([pupil], self.live, self.loader)
        self.net, self.ema, self.student, self.method, self.nets = (
            pupil.net,
            pupil.ema,
            pupil.engine,
            pupil.method,
            pupil.nets(self.live),
        )

    def plain(self, views: list[Tensor]) -> Out:
        with engine.autocast(self.cfg.engine.precision, self.device):
            return self.twin(views)

    def step(self, views: list[Tensor], recorded: teacher.CachedTeacher | None = None) -> Tensor:
        """One iteration of train.py's loop, with the teacher or its recorded embeddings."""
        loss = self.loss(self.nets._replace(teacher=recorded) if recorded else self.nets, views)
        self.student.backward(loss)
        self.student.step()
        with engine.gathered(self.student):
            models.ema_update(self.ema, self.net, self.method.momentum(self.progress))
        self.method.after_step()
        self.done += 1
        return loss

    def compute(self, views: list[Tensor]) -> Tensor:
        """The same without the engine and its exchange of gradients."""
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


def arms(
    ours: Ours,
    recorded: teacher.CachedTeacher,
    theirs: official.Official,
    ready: data.Batch,
    half: Ours | None,
    size: int,
    workers: int,
    folder: str,
) -> dict[str, Callable[[int], tuple[float, float]]]:
    """Name -> a function that runs some steps and returns the seconds of one, and of it those that
    waited for data."""
    device, views = ours.device, ready.views
    flat = [v.contiguous() for v in views]  # NCHW
    cut = lambda out, n: Out(*(x if x is None else x[:n] for x in out))
    with torch.no_grad():
        done = Out(*(x if x is None else x.detach() for x in ours.plain(views)))
        targets = Out(ours.nets.teacher(views).z)
    leaf = Out(*(x if x is None else x.clone().requires_grad_() for x in done))
    stub = Nets(
        lambda v: cut(leaf, len(v)), lambda v: cut(done, len(v)), lambda v: cut(targets, len(v))
    )
    gradients = torch.zeros(sum(p.numel() for p in ours.twin.parameters()), device=device)

    def train_student():
        out = ours.plain(views)
        torch.autograd.backward(
            [x for x in out if x is not None], [torch.ones_like(x) for x in out if x is not None]
        )
        ours.twin_optimizer.zero_grad(set_to_none=False)  # the update, timed alone, needs some

    def loss():
        ours.loss(stub, views).backward()
        ours.method.after_step()

    def update():
        ours.twin_optimizer.step()
        models.ema_update(ours.ema, ours.twin, 0.999)

    def repeat(f):
        def run(n):
            begin = now(device)
            for _ in range(n):
                f()
            return (now(device) - begin) / n, 0.0

        return run

    def loaded(step, source):
        def run(n):
            # What was made ahead while other arms ran.
            for _ in range(ours.loader.placement.prefetch if n > 1 else 0):
                step(next(source))
            begin, waited = now(device), 0.0
            for _ in range(n):
                ask = time.perf_counter()
                batch = next(source)
                waited += time.perf_counter() - ask
                step(batch)
            return (now(device) - begin) / n, waited / n

        return run

    def replay(batch):
        recorded.at(batch.index, batch.epoch)
        ours.step(batch.views, recorded)

    def published(a, b):
        with official.defaults():
            theirs(a, b)

    epochs = {}  # steps -> the official loader of an epoch twice as long

    def published_loaded(n):
        # In whole rounds of the workers, who end their batches together.
        steps = n if n == 1 and device.type == "cpu" else workers * -(-n // workers)
        if steps not in epochs:
            epochs.clear()
            epochs[steps] = official.loader(folder, size, len(flat[0]), workers, 2 * steps)
        for i, (batch, _) in enumerate(epochs[steps]):
            if i == steps:  # by now the loader runs at its pace
                begin = now(device)
            published(*(x.to(device, non_blocking=True) for x in batch))
        return (now(device) - begin) / steps, 0.0

    found = {
        "loader": loaded(lambda batch: None, ours.loader),
        "teacher": repeat(lambda: ours.nets.teacher(views).z),
        "student": repeat(train_student),
        "ema": repeat(lambda: ours.nets.ema(views[-1:]).z),
        "loss": repeat(loss),
        "optimizer": repeat(update),
        "compute": repeat(lambda: ours.compute(views)),
        "ready": repeat(lambda: ours.step(views)),
        "full": loaded(lambda batch: ours.step(batch.views), ours.loader),
        "cached": loaded(replay, recorded.loader),
        "matmul": repeat(matmul(device)),
        "official": published_loaded,
        "official_ready": repeat(lambda: published(*flat)),
    }
    if dist.world() > 1:
        found["exchange"] = repeat(lambda: dist.all_sum(gradients))
    if half:
        found["bf16"] = loaded(lambda batch: half.step(batch.views), half.loader)
    return found


def measure(
    cfg: config.Config,
    batch: int,
    folder: Path,
    device: torch.device,
    rounds: int,
    seconds: float,
    until: float,
) -> dict:
    """Seconds a step of every arm and round, and what is needed to judge them."""
    gc.collect()  # what measured another batch
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_reserved() if device.type == "cuda" else 0
    listing = data.listing(cfg.data.train, cfg.data.quarantine)
    few = listing._replace(
        left_out=np.setdiff1d(np.arange(len(listing.files)), listing.kept[: FEW * cfg.data.batch])
    )
    micro = config.micro_batch(cfg, dist.world())
    ours = Ours(cfg, listing, micro, device)
    workers = max(
        1,
        len(os.sched_getaffinity(0))
        // (dist.world() if device.type == "cpu" else max(1, torch.cuda.device_count())),
    )
    for _ in range(2):
        ready = next(ours.loader)
        ours.step(ready.views)
    peak = (
        torch.cuda.max_memory_reserved()
        if device.type == "cuda"
        else 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    )
    half = None
    if device.type == "cpu" and cfg.engine.precision == "fp32":
        half = Ours(
            cfg.model_copy(update={"engine": cfg.engine.model_copy(update={"precision": "bf16"})}),
            listing,
            micro,
            device,
        )
    replayed = data.TrainLoader(
        few,
        config.crops(cfg),
        micro,
        cfg.run.seed,
        cfg.run.epochs,
        1,
        cfg.data.threads,
        device,
        placement=ours.loader.placement,
        rounds=1,
    )
    recorded = teacher.create(
        cfg.teacher.model_copy(update={"cache": "record"}),
        cfg.student.dim,
        cfg.engine.precision,
        replayed,
    )
    recorded.complete()
    seen = next(replayed)
    recorded.at(seen.index, seen.epoch)
    near = (
        torch.nn.functional.cosine_similarity(
            recorded(seen.views).z, ours.nets.teacher(seen.views).z.float(), dim=-1
        )
        .min()
        .item()
    )
    # As published: not folded.
    net = teacher.load(
        cfg.teacher.file,
        cfg.teacher.arch,
        cfg.teacher.kwargs,
        cfg.student.dim,
        teacher.Options(device),
    ).net
    queue = cfg.method.queue // cfg.data.batch * cfg.data.batch
    theirs = official.Official(
        copy.deepcopy(ours.twin),
        copy.deepcopy(net),
        queue,
        cfg.student.dim,
        device,
        cfg.method.temp,
        cfg.method.momentum,
    )
    run = arms(
        ours, recorded, theirs, ready, half, cfg.view.size, workers, plain_folder(few, folder)
    )
    steps = {}
    for name in sorted(run):
        run[name](1)  # warm-up: first shapes, graphs, workers
        steps[name] = shared(max(1, min(100, round(seconds / max(run[name](1)[0], 1e-6)))))
    idle = 1.5 * ours.loader.placement.prefetch * run["loader"](2)[0]
    took, waits = {name: [] for name in run}, []
    for r in range(rounds):
        if shared(r >= 3 and time.monotonic() > until):
            say(f"stopped after {r} of {rounds} rounds, as --minutes says")
            break
        for name in random.Random(r).sample(sorted(run), len(run)):  # the same order on every rank
            seconds_, waited = run[name](steps[name])
            took[name].append(seconds_)
            if name == "full":
                waits.append(waited / seconds_)
            if name in ("loader", "full", "cached", "bf16"):
                time.sleep(idle)  # the loader fills up again, beside nobody
    found = dict(
        seconds=took,
        steps=steps,
        waits=waits,
        memory=(peak - before) / 1e9,
        cached_cosine=near,
        **work(ours, net, device, 2 * cfg.bn.groups),
        workers=workers,
        student=cfg.student.arch,
        teacher=cfg.teacher.arch,
        size=cfg.view.size,
        precision=cfg.engine.precision,
        threads=cfg.data.threads,
    )
    rates = {k: ips(found, k, batch) for k in ("loader", "compute", "exchange") if k in took}
    full, wait = ips(found, "full", batch), statistics.median(waits)
    return found | dict(
        verdict=verdict(
            rates,
            {k: statistics.median(took[k]) for k in PARTS if k in took and k != "exchange"},
            full,
        ),
        total_ips=full,
        data_time=wait * batch * dist.world() / full,
        compute_ips=full / max(1 - wait, 1e-9),
        peak_flops=found["matmul_flops"] / min(took["matmul"]),
    )


def plain_folder(few: data.Listing, folder: Path) -> str:
    """Class folders of these images, as the official recipe reads them."""
    if few.source == folder / "images":
        return str(few.source)
    if dist.rank() == 0:
        for i in few.kept.tolist():
            path = folder / "few" / f"{few.labels[i]:06}" / f"{i}{Path(few.files[i]).suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(few.read(i))
    dist.barrier()
    return str(folder / "few")


def work(ours: Ours, net: models.Net, device: torch.device, n: int) -> dict:
    """Floating-point operations and, at the least, bytes of an image's two views, told from n
    images; and what this device does of each in a second."""
    views = [torch.zeros(n, 3, c.size, c.size, device=device) for c in ours.loader.crops]
    flops, traffic = {}, {}
    with FlopCounterMode(display=False) as count, torch.no_grad():
        traffic["teacher"] = moved(net, lambda: net(views)) / n
    flops["teacher"] = count.get_total_flops() / n
    twin = copy.deepcopy(ours.twin)
    with FlopCounterMode(display=False) as count, torch.no_grad():
        # The backward reads and writes as much, twice.
        traffic["student"] = 3 * moved(twin, lambda: twin(views)) / n
    # And computes twice as much; counted by torch it is wrong for grouped convolutions.
    flops["student"] = 3 * count.get_total_flops() / n
    x = torch.zeros(2**28 if device.type == "cuda" else 2**26, dtype=torch.uint8, device=device)
    y = torch.empty_like(x)
    times = []
    for _ in range(6):
        begin = now(device)
        y.copy_(x)
        times.append(now(device) - begin)
    return dict(
        flops=flops,
        traffic=traffic,
        bandwidth=2 * len(x) / min(times[1:]),
        matmul_flops=2 * side(device) ** 3,
    )


def moved(net: nn.Module, forward: Callable) -> float:
    """Elements that convolutions and linear layers read and write in a forward: what remains when
    all else is fused into them."""
    seen = []
    hooks = [
        m.register_forward_hook(lambda m, x, y: seen.append(x[0].numel() + y.numel()))
        for m in net.modules()
        if isinstance(m, (nn.Conv2d, nn.Linear))
    ]
    forward()
    for h in hooks:
        h.remove()
    return float(sum(seen))


def side(device: torch.device) -> int:
    return 8192 if device.type == "cuda" else 1024


def matmul(device: torch.device) -> Callable:
    """The product of two square matrices whose rate is the peak: bf16 on a GPU, float32 on a
    CPU."""
    a = torch.randn(
        side(device),
        side(device),
        device=device,
        dtype=torch.bfloat16 if device.type == "cuda" else torch.float32,
    )
    out = torch.empty_like(a)
    return lambda: torch.mm(a, a, out=out)


def ips(found: dict, name: str, batch: int) -> float:
    """Images a second over all ranks, the median of the rounds."""
    return batch * dist.world() / statistics.median(found["seconds"][name])


def figures(found: dict, batch: int) -> dict[str, float]:
    """The values of ROWS."""
    rate = {k: ips(found, k, batch) for k in found["seconds"]}
    ratio = lambda a, b: statistics.median(
        y / x for x, y in zip(found["seconds"][a], found["seconds"][b])
    )
    width = {"fp32": 4}.get(found["precision"], 2)
    out = dict(
        step_vs_official=ratio("full", "official"),
        step_vs_official_ready=ratio("ready", "official_ready"),
        step_share_of_slowest=found["verdict"].share,
        data_wait=statistics.median(found["waits"]),
        loader_vs_step=ratio("loader", "full"),
        step_ips=rate["full"],
        peak_memory_gb=found["memory"],
        cached_vs_live_step=ratio("cached", "full"),
    )
    for net in ("teacher", "student"):
        out[f"{net}_mfu"] = found["flops"][net] * rate[net] / dist.world() / found["peak_flops"]
        out[f"{net}_mfu_ceiling"] = min(
            1.0,
            found["flops"][net]
            / (found["traffic"][net] * width)
            * found["bandwidth"]
            / found["peak_flops"],
        )
    if "bf16" in rate:
        out["step_vs_official_bf16"] = ratio("bf16", "official")
    return {k: float(f"{v:.4g}") for k, v in out.items()}


def show(found: dict, batch: int, kind: str, values: dict[str, float]):
    """The table and the verdict."""
    table = Table(
        title=f"{found['teacher']} -> {found['student']}, {found['size']} px, {found['precision']}, {dist.world()} x {batch} images"
    )
    for name, justify in (
        ("", "left"),
        ("ms a step", "right"),
        ("spread", "right"),
        ("images/s", "right"),
    ):
        table.add_column(name, justify=justify, no_wrap=True)
    label = {
        "loader": "read, decode, augment",
        "student": "student, both ways",
        "ema": "mean student's forward",
        "exchange": "gradient exchange",
        "optimizer": "optimizer, EMA",
        "compute": "all compute, ready tensors",
        "ready": "full step, ready tensors",
        "full": "full step",
        "cached": "full step, teacher replayed",
        "official": "official recipe",
        "bf16": "full step in bf16",
        "official_ready": "official, ready tensors",
    }
    for name in (
        "loader",
        *PARTS,
        "compute",
        "ready",
        "full",
        "cached",
        "bf16",
        "official_ready",
        "official",
    ):
        if name in found["seconds"]:
            times = [1e3 * t for t in found["seconds"][name]]
            table.add_row(
                label.get(name, name),
                f"{statistics.median(times):.1f}",
                f"{min(times):.1f} .. {max(times):.1f}",
                f"{ips(found, name, batch):.1f}",
            )
    console.print(table)
    say(
        f"matrix peak {found['peak_flops'] / 1e12:.2f} TFLOP/s, memory "
        f"{found['bandwidth'] / 1e9:.1f} GB/s; of the peak the teacher reaches "
        f"{values['teacher_mfu']:.1%} (its memory traffic allows "
        f"{values['teacher_mfu_ceiling']:.0%}), the student {values['student_mfu']:.1%} "
        f"({values['student_mfu_ceiling']:.0%})"
    )
    say(found["verdict"].text)


def picture(details: dict, kind: str, path: Path):
    """A stacked bar of the parts alone beside loader, full step and the official recipe, for each
    batch."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(len(details), 1, figsize=(10, 3.2 * len(details)), squeeze=False)
    for axis, (batch, found) in zip(axes[:, 0], details.items()):
        ms = {k: 1e3 * batch * dist.world() / r for k, r in found["rates"].items()}
        at = 0.0
        for part in (p for p in PARTS if p in ms):
            axis.barh("parts alone", ms[part], left=at, label=part)
            at += ms[part]
        for name, key in (
            ("loader alone", "loader"),
            ("full step", "full"),
            ("teacher replayed", "cached"),
            ("official recipe", "official"),
        ):
            if key in ms:
                axis.barh(name, ms[key], color="0.7")
        axis.invert_yaxis()
        axis.set(
            xlabel="ms a step",
            title=f"{found['teacher']} to {found['student']}, {found['size']} px, batch {batch} a rank, {kind}",
        )
        axis.legend(ncol=len(PARTS), fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def shared(value):
    """Rank 0's value, on every rank."""
    if dist.world() == 1:
        return value
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, device=dist.device())
    return box[0]


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as e:
        sys.exit(f"fastdisco: error: {e}")
