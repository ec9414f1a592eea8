"""Names of temporary files that tell whose they are, and the removal of those that a killed process
has left.

A name holds <machine>-<process>-<start>-<random>, where the machine is the boot and the PID namespace,
of which each container has its own."""

import contextlib
import functools
import os
import re
import shutil
import stat
import tempfile
import time
import zlib
from collections.abc import Iterable
from pathlib import Path

from fastdisco.common import launch

_MARK = r"([0-9a-f]{8})-(\d+)-(\d+)-[0-9a-f]{12}"
_PART = re.compile(rf"\..+\.{_MARK}\.part", re.DOTALL)
_FOLDER = re.compile(rf"fastdisco-{_MARK}-.+")
# As write_whole once named them.
_OLD = re.compile(r"\.(config\.yaml|env\.json|metrics\.jsonl|last|lock)\.[0-9a-f]{12}\.part")
# Seconds without change after which a file counts as left where nobody can tell whether its process
# lives: on another machine, or of an older version.
OLD = 24 * 3600.0


def part(path: Path) -> Path:
    """A hidden file beside the path, of this process's own, that may become the file."""
    # A name has 255 bytes, and a character up to 4.
    return path.with_name(f".{path.name[:40].lstrip('.')}.{_mark()}.part")


def prefix() -> str:
    """The beginning of the name of a folder in TMPDIR."""
    return f"fastdisco-{_mark()}-"


def machine() -> list[str]:
    """What two processes have in common that can see each other; empty where nothing tells."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return [boot, os.readlink("/proc/self/ns/pid")]
    except OSError:
        return []


def sweep(*folders: Path) -> None:
    """Removes the hidden `.part` files that killed processes have left in the folders; those of a
    live process and of others' programs stay."""
    for folder in folders:
        _remove(_left(folder, _PART, _OLD))


def sweep_tmpdir() -> None:
    """Removes this user's folders of killed processes of this machine from TMPDIR."""
    _remove(_left(Path(tempfile.gettempdir()), _FOLDER))


def _left(folder: Path, pattern: re.Pattern[str], old: re.Pattern[str] | None = None) -> list[Path]:
    found = []
    with contextlib.suppress(OSError):
        for path in folder.iterdir():
            if match := pattern.fullmatch(path.name):
                dead = _dead(path, *match.groups())
            else:
                dead = bool(old and old.fullmatch(path.name)) and _aged(path)
            found += [path] if dead else []
    return found


def _dead(path: Path, where: str, pid: str, start: str) -> bool:
    here = machine()
    if not here or where != _short(tuple(here)):
        return _aged(path)
    seen = launch.process(int(pid))
    return seen is None or str(seen[0]) != start


def _aged(path: Path) -> bool:
    with contextlib.suppress(OSError):
        return time.time() - path.lstat().st_mtime > OLD
    return False


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        # Somebody else may remove it at the same time.
        with contextlib.suppress(OSError):
            about = path.lstat()
            if about.st_uid != os.getuid():
                continue
            if stat.S_ISDIR(about.st_mode):
                shutil.rmtree(path)
            else:
                path.unlink()


def _mark() -> str:
    pid = os.getpid()
    seen = launch.process(pid)
    start = seen[0] if seen else 0
    return f"{_short(tuple(machine()))}-{pid}-{start}-{os.urandom(6).hex()}"


@functools.cache
def _short(parts: tuple[str, ...]) -> str:
    return f"{zlib.crc32(' '.join(parts).encode()):08x}"
