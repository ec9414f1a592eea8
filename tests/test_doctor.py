"""`fastdisco doctor` on one machine: each check finds what it is for, against made-up machines."""

import importlib.metadata
import json
import math
import re
import resource
import shutil
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ranks, tiny
from training import command

from fastdisco import config
from fastdisco.commands import trial
from fastdisco.common.errors import UserError
from fastdisco.data import operators
from fastdisco.doctor import (
    cgroup,
    code,
    disk,
    finding,
    gpu,
    looked,
    machine,
    node,
    training,
    versions,
)
from fastdisco.doctor.cgroup import Limits
from fastdisco.engine import device
from fastdisco.run import sizes
from fastdisco.teacher.cache import BLOCK

GIB, MIB = 2**30, 2**20


def says(found, level, *words):
    """A finding of that level, with these words, and with a remedy if something is to be done."""
    assert found.level == level, found
    told = finding.line(found)
    assert all(word in told for word in words), told
    assert bool(found.remedy) == (level in ("warning", "failure")), found


# ---- findings


def test_a_check_that_breaks_is_a_failure_and_hides_no_other():
    def broken():
        raise ZeroDivisionError("of the check\nand more")

    found = [looked(broken), looked(lambda: finding.ok("a", "good"))]
    says(found[0], "failure", "broken", "ZeroDivisionError: of the check")
    assert found[1].level == "ok" and code(found) == 2


def test_warnings_do_not_fail():
    found = [finding.ok("a", "b"), finding.warning("c", "d", "e"), finding.skipped("f", "g")]
    assert code(found) == 0 and finding.summary(found) == "3 checks: 1 warning"
    assert finding.line(found[1]._replace(where="node1")).endswith("node1: d; e")


# ---- versions


def test_two_wheels_of_dali():
    found = versions.dali({"nvidia-dali-cuda120": "2.4", "nvidia-dali-cuda130": "2.4"}, "13.0")
    says(found, "failure", "write into one folder", "pip uninstall -y nvidia-dali-cuda120")


@pytest.mark.parametrize(
    "wheels, cuda, words",
    [
        ({}, "12.8", "pip install nvidia-dali-cuda120"),
        ({"nvidia-dali-cuda120": "2.4"}, "13.0", "then pip install nvidia-dali-cuda130"),
        ({"nvidia-dali-cuda130": "2.4"}, "12.8", "then pip install nvidia-dali-cuda120"),
    ],
)
def test_dali_for_another_cuda(wheels, cuda, words):
    says(versions.dali(wheels, cuda), "failure", words)


def test_dali_that_lacks_an_operator_or_does_not_load(monkeypatch):
    wheel = {"nvidia-dali-cuda130": "2.4"}
    monkeypatch.setattr(operators, "OPERATORS", {"CPU": {"NoSuchOperator"}})
    says(versions.dali(wheel, None), "failure", "no CPU operators ['NoSuchOperator']")

    def lost():
        raise UserError("NVIDIA DALI is not installed")

    monkeypatch.setattr(versions.data, "missing_operators", lost)
    says(versions.dali(wheel, None), "failure", "does not load (NVIDIA DALI is not installed)")


def test_the_wheels_of_dali_that_are_installed(monkeypatch):
    found = [types.SimpleNamespace(metadata={"Name": n}, version="2.4") for n in
             ("nvidia_dali_cuda130", "Nvidia-DALI-cuda120", "numpy", None)]  # fmt: skip
    monkeypatch.setattr(importlib.metadata, "distributions", lambda: found)
    assert list(versions.dali_wheels()) == ["nvidia-dali-cuda120", "nvidia-dali-cuda130"]


def test_packages_of_versions_that_do_not_serve(monkeypatch):
    there = {"torch": "2.11.0a0+a6c236b9fd.nv26", "numpy": "2.1"}

    def version(name):
        if name not in there:
            raise importlib.metadata.PackageNotFoundError(name)
        return there[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    # An image's alpha counts as its release, and extras that were not asked for do not count.
    good = ["torch>=2.11,<2.16", "numpy", "pytest; extra == 'dev'"]
    monkeypatch.setattr(versions, "_wanted", lambda: good)
    says(versions.requirements(), "ok", "2 packages")
    says(
        versions.requirements([*good, "numpy>=3", "timm>=1"]),
        "failure",
        "numpy>=3 (found 2.1)",
        "timm>=1 (found none)",
        "pip install 'numpy>=3' 'timm>=1'",
    )


def test_a_checkout_that_is_not_installed(monkeypatch):
    monkeypatch.setattr(versions, "_wanted", lambda: None)
    says(versions.requirements(), "skipped", "not installed")


def test_a_numpy_that_torch_does_not_know(monkeypatch):
    def refuse(_):
        raise RuntimeError("Numpy is not available")

    monkeypatch.setattr(torch, "from_numpy", refuse)
    says(versions.numpy_fits(), "failure", np.__version__, "numpy<2")


def test_triton_without_compiler_header_or_driver(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.delenv("CC", raising=False)
    says(versions.triton(False), "failure", "no C compiler", "install gcc")
    monkeypatch.setattr(device, "compiler", lambda: "/usr/bin/cc")
    monkeypatch.setattr(device, "_lists_libcuda", lambda: False)
    monkeypatch.setattr(device.sysconfig, "get_path", lambda _: str(tmp_path))
    (tmp_path / "Python.h").touch()
    says(versions.triton(False), "ok", "/usr/bin/cc")
    says(versions.triton(True), "failure", "libcuda.so.1", "TRITON_LIBCUDA_PATH")
    (tmp_path / "Python.h").unlink()
    says(versions.triton(False), "failure", "python3-dev")


@pytest.mark.parametrize("name", ["deepspeed", "fastdisco"])
def test_a_command_that_is_not_on_the_path(monkeypatch, name):
    monkeypatch.setattr(shutil, "which", lambda _: None)
    check = {"deepspeed": versions.deepspeed, "fastdisco": lambda: versions.fastdisco("abc")}[name]
    says(check(), "warning", f"`{name}` is not on PATH")
    monkeypatch.setattr(shutil, "which", lambda _: "/bin/it")
    assert check().level == "ok"


def test_an_apex_that_is_not_nvidias(monkeypatch):
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    says(versions.apex(), "warning", "not NVIDIA's", "pip uninstall apex")
    says(versions.apex("fusedlamb"), "failure", "optim.name=fusedlamb needs it")
    monkeypatch.setitem(sys.modules, "apex", types.SimpleNamespace(optimizers=1))
    says(versions.apex("fusedlamb"), "ok", "NVIDIA's")
    # So an import raises.
    monkeypatch.setitem(sys.modules, "apex", None)
    says(versions.apex("lars"), "ok", "not usable")
    says(versions.apex("fusedsgd"), "failure", "build NVIDIA's apex")


def test_torch_says_what_it_is_built_for(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", None)
    says(versions.torch_loads(), "ok", torch.__version__, "for the CPU")
    monkeypatch.setitem(sys.modules, "torchvision", None)
    says(looked(versions.torch_loads), "failure", "torchvision")


# ---- GPUs, in nvidia-smi's words


def smi(index=0, driver="570.86", mode="Default", free=80000, total=81559, now="0", ever="0",
        width="16"):  # fmt: skip
    """A line of nvidia-smi's for an H100."""
    rest = f"{mode}, {free}, {total}, {now}, {ever}, {width}, 16, 1, 5"
    return f"{index}, NVIDIA H100 80GB HBM3, {driver}, {rest}\n"


def test_the_words_of_nvidia_smi():
    two = gpu.parse(smi() + smi(1, now="[N/A]", ever="[N/A]", width="[Not Supported]"))
    assert two[0] == gpu.Gpu(
        0, "NVIDIA H100 80GB HBM3", "570.86", "Default", 80000, 81559, 0, 0, 16, 16, 1, 5
    )
    assert two[1].ecc_now is None and two[1].width is None and two[1].index == 1
    assert gpu.parse(smi().replace(" HBM3", ", HBM3"))[0].name == "NVIDIA H100 80GB, HBM3"
    assert gpu.parse("\n") == []
    with pytest.raises(ValueError, match="has not 12 fields"):
        gpu.parse("0, NVIDIA\n")


@pytest.mark.parametrize(
    "answer, level, words",
    [
        (smi(), "ok", []),
        (smi(mode="Prohibited"), "failure", ["compute mode", "GPU 0", "-c DEFAULT"]),
        (smi(mode="Exclusive_Process"), "warning", ["compute mode", "one process at a time"]),
        (smi() + smi(1, free=900), "failure", ["gpu memory", "GPU 1 has 900", "a rank needs 1024"]),
        (smi(free=50000), "warning", ["gpu memory", "50000 of 81559"]),
        (smi(now="2"), "failure", ["ecc", "GPU 0 2"]),
        (smi(ever="7"), "warning", ["ecc", "in its life: GPU 0 7"]),
        (smi() + smi(1, width="4"), "warning", ["pcie", "GPU 1 4 of 16 lanes"]),
        (smi(driver="535.1"), "failure", ["driver", "535.1 runs CUDA up to 12.2", "for CUDA 12"]),
    ],
)
def test_what_is_wrong_with_a_gpu(monkeypatch, answer, level, words):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpu, "cuda_of_driver", lambda: 12020 if "535" in answer else 13000)
    found = node.gpus(GIB, True, lambda: answer)
    assert len(found) == 6
    bad = [f for f in found if f.level != "ok"]
    assert len(bad) == (level != "ok")
    for one in bad:
        says(one, level, *words)


def test_a_gpu_that_is_hidden_does_not_count(monkeypatch):
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(gpu, "cuda_of_driver", lambda: 13000)
    answer = smi() + smi(1, now="3")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert "failure" in [f.level for f in node.gpus(0, True, lambda: answer)]
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    assert {f.level for f in node.gpus(0, True, lambda: answer)} == {"ok"}
    # By name nothing is left out.
    assert len(gpu.visible(gpu.parse(answer), "GPU-1234")) == 2


def test_a_driver_of_the_same_major_number_warns():
    one = gpu.parse(smi())
    says(gpu.driver(one, "12.8", 12080), "ok", "up to 12.8")
    says(gpu.driver(one, "12.8", 12020), "warning", "update the driver to one for CUDA 12.8")
    says(gpu.driver(one, "12.8", 13000), "ok")
    says(gpu.driver(one, None, None), "failure", "build for the CPU")
    says(gpu.driver(one, "12.8", None), "skipped", "cannot ask")


def test_gpus_that_do_not_tell():
    one = gpu.parse(smi(now="[N/A]", ever="[N/A]", width="[N/A]", free="[N/A]"))
    checks = (gpu.ecc, gpu.pcie, lambda g: gpu.free_memory(g, 0))
    for check in checks:
        says(check(one), "skipped")


def test_a_machine_without_a_gpu_and_one_whose_driver_is_lost(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device, "NODES", tmp_path)
    (only,) = node.gpus(0, True, lambda: None)
    says(only, "skipped", "no NVIDIA GPU here")
    (tmp_path / "nvidia0").touch()
    (only,) = node.gpus(0, True, lambda: "")
    says(only, "failure", "nvidia0", "--gpus all")

    def failed():
        raise OSError("nvidia-smi ended with 9 and said: couldn't communicate with the driver")

    (only,) = node.gpus(0, True, failed)
    says(only, "failure", "ended with 9")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (only,) = node.gpus(0, True, failed)
    says(only, "skipped", "hides all GPUs")


def test_the_device_that_a_training_would_refuse(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(device, "NODES", tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    says(gpu.usable(), "ok", "the CPU")
    (tmp_path / "nvidia0").touch()
    monkeypatch.setattr(torch.version, "cuda", None)
    says(gpu.usable(), "failure", "is a build for the CPU", "install torch for CUDA")


def test_nvidia_smi_is_asked(monkeypatch, tmp_path):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n/bin/cat <<E\n{smi()}E\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu.parse(gpu.ask())[0].driver == "570.86"
    program.write_text("#!/bin/sh\necho no driver >&2; exit 9\n")
    with pytest.raises(OSError, match="ended with 9 and said: no driver"):
        gpu.ask()
    program.unlink()
    assert gpu.ask() is None


# ---- the machine


def test_shared_memory(tmp_path, monkeypatch):
    says(machine.shared_memory(1, tmp_path), "ok")
    says(machine.shared_memory(2, tmp_path / "none"), "failure", "--ipc=host")
    says(machine.shared_memory_size(64 * MIB, 8), "failure", "64 MiB", "--shm-size=1g")
    says(machine.shared_memory_size(500 * MIB, 8), "warning", "8 ranks")
    says(machine.shared_memory_size(64 * MIB, 1), "ok")

    def full(**_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(machine.tempfile, "TemporaryFile", full)
    says(machine.shared_memory(1, tmp_path), "failure", "No space left")


@pytest.mark.parametrize(
    "check, args, level, words",
    [
        (machine.locked_memory, (resource.RLIM_INFINITY, True), "ok", "no limit"),
        (machine.locked_memory, (8 * MIB, False), "ok", "there is none"),
        (machine.locked_memory, (8 * MIB, True), "failure", "memlock=-1"),
        (machine.open_files, (0, 65536), "ok", "65536"),
        (machine.open_files, (0, resource.RLIM_INFINITY), "ok", "no limit"),
        (machine.open_files, (0, 512), "warning", "ulimit -n 65536"),
        (machine.open_files, (512, 600), "failure", "512 tars"),
        (machine.stack, (8 * MIB,), "ok", "8.0 MiB"),
        (machine.stack, (1 * MIB,), "warning", "ulimit -s 8192"),
        (machine.cores, (4, 2, Limits(), 8), "ok", "8 cores for 2 ranks"),
        (machine.cores, (4, 8, Limits(), 8), "warning", "data.threads=1"),
        (machine.cores, (4, 2, Limits(cores=2.5), 8), "warning", "limit is 2.5"),
        (machine.cores, (1, 4, Limits(), 2), "warning", "start fewer ranks"),
        (machine.memory, (GIB, 2, Limits(), 8 * GIB), "ok", "8.0 GiB free"),
        (machine.memory, (GIB, 2, Limits(), 3 * GIB), "warning", "2 ranks at 1.0 GiB"),
        (machine.memory, (GIB, 2, Limits(), GIB), "failure", "end other programs"),
        (
            machine.memory,
            (GIB, 2, Limits(memory=4 * GIB, memory_used=3 * GIB), 8 * GIB),
            "failure",
            "raise the container's limit",
        ),
        (machine.tasks, (4, 2, Limits()), "ok", "no limit"),
        (machine.tasks, (4, 2, Limits(tasks=1000, tasks_used=10)), "ok", "990 more"),
        (machine.tasks, (4, 2, Limits(tasks=200, tasks_used=100)), "failure", "--pids-limit"),
        (machine.interface, ("",), "skipped", "not set"),
        (machine.interface, ("lo",), "ok", "lo"),
        (machine.interface, ("ib77",), "failure", "ib77"),
        (machine.hostname, (1, "localhost", ""), "ok", "127.0.0.1"),
        (machine.hostname, (2, "localhost", ""), "failure", "no other node can reach"),
        (machine.hostname, (2, "localhost", "eth0"), "ok", "eth0 is taken"),
        (machine.hostname, (1, "no.such.host.invalid", ""), "warning", "/etc/hosts"),
        (machine.hostname, (2, "no.such.host.invalid", ""), "failure", "GLOO_SOCKET_IFNAME"),
    ],
)
def test_limits_and_names(check, args, level, words):
    says(check(*args), level, words)


def written(root, files):
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


def test_limits_of_a_container_in_version_2(tmp_path):
    written(
        tmp_path,
        {
            "proc": "0::/job/rank",
            "job/cpu.max": "250000 100000",
            "job/rank/cpu.max": "max 100000",
            "job/memory.max": str(4 * GIB),
            "job/memory.current": str(3 * GIB),
            "job/memory.stat": f"anon 1\nactive_file {GIB}\ninactive_file {GIB}\nfile 9",
            "job/rank/memory.max": "max",
            "job/rank/pids.max": "100",
            "job/rank/pids.current": "40",
        },
    )
    found = cgroup.limits(tmp_path, tmp_path / "proc")
    assert found == Limits(2.5, 4 * GIB, 100, GIB, 40)


def test_limits_of_a_container_in_version_1(tmp_path):
    written(
        tmp_path,
        {
            "proc": "4:memory:/docker/1\n3:cpu,cpuacct:/docker/1\n2:pids:/docker/1",
            # Inside the container its own group is the root of the mount.
            "cpu,cpuacct/cpu.cfs_quota_us": "150000",
            "cpu,cpuacct/cpu.cfs_period_us": "100000",
            "memory/docker/1/memory.limit_in_bytes": str(2 * GIB),
            "memory/docker/1/memory.usage_in_bytes": str(2 * GIB),
            "memory/docker/1/memory.stat": f"inactive_file 1\ntotal_inactive_file {GIB}",
            "memory/memory.limit_in_bytes": "9223372036854771712",
            "pids/docker/1/pids.max": "max",
        },
    )
    found = cgroup.limits(tmp_path, tmp_path / "proc")
    assert found == Limits(1.5, 2 * GIB, math.inf, GIB, 0)
    nothing = cgroup.limits(tmp_path / "none", tmp_path / "none")
    assert nothing == Limits()


def test_what_the_images_need(tmp_path):
    needs = node.Needs(folder=tmp_path, cache=2**70, cache_folder=tmp_path / "c", tars=10**9)
    (found,) = node.recorded(needs)
    says(found, "failure", "recorded embeddings", "teacher.cache_folder")
    assert node.room(needs)[1:] == [found]
    (found,) = node.tars(needs)
    says(found, "failure", "1000000000 tars")
    assert node.tars(node.Needs()) == node.recorded(node.Needs()) == []


# ---- the disk


def test_space_on_the_disk(tmp_path):
    args = ("space", tmp_path / "out/run", 10 * GIB, 4 * GIB, "3 checkpoints", "run.out")
    says(disk.space_left(*args), "ok", "10.0 GiB free", "3 checkpoints need 4.0 GiB")
    says(disk.space_left(*args[:2], 6 * GIB, *args[3:]), "warning", "take another run.out")
    says(disk.space_left(*args[:2], 3 * GIB, *args[3:]), "failure", "make space")
    says(disk.space_left(*args, 12), "failure", "12 more files")
    says(disk.space(*args[:2], 2**70, *args[4:]), "failure", str(tmp_path / "out/run"))


def test_speed_of_writing(tmp_path):
    folder = Path("out")
    says(disk.writable(folder, disk.writes(tmp_path, 1), MIB), "ok", "MiB/s")
    assert not list(tmp_path.iterdir())
    slow = disk.Writing(rate=MIB, sync=0.01)
    says(disk.writable(folder, slow, 0), "ok", "1 MiB/s")
    says(disk.writable(folder, slow, 200 * MIB), "warning", "200.0 s", "checkpoint.every")
    says(disk.writable(folder, disk.Writing(GIB, 2.5), MIB), "warning", "2500.0 ms", "busy")
    says(disk.writable(folder, OSError(30, "Read-only file system"), 0), "failure", "Read-only")
    with pytest.raises(FileNotFoundError):
        disk.writes(tmp_path / "none", 1)


def test_speed_of_reading(few, packed):
    for listing in (few, packed):
        found = disk.reads(listing, 2, images=20)
        assert found.images > 0 and found.dropped
        sizes_of = {len(listing.read(i)) for i in listing.kept}
        assert min(sizes_of) <= found.rate / found.images <= max(sizes_of)
    read = disk.Reading(1000, 100 * MIB, False)
    says(disk.feeds(read, 0, 1), "ok", "1000 images/s", "from the system's cache")
    says(disk.feeds(read, 500, 1), "ok", "500")
    says(disk.feeds(read, 900, 1), "warning", "headroom")
    says(disk.feeds(read, 3000, 8), "warning", "8 ranks could take 3000", "data pack")
    lost = FileNotFoundError(2, "No such file", "a.jpg")
    says(disk.feeds(lost, 1, 1), "failure", "a.jpg", "data check")


def test_a_folder_that_a_node_does_not_share():
    seen = [("node0", True, "/out"), ("node0", True, "/out"), ("node1", True, "/out")]
    says(disk.shared(seen), "ok", "3 ranks on 2 nodes")
    says(disk.shared([*seen, ("node2", False, "/scratch")]), "failure", "node2", "/scratch")
    says(disk.shared(seen[:1]), "skipped")


def test_the_scratch_folder_is_hidden_beside_the_run_and_goes(tmp_path):
    with disk.scratch(tmp_path / "out/run") as made:
        assert made.parent == tmp_path and made.name.startswith(".")
    assert not list(tmp_path.iterdir())
    # Of a process that is no more: no number of a process is so large.
    left = tmp_path / re.sub(r"-\d+-", "-99999999-", made.name, count=1)
    (left / "trial").mkdir(parents=True)
    with disk.scratch(tmp_path / "out/run"):
        assert not left.exists()


# ---- the training


def test_the_lines_of_a_plan():
    lines = ["student     r18: 11 M", "remark      a queue", "missing     data.train x, y"]
    found = list(training.planned(lines))
    assert [f.level for f in found] == ["ok", "warning", "failure"]
    says(found[2], "failure", "data.train x, y")
    assert len(list(training.planned([*lines[:1], "missing     nothing"]))) == 1


SPEED = training.Speed(images=100, compute=110, step_s=2.0, wait=0.05, gb=3.0)


def test_what_the_steps_measured(tmp_path):
    says(training.waits(SPEED), "ok", "100 images/s", "5%")
    says(training.waits(SPEED._replace(wait=0.4)), "warning", "40%", "data.threads")
    says(training.fits(SPEED, 8, "a GPU"), "ok", "3.00 GB")
    says(training.fits(SPEED, 3.1, "a GPU"), "warning", "lower data.batch")
    says(training.exchange_share(0.2, SPEED), "ok", "10%")
    says(training.exchange_share(1.5, SPEED), "warning", "75%", "data.accumulate")
    days = training.eta(SPEED, 100_000, 100, 36.0)
    says(days, "ok", "2 d 8 h for 100,000 steps of 2 s with 100 checkpoints")
    assert training.eta(SPEED, 35, 1, 0).found.startswith("1 min 10 s for 35 steps")
    assert training.eta(SPEED, 3600, 1, 300).found.startswith("2 h 5 min")
    file = tmp_path / "metrics.jsonl"
    assert training.speed(file) is None
    names = dict(total_ips=1, compute_ips=2, step_time=3, data_share=4, mem_gb=5)
    row = {f"perf/{k}": v for k, v in names.items()}
    rows = [{"train/loss": 1}, dict.fromkeys(row, 9), row, {"eval/knn_top1": 0.5}]
    file.write_text("".join(json.dumps(r) + "\n" for r in rows[:1]))
    assert training.speed(file) is None
    file.write_text("".join(json.dumps(r) + "\n" for r in rows))
    assert training.speed(file) == (1, 2, 3, 4, 5)


def test_a_checkpoint_that_is_larger_than_planned(tmp_path):
    file = tmp_path / "state.pt"
    file.write_bytes(bytes(3 * MIB))
    says(training.checkpoint_size(3 * MIB, [file]), "ok", "3.0 MiB")
    says(training.checkpoint_size(MIB, [file]), "warning", "planned were 1.0")


@pytest.mark.parametrize(
    "ended, said, words",
    [
        (
            2,
            "x\nfastdisco: error: data.batch: 9 is odd; take 8\n",
            ("data.batch: 9 is odd; take 8",),
        ),
        (-9, "step 1\n", ("killed, often for want of memory", "step 1")),
        (-11, "", ("signal 11", "nothing")),
        (1, "Traceback\nRuntimeError: cudnn\n", ("ended with code 1", "RuntimeError: cudnn")),
    ],
)
def test_steps_that_fail(ended, said, words):
    says(training.ended(ended, said), "failure", *words)


def test_what_the_check_of_the_teacher_said():
    said = 'some words\n{"teacher/knn_top1": 0.5, "teacher/chance": 0.1}\n'
    says(training.teacher_words(0, said, ""), "ok", "knn_top1 0.5")
    err = "fastdisco: error: t.pth: is no better than chance; do not train with it\n"
    says(training.teacher_words(2, "", err), "failure", "no better than chance")
    says(training.teacher_words(-9, "", ""), "failure")


def loaded(folder, tmp_path, *overrides):
    _, file, *rest = map(str, tiny(folder, tmp_path, *overrides))
    return config.load(file, rest)


def test_the_trial_is_the_run_for_some_steps(folder, tmp_path):
    cfg = loaded(folder, tmp_path, "eval.every=1", "checkpoint.every=7", "teacher.file=/t.pth",
                 "teacher.cache=record", f"teacher.cache_folder={tmp_path}/cache")  # fmt: skip
    found = config.validate(json.loads(training.trial(cfg, tmp_path / "s").model_dump_json()), "t")
    old, new = (config.flatten(c.model_dump(mode="json")) for c in (cfg, found))
    differ = {k: new[k] for k in old if old[k] != new[k]}
    assert differ == {
        "run.out": str(tmp_path / "s"),
        "run.name": "trial",
        "run.max_steps": 20,
        "data.val": None,
        "eval.every": 0,
        "log.every": 10,
        "checkpoint.every": 20,
        "teacher.cache": "off",
    }


def test_the_arguments_of_the_check_of_the_teacher(folder, tmp_path):
    cfg = loaded(folder, tmp_path, "teacher.file=/t.pth", "teacher.arch=resnet18")
    found = training.teacher_check(cfg, 3)
    assert found[:3] == ["teacher", "check", "/t.pth"] and "--arch=resnet18" in found
    assert f"--data={folder}/val" in found and f"--bank={folder}/train" in found
    assert "--size=32" in found and "--threads=1" in found
    assert "no classes" in training.teacher_check(cfg, 1)
    assert training.teacher_check(loaded(folder, tmp_path), 3) == "no teacher"
    kwargs = loaded(folder, tmp_path, "teacher.file=/t.pth", "teacher.kwargs={a: 1}")
    assert "teacher.kwargs" in training.teacher_check(kwargs, 3)
    replay = loaded(folder, tmp_path, "teacher.file=/t.pth", "teacher.cache=replay")
    assert "replayed" in training.teacher_check(replay, 3)


def test_steps_and_checkpoints_of_a_run(folder, tmp_path):
    cfg = loaded(folder, tmp_path, "checkpoint.every=6")
    # 43 images in batches of 8, 4 epochs.
    assert training.steps_of(cfg, 43) == (20, 4)
    assert training.steps_of(loaded(folder, tmp_path, "run.max_steps=3"), 43) == (3, 1)


def test_the_bytes_of_recorded_embeddings(folder, tmp_path):
    cfg = loaded(folder, tmp_path, "teacher.file=/t.pth", "teacher.cache=record",
                 "teacher.cache_rounds=3")  # fmt: skip
    # Two views of 8 numbers in float16 and a checksum, in whole blocks.
    assert sizes.cache_bytes(cfg, 43) == 3 * BLOCK * (2 * 8 * 2 + 4)
    assert sizes.cache_bytes(loaded(folder, tmp_path), 43) == 0


# ---- the command


def doctor(args):
    """(exit code, stdout, stderr) of the command in this process."""
    return command("doctor", *args)


def told(out):
    """The findings of --json by section and check."""
    report = json.loads(out.splitlines()[-1])
    return report["code"], {(f["section"], f["check"]): f for f in report["findings"]}


def test_a_quick_look_measures_nothing_and_fails_where_a_training_would(folder, tmp_path):
    right = [*tiny(folder, tmp_path / "out"), "--quick", "--json"]
    (ended, out, _), *_ = ranks(1, doctor, right)
    found = told(out)[1]
    assert ended == 2 * any(f["level"] == "failure" for f in found.values())
    assert found["disk", "space"]["level"] == found["disk", "write"]["level"] == "ok"
    assert found["versions", "dali"]["level"] == "ok" and ("training", "steps") not in found
    assert list(tmp_path.iterdir()) == []


def test_a_quick_look_at_a_configuration_that_is_refused(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(node, "libraries", lambda *_: [])
    args = tiny(folder, tmp_path / "out", "data.batch=9", "data.accumulate=2")
    ended, out, _ = doctor([*args, "--quick", "--json"])
    found = told(out)[1]
    assert ended == 2 and "9 does not divide" in found["training", "refused"]["found"]


def test_twenty_steps_into_a_folder_that_goes(folder, tmp_path, monkeypatch):
    """The whole command but the libraries' checks, which the look above has made."""
    monkeypatch.setattr(node, "libraries", lambda *_: [])
    monkeypatch.setenv("RANK", "0")
    args = tiny(folder, tmp_path / "out", "run.epochs=100", "checkpoint.every=5")
    ended, out, err = doctor([*args, "--json"])
    _, found = told(out)
    assert ended == 2 * any(f["level"] == "failure" for f in found.values()), err
    assert found["training", "steps"]["found"] == "ran to their end", found
    assert "images/s" in found["training", "speed"]["found"]
    # 5 steps an epoch.
    assert "for 500 steps" in found["training", "whole run"]["found"]
    assert "with 100 checkpoints" in found["training", "whole run"]["found"]
    assert found["training", "checkpoint size"]["level"] == "ok"
    assert found["training", "teacher"]["found"] == "no teacher"
    assert "could take" in found["disk", "read"]["found"]
    assert found["disk", "write"]["level"] == "ok"
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(node, "libraries", lambda *_: [])

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(disk.temporary, "part", lambda path: Path("/proc/none/x"))
    monkeypatch.setattr(disk.tempfile, "TemporaryFile", refuse)
    monkeypatch.setattr(trial, "steps", lambda *_: pytest.fail("steps were run"))
    ended, out, _ = doctor([*tiny(folder, tmp_path / "out"), "--json"])
    found = told(out)[1]
    assert ended == 2 and "Permission denied" in found["disk", "write"]["found"]
    assert "take another run.out" in found["disk", "write"]["remedy"]


def test_what_the_plan_lacks_is_told_and_nothing_is_run(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(node, "libraries", lambda *_: [])
    monkeypatch.setattr(trial, "steps", lambda *_: pytest.fail("steps were run"))
    args = tiny(folder, tmp_path / "out", "teacher.file=/none.pth", "--json")
    ended, out, _ = doctor(args)
    _, found = told(out)
    assert ended == 2 and found["training", "missing"]["found"] == "teacher.file /none.pth"
    ended, out, _ = doctor([*args, "optim.name=none"])
    assert ended == 2 and "cannot make 'none'" in told(out)[1]["training", "refused"]["found"]


@pytest.mark.slow
def test_a_teacher_is_checked_and_a_random_one_is_told(folder, tmp_path):
    """By `fastdisco teacher check` itself, in a process of its own."""
    from layouts import save, small_swav

    file = save(tmp_path, small_swav()[0])
    cfg = loaded(folder, tmp_path, f"teacher.file={file}", "student.dim=16")
    found = trial.teacher(cfg, 3)
    says(found, "failure", str(file))


def test_mistaken_arguments(capsys):
    for args in (["optim.lr=1"], ["--limit=0"], ["--config", "/none.yaml"], ["--nodes", "/none"]):
        ended, _, err = doctor(args)
        assert ended == 2 and "error: " in err, args


def test_the_help_names_the_command_and_imports_no_torch():
    from conftest import run

    said = run(sys.executable, "-X", "importtime", "-m", "fastdisco.cli", "doctor", "--help")
    assert "--nodes HOSTFILE" in said and "| torch\n" not in said


def test_ranks_of_this_machine(monkeypatch):
    for name in ("LOCAL_WORLD_SIZE", "LOCAL_SIZE", "OMPI_COMM_WORLD_LOCAL_SIZE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "6")
    assert trial.ranks_here() == 6
    monkeypatch.setenv("SLURM_STEP_TASKS_PER_NODE", "2(x3)")
    assert trial.ranks_here() == 2
    monkeypatch.setenv("LOCAL_SIZE", "3")
    assert trial.ranks_here() == 3
