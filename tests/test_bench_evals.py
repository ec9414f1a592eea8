"""bench/evals.py: its arms are the real evaluations, and its rows are made of their times as they
say."""

import sys

import numpy as np
import pytest
import torch
from conftest import ROOT

from fastdisco import data

sys.path.insert(0, str(ROOT / "bench"))

import evals
from costs import backbone, cached
from costs.sizes import FULL
from harness import synthetic

SMALL = FULL._replace(
    heads=3,
    linear_images=24,
    linear_classes=12,
    students=("mobilenetv3_small_050",),
    bank=400,
    queries=60,
    width=16,
    all_train=120,
    all_val=32,
    all_classes=4,
    pixels=32,
)
# Of two rounds: (clock, process's own).
SAMPLES = {
    "linear": {
        "mobilenetv3_large_100": {"1": [(10, 5), (20, 8)], "64": [(11, 6), (24, 10)]},
        "resnet18": {"1": [(10, 5), (20, 8)], "64": [(10, 5), (20, 8)]},
    },
    "knn": {"times": [(9, 12), (7, 14)], "gib": 0.25004},
    "ridge": {"times": [(3, 4), (2, 6)]},
    "all": {"all": [(13, 24), (11, 22)], "pass": [(10, 20), (10, 20)]},
}


def rows_of(samples):
    return {r["name"]: r for r in evals.summary(samples, FULL)}


def test_the_rows_are_made_of_the_rounds():
    rows = rows_of(SAMPLES)
    assert {n: r["value"] for n, r in rows.items()} == {
        # Of ratios within a round the median.
        "linear_64_heads_cost": 1.15,
        "linear_64_heads_cost_cpu_time": 1.225,
        "linear_64_heads_cost_resnet18": 1.0,
        "linear_64_heads_cost_resnet18_cpu_time": 1.0,
        # The fastest round, and the median of the process's own time.
        "knn_50k_seconds": 7,
        "knn_50k_cpu_time": 13,
        "knn_50k_gib": 0.25,
        "ridge_50k_seconds": 2,
        "ridge_50k_cpu_time": 5,
        "eval_all_over_one_pass": 1.2,
        "eval_all_over_one_pass_cpu_time": 1.15,
    }
    aims = {n: r["aim"] for n, r in rows.items() if r["aim"] is not None}
    assert aims == {
        "linear_64_heads_cost": 1.15,
        "linear_64_heads_cost_resnet18": 1.15,
        "knn_50k_seconds": 60,
        "knn_50k_gib": 2,
        "ridge_50k_seconds": 10,
        "eval_all_over_one_pass": 1.3,
    }
    assert {r["better"] for r in rows.values()} == {"lower"}


def test_what_did_not_run_has_no_value():
    rows = rows_of({"ridge": SAMPLES["ridge"]})
    assert rows.keys() == rows_of(SAMPLES).keys()
    there = {n for n, r in rows.items() if r["value"] is not None}
    assert there == {"ridge_50k_seconds", "ridge_50k_cpu_time"}
    assert all(r["reason"] == "not run" for n, r in rows.items() if n not in there)


def test_the_parts_run_and_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(evals.os, "sched_setaffinity", lambda pid, cores: None)
    monkeypatch.setattr(torch, "set_num_threads", lambda cores: None)
    command = ["--rounds", "2", "--out", str(tmp_path), "--only"]
    first = evals.main([*command, "linear", "all"], SMALL)
    assert {r["name"] for r in first if r["value"] is None} == {
        f"{x}_50k_{y}" for x in ("knn", "ridge") for y in ("seconds", "cpu_time")
    } | {"knn_50k_gib"}
    assert all(r["value"] > 0 for r in first if r["value"] is not None)
    # What an earlier call measured stays.
    both = evals.main([*command, "knn", "ridge"], SMALL)
    assert all(r["value"] is not None for r in both)
    assert [r for r in both if "50k" not in r["name"]] == [
        r for r in first if "50k" not in r["name"]
    ]


def test_the_arm_is_the_real_command(tmp_path, monkeypatch):
    commands = []
    monkeypatch.setattr(backbone, "said", lambda command: commands.append(command))
    found = backbone.whole(tmp_path, SMALL, 2)
    assert {k: len(v) for k, v in found.items()} == {"all": 2, "pass": 2} and len(commands) == 2
    monkeypatch.undo()
    assert '"eval/knn_top1"' in backbone.said(commands[0])
    names = {p.name.partition("-")[0] for p in (tmp_path / "eval").glob("*.json")}
    assert names == {"knn", "retrieve", "health", "ridge", "logistic", "sgd"}
    # One percent of so few images is none to choose on, and probe would be left out.
    few = [
        x if not x.startswith("data.train") else f"data.train={tmp_path / 'val'}"
        for x in commands[0]
    ]
    few = [x if not x.startswith("data.val") else f"data.val={tmp_path / 'train'}" for x in few]
    with pytest.raises(AssertionError, match="ridge_strength|eval"):
        backbone.said(few)


def test_the_peak_is_what_a_search_adds(monkeypatch):
    at = {"VmRSS": 3 * 2**20, "VmHWM": 5 * 2**20}
    monkeypatch.setattr(cached, "memory", at.__getitem__)
    assert cached.peak_gib(SMALL) == 2
    monkeypatch.undo()
    before = cached.memory("VmHWM")
    kept = np.ones(2**24)  # 128 MiB, written
    assert cached.memory("VmHWM") - before > 0 and cached.memory("VmRSS") >= kept.nbytes // 1024


def test_zones_are_classes_of_different_images(tmp_path):
    synthetic.zones(tmp_path / "a", 30, 12, 0, 0.2)
    synthetic.zones(tmp_path / "b", 30, 12, 1, 0.2)
    one, other = (data.listing(tmp_path / x) for x in "ab")
    assert np.bincount(one.labels).tolist() == [3] * 6 + [2] * 6
    bytes_of = lambda x: {p.read_bytes() for p in x.rglob("*.jpg")}
    assert len(bytes_of(tmp_path / "a") | bytes_of(tmp_path / "b")) == 60
    # Two zones of one photograph are not the same.
    assert one.classes == other.classes == [f"class{i:03}" for i in range(12)]


@pytest.mark.parametrize("number", range(25))
def test_a_zone_is_a_quarter_of_the_photograph_and_within_it(number):
    from PIL import Image

    photo = Image.fromarray(np.arange(80 * 160, dtype=np.uint32).reshape(80, 160).astype(np.int32))
    zone = np.array(synthetic._zone(photo, number))
    assert zone.shape == (40, 80)
    top, left = divmod(int(zone[0, 0]), 160)
    assert (left, top) == (20 * (number % 5), 10 * (number // 5))
    assert zone[-1, -1] == (top + 39) * 160 + left + 79
