"""Every testbed at its real resolution: 20 steps of the real command for each student by MoCo with
DisCo and for each other method, on one device.

    python bench/testbeds.py                                            minutes on a GPU; on a CPU
    the figures stay open, with the reason python bench/testbeds.py --only swav_mobv3 --out out/t
    data.batch=8 data.accumulate=1     one of them, here, overrides as block.key=value

Images are synthetic and teachers have random weights: speed and memory are what is measured.
Writes bench/results/testbeds-<device>.json."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from common import ROOT, row, write
from throughput import jpegs, random_teacher

from fastdisco.models import heads

STEPS = 20
IMAGES = 512  # the largest batch; fewer would have no epoch
# Of the paper's 8 GPUs: 32 images share their batch-norm statistics.
ON_ONE = ["data.batch=256", "bn.groups=8"]
STUDENTS = {
    "mobv3": "mobilenetv3_large_100",
    "effb0": "efficientnet_b0",
    "effb1": "efficientnet_b1",
    "r18": "resnet18",
    "r34": "resnet34",
    "vit_tiny": "vit_tiny_patch16_224",
    "xcit_tiny": "xcit_tiny_12_p16_224",
}
# File -> architecture, head, and the names of backbone and head in the file, each as its training
# writes it.
TEACHERS = {
    "moco": (
        "resnet50",
        lambda dim: heads.mlp(dim, dim, 128),
        "module.encoder_q.",
        "module.encoder_q.fc.",
        "state_dict",
    ),
    "swav": (
        "resnet50",
        lambda dim: heads.mlp(dim, 2048, 128, bn=True),
        "module.",
        "module.projection_head.",
        None,
    ),
    "dino_vit": ("vit_small_patch16_224", heads.dino_mlp, "backbone.", "head.mlp.", "teacher"),
    "dino_xcit": (
        "xcit_small_12_p16_224",
        heads.dino_mlp,
        "module.backbone.",
        "module.head.mlp.",
        "teacher",
    ),
}
# Config, teacher, what differs.
RUNS = {
    f"moco_{name}": ("mobv3", "moco", [*ON_ONE, f"student.arch={arch}"])
    for name, arch in STUDENTS.items()
} | {
    "seed_mobv3": ("seed/mobv3_r50", "moco", ["data.batch=256"]),
    "swav_mobv3": ("swav/mobv3_disco", "swav", ["data.batch=256", "method.queue=3840"]),
    "dino_vit_tiny": ("dino/vit_tiny_disco", "dino_vit", ["data.batch=256"]),
    "dino_xcit_tiny": ("dino/xcit_tiny_disco", "dino_xcit", ["data.batch=256"]),
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=RUNS,
        default=list(RUNS),
        metavar="TESTBED",
        help=", ".join(RUNS),
    )
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument(
        "--out",
        type=Path,
        help="print what was measured and keep the runs there, instead of writing a result",
    )
    parser.add_argument("overrides", nargs="*", metavar="block.key=value")
    args = parser.parse_intermixed_args(argv)
    device = "gpu" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not args.out:
        print(
            write(
                "testbeds",
                "cpu",
                summary({}, "no GPU has run this; on a CPU these steps take hours"),
                {},
            )
        )
        return 0
    with tempfile.TemporaryDirectory(prefix="fastdisco-bench-") as folder:
        folder = args.out.resolve() if args.out else Path(folder)
        if not (folder / "images").exists():
            jpegs(folder / "images", IMAGES)
        found = {
            name: measured(name, folder, args.steps, device, args.overrides) for name in args.only
        }
    if args.out:
        print(json.dumps(found, indent=1))
    else:
        print(
            write(
                "testbeds",
                device,
                summary(found, "not asked for"),
                found,
                steps=args.steps,
                overrides=args.overrides,
            )
        )
    return int(any("exit_code" in one for one in found.values()))


def measured(
    name: str, folder: Path, steps: int, device: str, overrides: list[str]
) -> dict[str, float]:
    """The last metrics of a run of its own, which are of its second half; of one that failed its
    exit code, for the others are worth the same."""
    settings, kind, differs = RUNS[name]
    file = folder / f"{kind}.pth.tar"
    if not file.exists():
        random_teacher(file, *TEACHERS[kind])
    command = [
        sys.executable,
        "fastdisco/train.py",
        "--config",
        f"configs/{settings}.yaml",
        "--overwrite",
        f"run.name={name}",
        f"run.out={folder}",
        f"run.max_steps={steps}",
        f"log.every={max(1, steps // 2)}",
        f"data.train={folder}/images",
        "data.val=null",
        "eval.every=0",
        f"teacher.file={file}",
        f"teacher.arch={TEACHERS[kind][0]}",
        *(["engine.precision=bf16"] if device == "gpu" else ["bn.sync=false"]),
        *differs,
        *overrides,
    ]
    print(f"\n{name}: {' '.join(command[1:])}", flush=True)
    if code := subprocess.run(command, cwd=ROOT).returncode:
        return {"exit_code": code}  # the command has said why
    return json.loads((folder / name / "metrics.jsonl").read_text().splitlines()[-1])


def summary(found: dict[str, dict], reason: str) -> list[dict]:
    rows = []
    for name in RUNS:
        for what, key, unit, better in (
            ("ips", "perf/total_ips", "images/s", "higher"),
            ("memory", "perf/mem_gb", "GB at most", "lower"),
        ):
            one = found.get(name, {})
            value, why = (
                one.get(key),
                f"the run failed with exit code {one['exit_code']}"
                if "exit_code" in one
                else reason,
            )
            rows.append(
                row(f"{name}_{what}_gpu", value, unit, None, better, why if value is None else None)
            )
    return rows


if __name__ == "__main__":
    sys.exit(main())
