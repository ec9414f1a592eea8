"""What the plan, the teacher's check and some real steps say."""

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from fastdisco.config import Config
from fastdisco.doctor.finding import Finding, failure, ok, skipped, warning

# Steps of the trial; the speed is that of its second half, since the first steps compile and warm
# up.
STEPS = 20
# Images for the teacher's check, of either kind.
TEACHER_IMAGES = 2000
# Share of a step that may be waiting for data, and that the average of gradients may take alone.
_WAIT, _EXCHANGE = 0.1, 0.5


class Speed(NamedTuple):
    """What the trial's steps measured, all ranks together."""

    images: float  # a second
    compute: float  # images a second if data were always there
    step_s: float
    wait: float  # share of the time that waits for data
    gb: float  # of memory on a rank, at its most


def trial(cfg: Config, folder: Path, steps: int = STEPS) -> Config:
    """The configuration of the trial: the run's own for some steps, in that folder, without
    evaluations, and with one checkpoint at its end.

    Embeddings that are still to be recorded are not recorded: the teacher runs."""
    teacher = cfg.teacher
    if teacher and teacher.cache == "record":
        teacher = teacher.model_copy(update={"cache": "off"})
    update = {
        "run": cfg.run.model_copy(update={"out": folder, "name": "trial", "max_steps": steps}),
        "data": cfg.data.model_copy(update={"val": None}),
        "eval": cfg.eval.model_copy(update={"every": 0}),
        "log": cfg.log.model_copy(update={"every": max(1, steps // 2)}),
        "checkpoint": cfg.checkpoint.model_copy(update={"every": steps}),
        "teacher": teacher,
    }
    return cfg.model_copy(update=update)


def speed(metrics: Path) -> Speed | None:
    """What the last lines of the trial's metrics.jsonl say; None where it made no step."""
    if not metrics.exists():
        return None
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    row = next((r for r in reversed(rows) if "perf/total_ips" in r), None)
    if row is None:
        return None
    names = ("total_ips", "compute_ips", "step_time", "data_share", "mem_gb")
    return Speed(*(row[f"perf/{name}"] for name in names))


# ---- judging


def planned(lines: Iterable[str]) -> Iterator[Finding]:
    """The lines of the plan (`--dry-run`); what is missing is a failure, a remark a warning."""
    for line in lines:
        name, _, rest = line.partition(" ")
        rest = rest.strip()
        if name == "missing" and rest != "nothing":
            yield failure("missing", rest, "put it there, or correct its path")
        elif name == "remark":
            yield warning("remark", rest, "go on if that is meant")
        elif name != "missing":
            yield ok(name, rest)


def ended(code: int, said: str) -> Finding:
    """How the trial's process ended, from its exit code and its output."""
    if code == 0:
        return ok("steps", "ran to their end")
    own = [x.partition("error: ")[2] for x in said.splitlines() if "fastdisco: error: " in x]
    if own:
        what, _, remedy = own[0].rpartition("; ")
        return failure("steps", what or own[0], remedy if what else "correct it and look again")
    last = next((x.strip() for x in reversed(said.splitlines()) if x.strip()), "nothing")
    if code < 0:
        reason = "killed, often for want of memory" if code == -9 else f"ended by signal {-code}"
        remedy = "lower data.batch, or raise data.accumulate, and see the memory above"
        return failure("steps", f"{reason}; its last words: {last}", remedy)
    return failure("steps", f"ended with code {code}; its last words: {last}", "mend what it names")


def waits(found: Speed) -> Finding:
    """The steps do not wait for data."""
    told = f"{found.images:.4g} images/s, {found.wait:.0%} of the time waits for data"
    if found.wait > _WAIT:
        remedy = (
            f"up to {found.compute:.4g} images/s are possible: raise data.threads, see docs/data.md"
        )
        return warning("speed", told, remedy)
    return ok("speed", told)


def fits(found: Speed, total_gb: float, where: str) -> Finding:
    """The memory of a rank at its most leaves some free.

    total_gb, where: of the GPU or the machine's share of a rank"""
    told = f"{found.gb:.2f} GB at most of {total_gb:.1f} on {where}"
    if found.gb > 0.95 * total_gb:
        return warning("memory at most", told, "lower data.batch, or raise data.accumulate")
    return ok("memory at most", told)


def eta(found: Speed, steps: int, saves: int, save_s: float) -> Finding:
    """How long the whole run takes at this speed.

    steps, saves  of the whole run, and checkpoints;  save_s: seconds of one"""
    seconds = steps * found.step_s + saves * save_s
    told = f"{_span(seconds)} for {steps:,} steps of {found.step_s:.3g} s with {saves:,} checkpoint{'s' * (saves != 1)}"
    return ok("whole run", f"{told}, evaluations not counted")


def exchange_share(all_reduce_s: float, found: Speed) -> Finding:
    """The average of the gradients does not bound the step.

    all_reduce_s: seconds of it alone; in a step it runs beside the backward pass"""
    share = all_reduce_s / found.step_s
    told = f"averaging the gradients takes {share:.0%} as long as a whole step"
    if share > _EXCHANGE:
        remedy = "raise data.accumulate or data.batch, or give the nodes a faster network"
        return warning("exchange", told, remedy)
    return ok("exchange", told)


def checkpoint_size(planned_bytes: int, files: list[Path]) -> Finding:
    """A checkpoint is as large as the plan says."""
    found = sum(f.stat().st_size for f in files)
    told = f"{found / 2**20:.1f} MiB, planned were {planned_bytes / 2**20:.1f}"
    if found > 1.1 * planned_bytes + 2**20:
        return warning("checkpoint size", told, "leave that much more space than `disk` says")
    return ok("checkpoint size", told)


def teacher_words(code: int, out: str, err: str) -> Finding:
    """What `fastdisco teacher check` has said."""
    scores = [x for x in out.splitlines() if x.startswith("{")]
    if code:
        said = [x.partition("error: ")[2] for x in err.splitlines() if "fastdisco: error: " in x]
        last = said or [x for x in err.splitlines() if x.strip()] or ["nothing"]
        return failure("teacher", last[-1], "see fastdisco teacher show and teacher check")
    if not scores:
        return skipped("teacher", "its check said nothing")
    values = json.loads(scores[-1])
    told = ", ".join(f"{k.removeprefix('teacher/')} {v:.3g}" for k, v in values.items())
    return ok("teacher", f"has learned: {told}")


def teacher_check(cfg: Config, classes: int) -> list[str] | str:
    """The arguments of `fastdisco teacher check` for this run; why there are none.

    classes: of the training data"""
    t = cfg.teacher
    if t is None:
        return "no teacher"
    if t.cache == "replay":
        return "its recorded embeddings are replayed"
    if t.kwargs:
        return "teacher.kwargs cannot be given to `fastdisco teacher check`"
    if classes < 2:
        return "the data have no classes to measure it by"
    named = {"--arch": t.arch, "--student": t.student, "--images": TEACHER_IMAGES}
    named |= {"--data": cfg.data.val or cfg.data.train}
    named |= {"--bank": cfg.data.train} if cfg.data.val else {}
    for key in ("eval_resize", "eval_size", "eval_batch", "threads"):
        named[f"--{key.removeprefix('eval_')}"] = getattr(cfg.data, key)
    options = [f"{k}={v}" for k, v in named.items() if v is not None]
    return ["teacher", "check", str(t.file), *options]


def steps_of(cfg: Config, images: int) -> tuple[int, int]:
    """Steps of the whole run over so many images, and how many checkpoints it writes."""
    steps = cfg.run.epochs * (images // cfg.data.batch)
    steps = min(steps, cfg.run.max_steps or steps)
    return steps, math.ceil(steps / cfg.checkpoint.every)


def _span(seconds: float) -> str:
    """3 d 4 h, 2 h 5 min or 1 min 10 s"""
    for unit, small, size, part in (("d", "h", 86400, 3600), ("h", "min", 3600, 60)):
        if seconds >= size:
            return f"{int(seconds // size)} {unit} {int(seconds % size // part)} {small}"
    return f"{int(seconds // 60)} min {int(seconds % 60)} s"
