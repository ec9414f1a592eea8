"""`fastdisco doctor` on several ranks and nodes: it names the one that is not as it should be."""

import json
import os
import shlex
import socket
import subprocess
import sys
import time
from pathlib import Path

import nodes
import pytest
from conftest import HANGS, ROOT, ranks, tiny
from training import command

from fastdisco import cli
from fastdisco.common import start
from fastdisco.common.errors import UserError
from fastdisco.doctor import Finding, finding, gpu, meeting, network
from fastdisco.doctor import node as one_node
from fastdisco.doctor import nodes as hostfile
from fastdisco.doctor import ranks as together
from fastdisco.doctor.network import Collective, Link
from fastdisco.run import agreement

NODES = {0: "node0", 1: "node0", 2: "node1", 3: "node1"}
# Of the ranks in these tests, which the libraries' checks would take most of on a busy machine.
LIMIT = "--limit=120"


def says(found, level, *words):
    assert found.level == level, found
    text = finding.line(found)
    assert all(word in text for word in words), text


@pytest.fixture
def two_nodes():
    with nodes.two_nodes() as names:
        yield names


# ---- judging made-up numbers


def test_ranks_that_did_not_come():
    says(network.came(NODES, 4, 15), "ok", "4 ranks on 2 nodes")
    there = {r: NODES[r] for r in (0, 1)}
    says(network.came(there, 8, 15), "failure", "ranks 2-7 did not come within 15 s; came: node0")
    says(network.came({0: "a", 2: "b"}, 5, 1), "failure", "ranks 1, 3-4", "came: a, b")


def test_a_node_that_another_cannot_reach():
    says(network.connected({"a": {}, "b": {}}), "ok", "2 nodes")
    errors = {"a": {}, "b": {}, "c": {"b": "10.0.0.2:4: Connection timed out"}}
    says(network.connected(errors), "failure", "c cannot reach b (10.0.0.2:4", "open all ports")


def test_a_rank_with_another_version():
    facts = {r: {"version of torch": "2.14", "optim.lr": "0.1"} for r in NODES}
    says(network.agreed(facts, NODES), "ok", "2 versions and settings")
    facts[3] = facts[3] | {"version of torch": "2.13"}
    says(network.agreed(facts, NODES), "failure", "torch: rank 3 on node1 has 2.13, rank 0")
    facts[1] = {}
    says(network.agreed(facts, NODES), "failure", "optim.lr: rank 1 on node0 has None")


def link(trip=1e-4, skew=0.0, rate=1e9):
    return Link(trip, skew, rate)


def test_clocks_round_trips_and_links():
    links = {1: link(), 2: link(), 3: link(skew=-0.01)}
    says(network.clocks(links, NODES), "ok", "node1 is 0.01 s behind node0")
    says(network.clocks(links | {2: link(skew=40)}, NODES), "warning", "node1 is 40 s ahead", "NTP")
    says(network.round_trip(links, NODES), "ok", "0.1 ms")
    slow = links | {3: link(trip=0.08)}
    says(network.round_trip(slow, NODES), "warning", "80 ms to the slowest, rank 3 on node1")
    says(network.bandwidth({1: link(rate=0)}, NODES), "skipped", "one node")
    says(network.bandwidth(links, NODES), "ok", "1000 MB/s to the slowest node, node1")
    says(network.bandwidth({2: link(rate=1e8)}, NODES), "warning", "as slow as 1 Gbit/s", "node1")
    many = {r: f"node{r}" for r in range(5)}
    links = {r: link(rate=4e8 if r == 3 else 1e9) for r in range(1, 5)}
    says(network.bandwidth(links, many), "warning", "400 MB/s to the slowest node, node3; 1000")


def test_the_slowest_rank():
    seconds = {0: 1.0, 1: 1.1, 2: 1.0, 3: 1.2}
    says(network.slowest(seconds, NODES), "ok", "rank 3 on node1 computes 1.14 times")
    says(network.slowest(seconds | {2: 3.0}, NODES), "warning", "rank 2 on node1 computes 2.6")


def test_what_a_collective_takes():
    whole = Collective(0.5, 2**24, 2**24)
    says(network.exchange("all-reduce", whole, 4, "gradients"), "ok", "16.0 MiB in 500 ms")
    piece = Collective(40.0, 2**24, 2**20)
    told = network.exchange("all-reduce", piece, 4, "gradients")
    says(told, "warning", "by 1.0 MiB of it", "data.accumulate")


def test_nodes_of_one_name_are_told_apart():
    assert together._named(NODES, [0, 2]) == NODES
    same = dict.fromkeys(NODES, "vm")
    assert together._named(same, [0, 2]) == {r: f"vm (node {r // 2})" for r in NODES}
    assert together._named(same, [0]) == same


# ---- meeting


def test_a_port_that_nobody_opens_and_one_that_is_taken(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        says(meeting.listens("here", port), "failure", "cannot be opened", "another MASTER_PORT")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        monkeypatch.setenv("RANK", "1")
        monkeypatch.setenv("WORLD_SIZE", "2")
        says(meeting.reach(1), "ok", "can be reached")
    says(meeting.listens("here", port), "ok")
    says(meeting.reach(0.1), "failure", f"127.0.0.1:{port}", "refused", "start rank 0's node")
    monkeypatch.setenv("MASTER_ADDR", "no.such.host.invalid")
    says(meeting.reach(0.1), "failure", "does not know the name")
    timed = meeting.unreached("10.0.0.1", 29500, "timed out", 10)
    says(timed, "failure", "open port 29500 in the firewall")


def test_a_door_is_open_as_long_as_it_lasts():
    with meeting.open_door() as (host, port):
        doors = {"a": (host, port)}
        assert meeting.knock(doors) == {}
    assert "refused" in meeting.knock(doors)["a"]


def test_the_address_is_the_interfaces(monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "lo")
    assert meeting.address() == "127.0.0.1"
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib77")
    with pytest.raises(OSError, match="No such device"):
        meeting.address()


def test_what_hangs_is_ended_and_told(monkeypatch):
    ended, told = [], []
    monkeypatch.setattr(meeting.os, "_exit", ended.append)
    deadline = meeting.Deadline(0.05, told.append)
    deadline.phase = "gathering keys"
    other = meeting.Deadline(0.05, lambda phase: told.append("of the other"))
    other.over()
    end = time.monotonic() + HANGS
    while not ended:
        assert time.monotonic() < end
        time.sleep(0.01)
    assert told == ["gathering keys"] and ended == [2]
    says(together.hung("gathering keys", 30), "failure", "not done within 30 s", "--limit")
    says(together.broke("x", RuntimeError("reset\nmore")), "failure", "x: reset")


# ---- ranks


def doctor(args, change=None):
    """(exit code, stdout, stderr) of the command on this rank, without the libraries' checks."""
    one_node.libraries = lambda *_: []
    if change:
        change()
    return command("doctor", *args)


def told(out):
    report = json.loads(out.splitlines()[-1])
    return {(f["section"], f["check"]): Finding(**{k: f[k] for k in Finding._fields})
            for f in report["findings"]}  # fmt: skip


def test_two_ranks_measure_each_other_and_train(folder, tmp_path):
    args = [*tiny(folder, tmp_path / "out"), "--json", LIMIT]
    (zero, out, err), (one, nothing, _) = ranks(2, doctor, args)
    found = told(out)
    assert zero == one == 2 * any(f.level == "failure" for f in found.values()), out
    assert nothing == ""
    says(found["network", "ranks"], "ok", "2 ranks on 1 nodes")
    assert "by gloo" in found["network", "all-reduce"].found
    assert "rank 1 on " in found["network", "round trip"].found
    says(found["disk", "shared folder"], "ok", "2 ranks")
    says(found["training", "steps"], "ok", "ran to their end")
    assert "times as long" in found["network", "slowest rank"].found
    assert list(tmp_path.iterdir()) == [], err


def another_torch():
    found = agreement.versions()
    agreement.versions = lambda: found | {"torch": "2.9.9"}


def on_two_nodes(names, each):
    """(findings, exit codes, what each rank said on stderr), one rank a node."""
    found = nodes.srun(names, doctor, each, per_node=1)
    return told(found[0][1]), [code for code, _, _ in found], [err for *_, err in found]


def test_a_node_with_another_version_and_an_unshared_folder(folder, tmp_path, two_nodes):
    first = [*tiny(folder, tmp_path / "a/out"), "--json", LIMIT]
    other = [*first, f"run.out={tmp_path}/b/out"]
    for name in "ab":
        (tmp_path / name).mkdir()
    each = [([*first, "--as=left"],), ([*other, "--as=right"], another_torch)]
    found, codes, _ = on_two_nodes(two_nodes, each)
    assert codes == [2, 2]
    says(found["network", "ranks"], "ok", "2 ranks on 2 nodes")
    says(found["network", "links"], "ok", "2 nodes reach each other")
    wrong = found["network", "same everywhere"]
    says(wrong, "failure", "version of torch: rank 1 on right has 2.9.9, rank 0 on left has")
    says(found["disk", "shared folder"], "failure", "right does not see", f"{tmp_path}/b")
    # What can be measured is measured all the same.
    assert "right" in found["network", "links' speed"].found


def slowed(name):
    """Makes a node's link slow; returns whether its round trips are slow, too, for which not every
    kernel has the means."""
    add = "netns", "exec", name, "tc", "qdisc", "add", "dev", "eth0", "root"
    try:
        nodes.ip(*add, *["netem", "delay", "40ms", "rate", "40mbit"])
        return True
    except subprocess.CalledProcessError:
        pass
    try:
        nodes.ip(*add, *["tbf", "rate", "40mbit", "burst", "32kbit", "latency", "400ms"])
        return False
    except subprocess.CalledProcessError as e:
        pytest.skip(f"root: no slow link can be made here ({e.stderr.strip()})")


def test_a_slow_link_is_named(two_nodes):
    trips = slowed(two_nodes[1])
    each = [(["--json", LIMIT, f"--as={name}"],) for name in ("left", "right")]
    found, codes, _ = on_two_nodes(two_nodes, each)
    if trips:
        says(found["network", "round trip"], "warning", "rank 1 on right", "look at the network")
    says(found["network", "links' speed"], "warning", "slowest node, right", "1 Gbit/s")
    # 28 MB through 40 Mbit/s: a piece stands for it.
    says(found["network", "all-reduce"], "warning", "too slow for all")
    assert codes == [2 * any(f.level == "failure" for f in found.values())] * 2


def nothing_of_the_node():
    one_node.checks = lambda *_, **__: {}


def a_gpu_that_does_not_start():
    gpu.usable = lambda: finding.failure("device", "cuda:1: CUDA does not start", "update")


def test_a_rank_whose_device_cannot_be_used_is_named(two_nodes):
    each = [(["--json", LIMIT, "--as=left"],), (["--json", LIMIT, "--as=right"],)]
    each[1] += (a_gpu_that_does_not_start,)
    found, codes, _ = on_two_nodes(two_nodes, each)
    assert codes == [2, 2] and ("network", "all-reduce") not in found
    says(found["machine", "device"], "failure", "rank 1 on right: cuda:1: CUDA does not start")


def test_a_node_whose_link_is_cut(two_nodes):
    nodes.ip("-n", two_nodes[1], "link", "set", "eth0", "down")
    args = ["--json", "--quick", "--limit=12"]
    each = [([*args, f"--as={name}"], nothing_of_the_node) for name in ("left", "right")]
    found, codes, errors = on_two_nodes(two_nodes, each)
    assert codes == [2, 2]
    says(found["network", "ranks"], "failure", "rank 1 did not come within", "came: left")
    assert "rank 1 on right: 10.77.0.1:" in errors[1] and "cannot be reached" in errors[1]


# ---- the nodes of a hostfile


def test_a_hostfile(tmp_path):
    file = tmp_path / "hostfile"
    file.write_text("# two\nnode0 slots=2\n\nnode1 slots=4  # fast\n")
    assert hostfile.read(file) == {"node0": 2, "node1": 4}
    for text in ("node0\n", "node0 slots=x\n", "node0 slots=0\n", "a slots=1\na slots=1\n", "#\n"):
        file.write_text(text)
        with pytest.raises(UserError, match="hostfile: .*write `"):
            hostfile.read(file)
    with pytest.raises(UserError, match="cannot be read"):
        hostfile.read(tmp_path / "none")


def test_the_command_that_starts_a_node(monkeypatch):
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth 0")
    monkeypatch.setenv("HOME", "/home/secret")
    text = hostfile.remote({"node0": 2, "node1": 1}, "node1", ["optim.lr=1"])
    for words in ("--first=2 --ranks=1 --world=3 --master=node0:29500", "'GLOO_SOCKET_IFNAME=eth 0'",
                  "doctor optim.lr=1 --json --as=node1", f"cd {shlex.quote(os.getcwd())} &&"):  # fmt: skip
        assert words in text, text
    assert "secret" not in text
    monkeypatch.setenv("MASTER_PORT", "1234")
    assert "--master=node0:1234" in hostfile.remote({"node0": 2}, "node0", [])


def test_a_node_that_ends_without_a_word_to_rank_0():
    good = hostfile.Ended(0, '[INFO] x\n{"code": 0, "findings": []}\n', "")
    lost = hostfile.Ended(255, "", "ssh: connect to host b port 22: No route to host\n")
    mistaken = hostfile.Ended(2, "", "fastdisco: error: optim.lrr: unknown key\n[ERROR] killing\n")
    hangs = hostfile.Ended(None, "", "")
    assert hostfile.report({"a": good}) == {"code": 0, "findings": []}
    assert hostfile.report({"a": hangs}) is None
    (found,) = hostfile.silent({"a": good, "b": lost}, True)
    says(found, "failure", "b: not reached (ssh: connect to host b", "without a password")
    (found,) = hostfile.silent({"a": good, "b": mistaken}, True)
    says(found, "failure", "b: optim.lrr: unknown key")
    # What rank 0 has reported counts: the others end with its code.
    assert not list(hostfile.silent({"a": good, "b": mistaken._replace(err="x")}, True))
    hung, crashed = hostfile.silent({"a": hangs, "b": mistaken._replace(err="boom")}, False)
    says(hung, "failure", "a: did not end within the limit")
    says(crashed, "failure", "b: ended with code 2 and said: boom")


def program(folder, name, text):
    """Puts a shell script on the PATH that is returned."""
    file = folder / name
    file.write_text(f"#!/bin/sh\n{text}")
    file.chmod(0o755)
    return f"{folder}{os.pathsep}{os.environ['PATH']}"


def test_nodes_that_ssh_does_not_reach(tmp_path, monkeypatch):
    """The one that does not answer costs a moment, not the limit of the ranks."""
    monkeypatch.setattr(hostfile, "_CONNECT", -1.5)
    script = 'case $5 in up) ;; down) echo "no route" >&2; exit 255;; *) exec sleep 600;; esac\n'
    monkeypatch.setenv("PATH", program(tmp_path, "ssh", script))
    lost = hostfile.unreached({"up": 1, "down": 1, "mute": 1})
    assert {h: (e.code, e.err) for h, e in lost.items()} == {
        "down": (255, "no route\n"),
        "mute": (255, "no answer"),
    }


def test_the_nodes_that_are_reached_check_each_other(tmp_path, monkeypatch, capsys):
    """Without the configuration, which counts ranks that are missing."""
    asked = tmp_path / "asked"
    script = f"""case $5 in down) echo "no route" >&2; exit 255;; esac
[ "$6" = true ] && exit
echo "$6" >> {asked}
case "$6" in *--first=0*) echo '{{"code": 0, "findings": []}}';; esac
"""
    monkeypatch.setenv("PATH", program(tmp_path, "ssh", script))
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    hosts = tmp_path / "hostfile"
    hosts.write_text("down slots=4\nleft slots=2\nright slots=2\n")
    args = ["--nodes", hosts, "--json", "--config", ROOT / "configs/mobv3.yaml", "data.threads=2"]
    assert cli.main(["doctor", *map(str, args)]) == 2
    found = told(capsys.readouterr().out)
    says(found["nodes", "ssh"], "failure", "down: not reached (no route)")
    says(found["training", "configuration"], "skipped", "a node is missing")
    first, second = sorted(asked.read_text().splitlines(), key=lambda x: "--first=2" in x)
    assert "--first=0 --ranks=2 --world=4 --master=left:29500" in first
    assert "--first=2 --ranks=2 --world=4 --master=left:29500" in second
    assert "mobv3" not in first + second and "data.threads" not in first + second


def test_the_ranks_of_a_node(tmp_path, monkeypatch):
    """Each gets its variables; the first bad exit code is the node's."""
    script = f'echo $LOCAL_RANK $LOCAL_WORLD_SIZE $WORLD_SIZE $MASTER_ADDR $MASTER_PORT "$@" > {tmp_path}/$RANK\n'
    program(tmp_path, "python", f"{script}exit $((RANK * LOCAL_RANK))\n")
    monkeypatch.setattr(start.sys, "executable", str(tmp_path / "python"))
    where = ["--first=2", "--ranks=2", "--world=5", "--master=fe80::1:29500"]
    assert start.main([*where, "doctor", "--json", "a.b=1"]) == 3
    for rank in (2, 3):
        said = (tmp_path / str(rank)).read_text()
        assert said == f"{rank - 2} 2 5 fe80::1 29500 -m fastdisco.cli doctor --json a.b=1\n"
    assert not (tmp_path / "4").exists()


def test_starting_ranks_imports_no_torch():
    code = "import sys, fastdisco.common.start; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


SSH = """#!/bin/sh
# ssh -o ... -o ... HOST COMMAND, between name spaces.
case $5 in {0}) name={2};; {1}) name={3};; *) echo "ssh: no route to $5" >&2; exit 255;; esac
exec ip netns exec $name sh -c "$6"
"""


@pytest.fixture
def ssh(tmp_path, two_nodes, monkeypatch):
    """A folder on PATH whose ssh leads into the two name spaces."""
    program = tmp_path / "bin/ssh"
    program.parent.mkdir()
    program.write_text(SSH.format(*nodes.ADDRESSES, *two_nodes))
    program.chmod(0o755)
    path = [str(program.parent), str(Path(sys.executable).parent), os.environ["PATH"], "/usr/sbin"]
    monkeypatch.setenv("PATH", os.pathsep.join(path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth0")
    return tmp_path / "hostfile"


@pytest.mark.slow
def test_all_nodes_of_a_hostfile(folder, tmp_path, ssh, monkeypatch, capsys):
    ssh.write_text("".join(f"{x} slots=1\n" for x in nodes.ADDRESSES))
    args = [
        "--nodes",
        ssh,
        "--json",
        "--limit=300",
        *tiny(folder, tmp_path / "out", "data.batch=8"),
    ]
    cli.main(["doctor", *map(str, args)])
    found = told(capsys.readouterr().out)
    says(found["network", "ranks"], "ok", "2 ranks on 2 nodes")
    assert nodes.ADDRESSES[1] in found["network", "round trip"].found
    assert ("nodes", "ssh") not in found and ("training", "steps") not in found
    # A third node, which no ssh reaches: the others check each other without it.
    ssh.write_text(ssh.read_text() + "10.77.0.3 slots=1\n")
    args = ["--nodes", ssh, "--json", "--limit=60", "--quick"]
    assert cli.main(["doctor", *map(str, args)]) == 2
    found = told(capsys.readouterr().out)
    says(found["nodes", "ssh"], "failure", "10.77.0.3: not reached (ssh: no route to 10.77.0.3)")
    says(found["network", "ranks"], "ok", "2 ranks on 2 nodes")
