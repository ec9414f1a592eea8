"""Several nodes: network name spaces take the place of machines."""

import contextlib
import io
import os
import subprocess
import sys
import time

import nodes
import pytest
from conftest import HANGS, ROOT, ranks, tiny
from training import SCRIPT, _train, losses

from fastdisco.commands import train
from fastdisco.run import agreement

STEPS = ("run.max_steps=6", "data.batch=8", "bn.groups=1")


@pytest.fixture
def two_nodes():
    with nodes.two_nodes() as names:
        yield names


@pytest.fixture(scope="module")
def one_node(folder, tmp_path_factory):
    """The losses of four ranks on one node."""
    out = tmp_path_factory.mktemp("one")
    ranks(4, _train, tiny(folder, out, *STEPS))
    return losses(out / "tiny")


def refused(args):
    """(exit code, what this rank says of the error)"""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = train.main([str(a) for a in args])
        # A refusal after the ranks have joined.
        except SystemExit as e:
            code = e.code
    return code, err.getvalue()


def test_two_nodes_of_two_ranks_equal_one_node(folder, tmp_path, two_nodes, one_node):
    nodes.srun(two_nodes, _train, [(tiny(folder, tmp_path, *STEPS),)] * 4)
    found = losses(tmp_path / "tiny")
    assert len(found) == 6 and found == one_node


def test_a_node_with_another_configuration_is_refused(folder, tmp_path, two_nodes):
    right = tiny(folder, tmp_path, *STEPS)
    wrong = [*right, "optim.lr=0.06"]
    told = nodes.srun(two_nodes, refused, [(right,), (right,), (wrong,), (wrong,)])
    assert [code for code, _ in told] == [2] * 4
    (text,) = [error for _, error in told if error]
    assert "optim.lr" in text and "0.05" in text and "0.06" in text and "rank 2" in text
    assert not (tmp_path / "tiny/metrics.jsonl").exists()


def test_a_node_with_other_images_is_refused(folder, tmp_path, two_nodes):
    fewer = tmp_path / "fewer"
    for path in sorted((folder / "train").rglob("*.jpg"))[1:]:
        there = fewer / path.relative_to(folder / "train")
        there.parent.mkdir(parents=True, exist_ok=True)
        there.symlink_to(path)
    right = tiny(folder, tmp_path / "out", *STEPS)
    wrong = [*right, f"data.train={fewer}"]
    told = nodes.srun(two_nodes, refused, [(right,), (right,), (wrong,), (wrong,)])
    assert [code for code, _ in told] == [2] * 4
    (text,) = [error for _, error in told if error]
    says = ("data.train: rank 2 on ", " has 42 images with the fingerprint ", " has 43 images ")
    assert all(x in text for x in says), text


def refused_on_two_versions(rank, args):
    """`refused`, where the second node has another torch."""
    if rank > 1:
        found = agreement.versions()
        agreement.versions = lambda: found | {"torch": "2.9.9"}
    return refused(args)


def test_a_node_with_another_version_is_refused(folder, tmp_path, two_nodes):
    right = tiny(folder, tmp_path, *STEPS)
    told = nodes.srun(two_nodes, refused_on_two_versions, [(rank, right) for rank in range(4)])
    assert [code for code, _ in told] == [2] * 4
    (text,) = [error for _, error in told if error]
    says = ("version of torch: rank 2 on ", " has 2.9.9", agreement.versions()["torch"])
    assert all(x in text for x in says), text
    assert not (tmp_path / "tiny/metrics.jsonl").exists()


def started(names, command):
    """A launcher in each name space: `command(number of the node)`."""
    env = os.environ | {"GLOO_SOCKET_IFNAME": "eth0"}
    for variable in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        env.pop(variable, None)
    return [
        subprocess.Popen(
            ["ip", "netns", "exec", name, *map(str, command(number))],
            cwd=ROOT,
            env=env,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for number, name in enumerate(names)
    ]


def finished(processes):
    """Waits for all to end with 0."""
    for process in processes:
        text = process.communicate(timeout=HANGS)[0]
        assert process.returncode == 0, text[-4000:]


def torchrun(arguments):
    """node -> command of two ranks there."""
    where = ["--master-addr", nodes.ADDRESSES[0], "--master-port", 29500]
    how = ["-m", "torch.distributed.run", "--nnodes=2", "--nproc-per-node=2", *where]
    return lambda number: [sys.executable, *how, "--node-rank", number, SCRIPT, *arguments]


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["torchrun", "deepspeed"])
def test_the_launchers_on_two_nodes_equal_one_node(launcher, folder, tmp_path, two_nodes, one_node):
    arguments = tiny(folder, tmp_path, *STEPS)
    (tmp_path / "hostfile").write_text("".join(f"{x} slots=2\n" for x in nodes.ADDRESSES))

    def deepspeed(number):
        where = ["--hostfile", tmp_path / "hostfile", "--no_ssh", "--node_rank", number]
        where += ["--master_addr", nodes.ADDRESSES[0], "--master_port", 29500]
        return [sys.executable, "-m", "deepspeed.launcher.runner", *where, SCRIPT, *arguments]

    command = torchrun(arguments) if launcher == "torchrun" else deepspeed
    finished(started(two_nodes, command))
    assert losses(tmp_path / "tiny") == one_node


@pytest.mark.slow
def test_a_link_that_is_cut_for_20_seconds(folder, tmp_path, two_nodes):
    steps = ("run.max_steps=20", *STEPS[1:])
    ranks(4, _train, tiny(folder, tmp_path / "one", *steps))
    processes = started(two_nodes, torchrun(tiny(folder, tmp_path / "two", *steps)))
    file = tmp_path / "two/tiny/metrics.jsonl"
    end = time.monotonic() + HANGS
    while not (file.exists() and file.read_text().count("\n") >= 3):
        assert time.monotonic() < end and processes[0].poll() is None
        time.sleep(0.02)
    nodes.ip("-n", two_nodes[1], "link", "set", "eth0", "down")
    time.sleep(20)
    assert [process.poll() for process in processes] == [None, None]
    nodes.ip("-n", two_nodes[1], "link", "set", "eth0", "up")
    finished(processes)
    assert losses(tmp_path / "two/tiny") == losses(tmp_path / "one/tiny")
