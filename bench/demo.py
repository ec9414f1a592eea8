"""The paper's ordering on an embedded data set: teacher, student alone, alone for DisCo's time,
DisCo; kNN top-1 and minutes of each.

    python bench/demo.py --seeds 0                    the demo: one seed, a table, a picture of the
    embeddings
    python bench/demo.py --seeds 1 2 3 4 5 --keep     the figures of bench/results/

Every arm is the real command on configs/demo/; a seed sets data, weights and views alike.  Finished
arms are not run again."""

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from common import ROOT, knn_top1, row, untrained, write
from rich.console import Console
from rich.table import Table

from fastdisco import config, data, models
from fastdisco.data import demo

EQUAL_EPOCHS = 20  # of the student alone: DisCo's time; the table shows what both took
ARMS = {  # name -> what differs from the student's configuration; OUT and SEED are filled in
    "teacher": ("teacher", []),
    "alone": ("student", ["teacher=null"]),
    "alone_equal_time": ("student", ["teacher=null", f"run.epochs={EQUAL_EPOCHS}"]),
    "disco": ("student", ["teacher.file=OUT/teacher-SEED"]),
}
ROWS = {
    "raw_pixels": "raw pixels",
    "untrained_student": "untrained student",
    "untrained_teacher": "untrained teacher",
    "teacher": "teacher, MoCo-v2",
    "alone": "student alone, MoCo-v2",
    "alone_equal_time": "student alone, DisCo's time",
    "disco": "student with DisCo",
}
LIMITS = (
    "Limits: patches of 18 photographs, minutes of training; alone, so small a student learns next "
    "to nothing in this time, and DisCo\n"
    "costs more time an epoch (hence the row of equal time). The recipe was chosen on other data "
    "seeds.\n"
    "It shows the ordering, not the paper's numbers."
)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--out", type=Path, default=Path("out/demo"))
    parser.add_argument("--keep", action="store_true", help="write bench/results/demo-cpu.json")
    args = parser.parse_args()
    out = args.out.resolve()  # the training commands start in the root
    scores = {seed: one_seed(out, seed) for seed in args.seeds}
    show(scores)
    picture = out / f"embeddings-{args.seeds[0]}.png"
    draw(out, args.seeds[0], picture)
    print(
        f"{LIMITS}\nOutputs: {out}/<arm>-<seed>/ (config.yaml, metrics.jsonl, tb/, checkpoints/); "
        f"embeddings: {picture}"
    )
    if args.keep:
        device = "gpu" if torch.cuda.is_available() else "cpu"
        print(
            f"kept in {write('demo', device, summary(scores), scores, alone_equal_time_epochs=EQUAL_EPOCHS)}"
        )


def one_seed(out: Path, seed: int) -> dict[str, dict]:
    """{row: {"knn": 0..1, "minutes": training time}} of one seed."""
    demo.write(out / f"data-{seed}", seed=seed)
    scores = {}
    for number, (arm, (file, differs)) in enumerate(ARMS.items()):
        run = out / f"{arm}-{seed}"
        # Beside the run, which its own command may rewrite; written when the arm is finished.
        timing = out / f"{run.name}.minutes"
        overrides = [
            f"run.name={run.name}",
            f"run.out={out}",
            f"run.seed={seed}",
            f"data.train={out}/data-{seed}/train",
            f"data.val={out}/data-{seed}/val",
            *(x.replace("OUT", str(out)).replace("SEED", str(seed)) for x in differs),
        ]
        settings = f"configs/demo/{file}.yaml"
        finished = timing.exists() and (run / "config.yaml").exists()
        if not finished or config.load(run / "config.yaml") != config.load(
            ROOT / settings, overrides
        ):
            for later in list(ARMS)[number:]:  # what hangs on this arm is out of date with it
                (out / f"{later}-{seed}.minutes").unlink(missing_ok=True)
            command = [
                sys.executable,
                "fastdisco/train.py",
                "--config",
                settings,
                "--overwrite",
                *overrides,
            ]
            print(f"\n{ROWS[arm]}: {' '.join(command[1:])}", flush=True)
            begin = time.perf_counter()
            if code := subprocess.run(command, cwd=ROOT).returncode:
                sys.exit(code)  # the command has said why
            timing.write_text(f"{(time.perf_counter() - begin) / 60:.2f}")
        last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
        scores[arm] = {"knn": last["eval/knn_top1"], "minutes": float(timing.read_text())}
    return fixed(out, seed) | scores


def fixed(out: Path, seed: int) -> dict[str, dict]:
    """The rows that nothing is trained for, by the same evaluation."""
    rows = {"raw_pixels": {"knn": evaluate(out, seed, lambda x: x.flatten(1)), "minutes": None}}
    for name, arm in (("untrained_student", "disco"), ("untrained_teacher", "teacher")):
        rows[name] = {
            "knn": evaluate(out, seed, untrained(out / f"{arm}-{seed}").features),
            "minutes": None,
        }
    return rows


def evaluate(out: Path, seed: int, encode) -> float:
    return knn_top1(encode, config.load(out / f"disco-{seed}" / "config.yaml"), torch.device("cpu"))


def show(scores: dict[int, dict]):
    table = Table(title="Which photograph is this patch from: kNN top-1 on held-out parts")
    for name in (
        "",
        *(f"seed {s}" for s in scores),
        *(["mean"] if len(scores) > 1 else []),
        "minutes",
    ):
        table.add_column(name, justify="left" if not name else "right")
    for name, title in ROWS.items():
        values = [s[name]["knn"] for s in scores.values()]
        mean = (
            [f"{statistics.mean(values):.1%} ± {statistics.stdev(values):.1%}"]
            if len(values) > 1
            else []
        )
        minutes = [s[name]["minutes"] for s in scores.values() if s[name]["minutes"] is not None]
        table.add_row(
            title,
            *(f"{v:.1%}" for v in values),
            *mean,
            f"{statistics.mean(minutes):.1f}" if minutes else "",
        )
    Console(width=120).print(table)


def summary(scores: dict[int, dict]) -> list[dict]:
    mean = lambda name, what: statistics.mean(s[name][what] for s in scores.values())
    rows = [row(name, 100 * mean(name, "knn"), "% kNN top-1", None, "higher") for name in ROWS]
    for arm in ("alone", "alone_equal_time"):
        gains = [100 * (s["disco"]["knn"] - s[arm]["knn"]) for s in scores.values()]
        rows.append(
            row(
                f"disco_minus_{arm}",
                statistics.mean(gains),
                f"points, mean of {len(gains)} seeds",
                0,
                "higher",
            )
        )
        rows.append(
            row(f"disco_minus_{arm}_worst", min(gains), "points, the worst seed", 0, "higher")
        )
    rows.append(
        row(
            "teacher_minus_disco",
            100 * (mean("teacher", "knn") - mean("disco", "knn")),
            "points, mean",
            0,
            "higher",
        )
    )
    return rows + [
        row(f"minutes_{arm}", mean(arm, "minutes"), "minutes", None, "lower") for arm in ARMS
    ]


@torch.no_grad()
def draw(out: Path, seed: int, path: Path):
    """t-SNE of the validation patches' features under four networks, coloured by photograph."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    from sklearn.manifold import TSNE

    nets = {"untrained student": untrained(out / f"disco-{seed}")}
    for name, arm in (
        ("teacher", "teacher"),
        ("student alone", "alone"),
        ("student with DisCo", "disco"),
    ):
        nets[name] = models.from_run(out / f"{arm}-{seed}")[0]
    cfg = config.load(out / f"disco-{seed}" / "config.yaml")
    val = data.listing(cfg.data.val)
    some = np.arange(0, len(val.files), 2)
    d = cfg.data
    batches = list(
        data.EvalLoader(
            val, d.eval_resize, d.eval_size, d.eval_batch, d.threads, torch.device("cpu"), some
        )
    )
    label = torch.cat([b.label for b in batches])
    figure, axes = plt.subplots(1, 4, figsize=(18, 4.8))
    for axis, (name, net) in zip(axes, nets.items()):
        features = torch.cat(
            [torch.nn.functional.normalize(net.features(b.views[0]), dim=1) for b in batches]
        ).numpy()
        xy = TSNE(init="pca", random_state=0).fit_transform(features)
        axis.scatter(*xy.T, c=label, cmap="tab20", s=6)
        axis.set(title=name, xticks=[], yticks=[])
    figure.suptitle(
        f"Held-out patches of {len(val.classes)} photographs, t-SNE of the features, one colour a "
        "photograph"
    )
    figure.tight_layout()
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    try:
        main()
    except config.UserError as e:
        sys.exit(f"fastdisco: error: {e}")
