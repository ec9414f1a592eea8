"""Runs made by hand, with all that a report shows: what its tests share."""

import json
import os

import numpy as np
import torch
from conftest import ROOT
from PIL import Image

from fastdisco import config, data, models
from fastdisco.evals import results, tsne
from fastdisco.evals.settings import Tsne
from fastdisco.evals.tsne import Map

BEGIN = 1_700_000_000


def images(root):
    """train/ with 48 images of 3 classes and val/ with 36: colour by class, noisy."""
    rng = np.random.default_rng(0)
    for part, n in (("train", 48), ("val", 36)):
        for i in range(n):
            label = i % 3
            grain = rng.integers(0, 200, size=(6, 6, 3))
            grain[..., label] += 55
            path = root / part / f"class{label}" / f"{part}{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(grain.astype(np.uint8))
            small.resize((36, 40), Image.BICUBIC).save(path)
    return root


def run(root, name, seed=0, weights=True, **more):
    """out/NAME: a configuration and random weights, nothing else."""
    overrides = [
        f"data.train={root}/train",
        f"data.val={root}/val",
        f"run.out={root}/out",
        f"run.name={name}",
        *(f"{k.replace('__', '.')}={v}" for k, v in more.items()),
    ]
    cfg = config.load(ROOT / "tests/tiny.yaml", overrides)
    folder = root / "out" / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(config.dump(cfg))
    if weights:
        torch.manual_seed(seed)
        saved = {}
        for student, own in config.students(cfg).items():
            saved[f"{student}/student" if student else "student"] = models.of(own).state_dict()
        step = folder / "checkpoints/step_00000020"
        step.mkdir(parents=True)
        torch.save(saved, step / "state.pt")
        (step.parent / "last").write_text(step.name)
    return folder


def trained(folder, steps=20, of=20, starts=(0,), teacher=False, rate=100.0):
    """Metrics, an environment and a file of TensorBoard's for each start."""
    lines = []
    for step in range(1, steps + 1):
        entry = {
            "step": step,
            "time": BEGIN + 10.0 * step,
            "train/loss": 8 - 0.2 * step,
            "train/loss_contrast": 7 - 0.1 * step,
            "train/lr": 0.05,
            "train/epoch": step / 6,
            "feat/std": 0.5,
            "perf/total_ips": rate,
            "perf/data_share": 0.1,
            "perf/step_time": 0.5,
            "perf/eta": 0.5 * (of - step),
            "perf/mem_gb": 1.5,
        }
        if teacher:
            entry["distill/cosine"] = 0.4 + 0.01 * step
        lines.append(entry)
        if step % 10 == 0:
            known = {"eval/knn_top1": 0.3 + step / 100, "eval/effective_rank": 4.0}
            lines.append({"step": step, "time": BEGIN + 10.0 * step + 2, **known})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(x) + "\n" for x in lines))
    env = {"versions": {"torch": "2.14.1"}, "cpu": "a CPU", "cores": 2, "gpus": [], "ranks": 1}
    (folder / "env.json").write_text(json.dumps(env | {"command": folder.name}))
    (folder / "tb").mkdir(exist_ok=True)
    for start in starts:
        (folder / f"tb/events.out.tfevents.{BEGIN + start}.host.1.0").touch()


def network(folder):
    return {"fingerprint": f"{folder.name:0<64}", "arch": "test_efficientnet"}


def evaluated(folder, knn, linear=None, semi=None, k=5):
    """Results with these accuracies; k: a part of kNN's protocol."""
    right = np.arange(40) < round(40 * knn)
    labels = np.ones(40, np.int64)
    protocol = {
        "network": network(folder),
        "data": {"val": 1},
        "knn": {"k": k},
        "versions": {"torch": "2"},
    }
    found = [
        results.make(
            "knn", {"knn_top1": knn}, protocol, 1.25, {"knn_top1": right.astype(np.int64)}, labels
        )
    ]
    for what, value in (("linear", linear), ("semi-1pct-try0", semi)):
        if value is not None:
            values = {"linear_top1_selected": value, "linear_top1_best_on_val": value + 0.01}
            found.append(results.make(what, values, protocol | {what: 1}, 30.0))
    for i, result in enumerate(found):
        os.utime(results.write(folder / "eval", result), (BEGIN + i, BEGIN + i))


def exported(folder, ms=4.0, mb=8.0, drop=0.5, passed=True):
    """export/ with the bench of three forms and the accuracies of the files."""
    rows = [
        {
            "network": folder.name,
            "form": form,
            "image": 32,
            "threads": 2,
            "weights": 2_000_000,
            "macs": 5_000_000,
            "bytes": mb * 1e6 / size,
            "p50_ms_1_thread": ms / speed,
            "p95_ms_1_thread": 2 * ms / speed,
            "images_per_s": 100.0,
        }
        for form, size, speed in (("torch", 1, 1), ("onnx", 1, 2), ("int8", 4, 4))
    ]
    (folder / "export").mkdir()
    machine = {"cpu": "a CPU", "cores": 2}
    (folder / "export/bench.json").write_text(json.dumps({"machine": machine, "rows": rows}))
    int8 = {"fp32": {"knn_top1": 0.5}, "values": {"knn_top1": 0.5 - drop / 100}, "passed": passed}
    (folder / "export/export.json").write_text(json.dumps({"int8": int8}))


def mapped(folder, names, seed=0, at=0):
    """eval/tsne-*.coordinates.json of these networks."""
    listing = data.listing(config.load(folder / "config.yaml").data.val)
    settings = Tsne(images=12, k=5)
    chosen = tsne.choose(listing, settings)
    rng = np.random.default_rng(seed)
    values = {"tsne_knn_preservation": 0.25, "tsne_trustworthiness": 0.9}
    maps = [
        Map(name, {"arch": "a"}, rng.normal(size=(len(chosen.indices), 2)), values, 0.0)
        for name in names
    ]
    (folder / "eval").mkdir(exist_ok=True)
    path = folder / f"eval/tsne-0000000{seed}.coordinates.json"
    protocol = {"networks": [], "tsne": {"seed": 0}}
    colours = ["#1f77b4", "#ff7f0e", "#2ca02c"]
    tsne.write(path, listing, chosen, maps, colours, {}, protocol, f"0000000{seed}")
    os.utime(path, (BEGIN + at, BEGIN + at))
    return path


def whole(root):
    """Teacher, student alone and DisCo, each with everything."""
    images(root)
    teacher = run(root, "teacher", 9)
    evaluated(teacher, 0.9, 0.95, 0.8)
    exported(teacher, ms=20.0, mb=44.0)
    alone, disco = run(root, "alone", 1), run(root, "disco", 2, teacher__file=teacher)
    trained(alone)
    trained(disco, starts=(0, 95), teacher=True, rate=80.0)
    evaluated(alone, 0.4, 0.5, 0.3)
    evaluated(disco, 0.7, 0.75, 0.6)
    exported(alone)
    exported(disco, ms=5.0, drop=0.2)
    mapped(disco, ["student alone", "teacher", "DisCo"])
    return disco, alone
