"""What all tests share: skips for an absent GPU or absent data, a small folder of images, the real
command, and several ranks."""

import multiprocessing
import os
import socket
import subprocess
import traceback
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: several processes share few cores
os.environ.setdefault("DS_ACCELERATOR", "cuda" if any(Path("/dev").glob("nvidia[0-9]*")) else "cpu")

import numpy as np
import pytest
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
# Real images that a clone does not have.
SHARED = Path(os.environ.get("FASTDISCO_DATA", ROOT.parent / "shared" / "data"))
_FORK = multiprocessing.get_context("forkserver")
# Each rank is a fresh process that has its imports.
_FORK.set_forkserver_preload(["fastdisco.train", "deepspeed.runtime.zero.muon.original_muon"])


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


def run(*command, env=None, code=0, timeout=120, cwd=ROOT):
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


def ranks(n, function, *args, timeout=300):
    """[function(*args) on rank 0, 1, ...], each in a process of its own with the launcher's
    variables; an error there is raised here."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    pipes, processes = [], []
    for r in range(n):
        here, there = _FORK.Pipe(duplex=False)
        env = dict(RANK=r, LOCAL_RANK=r, WORLD_SIZE=n, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        p = _FORK.Process(target=_child, args=(there, env, function, args), daemon=True)
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


def _child(pipe, env, function, args):
    os.environ.update({k: str(v) for k, v in env.items()})
    torch.set_num_threads(1)
    try:
        pipe.send((True, function(*args)))
    except BaseException:
        pipe.send((False, f"rank {env['RANK']}:\n{traceback.format_exc()}"))
    pipe.close()
    os._exit(0)
