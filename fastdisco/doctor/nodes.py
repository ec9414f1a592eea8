"""The nodes of a hostfile: the ranks of each, started by ssh.

A launcher that starts all nodes itself says that something failed, not on which node.  Here each
node has a connection of its own, whose end and last words are known."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from fastdisco.common.errors import UserError
from fastdisco.doctor.finding import Finding, failure

# Seconds of ssh's to connect.
_CONNECT = 8
_SSH = ("ssh", "-o", "BatchMode=yes", "-o", f"ConnectTimeout={_CONNECT}")
# Variables that the other nodes get, as DeepSpeed's launcher passes them on.
_PASSED = ("NCCL_", "GLOO_", "UCX_", "PYTHON")
# ssh's own failure, and seconds beyond the limit in which a node's ranks end by themselves.
_NO_SSH, _GRACE = 255, 10.0


class Ended(NamedTuple):
    """How the command on a node ended."""

    # None: it was still running at the limit.
    code: int | None
    out: str
    err: str


def read(hostfile: Path) -> dict[str, int]:
    """The nodes of a hostfile of DeepSpeed's and the number of ranks on each.

    Raises UserError for what is none."""
    try:
        lines = hostfile.read_text().splitlines()
    except (OSError, ValueError) as e:
        raise UserError(f"--nodes: {hostfile} cannot be read ({e}); name a hostfile") from None
    hosts: dict[str, int] = {}
    for number, line in enumerate(lines, 1):
        words = line.split("#")[0].split()
        if not words:
            continue
        host, slots = words[0], words[1].removeprefix("slots=") if len(words) == 2 else ""
        if not slots.isdecimal() or int(slots) < 1 or host in hosts:
            raise UserError(
                f"{hostfile}: line {number} is {line!r}; write `NAME slots=RANKS` once for each node"
            )
        hosts[host] = int(slots)
    if not hosts:
        raise UserError(f"{hostfile}: names no node; write `NAME slots=RANKS` for each")
    return hosts


def unreached(hosts: dict[str, int]) -> dict[str, Ended]:
    """How ssh ended on the nodes that it does not reach; all are tried at once.

    The ranks of other nodes would wait for theirs until the limit."""
    tried = {host: _ssh(host, "true") for host in hosts}
    ended = {host: _wait(process, _CONNECT + 2) for host, process in tried.items()}
    lost = {host: e for host, e in ended.items() if e.code != 0}
    # One that connects and does not answer is not reached, either.
    return {h: e._replace(code=_NO_SSH, err=e.err or "no answer") for h, e in lost.items()}


def run(hosts: dict[str, int], arguments: list[str], limit_s: float) -> dict[str, Ended]:
    """Runs `fastdisco doctor` with the arguments on all nodes at once; what each has said.

    MASTER_ADDR and MASTER_PORT say where the ranks meet: the first node and 29500 by default."""
    started = {host: _ssh(host, remote(hosts, host, arguments)) for host in hosts}
    end = time.monotonic() + limit_s + _GRACE
    return {host: _wait(process, end - time.monotonic()) for host, process in started.items()}


def report(ended: dict[str, Ended]) -> dict | None:
    """What rank 0 reported, as `fastdisco doctor --json` prints it; None where it did not."""
    lines = (line for e in ended.values() for line in e.out.splitlines())
    told = next((line for line in lines if line.startswith('{"code":')), None)
    return json.loads(told) if told else None


def silent(ended: dict[str, Ended], reported: bool) -> Iterator[Finding]:
    """A failure for each node that ended badly.  Where rank 0 has reported, its words count, and
    only nodes that ssh did not reach are added.  The causes come first, as far as they can be
    told."""
    for host, e in ended.items():
        said = _last(e.err) or _last(e.out)
        if e.code == _NO_SSH:
            remedy = f"make `ssh {host} true` work without a password"
            yield failure("ssh", f"not reached ({said})", remedy)._replace(where=host)
        elif not reported and e.code is None:
            remedy = "raise --limit if the node is slow to start Python, or look at its network"
            yield failure("node", "did not end within the limit", remedy)._replace(where=host)
        elif e.code and (not reported or _of_our_own(e.err)):
            own = _of_our_own(e.err) or f"ended with code {e.code} and said: {said}"
            remedy = "correct it on that node, which needs the same fastdisco in the same folder"
            yield failure("node", own, remedy)._replace(where=host)


def remote(hosts: dict[str, int], host: str, arguments: list[str]) -> str:
    """The shell command that starts a node's ranks."""
    names = list(hosts)
    address = os.environ.get("MASTER_ADDR", names[0])
    port = os.environ.get("MASTER_PORT", "29500")
    first = sum(hosts[name] for name in names[: names.index(host)])
    launcher = [sys.executable, "-m", "fastdisco.common.start", f"--first={first}"]
    launcher += [f"--ranks={hosts[host]}", f"--world={sum(hosts.values())}"]
    launcher += [f"--master={address}:{port}"]
    command = ["doctor", *arguments, "--json", f"--as={host}"]
    passed = {k: v for k, v in os.environ.items() if k.startswith(_PASSED)}
    env = ["env", *(f"{k}={v}" for k, v in passed.items())]
    return f"cd {shlex.quote(os.getcwd())} && exec {shlex.join([*env, *launcher, *command])}"


def _ssh(host: str, command: str) -> subprocess.Popen[str]:
    try:
        return subprocess.Popen(
            [*_SSH, host, command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
    except OSError as e:
        raise UserError(
            f"--nodes: ssh cannot be started ({e.strerror}); install an ssh client, or start "
            "`fastdisco doctor` under torchrun on each node"
        ) from None


def _wait(process: subprocess.Popen[str], seconds: float) -> Ended:
    try:
        out, err = process.communicate(timeout=max(seconds, 0.1))
        return Ended(process.returncode, out, err)
    except subprocess.TimeoutExpired:
        process.kill()
        out, err = process.communicate()
        return Ended(None, out, err)


def _last(text: str) -> str:
    return next((x.strip() for x in reversed(text.splitlines()) if x.strip()), "")


def _of_our_own(err: str) -> str:
    """What a rank of ours said that could not tell rank 0."""
    marks = ("fastdisco: error: ", "fastdisco doctor: ")
    found = [line.partition(m)[2] for line in err.splitlines() for m in marks if m in line]
    return found[0] if found else ""
