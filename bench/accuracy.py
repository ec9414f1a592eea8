"""What distillation is worth where a student has time to learn: CIFAR-10, or any folder, with a
table, a plot and an untrained network beside each.

    python bench/accuracy.py --data cifar10                   the first call measures speeds and
    fixes the epochs that fit; then it trains python bench/accuracy.py --data cifar10 --stop-after 9
    the same in pieces: each call goes on where the last one stopped

A teacher by MoCo-v2, then for each seed the student alone (MoCo-v2), with DisCo, alone for as many
epochs as fit DisCo's measured training time, and with SEED; every arm is the real command, and all
share every setting but the term.  kNN and linear accuracy (logistic regression on frozen features)
are those of the last epoch on the test split, by which nothing was chosen.  SEED looks at one crop
of an image where the others look at two. Finished arms are not run again."""

import argparse
import json
import statistics
import subprocess
import sys
import tarfile
import time
import warnings
from pathlib import Path

import matplotlib
import torch
from common import ROOT, knn_top1, row, untrained, write
from rich.console import Console
from rich.table import Table

from fastdisco import config, data, models

SHARED = dict(
    method=dict(name="moco", queue=4096, momentum=0.99), checkpoint=dict(every=100, keep=1)
)
# In words, for a method may bring a recipe of its own.
PLAIN = dict(lr_scale="none", warmup_epochs=0, per="step")
# The student's configuration; the teacher's network; its step size; how many steps tell the speed.
PRESETS = {
    "cpu": dict(
        teacher="resnet18",
        teacher_lr=0.06,
        probe=40,
        cfg=SHARED
        | dict(
            data=dict(batch=128, threads=2, eval_resize=32, eval_size=32, eval_batch=256),
            view=dict(size=32, scale=[0.5, 1.0], blur_sigma=[0.1, 1.0]),
            student=dict(arch="mobilenetv3_small_050", hidden=2048),
            bn=dict(groups=4),
            optim=dict(lr=0.03, **PLAIN),
        ),
    ),
    "gpu": dict(
        teacher="resnet50",
        teacher_lr=0.06,
        probe=200,
        cfg=SHARED
        | dict(
            data=dict(batch=256, threads=12, eval_resize=64, eval_size=64, eval_batch=512),
            view=dict(size=64, scale=[0.3, 1.0], blur_sigma=[0.1, 1.0]),
            student=dict(arch="mobilenetv3_large_100", hidden=2048),
            bn=dict(groups=8),
            optim=dict(lr=0.06, **PLAIN),
            engine=dict(precision="bf16"),
            checkpoint=dict(every=1000, keep=1),
        ),
    ),
}
MINUTES = 90
# Of the teacher for each of a student's: what it has not learned it cannot pass on.
TEACHER_EPOCHS = 2
# What differs from the student's configuration; OUT and TEACHER are filled in, and the queue's
# length.
ARMS = {
    "alone": [],
    "disco": ["teacher={file: OUT/teacher, arch: TEACHER}"],
    "alone_equal_time": [],  # and the epochs
    "seed": ["teacher={file: OUT/teacher, arch: TEACHER}", "method={name: seed, queue: QUEUE}"],
}
TITLES = {
    "teacher": "teacher, MoCo-v2",
    "alone": "student alone, MoCo-v2",
    "alone_equal_time": "student alone, DisCo's time",
    "disco": "student with DisCo",
    "seed": "student with SEED",
}


def main(argv: list[str] | None = None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--data",
        type=Path,
        required=True,
        help="a folder with train/ and test/ or val/, or a tar of one",
    )
    parser.add_argument(
        "--name",
        help="of the data in the rows; the folder's or the tar's up to its first dot unless given",
    )
    parser.add_argument(
        "--minutes",
        type=float,
        help=f"of training, all arms and seeds together; evaluation comes on top ({MINUTES})",
    )
    parser.add_argument(
        "--stop-after",
        type=float,
        default=1e9,
        metavar="MINUTES",
        help="end this call by then; the next one goes on",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0], help="of the students; the teacher is one"
    )
    parser.add_argument(
        "--preset", choices=PRESETS, default="gpu" if torch.cuda.is_available() else "cpu"
    )
    parser.add_argument(
        "--epochs", type=int, help="of a student, instead of measuring what fits into --minutes"
    )
    parser.add_argument("--out", type=Path, default=Path("out/accuracy"))
    parser.add_argument(
        "--keep", action="store_true", help="write bench/results/accuracy-<device>.json"
    )
    args = parser.parse_args(argv)
    out, end = args.out.resolve(), time.monotonic() + 60 * args.stop_after
    out.mkdir(parents=True, exist_ok=True)
    folder = images(args.data, out)
    preset = PRESETS[args.preset]
    base = out / "student.yaml"
    # JSON is YAML.
    base.write_text(
        json.dumps(preset["cfg"] | {"data": preset["cfg"]["data"] | paths(folder)}, indent=1)
    )
    plan = planned(out, base, preset, args)
    print(
        f"{plan['epochs']} epochs a student, {plan['teacher_epochs']} the teacher; "
        f"{out / 'plan.json'} holds the measured speeds",
        flush=True,
    )
    missing, scores = {}, {}
    try:
        scores["teacher"] = [arm(out, base, preset, "teacher", 0, plan["teacher_epochs"], end)]
        for seed in args.seeds:
            for name in ARMS:
                epochs = plan["epochs"]
                if name == "alone_equal_time":
                    epochs = max(
                        1,
                        round(
                            epochs * scores["disco"][-1]["minutes"] / scores["alone"][-1]["minutes"]
                        ),
                    )
                scores.setdefault(name, []).append(arm(out, base, preset, name, seed, epochs, end))
    except Stopped as e:
        print(f"{e}; the same command goes on")
        missing |= {
            name: "the time was up"
            for name in TITLES
            if len(scores.get(name, [])) < (1 if name == "teacher" else len(args.seeds))
        }
        scores = {name: s for name, s in scores.items() if name not in missing}
    if scores:
        show(scores)
        draw(scores, out / "accuracy.png")
    rows = summary(scores, missing, args.name or args.data.resolve().name.split(".")[0])
    if args.keep:
        device = "gpu" if torch.cuda.is_available() else "cpu"
        used = json.loads(base.read_text())
        # Where they lie says nothing elsewhere.
        used["data"] = {k: v for k, v in used["data"].items() if k not in ("train", "val")}
        about = dict(
            preset=args.preset, config=used, plan=plan | {"data": args.data.name}, seeds=args.seeds
        )
        print("kept in", write("accuracy", device, rows, scores, **about))
    return rows


class Stopped(Exception):
    """The call's time is up."""


# ---- data and the length of the runs


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
    held_out = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    if held_out is None:
        raise config.UserError(
            f"{folder}: has neither test/ nor val/; give --data a folder with train/ and one of "
            "them"
        )
    return dict(train=str(folder / "train"), val=str(held_out))


def planned(out: Path, base: Path, preset: dict, args) -> dict:
    """The epochs, once and for all calls: those asked for, or those that fit into --minutes by the
    speed of some steps of each arm."""
    file = out / "plan.json"
    if file.exists():
        plan = json.loads(file.read_text())
        asked = dict(
            preset=args.preset,
            data=str(args.data),
            seeds=len(args.seeds),
            epochs=args.epochs,
            minutes=args.minutes,
        )
        if differ := [k for k, v in asked.items() if v is not None and plan[k] != v]:
            raise config.UserError(
                f"{file}: was made for another {' and '.join(differ)}; give another --out"
            )
        return plan
    seconds = {}
    if not args.epochs:
        teacher = arm_settings(out, preset, "teacher", 0, 1)
        train(
            base,
            ["run.name=probe_weights", "run.max_steps=2", "data.val=null", *teacher[1:]],
            float("inf"),
        )
        for name in ("teacher", "alone", "disco"):
            settings = [
                x.replace(f"{out}/teacher", f"{out}/probe_weights")
                for x in arm_settings(out, preset, name, 0, 1)[1:]
            ]
            probe = [
                f"run.name=probe_{name}",
                f"run.max_steps={preset['probe']}",
                "data.val=null",
                f"log.every={preset['probe'] // 4}",
                *settings,
            ]
            train(base, probe, float("inf"))
            steps = [x["perf/step_time"] for x in metrics(out / f"probe_{name}")]
            cfg = config.load(out / f"probe_{name}/config.yaml")
            seconds[name] = statistics.median(steps[1:]) * (
                len(data.listing(cfg.data.train).kept) // cfg.data.batch
            )
    minutes = args.minutes or MINUTES
    plan = dict(
        preset=args.preset,
        data=str(args.data),
        seeds=len(args.seeds),
        minutes=minutes,
        seconds_per_epoch=seconds,
        epochs=args.epochs or fitting(seconds, minutes, len(args.seeds)),
    )
    plan["teacher_epochs"] = TEACHER_EPOCHS * plan["epochs"]
    file.write_text(json.dumps(plan, indent=1))
    return plan


def fitting(seconds: dict[str, float], minutes: float, seeds: int) -> int:
    """Epochs of a student: the teacher's, and for each seed alone, DisCo, alone for DisCo's time,
    and SEED, which takes DisCo's at most."""
    once = TEACHER_EPOCHS * seconds["teacher"] + seeds * (seconds["alone"] + 3 * seconds["disco"])
    return max(1, int(60 * minutes / once))


# ---- an arm


def arm(out: Path, base: Path, preset: dict, name: str, seed: int, epochs: int, end: float) -> dict:
    """Trains it unless it is finished; kNN and linear accuracy, also of the network it began with,
    training minutes, epochs."""
    settings = arm_settings(out, preset, name, seed, epochs)
    run = out / settings[0].removeprefix("run.name=")
    if not finished(run):
        print(f"\n{TITLES[name]}, seed {seed}, {epochs} epochs", flush=True)
        train(base, settings, end)
        if not finished(run):
            raise Stopped(f"stopped within {run.name}")
    file = run / "accuracy.json"
    if not file.exists():
        if time.monotonic() > end:
            raise Stopped(f"stopped before {run.name} was evaluated")
        minutes = trained_minutes(metrics(run))
        scores = dict(epochs=epochs, minutes=minutes, knn=metrics(run)[-1]["eval/knn_top1"])
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        net, cfg = models.from_run(run)
        scores["linear"] = linear(net.to(device).features, cfg, device)
        if name in ("teacher", "alone"):
            first = untrained(run).to(device)
            scores |= dict(
                untrained_knn=knn_top1(first.features, cfg, device),
                untrained_linear=linear(first.features, cfg, device),
            )
        else:  # a seed's students all begin as one network
            alone = json.loads((out / f"alone-{seed}/accuracy.json").read_text())
            scores |= {key: alone[key] for key in ("untrained_knn", "untrained_linear")}
        file.write_text(json.dumps(scores))
    return json.loads(file.read_text())


def arm_settings(out: Path, preset: dict, name: str, seed: int, epochs: int) -> list[str]:
    """Overrides of the arm's command, its name first."""
    common = [f"run.out={out}", f"run.seed={seed}", f"run.epochs={epochs}"]
    if name == "teacher":
        return [
            "run.name=teacher",
            *common,
            f"student.arch={preset['teacher']}",
            f"optim.lr={preset['teacher_lr']}",
        ]
    fill = dict(
        OUT=str(out), TEACHER=preset["teacher"], QUEUE=str(preset["cfg"]["method"]["queue"])
    )
    more = ARMS[name]
    for key, value in fill.items():
        more = [x.replace(key, value) for x in more]
    return [f"run.name={name}-{seed}", *common, *more]


def train(base: Path, settings: list[str], end: float):
    """The real command, asked to stop at `end` of time.monotonic(): it then saves and can go on."""
    if time.monotonic() > end:
        raise Stopped(f"stopped before {settings[0].removeprefix('run.name=')}")
    process = subprocess.Popen(
        [sys.executable, "fastdisco/train.py", "--config", str(base), *settings], cwd=ROOT
    )
    try:
        code = process.wait(end - time.monotonic())
    except subprocess.TimeoutExpired:
        process.terminate()
        code = process.wait()
        code = 0 if code in (0, -15) else code  # before the loop began there was nothing to save
    if code:
        sys.exit(code)  # the command has said why


def finished(run: Path) -> bool:
    """Whether the last line is the evaluation, and of the checkpoint that is there."""
    if not (run / "metrics.jsonl").exists() or not (run / "checkpoints/last").exists():
        return False
    last = (metrics(run) or [{}])[-1]
    return (
        "eval/knn_top1" in last
        and (run / "checkpoints/last").read_text().strip() == f"step_{last['step']:08}"
    )


def metrics(run: Path) -> list[dict]:
    return [json.loads(x) for x in (run / "metrics.jsonl").read_text().splitlines()]


def trained_minutes(lines: list[dict]) -> float:
    """Training alone, without start, evaluation and what a stopped call did after its last
    checkpoint."""
    total, before = 0.0, 0
    for x in lines:
        total += (x["step"] - before) * x.get("perf/step_time", 0.0)
        before = x["step"]
    return total / 60


@torch.no_grad()
def features(
    encode, listing: data.Listing, cfg: config.Config, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    d, v = cfg.data, cfg.view
    batches = data.EvalLoader(
        listing,
        d.eval_resize,
        d.eval_size,
        d.eval_batch,
        d.threads,
        device,
        listing.kept,
        v.mean,
        v.std,
    )
    pairs = [(encode(b.views[0]).float().cpu(), b.label.cpu()) for b in batches]
    return torch.cat([x for x, _ in pairs]), torch.cat([y for _, y in pairs])


def linear(encode, cfg: config.Config, device: torch.device) -> float:
    """Test accuracy of a logistic regression on the frozen features of the training images under
    the evaluation's transform, no augmentation."""
    from sklearn.linear_model import LogisticRegression

    (x, y), (x_test, y_test) = (
        features(encode, data.listing(p, cfg.data.quarantine), cfg, device)
        for p in (cfg.data.train, cfg.data.val)
    )
    mean, std = x.mean(0), x.std(0) + 1e-6
    x, x_test = (x - mean) / std, (x_test - mean) / std
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it stops after max_iter, for all arms alike
        fit = LogisticRegression(C=0.01, max_iter=100).fit(x.numpy(), y.numpy())
    return float(fit.score(x_test.numpy(), y_test.numpy()))


# ---- what it shows


def show(scores: dict[str, list[dict]]):
    table = Table(title="Accuracy on the test split, mean over seeds, %")
    for name in ("", "kNN", "untrained", "linear", "untrained", "epochs", "minutes"):
        table.add_column(name, justify="left" if not name else "right")
    for name in [n for n in TITLES if n in scores]:
        values = {key: [s[key] for s in scores[name]] for key in scores[name][0]}
        spread = lambda key: (
            f"{100 * statistics.mean(values[key]):.1f}"
            + (f" ± {100 * statistics.stdev(values[key]):.1f}" if len(values[key]) > 1 else "")
        )
        table.add_row(
            TITLES[name],
            spread("knn"),
            spread("untrained_knn"),
            spread("linear"),
            spread("untrained_linear"),
            f"{statistics.mean(values['epochs']):g}",
            f"{statistics.mean(values['minutes']):.1f}",
        )
    Console(width=120).print(table)


def draw(scores: dict[str, list[dict]], path: Path):
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = [n for n in TITLES if n in scores]
    figure, axes = plt.subplots(1, 2, figsize=(11, 3.2), sharey=True)
    for axis, (key, title) in zip(axes, (("knn", "kNN top-1"), ("linear", "linear top-1"))):
        for y, name in enumerate(names):
            values = [100 * s[key] for s in scores[name]]
            axis.barh(
                y,
                statistics.mean(values),
                color="tab:gray" if name == "teacher" else "tab:blue",
                alpha=0.7,
            )
            axis.plot(values, [y] * len(values), "k.", markersize=5)
            axis.plot(
                [100 * statistics.mean(s[f"untrained_{key}"] for s in scores[name])] * 2,
                [y - 0.4, y + 0.4],
                "r--",
            )
        axis.set(
            title=f"{title}, % of the test split",
            yticks=range(len(names)),
            yticklabels=[TITLES[n] for n in names],
        )
    axes[0].invert_yaxis()
    axes[1].plot([], [], "r--", label="untrained network")
    axes[1].plot([], [], "k.", label="a seed")
    axes[1].legend(loc="lower right", fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    print(f"plot: {path}")


def summary(scores: dict[str, list[dict]], missing: dict[str, str], where: str) -> list[dict]:
    rows, why = (
        [],
        lambda *names: next(
            (f"{n}: {missing.get(n, 'not run')}" for n in names if n not in scores), None
        ),
    )
    mean = lambda name, key: 100 * statistics.mean(s[key] for s in scores[name])

    def add(name, unit, value, *arms, aim=None):
        reason = why(*arms)
        rows.append(row(name, None if reason else round(value(), 2), unit, aim, "higher", reason))

    for key, what in (("knn", ""), ("linear", "linear_")):
        unit = f"points of {'kNN' if key == 'knn' else 'linear'} top-1, mean over seeds"
        for name, a, b in (
            ("disco_gain", "disco", "alone"),
            ("disco_gain_equal_time", "disco", "alone_equal_time"),
            ("seed_gain", "seed", "alone"),
        ):
            add(
                f"{name}_{what}points_{where}",
                unit,
                lambda: mean(a, key) - mean(b, key),
                a,
                b,
                aim=0,
            )
    for key in ("knn", "linear"):
        for name in TITLES:
            add(f"{name}_{key}", f"% {key} top-1", lambda: mean(name, key), name)
        add(
            f"untrained_student_{key}",
            f"% {key} top-1",
            lambda: mean("alone", f"untrained_{key}"),
            "alone",
        )
        add(
            f"untrained_teacher_{key}",
            f"% {key} top-1",
            lambda: mean("teacher", f"untrained_{key}"),
            "teacher",
        )
    return rows


if __name__ == "__main__":
    try:
        main()
    except config.UserError as e:
        sys.exit(f"fastdisco: error: {e}")
