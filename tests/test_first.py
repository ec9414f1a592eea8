"""bench/first.py: what it keeps when parts fail, how it judges, and that its commands exist."""

import json
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT

from fastdisco import config

sys.path.insert(0, str(ROOT / "bench"))
import first
from first import Failed, Part


@pytest.fixture
def on_gpu(monkeypatch):
    monkeypatch.setattr(first, "device_kind", lambda: "gpu")


def rows(folder):
    found = json.loads((folder / "first-gpu.json").read_text())
    return {r["name"]: r for r in found["summary"]}, found["samples"]


def test_what_a_part_found_stays_when_a_later_one_fails_or_ends_everything(
    tmp_path, monkeypatch, on_gpu, capsys
):
    def broken(folder, minutes):
        raise RuntimeError("no such kernel")

    def killed(folder, minutes):
        seen.append(rows(tmp_path))
        raise KeyboardInterrupt

    seen, right = [], lambda folder, minutes: {"first_kernels": 0, "names": []}
    parts = {"kernels": right, "loader": broken, "twin": killed}
    parts = {name: Part(1, parts.get(name, right)) for name in first.PARTS}
    monkeypatch.setattr(first, "PARTS", parts)
    with pytest.raises(KeyboardInterrupt):
        first.main(["--out", str(tmp_path), "--only", "kernels", "loader", "twin"])
    summary, samples = rows(tmp_path)
    assert seen == [(summary, samples)] and list(samples) == ["kernels", "loader"]
    assert summary["first_kernels"]["value"] == 0
    assert summary["first_loader"]["reason"] == "RuntimeError: no such kernel"
    assert summary["first_twin_losses"]["reason"] == "not reached yet"
    assert summary["first_gpu_busy"]["reason"] == "not asked for"
    said = capsys.readouterr().out
    assert "kernels: ok, first_kernels 0" in said and "loader: FAIL, RuntimeError" in said
    # Another command adds to it, and its exit code speaks of its own parts alone.
    parts["environment"] = Part(1, lambda folder, minutes: {"first_environment": 2})
    assert first.main(["--out", str(tmp_path), "--only", "environment"]) == 1
    summary, samples = rows(tmp_path)
    assert summary["first_kernels"]["value"] == 0 and summary["first_environment"]["value"] == 2


def test_without_a_gpu_every_row_says_so(tmp_path, monkeypatch):
    monkeypatch.setattr(first, "device_kind", lambda: "cpu")
    assert first.main(["--out", str(tmp_path)]) == 0
    summary = json.loads((tmp_path / "first-cpu.json").read_text())["summary"]
    assert [r["name"] for r in summary] == list(first.ROWS)
    assert all(r["value"] is None and "no GPU" in r["reason"] for r in summary)


def test_the_parts_take_half_an_hour_at_most_and_each_has_a_row():
    assert sum(part.minutes for part in first.PARTS.values()) <= 30
    assert {part for part, *_ in first.ROWS.values()} == set(first.PARTS)
    for name in first.PARTS:
        assert f"\n{name} " in first.__doc__


def test_a_part_that_takes_too_long_is_ended_with_all_that_it_started(tmp_path):
    sign = tmp_path / "sign"
    child = f"import time; time.sleep(4); open({str(sign)!r}, 'w')"
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    with pytest.raises(Failed, match="stopped after 0.0 minutes"):
        first.call([sys.executable, "-c", parent], 1 / 60)
    time.sleep(4)
    assert not sign.exists()
    assert first.call([sys.executable, "-c", "raise SystemExit(3)"], 1) == 3


def test_tests_are_counted_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(first, "WORKERS", 1)
    (tmp_path / "test_it.py").write_text(
        "import pytest\npytestmark = pytest.mark.gpu\n"
        "def test_right(): pass\ndef test_wrong(): assert 0\n"
        "@pytest.fixture\ndef broken(): 1 / 0\ndef test_error(broken): pass\n"
        "def test_skipped(): pytest.skip('x')\n"
    )
    part = first.tests("first_kernels", str(tmp_path / "test_it.py"), f"--rootdir={tmp_path}")
    assert part(tmp_path, 2) == {"first_kernels": 2, "names": ["test_error", "test_wrong"]}
    (tmp_path / "test_it.py").write_text("def test_unmarked(): pass\n")
    with pytest.raises(Failed, match="no test ran"):
        part(tmp_path, 2)


def test_losses_are_compared_with_the_cpus():
    cpu = [4.0] * 10
    found = first.compared([4.0, 4.04, *[4.0] * 8], cpu)
    assert found["first_twin_loss_1"] == 0 and found["first_twin_losses"] == pytest.approx(0.01)
    assert first.good("twin", found)
    worst = first.compared([4.0, float("nan"), *cpu[2:]], cpu)["first_twin_losses"]
    assert worst == float("inf")
    with pytest.raises(Failed, match="9 and 10 losses"):
        first.compared(cpu[:9], cpu)


def test_the_twins_are_one_configuration_in_full_precision(tmp_path):
    load = lambda name: config.load(
        ROOT / "configs/mobv3.yaml", first.twin_overrides(name, tmp_path, Path("t.pth"))
    )
    gpu, cpu = load("gpu"), load("cpu")
    assert gpu.model_copy(update={"run": cpu.run}) == cpu
    assert gpu.engine.precision == gpu.teacher.precision == "fp32" and not gpu.engine.tf32
    assert gpu.data.batch * 2 >= config.micro_batch(gpu, 1) and gpu.run.max_steps == first.STEPS
