"""Where runs lie and how ranks are connected: mounts and network namespaces, which need root."""

import contextlib
import ctypes
import os
import shutil
import subprocess
import time
from pathlib import Path

ADDRESSES = ("10.77.0.1", "10.77.0.2")
# Flags of unshare: a mount namespace of one's own.
_NEW_MOUNTS = 0x00020000


def reason() -> str:
    """Why mounts and namespaces cannot be made here; empty where they can.  From then on this process
    has mounts of its own, which end with it."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_NEW_MOUNTS):
        return os.strerror(ctypes.get_errno())
    try:
        _run("mount", "--make-rprivate", "/")
        name = f"soak{os.getpid()}try"
        ip("netns", "add", name)
        ip("netns", "delete", name)
    except (OSError, subprocess.CalledProcessError) as e:
        return str(getattr(e, "stderr", None) or e).strip()
    return ""


def _run(*words: str) -> None:
    subprocess.run(words, check=True, capture_output=True, text=True)


# ---- disks


class Disk:
    """A small file system of its own, shown at `path`."""

    def __init__(self, folder: Path, megabytes: int) -> None:
        self.path, self._whole = folder / "out", folder / "disk"
        for path in (self.path, self._whole):
            path.mkdir(parents=True)
        _run("mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "none", str(self._whole))
        self.show()

    def show(self) -> None:
        """Mounts it at its path."""
        _run("mount", "--bind", str(self._whole), str(self.path))

    def vanish(self) -> None:
        """Takes it from its path, where an empty folder is left."""
        _run("umount", "-l", str(self.path))

    def fill(self) -> Path:
        """Fills it; returns the file that does."""
        path = self._whole / "ballast"
        with contextlib.suppress(OSError), path.open("wb") as f:
            while True:
                f.write(bytes(4096))
                f.flush()
        return path

    def read_only(self, yes: bool) -> None:
        """Refused by the kernel while a file is open for writing: tries for some seconds."""
        end = time.monotonic() + 20
        while True:
            try:
                how = "ro" if yes else "rw"
                return _run("mount", "-o", f"remount,bind,{how}", str(self.path))
            except subprocess.CalledProcessError:
                if time.monotonic() > end:
                    raise

    def close(self) -> None:
        for path in (self.path, self._whole):
            with contextlib.suppress(subprocess.CalledProcessError):
                _run("umount", "-l", str(path))


# ---- nodes


class Nodes:
    """Two network namespaces with a link between them, whose ends have ADDRESSES."""

    def __init__(self) -> None:
        self.names = [f"soak{os.getpid()}n{i}" for i in range(2)]
        self.close()
        for name in self.names:
            ip("netns", "add", name)
        ends = [("eth0", "netns", name) for name in self.names]
        ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
        for name, address in zip(self.names, ADDRESSES):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
            for device in ("eth0", "lo"):
                ip("-n", name, "link", "set", device, "up")

    def cut(self) -> None:
        ip("-n", self.names[1], "link", "set", "eth0", "down")

    def mend(self) -> None:
        ip("-n", self.names[1], "link", "set", "eth0", "up")

    def close(self) -> None:
        for name in self.names:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                ip("netns", "delete", name)


def ip(*arguments: str) -> None:
    """Runs iproute2's command, which a user's PATH often lacks."""
    program = shutil.which("ip") or shutil.which("ip", path="/usr/sbin:/sbin")
    if program is None:
        raise FileNotFoundError("the command ip of iproute2 is not installed")
    _run(program, *arguments)


def enter(name: str) -> None:
    """Moves this process, which has one thread, into a network namespace."""
    # os.setns is there from Python 3.12 on.
    with open(f"/run/netns/{name}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"setns {name}")
