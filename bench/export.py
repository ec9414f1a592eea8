"""What int8 costs in accuracy and gives in speed: small students, exported by the real command.

    python bench/export.py
        trains a ResNet-18 by MoCo-v2 and two students of it by DisCo on the demo's images, exports the
        three, and measures their files
    python bench/export.py --keep
        also writes bench/results/export-cpu.json
    python bench/export.py --data cifar10 --out out/export-cifar10
        the same on a folder with train/ and test/ or val/

int8_drop_knn_*        points of kNN top-1 that the file in int8 loses against the one in float32, both
                       measured on the files by `fastdisco export`, whose gate is 1 point
int8_layers_float_*    layers that the gate had to keep in float for it
int8_size_ratio_mobv3  bytes of the float32 file by those of the int8 file
int8_speedup_mobv3     time of the float32 ONNX file by that of the int8 file, one image of 224 px, one
                       thread; the same layers are in float
onnx_speedup_mobv3     the same, of eager torch by the float32 ONNX file
minutes_total          of all of it
The speeds are ratios within short rounds in which all forms take turns.  Training is short, so the
drops are those of these students and no others.  Finished runs and exports are not made again, and
then there are no minutes."""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from comparison.plan import images, paths
from harness import ROOT, finish, parser, row, row_of_rounds
from harness.runs import command

from fastdisco import config, models
from fastdisco.common.files import write_whole
from fastdisco.data import demo
from fastdisco.export import bench, int8, onnx

# Epochs, and steps at most: on the demo's images all are made, so that the learning rate comes down.
EPOCHS, STEPS = 2, 112
DISTILLED = ["optim.lr=0.03", "teacher.file=OUT/resnet18"]
# Row -> architecture, and what differs from the common settings.
STUDENTS = {
    "r18": ("resnet18", []),
    "mobv3": ("mobilenetv3_large_100", DISTILLED),
    "effb0": ("efficientnet_b0", DISTILLED),
}
SETTINGS = dict(
    data=dict(batch=128, threads=2, eval_resize=32, eval_size=32, eval_batch=256),
    view=dict(size=32, scale=[0.5, 1.0], flip_p=0.0, blur_sigma=[0.1, 1.0]),
    bn=dict(groups=4),
    method=dict(name="moco", queue=1024, momentum=0.99),
    optim=dict(lr=0.06),
    eval=dict(bank=10000, every=0),
    checkpoint=dict(every=STEPS, keep=1),
    log=dict(every=50),
    student=dict(arch="resnet18", hidden=2048),
    run=dict(name="student", epochs=EPOCHS, max_steps=STEPS),
)
# Deviation of the light of the demo's images.
LIGHT = 0.3
# Of the speeds: side of the image in pixels, and a few images for int8's ranges.
SIDE, CALIBRATE = 224, 32
POINTS = "points of kNN top-1"


def main() -> None:
    args = arguments()
    out = args.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    begin, fresh = time.perf_counter(), not any(out.glob("*/config.yaml"))
    settings = SETTINGS | {"data": SETTINGS["data"] | paths(of(args.data, out))}
    # JSON is YAML.
    write_whole(out / "student.yaml", json.dumps(settings, indent=1))
    asked = {name: STUDENTS[name] for name in STUDENTS if name in args.only}
    for arch, differs in asked.values():
        train(out, arch, differs)
    found = {name: exported(out, arch) for name, (arch, _) in asked.items()}
    speeds = speed(out / STUDENTS["mobv3"][0], found["mobv3"]["int8"]["floats"], args.rounds)
    minutes = (time.perf_counter() - begin) / 60 if fresh else None
    rows = summary(found, speeds, out / STUDENTS["mobv3"][0] / "export", minutes)
    told = ("fp32", "values", "drop", "floats", "layers", "tries", "calibration", "first_direction")
    samples = {name: {k: one["int8"][k] for k in told} for name, one in found.items()}
    if args.keep:
        finish("export", "cpu", rows, samples, args.results, speeds=speeds)
    else:
        print(json.dumps(rows, indent=1))


def arguments() -> argparse.Namespace:
    options = parser(__doc__)
    options.add_argument("--data", type=Path, help="other images than the demo's")
    options.add_argument("--out", type=Path, default=Path("out/export"))
    options.add_argument(
        "--only",
        nargs="+",
        choices=STUDENTS,
        default=list(STUDENTS),
        help="of these; mobv3 is always needed, and r18 is the teacher of the others",
    )
    options.add_argument("--rounds", type=int, default=20)
    options.add_argument("--keep", action="store_true", help="write bench/results/export-cpu.json")
    options.add_argument("--results", type=Path, help="folder of the result, if not bench/results")
    return options.parse_args()


def of(source: Path | None, out: Path) -> Path:
    """The folder with the images, which are the demo's unless others are given."""
    if source:
        return images(source, out)
    demo.write(out / "data", light=LIGHT)
    return out / "data"


def train(out: Path, arch: str, differs: list[str]) -> None:
    """Trains a student unless it has a checkpoint of its last step."""
    last = models.last(out / arch)
    if last and int(last.name.removeprefix("step_")) >= STEPS:
        return
    overrides = [f"run.out={out}", f"run.name={arch}", f"student.arch={arch}"]
    overrides += [x.replace("OUT", str(out)) for x in differs]
    done(command(out / "student.yaml", *overrides))


def exported(out: Path, arch: str) -> dict:
    """What `fastdisco export` found of a student's files."""
    about = out / arch / "export/export.json"
    if not about.exists():
        line = [sys.executable, "-m", "fastdisco.cli", "export", str(out / arch)]
        # A file beyond the gate ends with 3, and its row shows it.
        done([*line, "--to", "timm", "onnx", "int8"], (0, 3))
    return json.loads(about.read_text())


def done(line: list[str], codes: tuple[int, ...] = (0,)) -> None:
    print(" ".join(line[1:]), flush=True)
    if (code := subprocess.run(line, cwd=ROOT).returncode) not in codes:
        # The command has said why.
        sys.exit(code)


def speed(run: Path, floats: list[str], rounds: int) -> list[dict]:
    """Rows of the bench for the run's network at SIDE pixels, in torch, ONNX and int8, of one image
    with one thread."""
    net, _ = models.from_run(run)
    draw = torch.Generator().manual_seed(0)
    some = torch.randn(CALIBRATE, 3, SIDE, SIDE, generator=draw).numpy()
    with tempfile.TemporaryDirectory() as folder:
        float_file, int8_file = Path(folder) / "float.onnx", Path(folder) / "int8.onnx"
        onnx.write(net.backbone, SIDE, float_file, {})
        quantiser = int8.Quantiser(float_file, [some[:16], some[16:]])
        quantiser.write(int8_file, [name for name in quantiser.layers if name not in floats])
        form = lambda name, file: bench.Form(run.name, name, net.backbone, file, SIDE)
        forms = [form("torch", None), form("onnx", float_file), form("int8", int8_file)]
        return bench.measure(forms, rounds, loads=("one",))


def summary(
    found: dict[str, dict], speeds: list[dict], folder: Path, minutes: float | None
) -> list[dict]:
    left = "not asked for"
    rows = []
    for name in STUDENTS:
        one = found.get(name, {}).get("int8")
        lost = round(drop(one), 3) if one else None
        rows.append(row(f"int8_drop_knn_{name}", lost, POINTS, 1, "lower", None if one else left))
    for name, whole in found.items():
        one = whole["int8"]
        unit = f"of {one['layers']} layers"
        rows.append(row(f"int8_layers_float_{name}", len(one["floats"]), unit, None, "lower"))
    seconds = {r["form"]: r["rounds_s"]["one"] for r in speeds}
    ratio = lambda a, b: [x / y for x, y in zip(seconds[a], seconds[b])]
    files = [next(folder.glob(f"{name}*")) for name in ("model.onnx", "model.int8.onnx")]
    size = files[0].stat().st_size / files[1].stat().st_size
    return [
        *rows,
        row_of_rounds("int8_speedup_mobv3", ratio("onnx", "int8"), 3, "x", None, "higher"),
        row("int8_size_ratio_mobv3", round(size, 3), "x", None, "higher"),
        row_of_rounds("onnx_speedup_mobv3", ratio("torch", "onnx"), 3, "x", None, "higher"),
        row(
            "minutes_total",
            minutes if minutes is None else round(minutes, 2),
            "minutes",
            8,
            "lower",
            "some of it had been made before" if minutes is None else None,
        ),
    ]


def drop(found: dict) -> float:
    return 100 * (found["fp32"]["knn_top1"] - found["values"].get("knn_top1", 0.0))


if __name__ == "__main__":
    try:
        main()
    except config.UserError as e:
        sys.exit(f"fastdisco: error: {e}")
