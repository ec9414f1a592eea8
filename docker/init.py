"""The first process of a container: it passes signals on to every process and waits for all of them.

    python3 docker/init.py COMMAND...

is the image's entry point.  The kernel delivers to process 1 only what it handles, so `deepspeed` in
its place would ignore SIGTERM, and `docker stop` would end in SIGKILL without a checkpoint.  The usual
inits (docker run --init, tini) end when their child ends.  `deepspeed` ends at once when it gets
SIGTERM, and the ranks would be killed while they save.  This one stays until the last process has ended.

Where the base has NVIDIA's entry point, which makes the CUDA libraries fit an older driver, the
command runs behind it."""

import contextlib
import ctypes
import os
import signal
import subprocess
import sys
from pathlib import Path

PASSED_ON = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
# Exit code of ranks that were stopped and have saved (fastdisco.common.launch.STOPPED).
STOPPED = 75
NVIDIA = Path("/opt/nvidia/nvidia_entrypoint.sh")


def main(command: list[str]) -> int:
    """Runs the command and returns the container's exit code."""
    if NVIDIA.exists():
        command = [str(NVIDIA), *command]
    # Number 36 is PR_SET_CHILD_SUBREAPER: processes that lose their parent become this one's, also
    # where another init or a pod's shared process space makes this not process 1.
    ctypes.CDLL(None).prctl(36, 1)
    for number in PASSED_ON:
        signal.signal(number, pass_on)
    try:
        child = subprocess.Popen(command)
    except OSError as e:
        print(f"docker/init.py: {command[0]}: {e.strerror}", file=sys.stderr)
        return 127
    return code(wait(), child.pid)


def pass_on(number: int, frame: object) -> None:
    """Sends a signal to every process below this one."""
    for pid in below(os.getpid()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


def below(pid: int) -> list[int]:
    """Numbers of the processes that a process or one of its children has started and that live."""
    found = []
    # A process may be started by any thread.
    for listed in Path(f"/proc/{pid}/task").glob("*/children"):
        # A thread may have ended in the meantime.
        with contextlib.suppress(OSError):
            found += [int(x) for x in listed.read_text().split()]
    return found + [x for child in found for x in below(child)]


def wait() -> dict[int, int]:
    """Waits until no process is left.  Returns {process: status} of all that this one was parent of:
    the command, and what has lost its own parent."""
    ended = {}
    while True:
        try:
            pid, status = os.wait()
        except ChildProcessError:
            return ended
        ended[pid] = os.waitstatus_to_exitcode(status)


def code(ended: dict[int, int], child: int) -> int:
    """The exit code of the container: the command's.  Where a signal has ended the command before
    its ranks, theirs."""
    own = ended[child]
    if own >= 0:
        return own
    return STOPPED if STOPPED in ended.values() else 128 - own


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
