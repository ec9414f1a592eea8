"""How the ranks come together within a time, so that one that does not come is named.

A collective of PyTorch's waits for half an hour when a node is missing and then does not say which.
So the ranks first meet at the store of rank 0, which every launcher's variables name; only when all
have come, and each node has reached each other one, do they join a process group."""

import contextlib
import fcntl
import json
import os
import platform
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as td

from fastdisco.common import launch
from fastdisco.doctor.finding import Finding, failure, ok

_KEY = "fastdisco/doctor"
# Seconds between two tries to reach rank 0, of one try, and of a node's connection to another.
_AGAIN, _TRY = 0.2, 3.0
# Seconds that rank 0 waits at the end for the others to have read the exit code.
_LEAVE = 5.0


class Meeting:
    """The ranks at the store of rank 0."""

    def __init__(self, store: td.Store, node: str) -> None:
        """node: this machine's name."""
        self.store, self.node = store, node
        self.rank, self.world = launch.rank(), launch.world()

    def gather(self, what: str, value: Any, wait_s: float) -> dict[int, Any] | None:
        """On rank 0 the values (JSON) by rank, of those that came in time; None elsewhere."""
        self.store.set(f"{_KEY}/{what}/{self.rank}", json.dumps(value))
        if self.rank:
            return None
        end, found = time.monotonic() + wait_s, {}
        for rank in range(self.world):
            key = f"{_KEY}/{what}/{rank}"
            if self._comes(key, end - time.monotonic()):
                found[rank] = json.loads(self.store.get(key))
        return found

    def tell(self, what: str, value: Any = None, wait_s: float = 1e6) -> Any:
        """What rank 0 gives as value (JSON), on every rank.

        Raises RuntimeError where it does not come in time, or rank 0 is gone."""
        key = f"{_KEY}/{what}"
        if self.rank == 0:
            self.store.set(key, json.dumps(value))
        elif not self._comes(key, wait_s):
            raise RuntimeError(f"rank 0 did not answer within {wait_s:.0f} s")
        return json.loads(self.store.get(key))

    def leave(self) -> None:
        """Called by every rank at its end; rank 0 takes the store with it, so it goes last."""
        # Rank 0 may be gone.
        with contextlib.suppress(RuntimeError):
            self.store.add(f"{_KEY}/left", 1)
            end = time.monotonic() + _LEAVE
            while not self.rank and self.store.add(f"{_KEY}/left", 0) < self.world:
                if time.monotonic() > end:
                    return
                time.sleep(0.05)

    def _comes(self, key: str, wait_s: float) -> bool:
        try:
            self.store.wait([key], timedelta(seconds=max(wait_s, 0.01)))
        except td.DistError:
            return False
        return True


class Deadline:
    """Ends this process where it hangs: a collective cannot be interrupted.

    `phase` says what it is doing."""

    def __init__(self, limit_s: float, expired: Callable[[str], Any]) -> None:
        """expired: is given the phase; the process ends with code 2 after it."""
        self.end, self.phase = time.monotonic() + limit_s, "meeting"
        self._expired, self._over = expired, threading.Event()
        threading.Thread(target=self._watch, daemon=True).start()

    def left(self) -> float:
        """Seconds to go."""
        return self.end - time.monotonic()

    def over(self) -> None:
        """Nothing hangs any more."""
        self._over.set()

    def _watch(self) -> None:
        if not self._over.wait(max(self.left(), 0)):
            self._expired(self.phase)
            os._exit(2)


def reach(wait_s: float) -> Finding:
    """This rank reaches the port where rank 0 listens, or, as rank 0, can listen there."""
    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    if launch.rank() == 0 and not _agents_store():
        return listens(host, port)
    end, error = time.monotonic() + wait_s, ""
    while True:
        try:
            socket.create_connection((host, port), timeout=_TRY).close()
            return ok("master port", f"{host}:{port} can be reached")
        except OSError as e:
            error = e.strerror or str(e) or type(e).__name__
        if time.monotonic() > end:
            return unreached(host, port, error, wait_s)
        time.sleep(_AGAIN)


def unreached(host: str, port: int, error: str, wait_s: float) -> Finding:
    """What it means that rank 0's port cannot be reached."""
    what = f"{host}:{port} (MASTER_ADDR, MASTER_PORT) cannot be reached for {wait_s:.0f} s: {error}"
    if "refused" in error:
        remedy = "nothing listens there: start rank 0's node, or correct MASTER_ADDR"
    elif "ame or service" in error or "name resolution" in error or "address associated" in error:
        remedy = "this node does not know the name: give MASTER_ADDR as an address"
    else:
        remedy = f"open port {port} in the firewall, or give an address of the nodes' own network"
    return failure("master port", what, remedy)


def listens(host: str, port: int) -> Finding:
    """Rank 0 can listen on the port."""
    try:
        with socket.create_server(("", port)):
            pass
    except OSError as e:
        what = f"port {port} of {host} cannot be opened ({e.strerror})"
        return failure("master port", what, "take another MASTER_PORT, or end what uses it")
    return ok("master port", f"{host}:{port} can be opened")


def join(node: str, wait_s: float) -> Meeting:
    """Connects to the store of rank 0.  Call `reach` before, whose sentences are better.

    Raises RuntimeError where rank 0 does not answer in time."""
    first = launch.rank() == 0 and not _agents_store()
    store = td.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=first,
        timeout=timedelta(seconds=max(wait_s, 1)),
        wait_for_workers=False,
    )
    return Meeting(store, node)


def here(name: str | None = None) -> str:
    """The name of this machine; `name`: what the command was told."""
    return name or os.environ.get("SLURMD_NODENAME") or platform.node()


# ---- from node to node


@contextlib.contextmanager
def open_door() -> Iterator[tuple[str, int]]:
    """Accepts connections at the address that gloo takes, as long as the context lasts; yields it
    with the port.  Raises OSError where the address cannot be found."""
    with socket.create_server((address(), 0)) as server:

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    server.accept()[0].close()

        threading.Thread(target=accept, daemon=True).start()
        try:
            yield server.getsockname()[:2]
        finally:
            # Closed alone, it would stay open until the thread has accepted once more.
            server.shutdown(socket.SHUT_RDWR)


def address() -> str:
    """The address that gloo takes: the interface's that it is told, or the host name's."""
    if name := os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as s:
            asked = struct.pack("256s", name.encode()[:15])
            # SIOCGIFADDR
            return socket.inet_ntoa(fcntl.ioctl(s.fileno(), 0x8915, asked)[20:24])
    return socket.gethostbyname(socket.gethostname())


def knock(doors: dict[str, tuple[str, int]]) -> dict[str, str]:
    """Tries the doors of other nodes; the errors of those that cannot be reached, by node."""
    errors = {}
    for node, (host, port) in doors.items():
        try:
            socket.create_connection((host, port), timeout=_TRY).close()
        except OSError as e:
            errors[node] = f"{host}:{port}: {e.strerror or str(e) or type(e).__name__}"
    return errors


def group(meeting: Meeting, device: torch.device) -> None:
    """Joins the process group, NCCL on GPUs and gloo between hosts."""
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    store = td.PrefixStore(f"{_KEY}/group", meeting.store)
    td.init_process_group(backend, store=store, rank=meeting.rank, world_size=meeting.world)


def _agents_store() -> bool:
    """Whether torchrun itself listens at MASTER_PORT."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
