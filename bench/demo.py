"""The paper's ordering on an embedded data set: teacher, student alone, student alone for DisCo's
time, and DisCo, with kNN top-1 and minutes of each.

    python bench/demo.py --seeds 0
        the demo: one seed, a table, and a picture of the embeddings
    python bench/demo.py --seeds 1 2 3 4 5 --keep
        also writes bench/results/demo-<device>.json

Every arm is the real command on configs/demo/.  A seed sets data, weights and views alike.
Finished arms are not run again."""

import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch
from harness import ROOT, finish, parser, pictures, row
from harness.results import device_kind
from harness.runs import command, knn_top1, metrics, untrained
from harness.tables import percent, show_table

from fastdisco import config, data, models
from fastdisco.data import demo

# Of the student alone: DisCo's time; the table shows what both took.
EQUAL_EPOCHS = 20
# Arm -> the file in configs/demo/, and what differs from it; OUT and SEED are filled in.
ARMS = {
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
    "Limits: the images are patches of 18 photographs, and training takes minutes. A student so "
    "small\nlearns next to nothing alone in this time. DisCo costs more time an epoch, hence the row "
    "of equal\ntime. The recipe was chosen on other data seeds. The demo shows the ordering, not the "
    "paper's numbers."
)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--out", type=Path, default=Path("out/demo"))
    options.add_argument("--keep", action="store_true", help="write bench/results/demo-cpu.json")
    args = options.parse_args()
    # The training commands start in the project's root.
    out = args.out.resolve()
    scores = {seed: one_seed(out, seed) for seed in args.seeds}
    show(scores)
    picture = out / f"embeddings-{args.seeds[0]}.png"
    draw(out, args.seeds[0], picture)
    print(
        f"{LIMITS}\nOutputs: {out}/<arm>-<seed>/ (config.yaml, metrics.jsonl, tb/, checkpoints/); "
        f"embeddings: {picture}"
    )
    if args.keep:
        about = dict(alone_equal_time_epochs=EQUAL_EPOCHS)
        finish("demo", device_kind(), summary(scores), scores, **about)


def one_seed(out: Path, seed: int) -> dict[str, dict]:
    """{row: {"knn": 0..1, "minutes": training time}} of one seed."""
    demo.write(out / f"data-{seed}", seed=seed)
    trained = {arm: train(out, arm, seed) for arm in ARMS}
    return fixed(out, seed) | trained


def train(out: Path, arm: str, seed: int) -> dict[str, float]:
    """Trains an arm unless it is finished with these settings; its kNN accuracy and minutes."""
    file, differs = ARMS[arm]
    run, settings = out / f"{arm}-{seed}", f"configs/demo/{file}.yaml"
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
    finished = timing.exists() and (run / "config.yaml").exists()
    wanted = config.load(ROOT / settings, overrides)
    if not finished or config.load(run / "config.yaml") != wanted:
        # What depends on this arm is out of date with it.
        for later in list(ARMS)[list(ARMS).index(arm) :]:
            (out / f"{later}-{seed}.minutes").unlink(missing_ok=True)
        line = command(settings, "--overwrite", *overrides)
        print(f"\n{ROWS[arm]}: {' '.join(line[1:])}", flush=True)
        begin = time.perf_counter()
        if code := subprocess.run(line, cwd=ROOT).returncode:
            # The command has said why.
            sys.exit(code)
        timing.write_text(f"{(time.perf_counter() - begin) / 60:.2f}")
    return {"knn": metrics(run)[-1]["eval/knn_top1"], "minutes": float(timing.read_text())}


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


def show(scores: dict[int, dict]) -> None:
    """Prints the table: a column for each seed, and the mean where there are several."""
    several, lines = len(scores) > 1, []
    for name, title in ROWS.items():
        values = [s[name]["knn"] for s in scores.values()]
        minutes = [s[name]["minutes"] for s in scores.values() if s[name]["minutes"] is not None]
        line = [title, *(percent([v]) for v in values)]
        line += [percent(values)] if several else []
        lines.append([*line, f"{statistics.mean(minutes):.1f}" if minutes else ""])
    seeds = [f"seed {s}" for s in scores] + ["mean"] * several
    title = "Which photograph is this patch from: kNN top-1 on held-out parts, %"
    show_table(title, ["", *seeds, "minutes"], lines)


def summary(scores: dict[int, dict]) -> list[dict]:
    """The rows of bench/results/, from the scores of each seed."""
    mean = lambda name, what: statistics.mean(s[name][what] for s in scores.values())
    rows = [row(name, 100 * mean(name, "knn"), "% kNN top-1", None, "higher") for name in ROWS]
    for arm in ("alone", "alone_equal_time"):
        gains = [100 * (s["disco"]["knn"] - s[arm]["knn"]) for s in scores.values()]
        unit, name = f"points, mean of {len(gains)} seeds", f"disco_minus_{arm}"
        rows += [
            row(name, statistics.mean(gains), unit, 0, "higher"),
            row(f"{name}_worst", min(gains), "points, the worst seed", 0, "higher"),
        ]
    gap = 100 * (mean("teacher", "knn") - mean("disco", "knn"))
    rows.append(row("teacher_minus_disco", gap, "points, mean", 0, "higher"))
    minutes = {arm: mean(arm, "minutes") for arm in ARMS}
    return rows + [row(f"minutes_{arm}", minutes[arm], "minutes", None, "lower") for arm in ARMS]


@torch.no_grad()
def draw(out: Path, seed: int, path: Path) -> None:
    """t-SNE of the validation patches' features under four networks, coloured by photograph."""
    from sklearn.manifold import TSNE

    trained = lambda arm: models.from_run(out / f"{arm}-{seed}")[0]
    nets = {
        "untrained student": untrained(out / f"disco-{seed}"),
        "teacher": trained("teacher"),
        "student alone": trained("alone"),
        "student with DisCo": trained("disco"),
    }
    d = config.load(out / f"disco-{seed}" / "config.yaml").data
    val, cpu = data.listing(d.val), torch.device("cpu")
    some = np.arange(0, len(val.files), 2)
    loader = data.EvalLoader(val, d.eval_resize, d.eval_size, d.eval_batch, d.threads, cpu, some)
    batches = list(loader)
    label = torch.cat([b.label for b in batches])
    figure, axes = pictures.figure(1, 4, 18, 4.8)
    for axis, (name, net) in zip(axes[0], nets.items()):
        features = torch.cat([net.features(b.views[0]) for b in batches])
        unit = torch.nn.functional.normalize(features, dim=1).numpy()
        xy = TSNE(init="pca", random_state=0).fit_transform(unit)
        axis.scatter(*xy.T, c=label, cmap="tab20", s=6)
        axis.set(title=name, xticks=[], yticks=[])
    figure.suptitle(
        f"Held-out patches of {len(val.classes)} photographs, t-SNE of the features, one colour a "
        "photograph"
    )
    path.write_bytes(pictures.png(figure, {}))


if __name__ == "__main__":
    try:
        main()
    except config.UserError as e:
        sys.exit(f"fastdisco: error: {e}")
