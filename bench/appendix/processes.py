"""Commands in processes of their own: until when they may run, where they log, and what CPU time
they took."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from types import FrameType

from harness import ROOT

# Seconds between two looks at a process.
LOOK = 2.0
# Of a command that was asked to stop, has saved, and can go on.
SAVED = 75


class Stopped(Exception):
    """The call's time is up, or it was asked to end; the same command goes on."""


class Failed(Exception):
    """A command ended with an error; its log says why."""


class Processes:
    """Runs commands one after the other until `end` on time.monotonic()'s clock.

    state  the folder of logs and of the CPU seconds that each piece of work has taken so far"""

    def __init__(self, state: Path, end: float) -> None:
        self.state, self.end = state, end
        for name in ("logs", "cpu"):
            (state / name).mkdir(parents=True, exist_ok=True)

    def run(self, name: str, line: list[str]) -> str:
        """Runs the command to its end; what it printed on stdout.

        name  of the work, under which its log and its CPU time are kept
        Raises Stopped where the time is up first (the command has then been asked to save), and
        Failed with the log's path."""
        if time.monotonic() > self.end:
            raise Stopped(f"stopped before {name}")
        print(name, flush=True)
        log, out = self.state / f"logs/{name}.log", self.state / f"logs/{name}.out"
        with log.open("a") as errors, out.open("w") as printed:
            print("$", *line, file=errors, flush=True)
            process = subprocess.Popen(line, cwd=ROOT, stdout=printed, stderr=errors)
            asked = self._watched(name, process)
        if asked:
            raise Stopped(f"stopped within {name}")
        if process.returncode:
            raise Failed(f"{name} ended with exit code {process.returncode}; {log} says why")
        return out.read_text()

    def cpu_minutes(self, name: str) -> float:
        """CPU minutes of the work so far, over all its pieces."""
        path = self.state / f"cpu/{name}.json"
        return sum(json.loads(path.read_text()).values()) / 60 if path.exists() else 0.0

    def _watched(self, name: str, process: subprocess.Popen) -> bool:
        """Waits for the process, keeping its CPU time; whether it was asked to stop."""
        path, begun = self.state / f"cpu/{name}.json", f"{time.time():.0f}-{process.pid}"
        earlier = json.loads(path.read_text()) if path.exists() else {}
        asked = False

        def on_signal(_number: int, _frame: FrameType | None) -> None:
            self.end = 0.0

        before = {s: signal.signal(s, on_signal) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            while process.poll() is None:
                taken = cpu_seconds(process.pid)
                if taken is not None:
                    written(path, earlier | {begun: taken})
                if not asked and time.monotonic() > self.end:
                    process.terminate()
                    asked = True
                time.sleep(LOOK)
        finally:
            for s, handler in before.items():
                signal.signal(s, handler)
        # Ctrl-C reaches the process by itself.  Those of signals: before its loop began there was
        # nothing to save.
        stopped = (0, SAVED, -signal.SIGTERM, -signal.SIGINT)
        return time.monotonic() > self.end and process.returncode in stopped


def cpu_seconds(pid: int) -> float | None:
    """User and system time of a process and of its ended children; None: it is gone."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    # utime, stime, cutime, cstime: fields 14 to 17, of which the first two are cut off.
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def written(path: Path, content: object) -> None:
    """Writes JSON so that a kill leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.part")
    part.write_text(json.dumps(content, indent=1))
    part.replace(path)
