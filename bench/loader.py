"""Images/s of the training's loader, two 224 px views with MoCo-v2's augmentation, fp32 and
normalised, from JPEGs as found on the web.

    python bench/loader.py [--data FOLDER|TAR] [--rounds N] [--batch N]

Without a GPU: against torchvision in a DataLoader, folder and tars, 1 to 4 threads, the cost of
each stage.  With one: where to decode and augment, the decoding engine's share, threads, prefetch;
images/s and memory of each.  Writes bench/results/loader-<device>.json.

Every arm is a process of its own; in a round each in turn, in an order drawn anew, reads a number
of batches after those that it has ready."""

import argparse
import functools
import itertools
import multiprocessing
import os
import random
import statistics
import sys
import tarfile
import tempfile
import time
from pathlib import Path

import numpy as np
import skimage.data
import torch
from common import jpeg, row, row_of_rounds, write
from PIL import Image, ImageFilter

from fastdisco import data
from fastdisco.config import Crop
from fastdisco.data import draws, pack, pipelines
from fastdisco.data.decoder import graphs
from fastdisco.data.placement import Placement

CROP = Crop()
CORES = len(os.sched_getaffinity(0))
CPU = Placement("cpu", "cpu", "cpu", False, 0.0, 2)
IMAGES = 256  # of a stage in a round
STAGES = ("reading", "decoding", "draws", "resizing", "normalising", "jitter", "gray", "blur")


def main():
    gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        help="class folders, or a tar of images; default: 240 synthetic photographs",
    )
    parser.add_argument("--threads", type=int, default=min(CORES, 16 if gpu else 2))
    parser.add_argument("--batch", type=int, default=128 if gpu else 32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--seconds", type=float, default=2.0, help="of an arm in a round")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        root, what = photographs(Path(folder, "train"), args.data)
        summary, samples = (on_gpu if gpu else on_cpu)(args, root, Path(folder, "tars"))
    device = "gpu" if gpu else "cpu"
    print(
        write(
            "loader",
            device,
            summary,
            samples,
            data=what,
            **{k: getattr(args, k) for k in ("threads", "batch", "rounds", "seconds")},
        )
    )
    for r in summary:
        print(
            r["name"],
            r["value"],
            r["unit"],
            "quartiles {} {}".format(*r["quartiles"]) if "quartiles" in r else "",
        )


def on_cpu(args, root: Path, tars: Path) -> tuple[list[dict], dict]:
    pack.pack(root, tars, shard_mb=16)
    t = args.threads
    arms = {
        "folder": (ours, root, args.batch, t, CPU),
        "tars": (ours, tars, args.batch, t, CPU),
        "torchvision_pil": (torchvision, root, args.batch, t, "pil"),
        "torchvision_v2": (torchvision, root, args.batch, t, "v2"),
        **{f"{n} threads": (ours, root, args.batch, n, CPU) for n in range(1, 5) if n != t},
    }
    ips, memory = interleaved(arms, args.rounds, args.seconds)
    best = [max(p, v) for p, v in zip(ips["torchvision_pil"], ips["torchvision_v2"])]
    summary = [
        ratio(
            "loader_vs_torchvision_cpu",
            ips["folder"],
            best,
            "x of the faster of torchvision's two",
            2.0,
        ),
        ratio(
            "loader_vs_torchvision_pil_cpu",
            ips["folder"],
            ips["torchvision_pil"],
            "x, transforms on PIL images, blur by PIL",
            None,
        ),
        ratio(
            "loader_vs_torchvision_v2_cpu",
            ips["folder"],
            ips["torchvision_v2"],
            "x, transforms v2 on tensors",
            None,
        ),
        rate("loader_ips_cpu", ips["folder"]),
    ]
    summary += [
        rate(f"loader_ips_cpu_{n}_threads", ips["folder" if n == t else f"{n} threads"])
        for n in range(1, 5)
    ]
    summary += [
        ratio(
            "loader_tar_vs_folder", ips["tars"], ips["folder"], "x of the folder's images/s", None
        ),
        row(
            "loader_memory_gb",
            round(max(memory["folder"]), 2),
            "GB of the process, torch included",
            None,
            "lower",
        ),
        row(
            "loader_torchvision_memory_gb",
            round(max(memory["torchvision_pil"]), 2),
            "GB of the process and its workers",
            None,
            "lower",
        ),
    ]
    stages = profile(root, args.batch, args.rounds)
    summary += [
        row(
            f"loader_cost_{s}_ms",
            round(statistics.median(stages[s]), 3),
            "ms of a core an image, both views",
            None,
            "lower",
        )
        for s in STAGES
    ]
    none = "no NVIDIA GPU here"
    summary += [
        row(n, None, unit, None, better, none)
        for n, unit, better in (
            ("loader_ips_gpu", "images/s, 2 views each", "higher"),
            ("loader_gpu_vs_cpu", "x of all on the CPU, all cores", "higher"),
            ("loader_hw_share", "best share of the decoding engine", "higher"),
            ("loader_vram_gb", "GB", "lower"),
        )
    ]
    return summary, dict(ips=ips, memory_gb=memory, cost_ms=stages)


def on_gpu(args, root: Path, tars: Path) -> tuple[list[dict], dict]:
    """One setting after another, each kept at its best; then the three ways against each other."""
    pack.pack(root, tars, shard_mb=16)
    base, threads, table = Placement("gpu", "gpu", "gpu", True, 0.65, 2), args.threads, []

    def best_of(candidates):
        """Measures (way, threads) each, returns the fastest."""
        for way, n in candidates:
            ips, memory = interleaved({"": (ours, root, args.batch, n, way)}, 2, args.seconds / 2)
            table.append(
                dict(
                    way._asdict(),
                    threads=n,
                    ips=round(statistics.median(ips[""]), 1),
                    vram_gb=round(memory[""][-1], 2),
                )
            )
            print(table[-1], flush=True)
        return max(zip(table[-len(candidates) :], candidates), key=lambda x: x[0]["ips"])[1]

    base, threads = best_of(
        [(base._replace(hw_load=h), threads) for h in (0.0, 0.25, 0.5, 0.65, 0.8, 1.0)]
    )
    share = base.hw_load
    base, threads = best_of(
        [(base, n) for n in sorted({1, 2, 4, 8, 16, args.threads}) if n <= CORES]
    )
    base, threads = best_of([(base._replace(prefetch=p), threads) for p in (1, 2, 3, 4)])
    # Of this way; where several arms live each sees the memory of all.
    vram = max(table[-4:], key=lambda x: x["ips"])["vram_gb"]
    ways = {
        "gpu": base,
        "gpu fp32": base._replace(half=False),
        "cpu decode": base._replace(decode="cpu"),
        "cpu": base._replace(decode="cpu", augment="cpu"),
    }
    arms = {
        name: (ours, root, args.batch, CORES if "cpu" in name else threads, way)
        for name, way in ways.items()
    }
    ips, _ = interleaved(
        arms | {"tars": (ours, tars, args.batch, threads, base)}, args.rounds, args.seconds
    )
    summary = [
        rate("loader_ips_gpu", ips["gpu"]),
        rate("loader_ips_gpu_fp32", ips["gpu fp32"]),
        rate("loader_ips_gpu_cpu_decode", ips["cpu decode"]),
        rate("loader_ips_gpu_all_cpu", ips["cpu"]),
        ratio("loader_gpu_vs_cpu", ips["gpu"], ips["cpu"], "x of all on the CPU, all cores", None),
        ratio(
            "loader_gpu_tar_vs_folder", ips["tars"], ips["gpu"], "x of the folder's images/s", None
        ),
        row("loader_hw_share", share, "best share of the decoding engine", None, "higher"),
        row("loader_gpu_threads", threads, "best threads", None, "lower"),
        row("loader_gpu_prefetch", base.prefetch, "best prefetch", None, "lower"),
        row("loader_vram_gb", vram, "GB, without the CUDA context", None, "lower"),
    ]
    return summary, dict(sweep=table, ips=ips)


def interleaved(arms: dict, rounds: int, seconds: float) -> tuple[dict, dict]:
    """images/s and memory in GB of each arm in each round."""
    spawn = multiprocessing.get_context("spawn")
    ends, processes, ips, memory = {}, [], {n: [] for n in arms}, {n: [] for n in arms}
    try:
        for name, arm in arms.items():
            ends[name], there = spawn.Pipe()
            processes.append(spawn.Process(target=serve, args=(there, *arm)))
            processes[-1].start()
            there.close()
            ends[name].recv()  # it has begun
        for r in range(rounds + 1):
            for name in random.Random(r).sample(sorted(arms), len(arms)):
                ends[name].send(seconds)
                one = ends[name].recv()
                if r:  # the first is warm-up
                    ips[name].append(one[0])
                    memory[name].append(one[1])
    finally:
        for p in processes:
            p.kill()
            p.join()
    return ips, memory


def serve(pipe, make, root: Path, batch: int, threads: int, how):
    """An arm, until it is killed: for each number of seconds that it is told, images/s and memory
    in GB."""
    torch.set_num_threads(1)
    gpu = isinstance(how, Placement) and how.out == "gpu"
    if gpu:
        torch.zeros(1, device="cuda")
        free = torch.cuda.mem_get_info()[0]
    batches, ready = make(root, batch, threads, how)
    for _ in range(ready + 1):
        next(batches)
    pipe.send(None)
    while seconds := pipe.recv():
        for _ in range(ready):
            next(batches)
        wait(gpu)
        begin, n = time.perf_counter(), 0
        while time.perf_counter() - begin < seconds:
            for _ in range(max(1, 64 // batch)):
                next(batches)
                n += batch
        wait(gpu)
        rate_ = n / (time.perf_counter() - begin)
        pipe.send((rate_, (free - torch.cuda.mem_get_info()[0]) / 1e9 if gpu else resident()))


def ours(root: Path, batch: int, threads: int, way: Placement):
    device = torch.device("cuda" if way.out == "gpu" else "cpu")
    listing = data.listing(root)
    batch = min(batch, len(listing.files))
    return data.TrainLoader(
        listing, (CROP, CROP), batch, 0, 10**6, 1, threads, device, placement=way
    ), way.prefetch


def torchvision(root: Path, batch: int, threads: int, kind: str):
    """The same by torchvision: the views' parameters have the same distributions."""
    files = [str(root / f) for f in data.listing(root).files]
    images = torch.utils.data.DataLoader(
        Views(files, kind),
        batch,
        num_workers=threads,
        sampler=Endless(len(files)),
        multiprocessing_context="fork",
    )
    return iter(images), 2 * threads


class Endless(torch.utils.data.Sampler):
    def __init__(self, n: int):
        self.n = n

    def __iter__(self):
        for epoch in itertools.count():
            yield from random.Random(epoch).sample(range(self.n), self.n)


class Views(torch.utils.data.Dataset):
    """Two views of an image by torchvision's transforms on PIL images (pil), as MoCo-v2 has them,
    or on tensors (v2)."""

    def __init__(self, files: list[str], kind: str):
        from torchvision import io as images
        from torchvision import transforms as v1
        from torchvision.transforms import v2

        self.files, (b, c, s, h) = files, CROP.jitter
        t = v1 if kind == "pil" else v2
        blur = (
            pil_blur
            if kind == "pil"
            else v2.GaussianBlur(2 * int(np.ceil(3 * CROP.blur_sigma[1])) + 1, CROP.blur_sigma)
        )
        last = [v1.ToTensor()] if kind == "pil" else [v2.ToDtype(torch.float32, scale=True)]
        self.view = t.Compose(
            [
                t.RandomResizedCrop(CROP.size, CROP.scale, CROP.ratio, antialias=True),
                t.RandomApply([t.ColorJitter(b, c, s, h)], CROP.jitter_p),
                t.RandomGrayscale(CROP.gray_p),
                t.RandomApply([blur], CROP.blur_p),
                t.RandomHorizontalFlip(CROP.flip_p),
                *last,
                t.Normalize(CROP.mean, CROP.std),
            ]
        )
        self.read = (
            pil_image
            if kind == "pil"
            else functools.partial(images.decode_image, mode=images.ImageReadMode.RGB)
        )

    def __len__(self):
        return len(self.files)

    def __getitem__(self, i):
        image = self.read(self.files[i])
        return self.view(image), self.view(image), i


def pil_image(file: str):
    with open(file, "rb") as f:
        return Image.open(f).convert("RGB")


def pil_blur(image):
    return image.filter(ImageFilter.GaussianBlur(random.uniform(*CROP.blur_sigma)))


def profile(root: Path, batch: int, rounds: int) -> dict[str, list[float]]:
    """ms of one core for each stage of an image in both views: differences of the CPU time of
    graphs that go on one stage further, or that have one step more."""
    from nvidia.dali import pipeline_def

    graph, listing = graphs(), data.listing(root)
    files = np.random.default_rng(0).permutation(len(listing.files))
    files = files[: len(files) // batch * batch] if len(files) >= batch else np.resize(files, batch)
    reader, words = pipelines.reader(listing, files, ""), draws.words(files, 0).reshape(-1, batch)
    plain = dict(jitter_p=0, gray_p=0, blur_p=0)
    steps = {
        "plain": plain,
        **{
            name: plain | {f"{name}_p": getattr(CROP, f"{name}_p")}
            for name in ("jitter", "gray", "blur")
        },
    }

    @pipeline_def
    def upto(stage):
        encoded = graph._read(reader)
        if stage == "reading":
            return encoded
        image, hw = graph._decoded(encoded, CPU)
        if stage == "decoding":
            return image
        crops = (Crop(**plain),) * 2
        tries, place, each = graph._fed(crops, fed(crops), CPU)
        start, end = graph._boxes(hw, tries, place, crops)
        flips = tuple(d["flip"] for d in each)
        if stage == "draws":
            return image, start, end, *flips
        return *(
            graph.fn.resize(image, size=[c.size] * 2, roi_start=start[v, 0], roi_end=end[v, 0])
            for v, c in enumerate(crops)
        ), *flips

    def fed(crops):
        return lambda i: draws.feed(crops, 0, words[i % len(words)], "cpu")

    pipe = pipelines.settings(batch, 1, torch.device("cpu"), CPU)
    pipes = {s: upto(s, **pipe) for s in STAGES[:4]}
    for name, change in steps.items():
        crops = (Crop(**change),) * 2
        pipes[name] = graph.train(crops, reader, fed(crops), CPU, **pipe)
    cost = {name: [] for name in pipes}
    for r in range(rounds + 1):
        for name in random.Random(r).sample(sorted(pipes), len(pipes)):
            for _ in range(CPU.prefetch + 1):
                pipes[name].run()
            begin = time.process_time()
            for _ in range(max(1, IMAGES // batch)):
                pipes[name].run()
            if r:
                cost[name].append(
                    1e3 * (time.process_time() - begin) / (max(1, IMAGES // batch) * batch)
                )
    before = dict(zip(STAGES, [None, *STAGES[:3], "resizing", "plain", "plain", "plain"]))
    cost["normalising"] = cost["plain"]
    return {
        s: [
            a - (b if before[s] else 0)
            for a, b in zip(cost[s], cost[before[s]] if before[s] else cost[s])
        ]
        for s in STAGES
    }


def photographs(root: Path, source: Path | None) -> tuple[Path, str]:
    """Class folders of JPEGs, and what they are: those of the source, made in root where it is a
    tar; without one 240 of ImageNet's sizes."""
    if source and source.is_dir():
        return source, source.name
    (root / "a").mkdir(parents=True)
    if source:
        with tarfile.open(source) as t:
            for m in t:
                if m.isfile():
                    (root / "a" / Path(m.name).name).write_bytes(t.extractfile(m).read())
        return root, source.name
    rng, near = np.random.default_rng(0), Path(skimage.data.__file__).parent
    sources = [near / f for f in ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")]
    sizes = (
        [(500, 375)] * 13
        + [(375, 500)] * 4
        + [(500, 333)] * 4
        + [(333, 500), (640, 480), (1024, 768)]
    )
    for i in range(240):
        picture, (w, h) = Image.open(sources[i % 4]).convert("RGB"), sizes[i % len(sizes)]
        left, top = rng.integers(0, picture.width // 4), rng.integers(0, picture.height // 4)
        x = np.asarray(
            picture.crop(
                (left, top, left + picture.width * 3 // 4, top + picture.height * 3 // 4)
            ).resize((w, h)),
            float,
        )
        # As many bytes a pixel as photographs have.
        picture = Image.fromarray((x + rng.normal(0, 6, x.shape)).clip(0, 255).astype(np.uint8))
        (root / "a" / f"{i:03}.jpg").write_bytes(jpeg(picture, w * h * 107 / 187.5))
    return root, "240 synthetic photographs"


def resident() -> float:
    """GB of this process and its children; what they share is divided."""
    children = multiprocessing.active_children()
    return (
        sum(
            int(line.split()[1])
            for p in [os.getpid(), *(c.pid for c in children)]
            for line in Path(f"/proc/{p}/smaps_rollup").read_text().splitlines()
            if line.startswith("Pss:")
        )
        * 1024
        / 1e9
    )


def wait(gpu: bool):
    if gpu:
        torch.cuda.synchronize()


def ratio(name: str, ours_: list[float], theirs: list[float], unit: str, aim: float | None) -> dict:
    return row_of_rounds(name, [a / b for a, b in zip(ours_, theirs)], 3, unit, aim, "higher")


def rate(name: str, ips: list[float]) -> dict:
    return row_of_rounds(name, ips, 1, "images/s, 2 views each", None, "higher")


if __name__ == "__main__":
    sys.exit(main())
