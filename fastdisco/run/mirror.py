"""Copies of a run's checkpoints in object storage (`run.mirror`), from which the run continues on
another machine.

MIRROR/NAME/config.yaml                      the run's configuration
MIRROR/NAME/metrics.jsonl, loggers.json      its log, and where it goes on in the loggers' servers
MIRROR/NAME/checkpoints/step_XXXXXXXX/...    the files of a checkpoint; its manifest.json comes last,
                                             so a checkpoint without one is not whole"""

import contextlib
import json
import os
import re
import shutil
import tempfile
import threading
from pathlib import Path
from typing import Any

from fastdisco import config
from fastdisco.common import dist, temporary
from fastdisco.common.console import say
from fastdisco.common.errors import UserError
from fastdisco.common.files import sync, told, write_whole
from fastdisco.common.urls import Url
from fastdisco.config import Config
from fastdisco.data import objects
from fastdisco.models import checkpoints, manifest
from fastdisco.run.folder import refuse_other_run

_STEP = re.compile(r"step_\d{1,18}", re.ASCII)
# What a run that continues adds to.
_LOGS = ("metrics.jsonl", "loggers.json")
_PATIENCE = 600.0  # seconds that the end of a training waits for the last copy


class Mirror:
    """The mirror of a run; without `run.mirror` its methods do nothing.

    Only rank 0 copies; the others wait where it fetches."""

    def __init__(self, cfg: Config, folder: Path) -> None:
        """folder: the run's"""
        mirror = cfg.run.mirror
        self._url = mirror / cfg.run.name if isinstance(mirror, Url) and mirror else None
        self._cfg, self._folder, self._keep = cfg, folder, cfg.checkpoint.keep
        self._changed = threading.Condition()
        # The newest step that is to be copied, and the one that is.
        self._next: Path | None = None
        self._now: Path | None = None
        self._said = ""
        self._thread: threading.Thread | None = None

    # ---- from there

    def fetch(self, overwrite: bool = False) -> None:
        """Brings the newest whole checkpoint of the mirror where the run's folder has none, and says
        so.  Called by every rank.

        overwrite: deletes the mirror's instead
        Raises UserError, on every rank alike, where the mirror cannot be read, holds a run of another
        configuration, or no checkpoint there is whole."""
        if dist.rank() == 0:
            # Of a training that was killed.
            shutil.rmtree(self._parts(), ignore_errors=True)
        if self._url is not None:
            dist.alike(self._clear if overwrite else self._fetch)

    def _clear(self) -> None:
        if dist.rank() == 0:
            for step in self._steps():
                self._delete(step)

    def _fetch(self) -> None:
        if dist.rank() or checkpoints(self._folder):
            return
        steps = self._steps()[::-1]
        if not steps:
            return
        self._refuse_other()
        problems = []
        for step in steps:
            try:
                self._bring(step)
            except UserError as e:
                problems.append(str(e))
                continue
            # Without it the folder would be none of a run, if the command ended before it says so.
            write_whole(self._folder / "config.yaml", config.dump(self._cfg))
            self._bring_logs()
            seen = "; ".join([*problems, f"continuing from {step} of the mirror {self._url}"])
            say(f"{self._folder}: {seen}")
            return
        raise UserError(
            f"{'; '.join(problems)}; no checkpoint of the mirror is whole: put it right, set "
            "run.mirror=null, or start over with --overwrite"
        )

    def _steps(self) -> list[str]:
        """Names of the checkpoints there, the oldest first."""
        found = objects.folders(self._there("checkpoints"))
        return sorted(filter(_STEP.fullmatch, found), key=lambda name: int(name[5:]))

    def _refuse_other(self) -> None:
        name = "config.yaml"
        about = objects.listed(self._there()).get(name)
        if about is None:
            return
        with tempfile.TemporaryDirectory() as folder:
            Path(folder, name).write_bytes(objects.read(about))
            try:
                refuse_other_run(self._cfg, Path(folder))
            except UserError as e:
                raise UserError(str(e).replace(folder, str(self._url))) from None

    def _bring(self, step: str) -> None:
        """Downloads a checkpoint, which gets its name when it is whole."""
        there = self._there("checkpoints", step)
        found = objects.listed(there)
        if manifest.NAME not in found:
            raise UserError(f"{there}: was not copied to its end")
        text = objects.read(found[manifest.NAME]).decode()
        try:
            files = dict(json.loads(text)["files"])
            digests = {name: str(about["sha256"]) for name, about in files.items()}
        except (ValueError, KeyError, TypeError):
            raise UserError(f"{there / manifest.NAME}: is no manifest of a checkpoint") from None
        here = self._folder / "checkpoints" / step
        part = here.with_name(f".{step}.part")
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        for name, sha256 in digests.items():
            if name not in found or "/" in name:
                raise UserError(f"{there / name}: is not there")
            objects.download(found[name], part / name, sha256)
        write_whole(part / manifest.NAME, text)
        sync(part)
        os.replace(part, here)
        write_whole(here.parent / "last", step)
        sync(here.parent)

    def _bring_logs(self) -> None:
        """Downloads the log and the loggers' ids where the run's folder has none."""
        found = objects.listed(self._there())
        for name in _LOGS:
            here = self._folder / name
            if name in found and not here.exists():
                part = temporary.part(here)
                objects.download(found[name], part)
                os.replace(part, here)

    # ---- to there

    def copy(self, step: int) -> None:
        """Has a thread copy the checkpoint of that step, which is on disk.  Where it still copies
        another one, it takes the newest after that.

        What fails is said, and tried again at the next one."""
        path = self._folder / "checkpoints" / f"step_{step:08}"
        if self._url is None or dist.rank() or not path.is_dir():
            return
        with contextlib.suppress(FileNotFoundError):
            kept = self._kept(path)
            with self._changed:
                if self._next:
                    shutil.rmtree(self._next, ignore_errors=True)
                self._next = kept
                self._changed.notify_all()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="mirror")
                self._thread.start()

    def close(self) -> None:
        """Waits until the last copy has ended."""
        if self._thread is None:
            return
        with self._changed:
            idle = lambda: self._next is None and self._now is None
            if not self._changed.wait_for(idle, _PATIENCE):
                say(f"{self._url}: the last checkpoint is not copied after {_PATIENCE:.0f} s")
                return
        shutil.rmtree(self._parts(), ignore_errors=True)

    def _kept(self, step: Path) -> Path:
        """The checkpoint's files under another name: the run deletes old checkpoints meanwhile."""
        kept = self._parts() / step.name
        shutil.rmtree(kept, ignore_errors=True)
        kept.mkdir(parents=True)
        for file in step.iterdir():
            try:
                os.link(file, kept / file.name)
            except OSError:
                # A file system without hard links.
                shutil.copyfile(file, kept / file.name)
        return kept

    def _parts(self) -> Path:
        # `--overwrite` and `claim` take no notice of such a name.
        return self._folder / ".mirror.part"

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._next is not None)
                self._now, self._next = self._next, None
            now = self._now
            assert now is not None
            try:
                self._send(now)
                self._said = ""
            except (UserError, OSError) as e:
                self._tell(told(e) if isinstance(e, OSError) else str(e))
            finally:
                shutil.rmtree(now, ignore_errors=True)
                with self._changed:
                    self._now = None
                    self._changed.notify_all()

    def _tell(self, error: str) -> None:
        """Says an error once, not at each checkpoint."""
        if error != self._said:
            say(
                f"{self._url}: a checkpoint could not be copied ({error}); the training goes on and "
                "copies the next one"
            )
        self._said = error

    def _send(self, step: Path) -> None:
        for name in ("config.yaml", "env.json"):
            if (file := self._folder / name).is_file():
                objects.write(self._there(name), file.read_bytes())
        self._send_logs()
        there = self._there("checkpoints", step.name)
        last = step / manifest.NAME
        found = objects.listed(there)
        if last.name in found and objects.read(found[last.name]) == last.read_bytes():
            # Copied before, or fetched from there.
            return
        # What is there may be of a training that was given up.
        objects.remove(there / last.name)
        for file in sorted(step.iterdir()):
            if file != last:
                objects.upload(file, there / file.name)
        objects.upload(last, there / last.name)
        steps = self._steps()
        for old in set(steps) - set(steps[: steps.index(step.name) + 1][-self._keep :]):
            self._delete(old)

    def _send_logs(self) -> None:
        for name in _LOGS:
            kept = self._parts() / name
            # A copy: the training writes to the file meanwhile.
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(self._folder / name, kept)
                objects.upload(kept, self._there(name))
                kept.unlink()

    def _delete(self, step: str) -> None:
        there = self._there("checkpoints", step)
        # Without its manifest it is no checkpoint, whatever happens after that.
        objects.remove(there / manifest.NAME)
        for name in objects.listed(there):
            objects.remove(there / name)

    def _there(self, *names: str) -> Url:
        url: Any = self._url
        assert url is not None
        for name in names:
            url = url / name
        return url
