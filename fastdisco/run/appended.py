"""A file that a training appends to, and that may fail for a while: what cannot be written is kept in
memory until it can."""

import os
from pathlib import Path

from fastdisco.common.console import say
from fastdisco.common.files import naming, told


class Appended:
    """Opened for each write, so that a file system that comes back is found."""

    def __init__(self, path: Path, size: int) -> None:
        """size: bytes that the file has; it is made where it is not there.  Raises OSError where that
        cannot be."""
        self.path, self.size = path, size
        self._waiting: list[bytes] = []
        self._failed = False
        self._write()
        # A mount that is gone shows another file system in its place.
        self._device = self._where()

    def add(self, entry: bytes) -> None:
        """Appends an entry, and those that wait; says when writing begins to fail, and when it works
        again."""
        self._waiting.append(entry)
        waited = len(self._waiting) - 1
        try:
            if self._where() != self._device:
                raise OSError(0, "the file system that held it is gone")
            self._write()
        except OSError as e:
            if not self._failed:
                say(
                    f"{self._told(e)}; what cannot be written is kept in memory, the training goes on"
                )
            self._failed = True
            return
        if self._failed:
            say(f"{self.path}: can be written again, {_entries(waited)} that waited are there")
        self._failed = False

    def close(self) -> None:
        """Tries for a last time, and says what is lost."""
        if self._waiting:
            try:
                self._write()
            except OSError as e:
                say(f"{self._told(e)}; {_entries(len(self._waiting))} are lost")

    def _write(self) -> None:
        with naming(self.path):
            fd = os.open(self.path, os.O_WRONLY | os.O_CREAT, 0o666)
            try:
                # What an attempt that failed has written goes; somebody may have made a new file.
                at = min(self.size, os.fstat(fd).st_size)
                os.ftruncate(fd, at)
                os.lseek(fd, at, os.SEEK_SET)
                left = memoryview(b"".join(self._waiting))
                while left:
                    written = os.write(fd, left)
                    at, left = at + written, left[written:]
            finally:
                # Where a quota is exceeded, a file server may say it only here.
                os.close(fd)
        self.size = at
        self._waiting.clear()

    def _where(self) -> int:
        with naming(self.path):
            return os.stat(self.path.parent).st_dev

    def _told(self, error: OSError) -> str:
        return told(error) if error.filename else f"{self.path}: {told(error)}"


def _entries(n: int) -> str:
    return f"{n} entr{'y' if n == 1 else 'ies'}"
