"""Starts the ranks of a training on this machine, and starts them again from the last checkpoint when
they crash: `fastdisco run`.  Imports no torch: it lives as long as the training."""

import os
import signal
import subprocess
import tempfile
import time
from pathlib import Path
from types import FrameType

import fastdisco
from fastdisco.common import attempt, launch, temporary
from fastdisco.common.console import say
from fastdisco.common.errors import UserError
from fastdisco.config import Config
from fastdisco.run import goodput, launching

SCRIPT = Path(fastdisco.__file__).parent / "train.py"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# Seconds: the longest pause before a start; in which ranks end after their launcher.
_LONGEST, _LEAVE = 60.0, 60.0
# So many times in a row the same step may fail.
_SAME = 3


class Supervisor:
    """See `run`."""

    def __init__(
        self,
        cfg: Config,
        words: list[str],
        overwrite: bool,
        launcher: str,
        restarts: int,
        ranks: int | None,
    ) -> None:
        """words     the training's arguments but --overwrite
        launcher  torchrun or deepspeed
        restarts  how often the training may be started again
        ranks     the most processes; None: one for each GPU, or one"""
        self.cfg, self.words, self.overwrite = cfg, words, overwrite
        self.launcher, self.restarts, self.most = launcher, restarts, ranks
        self.folder = cfg.run.out / cfg.run.name
        self.asked = False
        self._gpus = launching.devices()
        self._process: subprocess.Popen[bytes] | None = None
        self._told: Path | None = None

    def run(self) -> int:
        """Trains to the end; returns the exit code: 0 finished, 2 refused, 75 stopped by a signal.

        Raises UserError where starting again does not help."""
        for number in SIGNALS:
            signal.signal(number, self._ask)
        began, start = time.time(), 0 if self.overwrite else goodput.saved(self.folder)
        failed, restarts = list[int](), 0
        try:
            while True:
                ranks = self._ranks()
                code, step = self._attempt(ranks)
                if code in (0, 2) or self.asked:
                    return launch.STOPPED if code is None else code
                # From the first step on, the old run is gone.
                self.overwrite &= step < 0
                failed.append(step)
                self._give_up(failed, restarts)
                restarts += 1
                pause = min(_LONGEST, 2.0 ** (_in_a_row(failed) - 1))
                say(
                    f"the training ended {_at(step)} and is started again from step "
                    f"{goodput.saved(self.folder)} in {pause:.0f} s ({restarts} of {self.restarts} restarts)"
                )
                if self._sleep(pause):
                    return launch.STOPPED
        finally:
            goodput.count(self.folder, began, start, restarts)

    # ---- one attempt

    def _attempt(self, ranks: int) -> tuple[int | None, int]:
        """Starts the ranks and waits until all are gone.  Returns the code that says what to do (0,
        2, or None: start again) and the last step under way, -1 before the first."""
        command = launching.starting(self.launcher, ranks)
        more = ["--overwrite"] if self.overwrite else []
        with tempfile.TemporaryDirectory(prefix=temporary.prefix()) as folder:
            self._told = Path(folder)
            # A session of its own: Ctrl-C reaches the ranks once, from here.
            self._process = subprocess.Popen(
                [*command, str(SCRIPT), *self.words, *more],
                env=os.environ | {attempt.FOLDER: folder},
                start_new_session=True,
                preexec_fn=launching.end_with_parent,
            )
            if self.asked:
                self._pass_on(signal.SIGTERM)
            self._process.wait()
            self._outwait()
            told = attempt.read(self._told)
            launcher = self._process.returncode
            self._process = None
        codes = [x.code for x in told]
        whole = len(told) == ranks
        finished = whole and not any(codes)
        self.asked |= whole and _asked(told, launcher)
        code = 2 if 2 in codes else 0 if finished else None
        return code, max((x.step for x in told), default=-1)

    def _outwait(self) -> None:
        """Waits for ranks that have outlived their launcher and save; ends those that hang."""
        end = time.monotonic() + _LEAVE
        while alive := self._alive():
            if time.monotonic() > end:
                for pid in alive:
                    launching.kill(pid, signal.SIGKILL)
            time.sleep(0.1)

    def _alive(self) -> list[int]:
        """The processes of the ranks that have told theirs and live."""
        told = attempt.read(self._told) if self._told else []
        seen = ((x, launch.process(x.pid)) for x in told)
        return [x.pid for x, found in seen if found and found[0] == x.start]

    def _ranks(self) -> int:
        """How many processes the devices that are left allow."""
        left = launching.devices()
        if self._gpus and not left:
            raise UserError(
                "no GPU is left on this machine; the same command goes on when one is back"
            )
        most = min(self.most or left or 1, left or self.most or 1)
        goes_on = not self.overwrite and goodput.saved(self.folder) > 0
        ranks = launching.divisible(self.cfg, most, goes_on)
        if left < self._gpus:
            say(f"{left} of {self._gpus} GPUs are left: the training goes on with {ranks} ranks")
        return ranks

    # ---- between attempts

    def _give_up(self, failed: list[int], restarts: int) -> None:
        """Raises UserError where the same step has failed too often, or anything has."""
        if _in_a_row(failed) >= _SAME:
            step = failed[-1]
            if step < 0:
                raise UserError(
                    f"the training failed {_SAME} times in a row before its first step; see above why"
                )
            names = "\n  ".join(batch(self.cfg, step))
            raise UserError(
                f"step {step + 1} failed {_SAME} times in a row; see above why, and look at the images "
                f"of its batch:\n  {names}"
            )
        if restarts >= self.restarts:
            raise UserError(
                f"the training failed {_at(failed[-1])} after {restarts} restarts; see above why, "
                "then give the same command again, which goes on from the last checkpoint"
            )

    def _sleep(self, seconds: float) -> bool:
        """Returns whether a signal has ended the pause."""
        end = time.monotonic() + seconds
        while not self.asked and time.monotonic() < end:
            time.sleep(0.1)
        return self.asked

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
        self._pass_on(number)

    def _pass_on(self, number: int) -> None:
        """To the ranks, which save; launchers die of most signals.  A launcher whose ranks are still
        to come is ended."""
        if not self._process:
            return
        alive = self._alive()
        for pid in alive:
            launching.kill(pid, number)
        if not alive:
            self._process.terminate()


def batch(cfg: Config, step: int) -> list[str]:
    """The names of the images of a step, from 0 on."""
    # They import torch.
    from fastdisco import data
    from fastdisco.data.orders import images_of_step

    listing = data.listing(cfg.data.train, cfg.data.quarantine)
    indices = images_of_step(listing, cfg.run.seed, cfg.data.batch, step)
    return [str(listing.files[i]) for i in indices]


def _asked(told: list[attempt.Told], launcher: int) -> bool:
    """Whether a signal to a rank, or to the launcher, has stopped the training.

    launcher  its exit code, negative where a signal has ended it
    A launcher ends the ranks by SIGTERM where one of them crashes or hangs, too."""
    if any(x.code != launch.STOPPED or x.why == attempt.STALLED for x in told):
        return False
    ended_by = {code for number in SIGNALS for code in (-number, 128 + number)}
    return launcher in ended_by or any(x.why == attempt.ASKED for x in told)


def _in_a_row(failed: list[int]) -> int:
    """How many of the last failures were at the last one's step."""
    n = 0
    while n < len(failed) and failed[-1 - n] == failed[-1]:
        n += 1
    return n


def _at(step: int) -> str:
    return "before its first step" if step < 0 else f"in step {step + 1}"
