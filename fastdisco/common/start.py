"""Starts the ranks of one node and waits for them: a launcher of a few lines, for what must not wait
seconds until a launcher has imported torch.

    python -m fastdisco.common.start --first=2 --ranks=2 --world=4 --master=HOST:PORT ARGUMENT ...

runs `fastdisco ARGUMENT ...` as ranks 2 and 3 of 4.  Trainings are started by deepspeed, torchrun or
srun, which also look after ranks that hang."""

import argparse
import os
import signal
import subprocess
import sys
from types import FrameType


def main(argv: list[str] | None = None) -> int:
    """Returns the first exit code of a rank that is not 0."""
    parser = argparse.ArgumentParser(description=__doc__)
    for name in ("first", "ranks", "world"):
        parser.add_argument(f"--{name}", type=int, required=True)
    parser.add_argument("--master", required=True, metavar="HOST:PORT")
    parser.add_argument("command", nargs=argparse.REMAINDER)
    args = parser.parse_args(argv)
    host, _, port = args.master.rpartition(":")
    shared = {
        "WORLD_SIZE": str(args.world),
        "LOCAL_WORLD_SIZE": str(args.ranks),
        "MASTER_ADDR": host,
        "MASTER_PORT": port,
    }
    command = [sys.executable, "-m", "fastdisco.cli", *args.command]
    started = [
        subprocess.Popen(command, env={**os.environ, **shared, **_rank(args.first + i, i)})
        for i in range(args.ranks)
    ]

    def pass_on(number: int, frame: FrameType | None) -> None:
        for process in started:
            process.send_signal(number)

    signal.signal(signal.SIGTERM, pass_on)
    codes = [process.wait() for process in started]
    return next(filter(None, codes), 0)


def _rank(rank: int, local: int) -> dict[str, str]:
    return {"RANK": str(rank), "LOCAL_RANK": str(local)}


if __name__ == "__main__":
    sys.exit(main())
