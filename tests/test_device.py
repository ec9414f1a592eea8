"""A machine's GPU that cannot be used is told at the start, in one sentence; what a graph's capture
and the losses' forms do on GPUs that this machine need not have."""

import gc

import pytest
import torch
from fastdisco.kernels import chunked, launch, ops
from torch._subclasses.fake_tensor import FakeTensorMode

from fastdisco import methods
from fastdisco.common.errors import UserError
from fastdisco.engine import cudagraph, device

CUDA = torch.device("cuda", 0)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine with one GPU, its driver, and all that Triton needs; torch sees the GPU if told."""
    (tmp_path / "nvidia0").touch()
    (tmp_path / "version").write_text("NVRM version: NVIDIA UNIX x86_64 Kernel Module  535.183.01")
    monkeypatch.setattr(device, "NODES", tmp_path)
    monkeypatch.setattr(device, "DRIVER", tmp_path / "version")
    monkeypatch.setattr(device, "launch_needs", lambda: [])
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    for name in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK", "RANK"):
        monkeypatch.delenv(name, raising=False)
    see(monkeypatch, 0)


def see(monkeypatch, count, starts=True):
    """torch sees so many GPUs, on which CUDA starts or does not."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    zeros = torch.zeros

    def started(*shape, device=None):
        if not starts:
            raise RuntimeError("CUDA driver version is insufficient\nfor CUDA runtime version")
        return zeros(*shape)

    monkeypatch.setattr(torch, "zeros", started)


@pytest.mark.usefixtures("machine")
def test_a_gpu_that_torch_cannot_use_is_told(monkeypatch):
    with pytest.raises(UserError, match=r"nvidia0.*driver is 535.183.01: update.*CUDA 13.0"):
        device.choose()
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UserError, match="nvidia0.*is a build for the CPU"):
        device.choose()


@pytest.mark.usefixtures("machine")
@pytest.mark.parametrize("hidden", ["", "-1"])
def test_a_gpu_that_is_hidden_on_purpose_is_none(monkeypatch, hidden):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", hidden)
    assert device.choose() == torch.device("cpu")


def test_no_gpu_no_questions(machine, tmp_path):
    (tmp_path / "nvidia0").unlink()
    assert device.choose() == torch.device("cpu") and device.describe(device.choose()) == "the CPU"


@pytest.mark.usefixtures("machine")
def test_a_driver_that_only_seems_to_do_is_told(monkeypatch):
    see(monkeypatch, 1, starts=False)
    with pytest.raises(UserError, match=r"cuda:0: CUDA does not start \(CUDA driver version is"):
        device.choose()


@pytest.mark.usefixtures("machine")
def test_more_processes_than_gpus_are_told(monkeypatch):
    see(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.choose() == torch.device("cuda", 1)
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(UserError, match="process 2 of its machine.*and 2 GPUs are visible"):
        device.choose()


def test_what_a_launch_of_triton_needs(tmp_path, monkeypatch):
    ldconfig = tmp_path / "ldconfig"
    ldconfig.write_text("#!/bin/sh\necho 'libcuda.so.1 (libc6,x86-64) => /lib/libcuda.so.1'\n")
    ldconfig.chmod(0o755)
    monkeypatch.setattr(device, "LDCONFIG", str(ldconfig))
    monkeypatch.setattr(device.sysconfig, "get_path", lambda _: str(tmp_path))
    (tmp_path / "Python.h").touch()
    (tmp_path / "gcc").write_text("")
    (tmp_path / "gcc").chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for name in ("CC", "TRITON_LIBCUDA_PATH", "LD_LIBRARY_PATH"):
        monkeypatch.delenv(name, raising=False)
    assert device.launch_needs() == []
    (tmp_path / "gcc").unlink()
    (tmp_path / "Python.h").unlink()
    ldconfig.write_text("#!/bin/sh\n")
    compiler, header, library = device.launch_needs()
    assert "no C compiler" in compiler and "python3-dev" in header and "ldconfig" in library
    monkeypatch.setattr(device, "LDCONFIG", str(tmp_path / "nowhere"))
    assert "ldconfig" in device.launch_needs()[-1]
    # As Triton, where ldconfig lists none.
    (tmp_path / "libcuda.so.1").touch()
    monkeypatch.setenv("LD_LIBRARY_PATH", f"/nowhere:{tmp_path}")
    assert len(device.launch_needs()) == 2


@pytest.mark.parametrize("capability, swept", [((7, 5), False), ((8, 0), True), ((12, 0), True)])
def test_a_gpu_before_ampere_takes_chunked_torch_and_a_queue_in_fp32(
    monkeypatch, capability, swept
):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
    with FakeTensorMode(allow_non_fake_inputs=True):
        rows = torch.empty(4, 128, device=CUDA)
        assert (ops._form(rows, rows) is chunked) != swept
    assert launch.sweeps(CUDA) == swept
    monkeypatch.setattr(methods.dist, "device", lambda: CUDA)
    assert methods.queue_dtype("auto") == (torch.bfloat16 if swept else torch.float32)


def test_what_a_forward_raises_itself_is_no_failed_capture():
    def too_large(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    graphed = cudagraph.Graphed("teacher", lambda views: views, capture=too_large)
    with pytest.raises(torch.OutOfMemoryError):
        graphed([torch.zeros(1, 3, 4, 4)])
    assert not graphed.warned


def test_garbage_is_collected_before_a_capture_and_not_in_it():
    seen = []

    class Old:
        def __del__(self):
            seen.append("ended")

    # Only the collector can end it.
    old = Old()
    old.itself = old
    del old
    with cudagraph._no_garbage_collection():
        assert seen == ["ended"] and not gc.isenabled()
    assert gc.isenabled()
