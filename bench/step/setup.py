"""The configuration of what bench/throughput.py measures, and the images and teacher that it makes
where it was given none."""

import argparse
import os
from pathlib import Path

from harness import ROOT
from harness.synthetic import jpegs, random_teacher

from fastdisco import config
from fastdisco.common import dist
from fastdisco.config import UserError
from fastdisco.models import heads
from step.measure import FEW

# Measured on synthetic images with a random teacher, unless the user names others.
DEFAULT = ROOT / "configs/mobv3.yaml"
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


def configuration(
    args: argparse.Namespace, folder: Path, batch: int, largest: int, kind: str
) -> config.Config:
    """The run's configuration, for `batch` images a rank and step.  Where the user gave no images
    or no teacher, rank 0 makes them in the folder, as many as the largest batch needs.

    Raises UserError where the bench cannot take the configuration's step apart."""
    own = args.config != DEFAULT
    synthetic = args.data is None and not own
    overrides = [
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
    if synthetic:
        overrides.append(f"data.train={folder}/images")
    if not own:
        threads = len(os.sched_getaffinity(0))
        overrides += [f"teacher.file={folder}/teacher.pth.tar", f"data.threads={threads}"]
        overrides += ["engine.precision=bf16"] if kind == "gpu" else []
    overrides += [f"data.train={args.data}"] if args.data else []
    overrides += QUICK if args.quick else []
    cfg = config.load(args.config, [*overrides, *args.overrides])
    check(cfg, args.config)
    if dist.rank() == 0:
        images = FEW * largest * dist.world() if synthetic else 0
        provide(cfg, folder, images, teacher=not own, scale=0.3 if args.quick else 1.0)
    dist.barrier()
    return cfg


def check(cfg: config.Config, file: Path) -> None:
    """Raises UserError where the bench cannot take this configuration's step apart."""
    if cfg.method.name != "moco":
        raise UserError(
            f"{file}: has method.name {cfg.method.name}; the bench takes MoCo's step apart, give a "
            "configuration with moco"
        )
    if cfg.teacher is None:
        raise UserError(
            f"{file}: has no teacher; the bench measures distillation, set teacher.file and "
            "teacher.arch"
        )


def provide(cfg: config.Config, folder: Path, images: int, teacher: bool, scale: float) -> None:
    """Makes so many synthetic images and the teacher's file, unless they are there."""
    if images and not (folder / "images").exists():
        jpegs(folder / "images", images, scale)
    if teacher and not cfg.teacher.file.exists():
        head = lambda dim: heads.mlp(dim, dim, cfg.student.dim)
        random_teacher(cfg.teacher.file, cfg.teacher.arch, head)
