"""`fastdisco report`: the whole page, what it says where something is missing, and what it refuses."""

import json
import os
import re
import subprocess
import sys
import time

import pytest
import reports
from conftest import ROOT

from fastdisco import cli, report
from fastdisco.commands import report as command

SECTIONS = ("pareto", "training", "maps", "neighbours", "views", "evaluations")
# What a page of a run that is just there says of each section.
LACKING = (
    "No kNN accuracy yet: fastdisco eval knn RUN.",
    "No linear accuracy yet",
    "No accuracy with 1 % of the labels yet",
    "No t-SNE yet: fastdisco eval tsne",
    "No evaluation yet: fastdisco eval all RUN.",
    "No latency yet",
)


def page(out, *arguments, code=0):
    assert cli.main(["report", *map(str, arguments), "--out", str(out)]) == code
    return out.read_text(encoding="ascii") if out.exists() else ""


def data_of(text, name):
    """What `copy data` of a figure copies."""
    (found,) = re.findall(rf'<script type="application/json" id="data-{name}">(.*?)</script>', text)
    return json.loads(found)


def text_of(text, section=""):
    """What a reader sees, of the page or of a section."""
    if section:
        text = re.search(rf'<section id="{section}">.*?</section>', text, re.S)[0]
    text = re.sub(r"<(script|style).*?</\1>", "", text, flags=re.S)
    return " ".join(re.sub(r"<[^>]+>", " ", text).split())


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return reports.whole(tmp_path_factory.mktemp("whole"))


@pytest.fixture(scope="module")
def whole(runs, tmp_path_factory):
    return page(tmp_path_factory.mktemp("page") / "report.html", *runs)


def test_the_same_runs_give_the_same_bytes_of_three_megabytes_at_most(runs, whole, tmp_path):
    assert page(tmp_path / "again.html", *runs) == whole
    assert len(whole) < 3e6


def test_the_page_asks_for_nothing(whole):
    outside = re.sub(r"<(script|style).*?</\1>", "", whole, flags=re.S)
    assert not re.findall(r'(?:src|href)="(?!data:)', outside)
    assert not re.findall(r"url\((?!data:)", whole)
    assert "default-src 'none'" in whole


def test_every_section_has_its_figures(whole):
    for name in SECTIONS:
        found = re.search(rf'<section id="{name}">.*?</section>', whole, re.S)[0]
        assert 'class="figure' in found and "data-copy" in found, name


def test_accuracy_and_cost_of_all_formats(whole):
    points = data_of(whole, "pareto-0")
    forms = {(p["network"], p["form"]): p for p in points}
    assert len(forms) == 9
    assert (
        forms["teacher", "fp32, torch"]["teacher"] and not forms["disco", "int8, ONNX"]["teacher"]
    )
    assert forms["disco", "int8, ONNX"]["accuracy"] == pytest.approx(49.8)
    assert forms["disco", "fp32, torch"] == {
        "network": "disco",
        "form": "fp32, torch",
        "teacher": False,
        "accuracy": 70.0,
        "mb": 8.0,
        "mmacs": 5.0,
        "ms": 5.0,
    }
    assert {p["accuracy"] for p in data_of(whole, "pareto-2")} == {80.0, 30.0, 60.0}
    assert "linear_top1_selected" in text_of(whole, "pareto")


def test_curves_of_all_runs_in_one_plot(whole):
    charts = {}
    for name, n in (("steps", 7), ("time", 3)):
        for i in range(n):
            found = data_of(whole, f"{name}-{i}")
            charts[found["title"]] = found
    assert [line["run"] for line in charts["Loss"]["lines"]] == [0, 1]
    assert charts["Loss"]["lines"][0]["y"][:2] == [7.8, 7.6]
    assert charts["kNN accuracy, %"]["lines"][1] == {"run": 1, "x": [10, 20], "y": [40, 50]}
    speed = charts["Images/s"]
    assert speed["axis"] == "minutes" and speed["marks"] == [{"run": 0, "x": [1.58333]}]
    assert speed["lines"][0]["x"][:2] == [0.166667, 0.333333] and speed["lines"][0]["y"][0] == 80
    said = text_of(whole, "training")
    assert "disco was started 2 times; a dashed line marks each restart." in said
    assert (
        "alone was never restarted." in said and "No image is quarantined, and none broke." in said
    )


def test_what_differs_stands_in_a_table(whole):
    said = text_of(whole, "training")
    assert "Configuration: what differs" in said and "teacher.file" in said
    assert "optim.lr" not in said and "The runs have the same environment." in said


def test_evaluations_have_protocol_interval_and_time(whole):
    said = text_of(whole, "evaluations")
    assert re.search(r"knn knn_top1 [0-9a-f]{8} 90.00 [\d.]+ to [\d.]+ 70.00", said)
    assert "knn 1.2 1.2 1.2" in said and "linear 30.0 30.0 30.0" in said
    found = data_of(whole, "evaluations")["disco"]
    assert found[0]["intervals"]["knn_top1"][0] < 0.7 < found[0]["intervals"]["knn_top1"][1]


def test_another_protocol_is_another_row(tmp_path):
    reports.images(tmp_path)
    a, b = (reports.run(tmp_path, name, weights=False) for name in "ab")
    reports.evaluated(a, 0.5)
    reports.evaluated(b, 0.6, k=7)
    said = text_of(page(tmp_path / "r.html", a, b, "--images", 0), "evaluations")
    assert len(re.findall(r"knn knn_top1 [0-9a-f]{8}", said)) == 2


def test_a_run_that_has_just_begun(tmp_path):
    folder = reports.run(reports.images(tmp_path), "new", weights=False)
    (folder / ".lock").write_text("{}")
    text = page(tmp_path / "r.html", folder)
    said = text_of(text)
    assert "new : test_efficientnet by moco; has no metrics yet, still going." in said
    # The title of an accuracy that nobody has measured names no value.
    assert "()" not in said
    for sentence in (*LACKING, "the run has logged nothing yet", "it has no teacher"):
        assert sentence in said, sentence
    assert "No run has saved a checkpoint yet" in said
    assert "There is no env.json." in said and "step 1, in epoch 1" in said


def test_a_run_without_validation_images(tmp_path):
    folder = reports.run(reports.images(tmp_path), "blind", data__val="null")
    reports.trained(folder)
    said = text_of(page(tmp_path / "r.html", folder))
    assert "it has no validation images (data.val: null), so nothing evaluates it" in said
    assert "No run has validation images (data.val), so there are no queries." in said


@pytest.mark.parametrize("age, state", [(0, "still going"), (3600, "stopped")])
def test_a_run_before_its_end(tmp_path, age, state):
    folder = reports.run(reports.images(tmp_path), "half", weights=False)
    reports.trained(folder, steps=11, of=20)
    (folder / ".lock").write_text("{}")
    os.utime(folder / ".lock", (time.time() - age,) * 2)
    assert f"step 11 of 20, {state};" in text_of(page(tmp_path / "r.html", folder))


def test_damaged_files_are_told_and_left_out(tmp_path):
    folder = reports.run(reports.images(tmp_path), "torn")
    reports.trained(folder)
    reports.evaluated(folder, 0.5)
    reports.exported(folder)
    with (folder / "metrics.jsonl").open("a") as f:
        f.write(
            '{"step": 21, "train/loss": NaN, "time": 1, "train/lr": "x"}\n{"step": 22, "tra\n[1]\n'
        )
    (folder / "env.json").write_text("{")
    (folder / "eval/knn-00000000.json").write_text("{}")
    (folder / "eval/tsne-00000000.coordinates.json").write_text('{"images": []}')
    (folder / "export/bench.json").write_text('{"rows": [{"form": "torch", "macs": 0}, 3]}')
    (folder / "export/export.json").write_text("[]")
    said = text_of(page(tmp_path / "r.html", folder))
    for sentence in (
        "metrics.jsonl: 2 of 25 lines are damaged and left out.",
        "metrics.jsonl: 2 values are no finite numbers and left out.",
        "env.json cannot be read",
        "knn-00000000.json is no result and left out",
        "tsne-00000000.coordinates.json: cannot be read and left out. No t-SNE yet",
        "bench.json: some rows lack a form, bytes, MACs or latency and are left out.",
        "export.json is no JSON object",
    ):
        assert sentence in said, sentence


def test_a_teacher_that_is_gone(tmp_path):
    reports.images(tmp_path)
    folder = reports.run(tmp_path, "disco", teacher__file=tmp_path / "gone.pth")
    said = text_of(page(tmp_path / "r.html", folder))
    assert "the teacher cannot be read" in said and "There is no teacher here" in said


def test_data_that_lie_elsewhere_now(tmp_path):
    reports.images(tmp_path)
    folder = reports.run(tmp_path, "moved")
    os.rename(tmp_path / "val", tmp_path / "other")
    assert "val: no such folder" in text_of(page(tmp_path / "r.html", folder), "neighbours")
    text = page(tmp_path / "r.html", folder, f"data.val={tmp_path}/other")
    assert "Nearest among 36 validation images of other" in text_of(text, "neighbours")


def test_several_students_are_several_runs(tmp_path):
    reports.images(tmp_path)
    two = "[{name: a}, {name: b, arch: test_resnet}]"
    folder = reports.run(tmp_path, "pair", students=two)
    line = {"step": 1, "time": 5.0, "train/a/loss": 1.5, "train/b/loss": 2.5, "perf/total_ips": 9}
    (folder / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    reports.evaluated(folder, 0.5)
    (folder / "eval").rename(folder / "b")
    (folder / "eval").mkdir()
    (folder / "b").rename(folder / "eval/b")
    text = page(tmp_path / "r.html", folder)
    assert data_of(text, "runs") == ["pair · a", "pair · b"]
    lines = data_of(text, "steps-0")["lines"]
    assert [line["y"] for line in lines] == [[1.5], [2.5]]
    (point,) = data_of(text, "pareto-0")
    assert point["network"] == "pair · b"


def test_names_are_text_and_no_markup(tmp_path):
    reports.images(tmp_path)
    odd = "</script><b>&"
    (tmp_path / "val/class0").rename(tmp_path / "val" / odd.replace("/", "_"))
    folder = reports.run(tmp_path, "odd", weights=False)
    reports.mapped(folder, [odd])
    text = page(tmp_path / "r.html", folder, "--images", 0)
    assert "<b>&" not in re.sub(r"<script.*?</script>", "", text, flags=re.S).replace("<b>odd", "")
    assert data_of(text, "maps")["networks"][0]["name"] == odd


# ---- the command


def test_what_is_refused_leaves_the_file_alone(tmp_path, capsys):
    reports.images(tmp_path)
    folder = reports.run(tmp_path, "run", weights=False)
    mine = tmp_path / "notes.html"
    before = report.MARK + "mine"
    mine.write_text(before)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad/config.yaml").write_bytes(b"\xff\xfe")
    refused = {
        (tmp_path / "nowhere",): "is no run",
        (tmp_path,): "is no run",
        (tmp_path / "bad",): "is no text in UTF-8",
        (folder, folder): "is named twice",
        (folder, "--watch", "0"): "--watch: is 0 seconds",
        (folder, "--watch", "nan"): "--watch: is nan seconds",
        (folder, "--step", "0"): "--step: is 0",
        (folder, "--images", "-1"): "--images: is -1",
        (folder, "data.valx=1"): "valx",
    }
    for arguments, said in refused.items():
        assert page(mine, *arguments, code=2) == before
        error = capsys.readouterr().err
        assert said in error and error.count("\n") == 1, error
    mine.write_text("mine")
    assert page(mine, folder, code=2) == "mine"
    assert "is no report, so it is left as it is" in capsys.readouterr().err
    for out in (tmp_path / "none/r.html", tmp_path):
        assert cli.main(["report", str(folder), "--out", str(out)]) == 2
        assert "give --out a file in a folder that is there" in capsys.readouterr().err


def test_a_page_of_ours_is_written_anew(tmp_path):
    folder = reports.run(reports.images(tmp_path), "run", weights=False)
    before = page(tmp_path / "r.html", folder)
    reports.evaluated(folder, 0.5)
    assert page(tmp_path / "r.html", folder) != before


def test_watch_writes_until_no_run_is_going(tmp_path, monkeypatch):
    folder, out = reports.run(reports.images(tmp_path), "run", weights=False), tmp_path / "r.html"
    reports.trained(folder, steps=11, of=20)
    (folder / ".lock").write_text("{}")
    pages, slept = [], []

    def sleep(seconds):
        slept.append(seconds)
        pages.append(out.read_text())
        if len(slept) == 2:
            reports.trained(folder)
            (folder / ".lock").unlink()

    monkeypatch.setattr(command.time, "sleep", sleep)
    last = page(out, folder, "--watch", "5")
    assert slept == [5, 5]
    assert all('http-equiv="refresh" content="5"' in p and "step 11 of 20" in p for p in pages)
    assert 'http-equiv="refresh"' not in last and "step 20 of 20, done" in last


def test_ctrl_c_ends_a_watch(tmp_path, monkeypatch, capsys):
    folder = reports.run(reports.images(tmp_path), "run", weights=False)
    (folder / ".lock").write_text("{}")

    def stop(seconds):
        raise KeyboardInterrupt

    monkeypatch.setattr(command.time, "sleep", stop)
    assert page(tmp_path / "r.html", folder, "--watch")
    assert "the last page stays" in capsys.readouterr().out


def test_an_installed_copy_has_the_templates(tmp_path):
    build = [sys.executable, "setup.py", "-q", "build_py", "--build-lib", str(tmp_path)]
    subprocess.run(build, cwd=ROOT, check=True, capture_output=True)
    here = {p.name for p in (ROOT / "fastdisco/report/templates").iterdir()}
    assert {p.name for p in (tmp_path / "fastdisco/report/templates").iterdir()} == here
    assert "uPlot.LICENSE" in here and report.MARK
