"""What distillation is worth where a student has time to learn: CIFAR-10, or any folder, with a
table, a plot and an untrained network beside each.

    python bench/accuracy.py --data cifar10
        the first call measures speeds and fixes the epochs that fit; then it trains
    python bench/accuracy.py --data cifar10 --stop-after 9
        the same in pieces: each call goes on where the last one stopped
    python bench/accuracy.py --data cifar10 --keep
        also writes bench/results/accuracy-<device>.json and .png

A teacher is trained by MoCo-v2.  Then for each seed a student is trained alone (MoCo-v2), with
DisCo, alone for as many epochs as fit DisCo's measured training time, and with SEED.  Every arm is
the real command, and all share every setting but the term.  kNN and linear accuracy (logistic
regression on frozen features) are those of the last epoch on the test split, by which nothing was
chosen.  SEED looks at one crop of an image where the others look at two.  Finished arms are not run
again."""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from comparison.arms import ARMS, PRESETS, Stopped, arm
from comparison.plan import MINUTES, images, paths, planned
from harness import finish, parser, pictures, row
from harness.results import device_kind
from harness.tables import percent, show_table
from pictures.accuracy import TITLES, draw

from fastdisco import config


def main(argv: list[str] | None = None) -> list[dict]:
    """The rows, also of what one call did not finish."""
    args = arguments(argv)
    out, end = args.out.resolve(), time.monotonic() + 60 * args.stop_after
    out.mkdir(parents=True, exist_ok=True)
    folder, preset, base = images(args.data, out), PRESETS[args.preset], out / "student.yaml"
    settings = preset["cfg"] | {"data": preset["cfg"]["data"] | paths(folder)}
    # JSON is YAML.
    base.write_text(json.dumps(settings, indent=1))
    plan = planned(out, base, preset, args)
    print(
        f"{plan['epochs']} epochs a student, {plan['teacher_epochs']} the teacher; "
        f"{out / 'plan.json'} holds the measured speeds",
        flush=True,
    )
    scores, missing = trained(out, base, preset, plan, args.seeds, end)
    if scores:
        show(scores)
        picture = out / "accuracy.png"
        picture.write_bytes(pictures.png(draw(dict(samples=scores)), {}))
        print(f"plot: {picture}")
    rows = summary(scores, missing, args.name or args.data.resolve().name.split(".")[0])
    if args.keep:
        # Where the images lie says nothing elsewhere.
        used = {k: v for k, v in settings["data"].items() if k not in ("train", "val")}
        about = dict(preset=args.preset, config=settings | {"data": used})
        about |= dict(plan=plan | {"data": args.data.name}, seeds=args.seeds)
        finish("accuracy", device_kind(), rows, scores, **about)
    return rows


def arguments(argv: list[str] | None) -> argparse.Namespace:
    options = parser(__doc__)
    add = options.add_argument
    add(
        "--data",
        type=Path,
        required=True,
        help="a folder with train/ and test/ or val/, or a tar of one",
    )
    add("--name", help="of the data in the rows; by default --data up to its first dot")
    add(
        "--minutes",
        type=float,
        help=f"of training, all arms and seeds together; evaluation comes on top ({MINUTES})",
    )
    add(
        "--stop-after",
        type=float,
        default=1e9,
        metavar="MINUTES",
        help="end this call by then; the next one goes on",
    )
    add("--seeds", type=int, nargs="+", default=[0], help="of the students; the teacher is one")
    add("--preset", choices=PRESETS, default="gpu" if torch.cuda.is_available() else "cpu")
    add("--epochs", type=int, help="of a student, instead of measuring what fits into --minutes")
    add("--out", type=Path, default=Path("out/accuracy"))
    add("--keep", action="store_true", help="write bench/results/accuracy-<device>.json")
    return options.parse_args(argv)


def trained(
    out: Path, base: Path, preset: dict, plan: dict, seeds: list[int], end: float
) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """Scores of each arm, one for each seed, and why others are missing."""
    scores: dict[str, list[dict]] = {}
    try:
        scores["teacher"] = [arm(out, base, preset, "teacher", 0, plan["teacher_epochs"], end)]
        for seed in seeds:
            for name in ARMS:
                epochs = plan["epochs"]
                if name == "alone_equal_time":
                    alone, disco = (scores[x][-1]["minutes"] for x in ("alone", "disco"))
                    epochs = max(1, round(epochs * disco / alone))
                one = arm(out, base, preset, name, seed, epochs, end)
                scores.setdefault(name, []).append(one)
    except Stopped as e:
        print(f"{e}; the same command goes on")
    wanted = {name: 1 if name == "teacher" else len(seeds) for name in TITLES}
    missing = {n: "the time was up" for n, k in wanted.items() if len(scores.get(n, [])) < k}
    return {name: s for name, s in scores.items() if name not in missing}, missing


def show(scores: dict[str, list[dict]]) -> None:
    """Prints the table, the mean over seeds in per cent."""
    lines = []
    for name in (n for n in TITLES if n in scores):
        values = {key: [s[key] for s in scores[name]] for key in scores[name][0]}
        shares = ("knn", "untrained_knn", "linear", "untrained_linear")
        epochs, minutes = statistics.mean(values["epochs"]), statistics.mean(values["minutes"])
        cells = [percent(values[key]) for key in shares]
        lines.append([TITLES[name], *cells, f"{epochs:g}", f"{minutes:.1f}"])
    columns = ["", "kNN", "untrained", "linear", "untrained", "epochs", "minutes"]
    show_table("Accuracy on the test split, mean over seeds, %", columns, lines)


def summary(scores: dict[str, list[dict]], missing: dict[str, str], where: str) -> list[dict]:
    """The rows: gains over the student alone in points, then every arm's accuracy in per cent.

    where  names the data in the rows of gains"""

    def mean(name: str, key: str) -> float:
        return 100 * statistics.mean(s[key] for s in scores[name])

    def one(name: str, unit: str, arms: list[str], keys: list[str], aim: float | None) -> dict:
        """The first arm's mean, less the second's where there are two."""
        lost = [f"{n}: {missing.get(n, 'not run')}" for n in arms if n not in scores]
        if lost:
            return row(name, None, unit, aim, "higher", lost[0])
        first, *rest = (mean(n, key) for n, key in zip(arms, keys))
        return row(name, round(first - sum(rest), 2), unit, aim, "higher")

    rows = []
    for key, what in (("knn", ""), ("linear", "linear_")):
        unit = f"points of {'kNN' if key == 'knn' else 'linear'} top-1, mean over seeds"
        for name, a, b in (
            ("disco_gain", "disco", "alone"),
            ("disco_gain_equal_time", "disco", "alone_equal_time"),
            ("seed_gain", "seed", "alone"),
        ):
            rows.append(one(f"{name}_{what}points_{where}", unit, [a, b], [key, key], 0))
    for key in ("knn", "linear"):
        unit, before = f"% {key} top-1", [f"untrained_{key}"]
        rows += [one(f"{name}_{key}", unit, [name], [key], None) for name in TITLES]
        rows.append(one(f"untrained_student_{key}", unit, ["alone"], before, None))
        rows.append(one(f"untrained_teacher_{key}", unit, ["teacher"], before, None))
    return rows


if __name__ == "__main__":
    try:
        main()
    except config.UserError as e:
        sys.exit(f"fastdisco: error: {e}")
