"""Files that are written completely or not at all, and paths as users write them."""

import contextlib
import hashlib
import os
import re
from collections.abc import Iterator
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes the text through a temporary file beside it, which then takes the file's name.

    Whenever the process is killed, the file has either its old content or all of the new.  Several
    processes may write the same file at once: each has a temporary file of its own.
    Raises an OSError that names the path; then the file has its old content."""
    part = path.with_name(f".{path.name}.{os.urandom(6).hex()}.part")
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
    """In this context an OSError names the path, which that of a full disk does not by itself."""
    try:
        yield
    except OSError as e:
        e.filename, e.filename2 = str(path), None
        raise


def told(error: OSError) -> str:
    """'PATH: No space left on device'"""
    reason = error.strerror or str(error)
    return f"{os.fspath(error.filename)}: {reason}" if error.filename else reason


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


def expanded(path: Path) -> Path:
    """The path with ~ and environment variables replaced: a shell leaves them as they are in
    key=value and --option=value, and nobody else would look at a YAML file.

    Raises ValueError for a user or a variable that is not there."""
    text = os.path.expanduser(path)
    if text.startswith("~"):
        raise ValueError(f"there is no user {text.split('/')[0][1:]}; write the path out")
    text = os.path.expandvars(text)
    if left := re.search(r"\$(\w+|\{\w+\})", text):
        name = left[1].strip("{}")
        raise ValueError(f"${name} is not set in the environment; set it, or write the path out")
    return Path(text)
