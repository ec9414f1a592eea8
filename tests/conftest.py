"""What all tests share: the skips for an absent GPU and absent data, and starting the real command in a process of its own."""
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared" / "data"


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if "gpu" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="gpu: no NVIDIA GPU here"))


@pytest.fixture(scope="session")
def photos():
    """240 photographs in class folders would be nice to have; only where the project's shared data lie beside it."""
    path = SHARED / "photos-240.tar"
    if not path.exists():
        pytest.skip(f"data: {path.name} is not here")
    return path


def run(*command, env=None, ok=True, timeout=300):
    """Runs a command from the root; returns what it printed.  Fails the test with that output unless it ended as expected."""
    done = subprocess.run([str(c) for c in command], cwd=ROOT, text=True, capture_output=True, timeout=timeout,
                          env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})})
    text = done.stdout + done.stderr
    assert (done.returncode == 0) == ok, f"{command} ended with {done.returncode}:\n{text[-4000:]}"
    return text


def launch(script, *args, ranks=2, **kwargs):
    """A script on several ranks, by torchrun."""
    return run(sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}", "--master_port=0", "--rdzv_backend=c10d",
               "--rdzv_endpoint=localhost:0", script, *args, **kwargs)
