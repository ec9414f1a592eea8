"""The networks behind the runs and their teacher, for what must be computed anew: nearest images, MACs
and sizes.  All on the CPU, so that a training on the GPU is left alone and the bytes stay the same."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fastdisco import models
from fastdisco.common.errors import UserError
from fastdisco.report.collect import Measured, Run, measured
from fastdisco.teacher import formats

TEACHER, DISTILLED, ALONE = "teacher", "distilled", "alone"


@dataclass(frozen=True)
class Network:
    name: str
    role: str  # TEACHER, DISTILLED or ALONE
    run: int | None  # its place among the runs; None: a teacher that is none of them
    measured: Measured
    # Says which weights these are, for what is kept between two pages; '' where none are.
    mark: str = ""
    net: models.Net | None = None
    remarks: list[str] = field(default_factory=list)


def read(runs: Sequence[Run], weights: bool = True) -> list[Network]:
    """The teacher first, then the runs in their order.  Without `weights` no network is built.

    What cannot be read has no `net`, and a remark that says why."""
    found = []
    of_teacher = teacher(runs)
    if of_teacher and of_teacher[1] not in [r.folder.resolve() for r in runs]:
        found.append(_teacher(*of_teacher, weights))
    for i, run in enumerate(runs):
        role = DISTILLED if run.cfg.teacher else ALONE
        if of_teacher and run.folder.resolve() == of_teacher[1]:
            role = TEACHER
        found.append(_of_run(i, run, role, weights))
        found += _mean_student(i, run, role)
    return sorted(found, key=lambda n: n.role != TEACHER)


def teacher(runs: Sequence[Run]) -> tuple[Run, Path] | None:
    """The first run that has a teacher, and where that is."""
    for run in runs:
        if run.cfg.teacher:
            return run, run.at(run.cfg.teacher.file).resolve()
    return None


def cost(net: models.Net, image: int) -> tuple[int, int]:
    """(bytes of the backbone's weights and statistics, MACs of one image of `image` pixels)"""
    size = sum(x.numel() * x.element_size() for x in net.backbone.state_dict().values())
    return size, models.macs(net.backbone, image)


def aside(run: Run) -> dict[int, str]:
    """Which training images had broken by the run's last checkpoint, and why."""
    try:
        step = models.last(run.folder)
        state = models.read(step / "state.pt").get("data") if step else None
    except (UserError, OSError):
        # What is wrong with it, the network's remark says.
        return {}
    found = state.get("aside") if isinstance(state, dict) else None
    return found if isinstance(found, dict) else {}


def _of_run(i: int, run: Run, role: str, weights: bool) -> Network:
    remarks: list[str] = []
    net, mark = None, ""
    if weights:
        try:
            net = models.from_run(run.folder, student=run.student or None)[0]
            step = models.last(run.folder)
            mark = f"{step} {run.student} {step and (step / 'state.pt').stat().st_mtime_ns}"
        except (UserError, OSError) as e:
            remarks.append(f"{run.name}: its network cannot be read ({e})")
    return Network(run.name, role, i, run.measured, mark, net, remarks)


def _mean_student(i: int, run: Run, role: str) -> list[Network]:
    """The mean student (EMA), where `--net ema` has evaluated or exported it."""
    remarks: list[str] = []
    part = f"{run.student}-ema".lstrip("-")
    known = measured(run.folder / "eval" / part, run.folder / "export" / part, remarks)
    if not (known.results or known.bench or remarks):
        return []
    return [Network(f"{run.name}, EMA", role, i, known, remarks=remarks)]


def _teacher(run: Run, file: Path, weights: bool) -> Network:
    """Where evaluations of a file and its export lie, `fastdisco eval` and `export` say."""
    remarks: list[str] = []
    out = run.folder.resolve().parent
    places = out / "eval" / file.name, out / "export" / file.name
    if file.is_dir():
        own = file.parent.parent if (file / "state.pt").is_file() else file
        places = own / "eval", own / "export"
    known = measured(*places, remarks)
    net, mark, t = None, "", run.cfg.teacher
    if weights and t:
        try:
            net = formats.read(file, t.arch, t.kwargs, student=t.student).net.eval()
            mark = f"{file} {file.stat().st_mtime_ns}"
        except (UserError, OSError) as e:
            remarks.append(f"the teacher cannot be read ({e})")
    name = TEACHER if file.name == TEACHER else f"{TEACHER} {file.name}"
    return Network(name, TEACHER, None, known, mark, net, remarks)
