"""What all tests share: skips for an absent GPU or absent data, a small folder of images, the real
command, and several ranks."""

import contextlib
import functools
import multiprocessing
import os
import socket
import subprocess
import sys
import traceback
from multiprocessing import forkserver
from pathlib import Path

# Before torch: several processes share few cores.  An empty value makes libgomp complain.
os.environ["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS") or "1"

import numpy as np
import pytest
import torch
from PIL import Image

from fastdisco import data
from fastdisco.data import pack

# What a helper asserts is told as a test's own.
pytest.register_assert_rewrite("loading", "loop", "published", "training")
TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
# Real images that a clone does not have.
SHARED = Path(os.environ.get("FASTDISCO_DATA", ROOT.parent / "shared" / "data"))
# Lie in scikit-image's package.
PHOTOS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg")
# Megabytes of a tar: the 43 images fill several.
TAR_MB = 30 / 1024
# Asked without touching the driver, so that processes can still be forked.
_HIDDEN = os.environ.get("CUDA_VISIBLE_DEVICES", "all").split(",")[0].strip() in ("", "-1")
_GPU = not _HIDDEN and any(Path("/dev").glob("nvidia[0-9]*"))
os.environ.setdefault("DS_ACCELERATOR", "cuda" if _GPU else "cpu")
# Limits catch what hangs.  They are no measure of speed: a busy machine is five times slower.
HANGS = 600


def pytest_xdist_auto_num_workers():
    """Of `pytest -n auto`: a worker a core; more than eight take more memory than they save time."""
    return min(8, len(os.sched_getaffinity(0)))


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="gpu: no NVIDIA GPU here"))


def shared(name):
    """A file of real images, or a skip."""
    if not (SHARED / name).exists():
        pytest.skip(f"data: {name} is not here")
    return SHARED / name


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """train/ with 43 images of 3 classes and val/ with 12, JPEGs of about 40 px with some
    structure."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for part, n in (("train", 43), ("val", 12)):
        for i in range(n):
            label = i % 3
            small = rng.integers(0, 256, size=(4 + label, 4, 3), dtype=np.uint8)
            path = root / part / f"class{label}" / f"{i:03}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(small).resize((36 + i % 9, 40), Image.BICUBIC).save(path, quality=90)
    return root


@pytest.fixture(scope="session")
def textures(tmp_path_factory):
    """train/ with 60 images of 3 classes and val/ with 30: colour and grain by class, noisy, so
    that random features tell some of them."""
    root, rng = tmp_path_factory.mktemp("textures"), np.random.default_rng(0)
    for part, n in (("train", 60), ("val", 30)):
        for i in range(n):
            label = i % 3
            grain = rng.integers(0, 256, size=(3 + 3 * label, 3 + 3 * label, 3)).astype(float)
            grain[..., label] += 25
            path = root / part / f"class{label}" / f"{part}{i:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            small = Image.fromarray(grain.clip(0, 255).astype(np.uint8))
            small.resize((36, 40), Image.BICUBIC).save(path)
    return root


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """Two classes of two photographs, PNG so that every decoder reads the same pixels."""
    import skimage.data

    root = tmp_path_factory.mktemp("photos")
    for i, name in enumerate(PHOTOS):
        (root / "ab"[i % 2]).mkdir(exist_ok=True)
        Image.open(Path(skimage.data.__file__).parent / name).convert("RGB").save(
            root / "ab"[i % 2] / f"{i}.png", compress_level=1
        )
    return data.listing(root)


@pytest.fixture(scope="session")
def few(folder):
    """43 small images."""
    return data.listing(folder / "train")


@pytest.fixture(scope="session")
def packed(folder, tmp_path_factory):
    """The 43 images in several tars."""
    dst = tmp_path_factory.mktemp("packed") / "train"
    pack.pack(folder / "train", dst, shard_mb=TAR_MB)
    return data.listing(dst)


def tiny(folder, tmp_path, *overrides):
    """The arguments of a run of seconds on that folder: 5 steps an epoch, a queue that wraps after
    3."""
    return [
        "--config",
        ROOT / "tests/tiny.yaml",
        f"data.train={folder}/train",
        f"data.val={folder}/val",
        f"run.out={tmp_path}",
        *overrides,
    ]


def run(*command, env=None, code=0, timeout=HANGS, cwd=ROOT):
    """Runs a command and returns what it printed; fails the test with that unless it ended with
    `code`."""
    done = subprocess.run(
        [str(c) for c in command],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=timeout,
        env={**os.environ, **(env or {})},
    )
    text = done.stdout + done.stderr
    assert done.returncode == code, (
        f"{' '.join(map(str, command))} ended with {done.returncode}:\n{text[-4000:]}"
    )
    return text


def launcher(n):
    """The start of a command: the deepspeed launcher with n ranks, on a port that is free now."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    module = [sys.executable, "-m", "deepspeed.launcher.runner"]
    return [*module, f"--num_accelerators={n}", f"--master_port={port}"]


def launch(n, *args, **options):
    """`run` by the deepspeed launcher; once more where somebody took the port before rank 0 did."""
    for _ in range(3):
        try:
            return run(*launcher(n), *args, **options)
        except AssertionError as e:
            if "EADDRINUSE" not in str(e):
                raise
    raise AssertionError("three ports in a row were taken")


@contextlib.contextmanager
def nan_filled():
    """New memory holds NaN, or the largest integer, so that an element that nothing writes shows."""
    before = torch.are_deterministic_algorithms_enabled()
    warns = torch.is_deterministic_algorithms_warn_only_enabled()
    # The only switch that torch has for it; what has no deterministic form runs as it does.
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before, warn_only=warns)


@pytest.fixture(scope="module")
def unwritten():
    """nan_filled() for a module's tests, in the ranks that they start, too."""
    with nan_filled():
        yield


def ranks(n, function, *args, timeout=HANGS):
    """[function(*args) on rank 0, 1, ...], each in a process of its own with the launcher's
    variables; an error there is raised here."""
    # As torchrun does: the store is here and its port is taken, so nobody can take it before rank 0.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = dict(
        WORLD_SIZE=n,
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=store.port,
        TORCHELASTIC_USE_AGENT_STORE="True",
        TORCHELASTIC_RESTART_COUNT=0,
    )
    filled = torch.are_deterministic_algorithms_enabled()
    pipes, processes = [], []
    for r in range(n):
        here, there = _forks().Pipe(duplex=False)
        env = dict(RANK=r, LOCAL_RANK=r, **shared)
        p = _forks().Process(target=_child, args=(there, env, filled, function, args), daemon=True)
        p.start()
        there.close()
        pipes.append(here)
        processes.append(p)
    results, errors = [], []
    for r, pipe in enumerate(pipes):
        try:
            assert pipe.poll(timeout), f"rank {r} gave no result in {timeout} s"
            ok, value = pipe.recv()
        except EOFError:
            ok, value = False, f"rank {r} died"
        (results if ok else errors).append(value)
        if not ok:
            break  # the others may wait for it for ever
    for p in processes:
        p.join(5)
        p.kill()
    assert not errors, errors[0]
    return results


@functools.cache
def _forks():
    """The server that ranks are forked from, with tests/warm.py imported."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["warm"])
    # The server of Python 3.11 and older has not the path of this process.
    with pytest.MonkeyPatch.context() as patch:
        for folder in (ROOT, TESTS):
            patch.setenv("PYTHONPATH", str(folder), prepend=os.pathsep)
        forkserver.ensure_running()
    return context


def _child(pipe, env, filled, function, args):
    os.environ.update({k: str(v) for k, v in env.items()})
    torch.set_num_threads(1)
    try:
        with nan_filled() if filled else contextlib.nullcontext():
            pipe.send((True, function(*args)))
    except BaseException:
        pipe.send((False, f"rank {env['RANK']}:\n{traceback.format_exc()}"))
    pipe.close()
    os._exit(0)
