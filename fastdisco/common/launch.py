"""Which rank this process is, and of how many: the launcher's environment variables."""

import os


def rank() -> int:
    """This process's number among all processes of the run, 0 without a launcher."""
    return int(os.environ.get("RANK", 0))


def local_rank() -> int:
    """This process's number on its machine, which is also the number of its GPU."""
    return int(os.environ.get("LOCAL_RANK", 0))


def world() -> int:
    """How many processes the run has, 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE", 1))


def defaults() -> None:
    """Sets the launcher's five variables for a plain `python train.py`, where they are not set.

    Without them DeepSpeed would look for MPI."""
    single = {
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        # Any free port.
        "MASTER_PORT": "0",
    }
    for name, value in single.items():
        os.environ.setdefault(name, value)
