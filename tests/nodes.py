"""Two nodes on one machine: network name spaces with a link between them, and ranks that start in
them as Slurm's srun starts them."""

import contextlib
import ctypes
import itertools
import os
import shutil
import subprocess

import conftest
import pytest
import torch

ADDRESSES = ("10.77.0.1", "10.77.0.2")
_numbers = itertools.count()


@contextlib.contextmanager
def two_nodes():
    """The names of two network name spaces, whose ends of one link have ADDRESSES.  Skips where the
    system does not let this user make them."""
    names = [f"fd{os.getpid()}n{next(_numbers)}" for _ in ADDRESSES]
    try:
        try:
            _link(names)
        except (OSError, subprocess.CalledProcessError) as e:
            said = getattr(e, "stderr", None) or e
            pytest.skip(f"root: no network name space can be made here ({str(said).strip()})")
        yield names
    finally:
        for name in names:
            with contextlib.suppress(OSError, subprocess.CalledProcessError):
                ip("netns", "delete", name)


def _link(names):
    for name in names:
        ip("netns", "add", name)
    ends = [("eth0", "netns", name) for name in names]
    ip("link", "add", *ends[0], "type", "veth", "peer", "name", *ends[1])
    for name, address in zip(names, ADDRESSES):
        ip("-n", name, "address", "add", f"{address}/24", "dev", "eth0")
        for device in ("eth0", "lo"):
            ip("-n", name, "link", "set", device, "up")


def ip(*arguments):
    """Runs iproute2's command, which a user's PATH often lacks."""
    program = shutil.which("ip") or shutil.which("ip", path="/usr/sbin:/sbin")
    if program is None:
        raise FileNotFoundError("the command ip of iproute2 is not installed")
    subprocess.run([program, *arguments], check=True, capture_output=True, text=True)


def enter(name):
    """Moves this process, which has one thread, into a network name space."""
    # os.setns is there from Python 3.12 on.
    with open(f"/run/netns/{name}") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), 0):
            raise OSError(ctypes.get_errno(), f"setns {name}")


def srun(names, function, each, per_node=2, timeout=conftest.HANGS):
    """[function(*each[rank])] of `per_node` ranks on each node, with srun's variables."""
    forks, pipes, processes = conftest._forks(), [], []
    world = per_node * len(names)
    for rank in range(world):
        here, there = forks.Pipe(duplex=False)
        name = names[rank // per_node]
        env = {
            # Where an error comes from; srun has no such variable.
            "RANK": rank,
            "SLURM_JOB_ID": "77",
            "SLURM_STEP_ID": "0",
            "SLURM_STEP_NUM_TASKS": world,
            "SLURM_STEP_NODELIST": ",".join(ADDRESSES),
            "SLURM_PROCID": rank,
            "SLURM_LOCALID": rank % per_node,
            # The hosts' name is the same here, so it tells nothing of the network.
            "GLOO_SOCKET_IFNAME": "eth0",
        }
        filled = torch.are_deterministic_algorithms_enabled()
        args = (there, env, filled, _in_node, (name, function, each[rank]))
        process = forks.Process(target=conftest._child, args=args, daemon=True)
        process.start()
        there.close()
        pipes.append(here)
        processes.append(process)
    try:
        return [_result(rank, pipe, timeout) for rank, pipe in enumerate(pipes)]
    finally:
        for process in processes:
            process.join(5)
            process.kill()


def _result(rank, pipe, timeout):
    assert pipe.poll(timeout), f"rank {rank} gave no result in {timeout} s"
    ok, value = pipe.recv()
    assert ok, value
    return value


def _in_node(name, function, args):
    del os.environ["RANK"]
    enter(name)
    return function(*args)
