"""The data of bench/accuracy.py, and how many epochs its arms train."""

import argparse
import json
import statistics
import tarfile
from pathlib import Path

from harness.runs import metrics

from comparison.arms import arm_settings, train
from fastdisco import config, data

MINUTES = 90
# Of the teacher for each of a student's: what it has not learned it cannot pass on.
TEACHER_EPOCHS = 2


def images(source: Path, out: Path) -> Path:
    """The folder that holds train/, unpacked where it is a tar."""
    if source.is_dir():
        return source.resolve()
    if not source.exists():
        raise config.UserError(
            f"{source}: not here; give --data a folder with train/ and test/ or val/, or a tar of "
            "one"
        )
    place = out / "images"
    if not place.exists():
        with tarfile.open(source) as tar:
            tar.extractall(out / "unpacking", filter="data")
        (out / "unpacking").rename(place)
    return next(p.parent for p in sorted(place.rglob("train")))


def paths(folder: Path) -> dict[str, str]:
    """data.train and data.val: the training images, and those held out."""
    held_out = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    if held_out is None:
        raise config.UserError(
            f"{folder}: has neither test/ nor val/; give --data a folder with train/ and one of "
            "them"
        )
    return dict(train=str(folder / "train"), val=str(held_out))


def planned(out: Path, base: Path, preset: dict, args: argparse.Namespace) -> dict:
    """The plan of all calls, made by the first: the epochs that were asked for, or those that fit
    into --minutes by the measured speed of each arm.

    Raises UserError where this call asks for something else than the plan."""
    file = out / "plan.json"
    asked = dict(
        preset=args.preset,
        data=str(args.data),
        seeds=len(args.seeds),
        minutes=args.minutes,
        epochs=args.epochs,
    )
    if file.exists():
        plan = json.loads(file.read_text())
        if differ := [k for k, v in asked.items() if v is not None and plan[k] != v]:
            raise config.UserError(
                f"{file}: was made for another {' and '.join(differ)}; give another --out"
            )
        return plan
    speeds = {} if args.epochs else seconds_per_epoch(out, base, preset)
    plan = asked | dict(minutes=args.minutes or MINUTES, seconds_per_epoch=speeds)
    plan["epochs"] = args.epochs or fitting(speeds, plan["minutes"], len(args.seeds))
    plan["teacher_epochs"] = TEACHER_EPOCHS * plan["epochs"]
    file.write_text(json.dumps(plan, indent=1))
    return plan


def seconds_per_epoch(out: Path, base: Path, preset: dict) -> dict[str, float]:
    """Measured by some steps of the teacher, the student alone and DisCo, as real commands."""
    common = ["data.val=null", f"log.every={preset['probe'] // 4}"]
    teacher = arm_settings(out, preset, "teacher", 0, 1)[1:]
    # DisCo's probe needs a teacher, whose weights do not matter.
    weights = ["run.name=probe_weights", "run.max_steps=2", "data.val=null", *teacher]
    train(base, weights, float("inf"))
    found = {}
    for name in ("teacher", "alone", "disco"):
        settings = [
            x.replace(f"{out}/teacher", f"{out}/probe_weights")
            for x in arm_settings(out, preset, name, 0, 1)[1:]
        ]
        steps = f"run.max_steps={preset['probe']}"
        train(base, [f"run.name=probe_{name}", steps, *common, *settings], float("inf"))
        run = out / f"probe_{name}"
        # The first line has the start in it.
        step = statistics.median(x["perf/step_time"] for x in metrics(run)[1:])
        d = config.load(run / "config.yaml").data
        found[name] = step * (len(data.listing(d.train).kept) // d.batch)
    return found


def fitting(seconds: dict[str, float], minutes: float, seeds: int) -> int:
    """Epochs of a student that fit into the minutes.

    They hold the teacher, and for each seed the student alone, with DisCo, alone for DisCo's time,
    and with SEED, which takes DisCo's time at most."""
    once = TEACHER_EPOCHS * seconds["teacher"] + seeds * (seconds["alone"] + 3 * seconds["disco"])
    return max(1, int(60 * minutes / once))
