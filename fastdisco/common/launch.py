"""What the launcher's environment variables say: which rank this process is, and of how many."""

import os


def rank() -> int:
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    return int(os.environ.get("LOCAL_RANK", 0))


def world() -> int:
    return int(os.environ.get("WORLD_SIZE", 1))


def defaults():
    """A plain `python train.py` gets the five variables that a launcher sets; without them
    DeepSpeed looks for MPI."""
    for name, value in dict(
        RANK=0, LOCAL_RANK=0, WORLD_SIZE=1, MASTER_ADDR="127.0.0.1", MASTER_PORT=0
    ).items():
        os.environ.setdefault(name, str(value))
