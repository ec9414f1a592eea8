"""The bench of the testbeds: its table of runs, the teachers it makes, and one of its runs."""

import json
import sys

import pytest
from conftest import ROOT, run

from fastdisco import config
from fastdisco.teacher import formats

sys.path.insert(0, str(ROOT / "bench"))
import testbeds
from harness.synthetic import random_teacher


def test_every_student_of_the_paper_and_every_method_is_run_at_its_real_resolution():
    found = {}
    for name, (settings, _, differs) in testbeds.RUNS.items():
        cfg = config.load(ROOT / f"configs/{settings}.yaml", differs)
        found.setdefault(cfg.method.name, set()).add(cfg.student.arch)
        assert (
            config.crops(cfg)[0].size == 224
            and cfg.teacher is not None
            and config.micro_batch(cfg, 1) <= testbeds.IMAGES
        ), name
    assert found["moco"] == {
        "mobilenetv3_large_100",
        "efficientnet_b0",
        "efficientnet_b1",
        "resnet18",
        "resnet34",
        "vit_tiny_patch16_224",
        "xcit_tiny_12_p16_224",
    }
    assert set(found) == {"moco", "seed", "swav", "dino"}


@pytest.mark.parametrize(
    "kind, dim", [("moco", 128), ("swav", 128), ("dino_vit", 256), ("dino_xcit", 256)]
)
def test_its_teachers_are_read_as_what_they_are(tmp_path, kind, dim):
    random_teacher(tmp_path / "t.pth", *testbeds.TEACHERS[kind])
    found = formats.read(tmp_path / "t.pth")
    assert (found.arch, found.dim) == (testbeds.TEACHERS[kind][0], dim) and not found.ignored
    assert {"moco": "MoCo", "swav": "SwAV", "dino_vit": "DINO", "dino_xcit": "DINO"}[
        kind
    ] in found.format


def test_what_no_gpu_has_run_stays_open():
    rows = testbeds.summary(
        {"moco_r18": {"perf/total_ips": 1234.5, "perf/mem_gb": 3.2}, "moco_r34": {"exit_code": 2}},
        "not asked for",
    )
    at = {r["name"]: r for r in rows}
    assert at["moco_r34_ips_gpu"]["reason"] == "the run failed with exit code 2"
    assert at["moco_r18_ips_gpu"]["value"] == 1234.5 and at["moco_r18_memory_gpu"]["value"] == 3.2
    assert (
        at["swav_mobv3_ips_gpu"]["value"] is None
        and at["swav_mobv3_ips_gpu"]["reason"] == "not asked for"
    )
    assert len(rows) == 2 * len(testbeds.RUNS)


@pytest.mark.slow
def test_a_testbed_runs_here_at_a_small_size(tmp_path):
    run(
        sys.executable,
        "bench/testbeds.py",
        "--only",
        "swav_mobv3",
        "--steps",
        "2",
        "--out",
        tmp_path,
        "data.batch=4",
        "data.threads=1",
        "method.queue=0",
        "view={jitter_p: 0.5}",
        "views=[{count: 2, size: 64}, {count: 2, size: 32}]",
        "student.arch=mobilenetv3_small_050",
    )
    assert (
        json.loads((tmp_path / "swav_mobv3" / "metrics.jsonl").read_text().splitlines()[-1])[
            "train/loss_swav"
        ]
        > 0
    )
