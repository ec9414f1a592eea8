"""Files that are written completely or not at all, and paths as users write them."""

import contextlib
import errno
import hashlib
import io
import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fastdisco.common import temporary
from fastdisco.common.errors import UserError
from fastdisco.common.urls import addressed

_SPACE, _RIGHTS = (
    "make space there, or take another place",
    "make it writable, or take another place",
)
_OF_DISKS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)
_REMEDIES = {
    errno.ENOSPC: _SPACE,
    errno.EDQUOT: _SPACE,
    errno.EACCES: _RIGHTS,
    errno.EPERM: _RIGHTS,
    errno.EROFS: _RIGHTS,
    errno.ENAMETOOLONG: "give a shorter name",
}
# Linux's PATH_MAX less the zero byte at the end, and NAME_MAX, bytes.
LONGEST_PATH, LONGEST_NAME = 4095, 255


def write_whole(path: Path, text: str) -> None:
    """Writes the text through a temporary file beside it, which then takes the file's name.

    Whenever the process is killed, the file has either its old content or all of the new.  Several
    processes may write the same file at once: each has a temporary file of its own.
    Raises an OSError that names the path; then the file has its old content."""
    part = temporary.part(path)
    with naming(path):
        try:
            # A file name is bytes and need not be valid UTF-8; Python hands such bytes over as
            # surrogates.
            with part.open("w", errors="surrogateescape") as f:
                f.write(text)
                f.flush()
                # Without this the new name could reach the disk before the content.
                os.fsync(f.fileno())
            os.replace(part, path)
        except OSError:
            with contextlib.suppress(OSError):
                part.unlink()
            raise


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """In this context an OSError names the path, which that of a full disk does not by itself, unless
    it names another one than a temporary file."""
    try:
        yield
    except OSError as e:
        if not e.filename or os.fspath(e.filename).endswith(".part"):
            e.filename, e.filename2 = str(path), None
        raise


def told(error: OSError) -> str:
    """'PATH: No space left on device'"""
    reason = error.strerror or str(error)
    return f"{os.fspath(error.filename)}: {reason}" if error.filename else reason


@contextlib.contextmanager
def refused() -> Iterator[None]:
    """In this context an error of the file system becomes a UserError: one sentence with path, reason
    and remedy."""
    try:
        yield
    except OSError as e:
        # Of a full disk, say those that nobody has named a path in; others are a program's.
        if not e.filename and e.errno not in _OF_DISKS:
            raise
        remedy = _REMEDIES.get(e.errno or 0, "look at this path and what it lies on")
        raise UserError(f"{told(e)}; {remedy}") from None


def sha256(path: Path) -> str:
    """The digest of a file's content."""
    h = hashlib.sha256()
    with path.open("rb") as f:
        while block := f.read(1 << 20):
            h.update(block)
    return h.hexdigest()


def sync(folder: Path) -> None:
    """Waits until the names in the folder are on disk."""
    with naming(folder):
        fd = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def open_regular(path: Path | str) -> io.BufferedReader:
    """The file opened to be read as bytes.

    Raises OSError, also for a pipe, a socket or a device, where reading could wait for ever."""
    # Opening a pipe waits for a writer, unless told not to.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(fd).st_mode
    if not stat.S_ISREG(mode):
        os.close(fd)
        code = errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL
        what = (
            os.strerror(code) if stat.S_ISDIR(mode) else "a pipe, a socket or a device, not a file"
        )
        raise OSError(code, what, str(path))
    return open(fd, "rb")


def read_regular(path: Path) -> bytes:
    """The file's content.  Raises OSError, also for a pipe, a socket or a device."""
    with open_regular(path) as f:
        return f.read()


def read_json(path: Path) -> Any:
    """The value in a file of JSON.  Raises OSError as `open_regular`, and ValueError for what is no
    JSON."""
    try:
        return json.loads(read_regular(path))
    except RecursionError:
        # Brackets in brackets, by the thousand.
        raise ValueError("it is nested too deep") from None


def expanded(path: Path) -> Path:
    """The path with ~ and environment variables replaced: a shell leaves them as they are in
    key=value and --option=value, and nobody else would look at a YAML file.

    An address in object storage becomes a Url.
    Raises ValueError for a user or a variable that is not there."""
    text = os.path.expanduser(path)
    if text.startswith("~"):
        raise ValueError(f"there is no user {text.split('/')[0][1:]}; write the path out")
    text = os.path.expandvars(text)
    if left := re.search(r"\$(\w+|\{\w+\})", text):
        name = left[1].strip("{}")
        raise ValueError(f"${name} is not set in the environment; set it, or write the path out")
    _refuse_unopenable(text)
    return addressed(text)


def _refuse_unopenable(text: str) -> None:
    """Raises ValueError for a path that no system call takes."""
    try:
        name = os.fsencode(text)
    except UnicodeEncodeError:
        raise ValueError("it has a character that no file name can have; remove it") from None
    if b"\0" in name:
        raise ValueError("it has a zero byte, which no path can have; remove it")
    if len(name) > LONGEST_PATH or max(map(len, name.split(b"/"))) > LONGEST_NAME:
        raise ValueError(
            f"it is longer than a path ({LONGEST_PATH} bytes) or a name in it ({LONGEST_NAME}) can "
            "be; shorten it"
        )
