"""Saves a run's state again and again, beside the training where it is asked to.

In the background a save has two parts.  At the step, the training's own thread gathers the state,
which takes collectives, and copies it into host memory.  A thread on each rank then writes it, while
the training goes on.  There is one such save at a time."""

import contextlib
import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fastdisco import models
from fastdisco.common import dist, store
from fastdisco.common.console import say
from fastdisco.common.errors import UserError
from fastdisco.common.files import refused
from fastdisco.run import checkpoint, saving
from fastdisco.run.snapshot import Snapshots

# Seconds that a crash of the training waits for the save under way.
_GRACE = 10.0
# Seconds until the ranks ask each other again whether a save has ended.
_TURN = 0.05


class Saver:
    """Saves a run's state again and again; a failure costs a checkpoint, not the training.

    Use it as a context: it waits at its end for the save under way, after a crash for some seconds at
    most."""

    def __init__(
        self,
        run: Path,
        state: dict[str, checkpoint.Item],
        meta: dict[str, str],
        keep: int,
        background: bool = False,
        allowed: Callable[[], None] = lambda: None,
        then: Callable[[int], None] = lambda step: None,
    ) -> None:
        """run, state, meta, keep: see checkpoint.save.

        background  the training goes on while a thread writes a snapshot of the state
        allowed     raises UserError where the run's folder is no longer this training's
        then        called with the step once its checkpoint is on disk, maybe by the thread"""
        self._run, self._state, self._meta, self._keep = run, state, meta, keep
        self._allowed, self._then = allowed, then
        # Where a mount is gone, another file system is in its place.
        self._device = os.stat(run).st_dev
        self._snapshots = Snapshots() if background else None
        self._texts = store.Texts("saves") if background else dist.all_texts
        self._thread: threading.Thread | None = None
        # What has ended the thread but a failing file system.
        self._error: Exception | None = None

    def save(self, step: int, ends: bool) -> None:
        """Saves the state after `step` steps.  Called by every rank.

        In the background it returns once there is a snapshot, after the save before has come to its
        end.  Where the run ends with this step, it waits until all is written.
        A failure is said, and the next checkpoint tried as if nothing had been.  Where the run ends
        with this step, it is a UserError, on every rank alike."""
        self.wait()
        shared, own = checkpoint.gathered(step, self._state, self._meta)
        if dist.rank():
            shared = {}
        if self._snapshots is None or ends:
            # All ranks wait for it, so that by collectives they notice one that dies.
            self._save(step, shared, own, dist.all_texts, ends)
            return
        try:
            files = self._snapshots.take((shared, own))
        except MemoryError as e:
            say(
                f"step {step}: the copy of the state for its checkpoint finds no memory ({e}), so the "
                "training waits until it is written; set checkpoint.background=false",
                anywhere=True,
            )
            # The other ranks may do it in their threads.
            self._save(step, shared, own, self._texts)
            return
        self._thread = threading.Thread(
            target=self._beside, args=(step, *files), daemon=True, name="saver"
        )
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Whether a save is under way."""
        return self._thread is not None and self._thread.is_alive()

    def wait(self) -> None:
        """Waits for the save under way on all ranks; called by every rank.  Raises what has ended it,
        unless that was a failing file system, which has been said."""
        # The ranks tell each other, for a rank that has died would never end it.
        while self._snapshots is not None and dist.any_rank_later(self.busy)():
            if self._thread:
                self._thread.join(_TURN)
        self._thread = None
        error, self._error = self._error, None
        if error:
            raise error

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        if kind is None:
            self.wait()
        # At once after Ctrl-C.  Else the steps before the error are worth waiting for; but after a
        # crash the save may wait for a rank that has died.
        elif self._thread and issubclass(kind, Exception):
            self._thread.join(None if issubclass(kind, UserError) else _GRACE)

    def _beside(self, step: int, shared: dict[str, Any], own: dict[str, Any]) -> None:
        try:
            self._save(step, shared, own, self._texts)
        except Exception as e:
            self._error = e

    def _save(
        self,
        step: int,
        shared: dict[str, Any],
        own: dict[str, Any],
        texts: saving.Texts,
        ends: bool = False,
    ) -> None:
        try:
            saving.write(self._run, step, shared, own, self._keep, texts, self._refuse)
        except saving.NotSaved as e:
            has = self._newest()
            if ends:
                raise UserError(
                    f"step {step}: its checkpoint could not be saved ({e}), {has}; mend that, then "
                    "the same command continues from there"
                ) from None
            say(
                f"step {step}: its checkpoint could not be saved ({e}), {has}; the training goes on "
                "and tries it again at the next one"
            )
        else:
            self._then(step)

    def _newest(self) -> str:
        steps: list[Path] = []
        with contextlib.suppress(OSError):
            steps = models.checkpoints(self._run)
        return f"the newest is {steps[-1].name}" if steps else "none is there"

    def _refuse(self) -> None:
        self._allowed()
        with refused():
            if os.stat(self._run).st_dev != self._device:
                raise UserError(f"{self._run}: the file system that held it is gone")
