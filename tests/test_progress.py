"""What a training shows of its progress: on terminals of several widths, and in a log file."""

import io
import json
import re

import pytest
from rich.cells import cell_len
from rich.console import Console

from fastdisco.common import console as terminal
from fastdisco.run import log
from fastdisco.run.progress import Bar, Scores, brief, evaluated, plain

PERF = {
    "perf/total_ips": 123456.7,
    "perf/data_share": 0.031,
    "perf/eta": 446_400.0,
    "perf/mem_gb": 71.23,
}
# The longest numbers that one meets: a million steps, six digits of images a second, days to go.
ALONE = {
    "train/loss": 24.0123,
    "train/loss_contrast": 8.1234,
    "train/loss_distill": 0.4961,
    "train/lr": 0.029871,
    "train/epoch": 123.456,
    "distill/cosine": 0.8123,
    **PERF,
}
NAMES = ("mobilenetv3_large_100", "efficientnet_b0", "a" * 200)
SEVERAL = {
    "train/epoch": 123.456,
    **PERF,
    **{f"train/{name}/loss": 24.0123 for name in NAMES},
    **{f"train/{name}/lr": 0.03 for name in NAMES},
}


def rendered(values, scores, width, step=123456, steps=1_000_000, height=24):
    file = io.StringIO()
    console = Console(width=width, height=height, file=file, force_terminal=True, color_system=None)
    bar = Bar(step, steps, scores)
    bar.values = values
    console.print(bar)
    return [line.rstrip() for line in file.getvalue().splitlines()]


def scored(*names):
    scores = Scores()
    for knn in (0.5123, 0.4987):
        scores.add({f"eval/{n}/knn_top1" if n else "eval/knn_top1": knn for n in names})
    return scores


@pytest.mark.parametrize("width", [60, 80, 120])
def test_every_line_fits_and_the_first_has_what_is_asked_for(width):
    lines = rendered(ALONE, scored(""), width)
    assert len(lines) == 2 and max(map(cell_len, lines)) <= width
    first = lines[0]
    for text in ("123456/1000000", "loss 24.01", "kNN 49.9%", "123457 im", "ETA "):
        assert text in first, first
    # 12 hundredths of its columns are done.
    assert ("─" in first and "━" * (width // 80) in first) == (width >= 80)
    assert "epoch 123.46" in lines[1] and not lines[1].endswith(("...", "…"))


def test_a_wide_terminal_has_the_whole_of_the_details():
    first, details = rendered(ALONE, scored(""), 160)
    assert "step 123456/1000000  loss 24.01  kNN 49.9%  123457 images/s  ETA 124:00:00" in first
    assert details == (
        "epoch 123.46  lr 0.0299  best kNN 51.2%  data wait 3%  loss_contrast 8.123  "
        "loss_distill 0.4961  cosine to the teacher 0.812  memory 71.2 GB"
    )
    # A log file has the terms of the loss at any width.
    assert "loss_contrast" in plain(1, 2, ALONE, Scores())


def test_usual_numbers_leave_80_columns_a_bar_that_says_something():
    perf = {"perf/total_ips": 472.3, "perf/eta": 3912.0, "perf/data_share": 0.0}
    values = {"train/loss": 24.01, "train/lr": 0.03, "train/epoch": 1.2, **perf}
    first, _ = rendered(values, scored(""), 80, step=600, steps=1200)
    bar = first.split("step")[0].strip()
    assert len(bar) >= 12 and first.endswith("ETA 1:05:12")


@pytest.mark.parametrize("width", [60, 80, 120])
def test_several_students_have_a_line_each(width):
    lines = rendered(SEVERAL, scored(*NAMES), width)
    assert len(lines) == 2 + len(NAMES) and max(map(cell_len, lines)) <= width
    for line, name in zip(lines[1:], NAMES):
        assert line.startswith("loss 24.01  kNN 49.9% best 51.2%") and name[:15] in line
    assert "images/s" in lines[0] and "ETA" in lines[0]


@pytest.mark.parametrize("width", range(1, 60))
def test_a_narrow_terminal_keeps_the_step_longest(width):
    lines = rendered(ALONE, scored(""), width)
    assert max(map(cell_len, lines), default=0) <= width
    if width >= 14:
        assert "123456/1000000" in lines[0]


def test_a_low_terminal_has_the_first_line_alone():
    assert len(rendered(ALONE, scored(""), 80, height=5)) == 1


def test_before_the_first_log_point_the_step_is_all():
    (line,) = rendered({}, Scores(), 80, step=0, steps=10)
    assert line.endswith("step 0/10")


@pytest.mark.parametrize(
    "seconds, text",
    [(5.9, "0m05s"), (245, "4m05s"), (11520, "3h12m"), (446400, "5d4h"), (1e9, "11574d")],
)
def test_a_short_form_of_the_time_left(seconds, text):
    assert brief(seconds) == text and len(text) <= 6


# ---- without a terminal


def test_lines_of_a_log_file_can_be_searched():
    line = plain(20, 100, ALONE, scored(""))
    found = re.fullmatch(r"step (\d+)/(\d+)  epoch (\S+)  loss (\S+)  .*  ETA (\S+)", line)
    assert found and found.groups() == ("20", "100", "123.46", "24.01", "124:00:00")
    assert "  123457 images/s  data wait 3%  kNN 51.2%" in line and "\n" not in line
    assert "  a 24.01" not in plain(20, 100, SEVERAL, scored("small"))
    assert "  small kNN 51.2%" in plain(20, 100, SEVERAL, scored("small"))


def test_an_evaluation_is_a_line_for_each_student():
    values = {"eval/small/knn_top1": 0.4987, "eval/big/effective_rank": 12.34}
    assert list(evaluated(20, 100, values, scored("small"))) == [
        "step 20/100  small kNN top-1 49.87%  best 51.23%",
        "step 20/100  big effective rank 12.3",
    ]


def test_the_log_prints_lines_where_there_is_no_terminal(tmp_path, capsys):
    with log.Log(tmp_path, 0, 100) as writes:
        writes.write(20, ALONE)
        writes.write(20, {"eval/knn_top1": 0.5})
    out = capsys.readouterr().out.splitlines()
    assert [line.split("  ")[0] for line in out] == ["step 20/100"] * 2


def test_the_log_moves_its_lines_on_a_terminal(tmp_path, monkeypatch):
    file = io.StringIO()
    console = Console(width=80, height=24, file=file, force_terminal=True, color_system=None)
    monkeypatch.setattr(log, "console", console)
    monkeypatch.setattr(terminal, "_console", lambda: console)
    with log.Log(tmp_path, 0, 1_000_000) as writes:
        writes.write(20, ALONE)
        writes.write(20, {"eval/knn_top1": 0.5})
    shown = file.getvalue()
    assert "step 20/1000000  kNN top-1 50.00%" in shown and "kNN 50.0%" in shown
    assert "─" * 6 in shown


def test_steps_that_are_evaluated_are_known_after_a_resume(tmp_path):
    """By any of an evaluation's values: images without classes have no accuracy."""
    lines = [
        {"step": 2, "train/loss": 1.0},
        {"step": 2, "eval/knn_top1": 0.5},
        {"step": 4, "eval/effective_rank": 9.0},
        {"step": 6, "train/loss": 1.0},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    with log.Log(tmp_path, 6, 10) as writes:
        assert [writes.lacks(step) for step in (2, 4, 6)] == [False, False, True]
        assert writes.scores.best == {"eval/knn_top1": 0.5}
