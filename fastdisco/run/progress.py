"""How far a training is, for people: the moving lines of a terminal, and plain lines elsewhere.

A terminal's first line has the step, loss, kNN accuracy, images a second and the time left, beside a
bar where there is room; the second has details, as many as fit.  `fastdisco watch` shows the same."""

from collections.abc import Iterator
from itertools import pairwise
from typing import NamedTuple

from rich.console import Console, ConsoleOptions, RenderResult
from rich.text import Text

# A bar of fewer columns says nothing; one of more does not say more.
_LEAST, _MOST = 6, 40
# Terminals of fewer lines keep them for what is said.
_LINES = 8


class Scores:
    """The kNN accuracies so far, by their names: eval/knn_top1, or eval/<student>/knn_top1."""

    def __init__(self) -> None:
        self.last: dict[str, float] = {}
        self.best: dict[str, float] = {}

    def add(self, values: dict[str, float]) -> None:
        """Remembers those among the values."""
        found = {k: v for k, v in values.items() if k.endswith("/knn_top1")}
        self.last |= found
        self.best |= {k: max(v, self.best.get(k, 0.0)) for k, v in found.items()}


class Bar:
    """The moving lines; a rich renderable."""

    def __init__(self, step: int, steps: int, scores: Scores) -> None:
        self.step, self.steps, self.scores = step, steps, scores
        # The newest values of the log, group/name; empty before the first.
        self.values: dict[str, float] = {}

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width = options.max_width
        text = self._first(width)
        first = Text(no_wrap=True, overflow="crop")
        if (room := width - len(text) - 2) >= _LEAST:
            _draw(first, min(room, _MOST), self.step / max(self.steps, 1), options.ascii_only)
        yield first.append(text)
        for student in self._students() if several(self.values) else ():
            yield Text(student, no_wrap=True, overflow="ellipsis")
        details = _fitting(self._details(), width, "  ")
        if details and options.size.height >= _LINES:
            yield Text(details, style="dim", no_wrap=True)

    def _first(self, width: int) -> str:
        """The first line without its bar, in the longest form that fits: beside a bar if it can."""
        parts = list(self._parts())
        for room in (width - _LEAST - 2, width):
            for form in (0, 1):
                for gap in ("  ", " "):
                    if len(line := gap.join(p.forms[form] for p in parts)) <= room:
                        return line
        # The least important ones go.
        for part in sorted(parts, key=lambda p: -p.rank):
            parts.remove(part)
            line = " ".join(p.forms[1] for p in parts)
            if len(line) <= width:
                return line
        return ""

    def _parts(self) -> Iterator["_Part"]:
        yield _Part(0, (f"step {self.step}/{self.steps}", f"{self.step}/{self.steps}"))
        v = self.values
        if not several(v):
            if "train/loss" in v:
                loss = f"loss {v['train/loss']:.4g}"
                yield _Part(1, (loss, loss))
            for knn in list(self.scores.last.values())[:1]:
                yield _Part(2, (f"kNN {knn:.1%}", f"kNN {knn:.1%}"))
        if "perf/total_ips" in v:
            ips = _rate(v["perf/total_ips"])
            yield _Part(4, (f"{ips} images/s", f"{ips} img/s"))
        if "perf/eta" in v:
            yield _Part(3, (f"ETA {hms(v['perf/eta'])}", f"ETA {brief(v['perf/eta'])}"))

    def _students(self) -> Iterator[str]:
        """A line for each of several."""
        for key in (k for k in self.values if k.endswith("/loss")):
            name = student(key)
            parts = [f"loss {self.values[key]:.4g}"]
            if (score := f"eval/{name}/knn_top1") in self.scores.last:
                last, best = self.scores.last[score], self.scores.best[score]
                parts.append(f"kNN {last:.1%} best {best:.1%}")
            # What is cut where the line is too long is the name's end.
            yield f"{'  '.join(parts)}  {name}"

    def _details(self) -> Iterator[str]:
        v = self.values
        if "train/epoch" in v:
            yield f"epoch {v['train/epoch']:.2f}"
        if not several(v):
            if "train/lr" in v:
                yield f"lr {v['train/lr']:.3g}"
            for best in list(self.scores.best.values())[:1]:
                yield f"best kNN {best:.1%}"
        if "perf/data_share" in v:
            yield f"data wait {v['perf/data_share']:.0%}"
        if "perf/save_share" in v:
            yield f"saves {v['perf/save_share']:.1%}"
        terms = ((k.removeprefix("train/"), x) for k, x in v.items() if k.startswith("train/loss_"))
        yield from (f"{name} {x:.4g}" for name, x in terms)
        if "distill/cosine" in v:
            yield f"cosine to the teacher {v['distill/cosine']:.3f}"
        if "perf/mem_gb" in v:
            yield f"memory {v['perf/mem_gb']:.1f} GB"


class _Part(NamedTuple):
    """A part of the first line: 0 stays longest; its long and its short form."""

    rank: int
    forms: tuple[str, str]


def plain(step: int, steps: int, values: dict[str, float], scores: Scores) -> str:
    """A log point as one line, for a log file.  Of several students it has the sums of the losses
    alone, for the line would be too long."""
    many = several(values)
    shown = {
        k.removeprefix("train/"): v
        for k, v in values.items()
        if (k.endswith("/loss") if many else k.startswith("train/loss"))
    }
    losses = "  ".join(f"{name} {loss:.4g}" for name, loss in shown.items())
    rate = "" if many else f"  lr {values['train/lr']:.3g}"
    speed, wait = values["perf/total_ips"], values["perf/data_share"]
    best = "".join(
        f"  {student(name)}{' ' if student(name) else ''}kNN {x:.1%}"
        for name, x in scores.best.items()
    )
    return (
        f"step {step}/{steps}  epoch {values['train/epoch']:.2f}  {losses}{rate}  "
        f"{speed:.0f} images/s  data wait {wait:.0%}{best}  ETA {hms(values['perf/eta'])}"
    )


def evaluated(step: int, steps: int, values: dict[str, float], scores: Scores) -> Iterator[str]:
    """An evaluation as a line for each student."""
    for group in dict.fromkeys(name.rpartition("/")[0] for name in values):
        own = {k.rpartition("/")[2]: v for k, v in values.items() if k.rpartition("/")[0] == group}
        parts = []
        if "knn_top1" in own:
            best = scores.best[f"{group}/knn_top1"]
            parts.append(f"kNN top-1 {own['knn_top1']:.2%}  best {best:.2%}")
        if "effective_rank" in own:
            parts.append(f"effective rank {own['effective_rank']:.1f}")
        if "teacher_neighbours" in own:
            parts.append(f"neighbours shared with the teacher {own['teacher_neighbours']:.1%}")
        name = student(f"{group}/")
        yield f"step {step}/{steps}  {name}{' ' if name else ''}{'  '.join(parts)}"


def sparkline(values: list[float], width: int, ascii_only: bool = False) -> str:
    """The values as heights between their smallest and largest; of more than `width` values the
    mean of each stretch, but the last one as it is."""
    levels = "_.-=+*#@" if ascii_only else "▁▂▃▄▅▆▇█"
    if len(values) > width:
        edges = [round(i * (len(values) - 1) / (width - 1)) for i in range(width)]
        means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
        values = [*means, values[-1]]
    if not values:
        return ""
    low, high = min(values), max(values)
    scale = (len(levels) - 1) / (high - low) if high > low else 0.0
    return "".join(levels[round((x - low) * scale)] for x in values)


def several(values: dict[str, float]) -> bool:
    """Whether a log point is of several students."""
    return "train/epoch" in values and "train/loss" not in values


def student(name: str) -> str:
    """eval/<student>/knn_top1 -> '<student>'; eval/knn_top1 -> ''"""
    return " ".join(name.split("/")[1:-1])


def hms(seconds: float) -> str:
    """'27:46:40'"""
    minutes, s = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{s:02}"


def brief(seconds: float) -> str:
    """At most six characters: '12d 3h', '3h12m', '4m05s'"""
    s = int(seconds)
    minutes, hours, days = s // 60, s // 3600, s // 86400
    if days:
        return f"{days}d{hours % 24}h" if days < 1000 else f"{days}d"
    return f"{hours}h{minutes % 60:02}m" if hours else f"{minutes}m{s % 60:02}s"


def _draw(line: Text, width: int, share: float, ascii_only: bool) -> None:
    """Appends a bar and two spaces."""
    full, rest = ("#", "-") if ascii_only else ("━", "─")
    done = min(round(share * width), width)
    line.append(full * done, style="bar.complete").append(rest * (width - done), style="bar.back")
    line.append("  ")


def _rate(ips: float) -> str:
    """With a digit after the point where a slow CPU needs it."""
    return f"{ips:.1f}" if ips < 10 else f"{ips:.0f}"


def _fitting(parts: Iterator[str], width: int, gap: str) -> str:
    """As many of the first parts as fit."""
    line = ""
    for part in parts:
        longer = f"{line}{gap}{part}" if line else part
        if len(longer) > width:
            break
        line = longer
    return line
