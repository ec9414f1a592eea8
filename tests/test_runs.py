"""`fastdisco runs` and `fastdisco watch`: what they tell of runs of each state, and of folders that
are damaged; neither writes anything."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ROOT
from rich.cells import cell_len

from fastdisco import cli
from fastdisco.commands import runs, watch
from fastdisco.run import lock, seen
from fastdisco.run.progress import sparkline

CONFIG = "run: {name: x}\n"


def point(step, steps=1000, **more):
    return {
        "step": step,
        "time": time.time() - 5,
        "train/loss": 24.0,
        "train/lr": 0.03,
        "train/epoch": step / 100,
        "perf/total_ips": 472.0,
        "perf/data_share": 0.02,
        "perf/step_time": 0.54,
        "perf/eta": 0.54 * (steps - step),
        **more,
    }


def knn(step, accuracy, name="eval/knn_top1"):
    return {"step": step, "time": time.time() - 5, name: accuracy}


def made(folder, *entries, saved=None):
    """A run's folder with these lines in its log and a checkpoint after step `saved`."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(CONFIG)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(e) + "\n" for e in entries))
    if saved is not None:
        step = folder / "checkpoints" / f"step_{saved:08}"
        step.mkdir(parents=True)
        (step / "state.pt").touch()
        (folder / "checkpoints/last").write_text(step.name)
    return folder


def locked(folder, **other):
    """The lock of this process, or of another one."""
    (folder / lock.NAME).write_text(json.dumps(lock._me() | other))


def dead():
    """The number of a process that is no more."""
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def state(folder):
    return seen.look(folder).state


def everything(folder):
    """Each file and folder below with its time and content."""
    return {
        p: (p.lstat().st_mtime_ns, p.read_bytes() if p.is_file() else None)
        for p in [folder, *folder.rglob("*")]
    }


def test_each_state(tmp_path):
    """From lock, checkpoint and log."""
    running = made(tmp_path / "running", point(420), saved=400)
    locked(running)
    elsewhere = made(tmp_path / "elsewhere", point(420), saved=400)
    locked(elsewhere, machine=["another"])
    killed = made(tmp_path / "killed", point(420), saved=420)
    locked(killed, pid=dead())
    gone = made(tmp_path / "gone", point(420), saved=400)
    locked(gone, machine=["another"])
    os.utime(gone / lock.NAME, (time.time() - 120,) * 2)
    failed = made(tmp_path / "failed", point(420), saved=400)
    stopped = made(tmp_path / "stopped", point(420), saved=420)
    finished = made(tmp_path / "finished", point(980), point(1000), saved=1000)
    begun = made(tmp_path / "begun")
    assert {p.name: state(p) for p in tmp_path.iterdir()} == {
        running.name: "running",
        elsewhere.name: "running",
        killed.name: "crashed",
        gone.name: "crashed",
        failed.name: "crashed",
        stopped.name: "stopped",
        finished.name: "finished",
        begun.name: "stopped",
    }


def test_what_is_told_of_a_run(tmp_path):
    folder = made(tmp_path / "x", point(400), knn(400, 0.5), point(420), knn(420, 0.4), saved=400)
    locked(folder)
    found = seen.look(folder)
    assert (found.step, found.steps, found.note) == (420, 1000, "")
    # From the log point on, 5 s ago.
    assert 0.54 * 580 - 15 < found.eta <= 0.54 * 580 - 5 and 5 <= found.age < 15
    assert found.knn == {"": [(400, 0.5), (420, 0.4)]}
    assert (found.scores.last, found.scores.best) == (
        {"eval/knn_top1": 0.4},
        {"eval/knn_top1": 0.5},
    )


DAMAGED = {
    "no configuration": (lambda f: (f / "config.yaml").unlink(), "config.yaml cannot be read"),
    "another's": (lambda f: (f / "config.yaml").write_text("a: 1"), "not that of a run"),
    "no YAML": (lambda f: (f / "config.yaml").write_bytes(b"\x00{"), "config.yaml is no YAML"),
    "a log of nonsense": (
        lambda f: (f / "metrics.jsonl").write_bytes(b"\xff\n[1]\n{}\n" + b"[" * 99999 + b"\n"),
        "metrics.jsonl holds no entry of a run",
    ),
    "a pipe": (
        lambda f: ((f / "metrics.jsonl").unlink(), os.mkfifo(f / "metrics.jsonl")),
        "metrics.jsonl cannot be read",
    ),
    "a pipe for a configuration": (
        lambda f: ((f / "config.yaml").unlink(), os.mkfifo(f / "config.yaml")),
        "config.yaml cannot be read",
    ),
}


@pytest.mark.parametrize("what", DAMAGED)
def test_a_malformed_run_is_a_row_that_says_so(what, tmp_path, capsys):
    harm, why = DAMAGED[what]
    made(tmp_path / "good", point(1000), saved=1000)
    harm(made(tmp_path / "bad", point(420), saved=420))
    assert cli.main(["runs", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "bad   malformed" in out and why in out and "good  finished" in out


def test_lines_that_are_damaged_are_counted_and_a_half_one_is_not(tmp_path):
    folder = made(tmp_path / "x", point(420), saved=420)
    with (folder / "metrics.jsonl").open("a") as f:
        f.write('{"step": "1"}\n{"step": 3, "eval/knn_top1": NaN}\n{"step": 440, "train')
    found = seen.look(folder)
    assert found.step == 420 and found.note == "2 damaged lines in metrics.jsonl"


@pytest.mark.parametrize("text", ["", "step_x", "step_00000999"])
def test_a_lost_checkpoint_is_said(text, tmp_path):
    folder = made(tmp_path / "x", point(420), saved=420)
    (folder / "checkpoints/last").write_text(text)
    found = seen.look(folder)
    assert found.state == "crashed" and found.note.startswith("checkpoints/")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"machine": 3}', '{"pid": "x"}'])
def test_a_torn_lock_is_alive_as_long_as_it_is_fresh(content, tmp_path):
    folder = made(tmp_path / "x", point(420), saved=420)
    (folder / lock.NAME).write_text(content)
    assert state(folder) == "running"
    os.utime(folder / lock.NAME, (time.time() - 120,) * 2)
    assert state(folder) == "crashed"


def test_a_list_of_runs_touches_nothing(tmp_path, capsys):
    for name, owner in (("alive", {}), ("dead", {"pid": dead()}), ("far", {"machine": ["x"]})):
        locked(made(tmp_path / name, point(420), saved=400), **owner)
    before = everything(tmp_path)
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert cli.main(["watch", str(tmp_path / "dead")]) == 0
    assert everything(tmp_path) == before


def test_runs_are_found_below_and_not_within_each_other(tmp_path):
    made(tmp_path / "a/b/x", point(1))
    made(tmp_path / "y", point(1))
    made(tmp_path / "y/inside", point(1))
    (tmp_path / "other").mkdir()
    assert seen.find(tmp_path) == [tmp_path / "a/b/x", tmp_path / "y"]
    assert seen.find(tmp_path / "y") == [tmp_path / "y"]


def test_json_has_every_fact(tmp_path, capsys):
    two = [knn(20, 0.25, "eval/small/knn_top1"), knn(20, 0.5, "eval/big/knn_top1")]
    made(tmp_path / "x", point(20), *two, saved=20)
    assert cli.main(["runs", str(tmp_path), "--json"]) == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found.pop("age") >= 5
    assert found == {
        "run": str(tmp_path / "x"),
        "state": "stopped",
        "note": "",
        "step": 20,
        "steps": 1000,
        "eta": None,
        "knn": {
            "small": {"last": 0.25, "best": 0.25, "curve": [[20, 0.25]]},
            "big": {"last": 0.5, "best": 0.5, "curve": [[20, 0.5]]},
        },
    }


def test_the_table_has_a_row_for_each_student(tmp_path, capsys):
    curve = [knn(s, s / 1000, "eval/small/knn_top1") for s in (100, 200, 300)]
    made(tmp_path / "x", point(300), *curve, knn(300, 0.5, "eval/big/knn_top1"), saved=300)
    assert cli.main(["runs", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split("  ")[0] == "run" and lines[1].split()[:3] == ["x", "stopped", "300/1000"]
    assert lines[2].split() == ["small", "30.0%", "30.0%", "▁▅█"]
    assert lines[3].split() == ["big", "50.0%", "50.0%", "▁"]


@pytest.mark.parametrize("width", [40, 60, 80, 120])
def test_the_table_fits_its_terminal(width):
    row = {
        "run": "a" * 30,
        "state": "finished",
        "step": "1000000/1000000",
        "ETA": "12d3h",
        "kNN": "45.1%",
        "best": "45.2%",
        "kNN so far": "▁" * 16,
        "age": "2h03m",
    }
    lines = list(runs.table([row], width))
    assert max(map(cell_len, lines)) <= width
    assert "finished" in lines[1] and "45.1%" in lines[1]
    assert "▁" in list(runs.table([row], None))[1]


def test_a_folder_without_runs_and_none_at_all(tmp_path, capsys):
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert f"{tmp_path}: no runs here" in capsys.readouterr().out
    for command in ("runs", "watch"):
        assert cli.main([command, str(tmp_path / "no")]) == 2
        assert "no such folder" in capsys.readouterr().err
    assert cli.main(["watch", str(tmp_path)]) == 2
    assert "is no run" in capsys.readouterr().err


def test_names_do_not_reach_the_terminal_as_they_are(tmp_path, capsys):
    made(tmp_path / "a\x1b[31mb", point(1))
    assert cli.main(["runs", str(tmp_path)]) == 0
    assert "a?[31mb" in capsys.readouterr().out


@pytest.mark.parametrize(
    "values, drawn",
    [([], ""), ([0.5], "▁"), ([0, 1], "▁█"), ([0, 0.5, 1], "▁▅█"), ([1] * 3, "▁▁▁")],
)
def test_a_sparkline(values, drawn):
    assert sparkline(values, 8) == drawn


def test_a_long_sparkline_keeps_its_width_and_its_end():
    drawn = sparkline([0.0] * 500 + [1.0], 16)
    assert len(drawn) == 16 and drawn.endswith("█") and drawn.startswith("▁▁▁")
    assert set(sparkline([0, 1, 2], 8, ascii_only=True)) <= set("_.-=+*#@")


# ---- watch


def test_a_run_is_followed_line_by_line_until_it_ends(tmp_path, monkeypatch, capsys):
    folder = made(tmp_path / "x", point(20), knn(20, 0.25))
    locked(folder)
    news = iter([(point(40),), (knn(40, 0.5),), ()])

    def later(seconds):
        entries = next(news)
        with (folder / "metrics.jsonl").open("a") as f:
            f.writelines(json.dumps(e) + "\n" for e in entries)
        if not entries:
            (folder / lock.NAME).unlink()

    monkeypatch.setattr(watch.time, "sleep", later)
    assert cli.main(["watch", str(folder)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[0].startswith("step 20/1000  epoch 0.20  loss 24  lr 0.03  472 images/s")
    assert out[1].startswith("step 40/1000  epoch 0.40") and "kNN 25.0%" in out[1]
    assert out[2] == "step 40/1000  kNN top-1 50.00%"
    assert out[3].startswith(f"{folder}: failed or was killed, last seen at step 40 of 1000; ")
    assert len(out) == 4


def test_on_a_terminal_it_is_shown_as_the_training_shows_it(tmp_path):
    from rich.console import Console

    folder = made(tmp_path / "x", point(20), knn(20, 0.25), knn(40, 0.5), point(40))
    locked(folder)
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(watch.picture(seen.look(folder)))
    lines = console.export_text().splitlines()
    assert max(map(cell_len, lines)) <= 80 and "running" in "".join(lines)
    text = "\n".join(lines)
    assert "step 40/1000" in text and "kNN 25.0% ▁█ 50.0%" in text and "ETA 0:08:" in text


def test_ctrl_c_ends_the_watching_alone(tmp_path):
    folder = made(tmp_path / "x", point(20))
    locked(folder)
    command = [sys.executable, "-m", "fastdisco.cli", "watch", str(folder), "--every", "60"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with contextlib.closing(process.stdout) as out:
        first = out.readline()
        process.send_signal(signal.SIGINT)
        rest = out.read().decode()
    assert process.wait(60) == 0, rest
    assert first.startswith(b"step 20/1000") and "Traceback" not in rest
    # A signal while a line is written may have it written again.
    assert rest.replace(first.decode(), "") == f"{folder}: running, at step 20 of 1000\n"
    assert state(folder) == "running"


@pytest.mark.parametrize("every", ["0", "x", "nan", "1e9"])
def test_the_time_between_looks_is_checked(every, tmp_path, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["watch", str(tmp_path), "--every", every])
    assert "--every" in capsys.readouterr().err
