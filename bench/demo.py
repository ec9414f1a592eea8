"""The paper's ordering on an embedded data set: teacher, student alone and DisCo, with kNN top-1 and
minutes of each, and a report of them.

    python bench/demo.py --seeds 0
        the demo: one seed, a table, and report-0.html
    python bench/demo.py --seeds 0 --equal-time
        also trains the student alone for as long as DisCo takes
    python bench/demo.py --seeds 1 2 3 --keep
        also writes bench/results/demo-<device>.json; add --equal-time for the rows of that arm

alone_minus_untrained_worst  points of kNN top-1 that the student alone gains, of the worst seed
disco_minus_alone_worst      points of kNN top-1 that DisCo gains over that, of the worst seed
minutes_total                from the first image to the report, of the slowest seed, without the arm
                             of equal time, which `make demo` leaves out

Every arm is the real command on configs/demo/.  A seed sets data, weights and views alike.
Finished arms are not run again."""

import contextlib
import io
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

from harness import ROOT, finish, parser, row
from harness.results import device_kind
from harness.runs import command, knn_top1, metrics, untrained
from harness.tables import percent, show_table

from fastdisco import cli, config

# Deviation of the light of the images, see fastdisco data demo.
LIGHT = 0.3
# Of the student alone: DisCo's time; the table shows what both took.
EQUAL_EPOCHS = 13
# Arm -> the file in configs/demo/, and what differs from it; OUT and SEED are filled in.
ARMS = {
    "teacher": ("teacher", []),
    "alone": ("student", ["teacher=null"]),
    "alone_equal_time": ("student", ["teacher=null", f"run.epochs={EQUAL_EPOCHS}"]),
    "disco": ("student", ["teacher.file=OUT/teacher-SEED", "teacher.cache_folder=OUT/cache-SEED"]),
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
EXTRA = "alone_equal_time"
LIMITS = (
    "Limits: the images are patches of 18 photographs, and training takes minutes. The recipe was "
    "chosen\non other data seeds. The demo shows the ordering, not the paper's numbers."
)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--seeds", type=int, nargs="+", default=[0])
    options.add_argument("--out", type=Path, default=Path("out/demo"))
    options.add_argument("--equal-time", action="store_true", help="train that arm, too")
    options.add_argument("--keep", action="store_true", help="write bench/results/demo-cpu.json")
    args = options.parse_args()
    # The training commands start in the project's root.
    out = args.out.resolve()
    arms = [arm for arm in ARMS if arm != EXTRA or args.equal_time]
    scores = {seed: one_seed(out, arms, seed) for seed in args.seeds}
    show(scores)
    print(f"{LIMITS}\nRuns: {out}/<arm>-<seed>/ (config.yaml, metrics.jsonl, tb/, checkpoints/)")
    for seed in args.seeds:
        print(f"The report, to open in a browser: {page(out, seed).as_uri()}")
    if args.keep:
        about = dict(alone_equal_time_epochs=EQUAL_EPOCHS)
        finish("demo", device_kind(), summary(scores), scores, **about)


def one_seed(out: Path, arms: list[str], seed: int) -> dict[str, dict]:
    """{row: {"knn": 0..1, "minutes": time}} of one seed; the row "total" has the time alone."""
    begin = time.perf_counter()
    write_images(out / f"data-{seed}", seed)
    timing = out / f"data-{seed}.minutes"
    if not timing.exists():
        timing.write_text(f"{(time.perf_counter() - begin) / 60:.2f}")
    images = float(timing.read_text())
    trained = {arm: train(out, arm, seed) for arm in arms}
    rows = fixed(out, seed) | trained
    shown = report(out, seed)
    minutes = images + shown + sum(trained[arm]["minutes"] for arm in arms if arm != EXTRA)
    return rows | {"total": {"knn": None, "minutes": round(minutes, 2)}}


def write_images(folder: Path, seed: int) -> None:
    from fastdisco.data import demo

    demo.write(folder, seed=seed, light=LIGHT)


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
        for later in [*list(ARMS)[list(ARMS).index(arm) :], "report"]:
            (out / f"{later}-{seed}.minutes").unlink(missing_ok=True)
        if arm == "teacher":
            # Its recorded embeddings are of the teacher before.
            shutil.rmtree(out / f"cache-{seed}", ignore_errors=True)
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
    import torch

    cfg = config.load(out / f"disco-{seed}" / "config.yaml")
    encoders = {
        "raw_pixels": lambda x: x.flatten(1),
        "untrained_student": untrained(out / f"disco-{seed}").features,
        "untrained_teacher": untrained(out / f"teacher-{seed}").features,
    }
    with torch.no_grad():
        scores = {name: knn_top1(f, cfg, torch.device("cpu")) for name, f in encoders.items()}
    return {name: {"knn": score, "minutes": None} for name, score in scores.items()}


def page(out: Path, seed: int) -> Path:
    return out / f"report-{seed}.html"


def report(out: Path, seed: int) -> float:
    """Evaluates the networks and writes the page, unless it was written for these very runs; the
    minutes that this took."""
    timing = out / f"report-{seed}.minutes"
    if timing.exists() and page(out, seed).exists():
        return float(timing.read_text())
    begin = time.perf_counter()
    teacher, alone, disco = runs = [str(out / f"{a}-{seed}") for a in ("teacher", "alone", "disco")]
    for run in runs:
        call("eval", "all", run, "--only", "knn,probe", "probe.kinds=[ridge]")
    titles = "tsne.titles=[student alone, teacher, DisCo]"
    call("eval", "tsne", alone, teacher, disco, titles)
    call("export", *runs, "--bench", "cpu", "--rounds", "5")
    call("report", alone, disco, "--out", str(page(out, seed)))
    timing.write_text(f"{(time.perf_counter() - begin) / 60:.2f}")
    return float(timing.read_text())


def call(*words: str) -> None:
    """A command within this process, which spares the start of another one."""
    print(f"\nfastdisco {' '.join(words)}", flush=True)
    # The last line of a command is a JSON for programs.
    with contextlib.redirect_stdout(io.StringIO()):
        code = cli.main(list(words))
    if code:
        # The command has said why.
        sys.exit(code)


def show(scores: dict[int, dict]) -> None:
    """Prints the table: a column for each seed, and the mean where there are several."""
    several, lines = len(scores) > 1, []
    measured = next(iter(scores.values()))
    for name, title in ROWS.items():
        if name not in measured:
            continue
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
    without = any(EXTRA not in s for s in scores.values())
    names = [name for name in ROWS if not (without and name == EXTRA)]
    rows = [row(name, 100 * mean(name, "knn"), "% kNN top-1", None, "higher") for name in names]
    rows += gain(scores, "alone", "untrained_student", "alone_minus_untrained")
    arms = [arm for arm in ARMS if arm in names]
    for arm in arms:
        if arm.startswith("alone"):
            rows += gain(scores, "disco", arm, f"disco_minus_{arm}")
    gap = 100 * (mean("teacher", "knn") - mean("disco", "knn"))
    rows.append(row("teacher_minus_disco", gap, "points, mean", 0, "higher"))
    for arm in arms:
        rows.append(row(f"minutes_{arm}", mean(arm, "minutes"), "minutes", None, "lower"))
    if without:
        unit, reason = "points, the worst seed", "that arm is trained with --equal-time"
        rows.append(row(f"disco_minus_{EXTRA}_worst", None, unit, 0, "higher", reason))
    return [*rows, total(scores)]


def gain(scores: dict[int, dict], better: str, than: str, name: str) -> list[dict]:
    """Rows of the mean and of the worst seed's gain."""
    gains = [100 * (s[better]["knn"] - s[than]["knn"]) for s in scores.values()]
    unit = f"points, mean of {len(gains)} seeds"
    return [
        row(name, statistics.mean(gains), unit, 0, "higher"),
        row(f"{name}_worst", min(gains), "points, the worst seed", 0, "higher"),
    ]


def total(scores: dict[int, dict]) -> dict:
    times = [s["total"]["minutes"] for s in scores.values() if "total" in s]
    unit = "minutes, the slowest seed, without the arm of equal time"
    if len(times) < len(scores):
        reason = "these seeds were measured before the demo ended with a report"
        return row("minutes_total", None, unit, 5, "lower", reason)
    return row("minutes_total", max(times), unit, 5, "lower")


if __name__ == "__main__":
    try:
        main()
    except config.UserError as e:
        sys.exit(f"fastdisco: error: {e}")
