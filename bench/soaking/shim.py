"""The soak's library in front of libc (shim.c): built here, and controlled through a mapped file."""

import ctypes
import mmap
import os
import struct
import subprocess
from pathlib import Path

_FIELDS = ("clock", "armed", "count", "die_at", "torn", "error", "failed")
_PREFIX, _KINDS = 1024, 8192
_SIZE = 8 * len(_FIELDS) + _PREFIX + _KINDS


def build(folder: Path) -> Path:
    """Compiles the library into the folder.  Raises an error without a C compiler."""
    source, library = Path(__file__).with_name("shim.c"), folder / "shim.so"
    if not library.exists() or library.stat().st_mtime < source.stat().st_mtime:
        part = library.with_suffix(f".{os.getpid()}")
        command = [os.environ.get("CC", "cc"), "-shared", "-fPIC", "-O1", "-w", str(source)]
        subprocess.run([*command, "-o", str(part), "-ldl"], check=True)
        os.replace(part, library)
    return library


def join(path: Path) -> None:
    """Puts this process under the control at the path."""
    ctypes.CDLL(None).soak_control(os.fsencode(path))


class Control:
    """What the library does in one process.

    clock   seconds added to the clock of the wall
    error   errno of every change of a file below the prefix; 0: none
    armed   1: changes below the prefix count; 2: from the first new folder on
    die_at  the change at which the process is killed, from 1 on; torn: after half of a write"""

    def __init__(self, path: Path, prefix: Path | str = "", **fields: int) -> None:
        self.path = path
        path.write_bytes(bytes(_SIZE))
        with path.open("r+b") as f:
            self._map = mmap.mmap(f.fileno(), _SIZE)
        text = os.fsencode(prefix)
        begin = 8 * len(_FIELDS)
        self._map[begin : begin + len(text)] = text
        for name, value in fields.items():
            self.put(name, value)

    def put(self, name: str, value: int) -> None:
        if name == "clock":
            value *= 10**9
        struct.pack_into("<q", self._map, 8 * _FIELDS.index(name), value)

    def get(self, name: str) -> int:
        return struct.unpack_from("<q", self._map, 8 * _FIELDS.index(name))[0]

    @property
    def kinds(self) -> str:
        """A letter for each change that has counted, see shim.c."""
        begin = 8 * len(_FIELDS) + _PREFIX
        return self._map[begin : begin + min(self.get("count"), _KINDS)].decode()
