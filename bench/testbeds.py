"""Every testbed at its real resolution: 20 steps of the real command for each student by MoCo with
DisCo and for each other method, on one device.

    python bench/testbeds.py
        minutes on a GPU; on a CPU the figures stay open, with the reason
    python bench/testbeds.py --only swav_mobv3 --out out/t data.batch=8 data.accumulate=1
        one of them, on any machine; overrides as block.key=value

Images are synthetic and teachers have random weights: the bench measures speed and memory.  Writes
bench/results/testbeds-<device>.json."""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from harness import ROOT, finish, parser, row
from harness.results import device_kind, earlier
from harness.runs import command, metrics
from harness.synthetic import jpegs, random_teacher

from fastdisco.models import heads

STEPS = 20
# The largest batch; fewer images would give no epoch.
IMAGES = 512
# As on the paper's 8 GPUs, 32 images share their batch-norm statistics.
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
# File -> architecture, head, and the names of backbone, head and state dict in the file, each as its
# training writes it.
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
# Testbed -> configuration, teacher, and what differs from the configuration.
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
    args, device = arguments(argv), device_kind()
    if device == "cpu" and not args.out:
        reason = "no GPU has run this; on a CPU these steps take hours"
        finish("testbeds", "cpu", summary({}, reason), {})
        return 0
    with tempfile.TemporaryDirectory(prefix="fastdisco-bench-") as temporary:
        folder = args.out.resolve() if args.out else Path(temporary)
        if not (folder / "images").exists():
            jpegs(folder / "images", IMAGES)
        found = {
            name: measured(name, folder, args.steps, device, args.overrides) for name in args.only
        }
    if args.out:
        print(json.dumps(found, indent=1))
    else:
        about = dict(steps=args.steps, overrides=args.overrides)
        # So the testbeds can be run in pieces.
        before = earlier("testbeds", device)
        found = {name: one for name, one in before.items() if name not in args.only} | found
        finish("testbeds", device, summary(found, "not asked for"), found, **about)
    return int(any("exit_code" in found[name] for name in args.only))


def arguments(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument(
        "--only",
        nargs="+",
        choices=RUNS,
        default=list(RUNS),
        metavar="TESTBED",
        help=", ".join(RUNS),
    )
    options.add_argument("--steps", type=int, default=STEPS)
    options.add_argument(
        "--out",
        type=Path,
        help="print what was measured and keep the runs there, instead of writing a result",
    )
    options.add_argument("overrides", nargs="*", metavar="block.key=value")
    return options.parse_intermixed_args(argv)


def measured(
    name: str, folder: Path, steps: int, device: str, overrides: list[str]
) -> dict[str, float]:
    """The last metrics of a run, which are those of its second half.  Of a run that failed the exit
    code: the other testbeds are still worth measuring."""
    settings, kind, differs = RUNS[name]
    file = folder / f"{kind}.pth.tar"
    if not file.exists():
        random_teacher(file, *TEACHERS[kind])
    line = command(
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
        "engine.precision=bf16" if device == "gpu" else "bn.sync=false",
        *differs,
        *overrides,
    )
    print(f"\n{name}: {' '.join(line[1:])}", flush=True)
    if code := subprocess.run(line, cwd=ROOT).returncode:
        # The command has said why.
        return {"exit_code": code}
    return metrics(folder / name)[-1]


def summary(found: dict[str, dict], reason: str) -> list[dict]:
    """Speed and memory of every testbed; `reason` says why one without a run has none."""
    rows = []
    for name in RUNS:
        one, why = found.get(name, {}), reason
        if "exit_code" in one:
            why = f"the run failed with exit code {one['exit_code']}"
        for what, key, unit, better in (
            ("ips", "perf/total_ips", "images/s", "higher"),
            ("memory", "perf/mem_gb", "GB at most", "lower"),
        ):
            value = one.get(key)
            missing = why if value is None else None
            rows.append(row(f"{name}_{what}_gpu", value, unit, None, better, missing))
    return rows


if __name__ == "__main__":
    sys.exit(main())
