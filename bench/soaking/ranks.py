"""Starts attempts of a training.

Starting a rank takes 5 to 12 seconds of imports.  The soak has all that imported and forks ranks, under
a stand-in for the launcher that does what torchrun does: its name, its store, SIGTERM to the other ranks
when one has died.  `real` starts the real launchers."""

import atexit
import ctypes
import functools
import gc
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from harness import ROOT

from soaking import places, shim
from soaking.processes import Attempt, send

# Seconds that torchrun gives ranks to end.
_PATIENCE = 30.0
LAUNCHERS = ("torchrun", "deepspeed", "fastdisco run")

# ---- forked


def warm() -> None:
    """Imports whatever a training imports, and has DALI convert its graph."""
    sys.path.append(str(ROOT / "tests"))
    import deepspeed.ops
    import torch
    import warm  # noqa: F401

    # It looks for compilers at the first question.
    deepspeed.ops.__compatible_ops__.get("deepspeed_shm_comm")
    torch.set_num_threads(1)
    # Orphans become this process's children.
    ctypes.CDLL(None).prctl(36, 1)
    # No collection in a child copies all of this.
    gc.collect()
    gc.freeze()


def fork(
    arguments: Sequence[str],
    ranks: int,
    log: Path,
    controls: Sequence[shim.Control] = (),
    agent: bool = True,
    nodes: Sequence[str] = (),
) -> Attempt:
    """Starts ranks of `fastdisco train` under a stand-in for torchrun.

    agent   the launcher has the store; otherwise rank 0
    nodes   the network namespace of each rank"""
    sys.stdout.flush()
    top = os.fork()
    if not top:
        _never_back(lambda: _launcher(arguments, ranks, log, controls, agent, nodes))
    return Attempt(top, log, controls)


def _never_back(action) -> None:
    """Runs a child's life; nothing of the parent's must run in it."""
    code = 1
    try:
        code = action() or 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else 1
    except KeyboardInterrupt:
        code = 130
    except BaseException:
        traceback.print_exc()
    try:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _launcher(arguments, ranks, log, controls, agent, nodes) -> int:
    os.setsid()
    # The soak itself may be killed.
    ctypes.CDLL(None).prctl(1, int(signal.SIGTERM))
    _usual_signals()
    _call_myself("torchrun")
    out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    for fd in (1, 2):
        os.dup2(out, fd)
    port, tell = os.pipe()
    pids = {}
    for rank in range(ranks):
        pid = os.fork()
        if not pid:
            os.close(tell)
            control = controls[rank] if controls else None
            where = (nodes[rank] if nodes else None, port, agent)
            _never_back(functools.partial(_train, arguments, rank, ranks, control, *where))
        pids[pid] = rank
    asked = []
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        signal.signal(number, lambda n, _: asked.append(n))
    # Kept: the store ends with its object.
    number, _store_of_all = _store(agent, bool(nodes))
    os.write(tell, f"{number:08}".encode() * ranks)
    return _outlive(pids, asked)


def _store(agent: bool, apart: bool):
    """(port, the store)"""
    if apart:
        # Of a launcher that was killed the port may still be closing.
        return 20000 + os.getpid() % 10000, None
    if agent:
        import torch

        store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        return store.port, store
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1], None


def _outlive(pids: dict[int, int], asked: list[int]) -> int:
    """What torchrun does until all ranks are gone."""
    codes, end = {}, None
    while pids:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in pids:
            codes[pids.pop(pid)] = os.waitstatus_to_exitcode(status)
        if end is None and (asked or any(codes.values())):
            end = time.monotonic() + _PATIENCE
            for other in pids:
                send(other, signal.SIGTERM)
        if end and time.monotonic() > end:
            for other in pids:
                send(other, signal.SIGKILL)
        if not pid:
            time.sleep(0.02)
    print("codes " + json.dumps([codes[r] for r in sorted(codes)]), flush=True)
    return int(any(codes.values()))


def _train(arguments, rank, ranks, control, node, port, agent) -> int:
    _usual_signals()
    _call_myself(f"rank\0{rank}")
    if node:
        places.enter(node)
    if control:
        shim.join(control.path)
    env = dict(RANK=rank, LOCAL_RANK=0 if node else rank, WORLD_SIZE=ranks)
    env |= dict(MASTER_ADDR=places.ADDRESSES[0] if node else "127.0.0.1")
    env |= dict(MASTER_PORT=int(os.read(port, 8)))
    if agent and not node:
        env |= dict(TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT=0)
    if node:
        env |= dict(GLOO_SOCKET_IFNAME="eth0")
    os.environ.update({k: str(v) for k, v in env.items()})
    from fastdisco.commands import train

    return train.main(list(arguments))


def _usual_signals() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


def _call_myself(words: str) -> None:
    """Changes this process's command line, by which ranks know a launcher."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    # Fields 48 and 49 of the whole line.
    begin, end = int(fields[45]), int(fields[46])
    text = words.encode()[: end - begin - 1]
    ctypes.memset(begin, 0, end - begin)
    ctypes.memmove(begin, text, len(text))


# ---- the real launchers


def real(launcher: str, arguments: Sequence[str], ranks: int, log: Path) -> Attempt:
    """Starts ranks by `deepspeed`, `torchrun` or `fastdisco run`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    script = str(ROOT / "fastdisco/train.py")
    words = {
        "deepspeed": [
            *("deepspeed.launcher.runner", "--hostfile=/dev/null"),
            *(f"--num_accelerators={ranks}", f"--master_port={port}", script),
        ],
        "torchrun": [
            *("torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}", script),
        ],
        "fastdisco run": ["fastdisco.cli", "run", "--ranks", str(ranks), "--"],
    }[launcher]
    env = {k: v for k, v in os.environ.items() if k != "LD_PRELOAD"}
    with log.open("a") as f:
        top = subprocess.Popen(
            [sys.executable, "-m", *words, *arguments],
            cwd=ROOT,
            env=env | {"PYTHONPATH": str(ROOT)},
            stdin=subprocess.DEVNULL,
            stdout=f,
            stderr=f,
            start_new_session=True,
        )
    return Attempt(top.pid, log)
