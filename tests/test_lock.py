"""A run's folder: one training at a time, the same folder and settings for all ranks, and what
`--overwrite` deletes."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from conftest import HANGS, ROOT, TESTS, ranks, tiny

from fastdisco import config
from fastdisco.commands import train
from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.run import agreement, checkpoint, lock
from fastdisco.run import folder as folders
from fastdisco.run.folder import claim, clear
from fastdisco.run.lock import NAME, Lock

# Takes the lock of the folder in argv, says what came of it, and holds it until its input ends.
HOLDER = """
import sys, pathlib
from fastdisco.common.errors import UserError
from fastdisco.run.lock import Lock
sys.stdin.readline()
with Lock() as lock:
    try:
        lock.take(pathlib.Path(sys.argv[1]))
        print("taken", flush=True)
    except UserError as e:
        print(e, flush=True)
    sys.stdin.readline()
"""


@contextlib.contextmanager
def holders(folder, n=1):
    """Processes that wait for a line, take the lock, and give it back at another line."""
    command = [sys.executable, "-c", HOLDER, str(folder)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    made = [subprocess.Popen(command, cwd=ROOT, **pipes) for _ in range(n)]
    try:
        yield made
    finally:
        for p in made:
            p.kill()
            p.communicate()


def go(process):
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(lock, "DEAD", 1.0)


def of_another_host(folder, age=0.0):
    """A lock of a process elsewhere, whose last heartbeat was `age` seconds ago."""
    folder.mkdir()
    path = folder / NAME
    owner = dict(host="node7", pid=1, since="yesterday", ticks=1, machine=["x", "y"], id="other")
    path.write_text(json.dumps(owner))
    os.utime(path, (time.time() - age,) * 2)
    return path


def test_a_second_training_is_refused_until_the_first_has_ended(tmp_path):
    with holders(tmp_path / "run") as (first,):
        go(first)
        assert first.stdout.readline() == "taken\n"
        with pytest.raises(UserError, match=f"run: process {first.pid} on .* has been training"):
            Lock().take(tmp_path / "run")
        go(first)
        assert first.wait(HANGS) == 0
    assert not (tmp_path / "run").exists()
    with Lock() as mine:
        mine.take(tmp_path / "run")


def test_the_lock_of_a_killed_training_is_taken_over_at_once_and_said(tmp_path, capsys):
    with holders(tmp_path / "run") as (first,):
        go(first)
        assert first.stdout.readline() == "taken\n"
        # Not waited for: a zombie is dead, too.
        os.kill(first.pid, signal.SIGKILL)
        stat = Path(f"/proc/{first.pid}/stat")
        while stat.read_text().rpartition(")")[2].split()[0] != "Z":
            time.sleep(0.01)
        with Lock() as mine:
            mine.take(tmp_path / "run")
            text = capsys.readouterr().out
            assert f"took over the lock of a training that was killed (process {first.pid}" in text
            assert lock.read(tmp_path / "run" / NAME)["pid"] == os.getpid()


def test_another_process_with_the_same_number_is_not_the_owner(tmp_path):
    path = tmp_path / NAME
    path.write_text(json.dumps(lock._me() | {"ticks": 1}))
    with Lock() as mine:
        mine.take(tmp_path)
        assert lock.read(path)["ticks"] == lock._me()["ticks"] != 1


def test_of_many_that_find_a_stale_lock_one_gets_it(tmp_path):
    path = tmp_path / NAME
    path.write_text(json.dumps(lock._me() | {"ticks": 1}))
    with holders(tmp_path, 5) as many:
        for p in many:
            go(p)
        said = [p.stdout.readline() for p in many]
        # The one line that the winner says first is of the lock that it took over.
        won = [p for p, line in zip(many, said) if "took over" in line or line == "taken\n"]
        for p, line in zip(many, said):
            if "took over" in line and p.stdout.readline() != "taken\n":
                won.remove(p)
        assert len(won) == 1, said
        assert lock.read(path)["pid"] == won[0].pid


def test_the_lock_of_another_host_that_gives_signs_of_life_is_left_alone(
    tmp_path, monkeypatch, capsys
):
    path = of_another_host(tmp_path / "run")
    monkeypatch.setattr(lock.time, "sleep", lambda _: os.utime(path, (1, 1)))
    with pytest.raises(UserError, match="process 1 on node7 has been training there since yester"):
        Lock().take(tmp_path / "run")
    assert "node7 has the lock; waiting for a sign of life" in capsys.readouterr().out
    assert lock.read(path)["id"] == "other"


@pytest.mark.parametrize("age", [0, 3600])
def test_the_lock_of_another_host_without_signs_of_life_is_taken_over(age, tmp_path, quick, capsys):
    of_another_host(tmp_path / "run", age)
    with Lock() as mine:
        mine.take(tmp_path / "run")
    text = capsys.readouterr().out
    assert "(process 1 on node7, yesterday)" in text
    # After an hour nothing is left to wait for.
    assert ("waiting" in text) == (age == 0)


@pytest.mark.parametrize("torn", ["", '{"host": "no', "[]"])
def test_a_torn_lock_is_taken_over(torn, tmp_path, quick):
    (tmp_path / NAME).write_text(torn)
    with Lock() as mine:
        mine.take(tmp_path)
        assert lock.read(tmp_path / NAME)["pid"] == os.getpid()


def test_who_lost_the_lock_is_told_and_does_not_delete_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    mine = Lock()
    mine.take(tmp_path)
    mine.check()
    other = tmp_path / "other"
    other.write_text(json.dumps(lock._me() | {"host": "node7"}))
    os.replace(other, tmp_path / NAME)
    while not mine.lost:
        time.sleep(0.01)
    with pytest.raises(UserError, match="on node7 .* ends without saving"):
        mine.check()
    mine.release()
    assert lock.read(tmp_path / NAME)["host"] == "node7"


def test_a_heartbeat_renews_the_lock_and_brings_a_deleted_one_back(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "BEAT", 0.01)
    path = tmp_path / NAME
    with Lock() as mine:
        mine.take(tmp_path)
        os.utime(path, (1, 1))
        while path.stat().st_mtime == 1:
            time.sleep(0.01)
        path.unlink()
        while not path.exists():
            time.sleep(0.01)
        mine.check()


def test_a_loss_is_found_before_the_next_heartbeat(tmp_path):
    with Lock() as mine:
        mine.take(tmp_path)
        (tmp_path / NAME).write_text(json.dumps(lock._me() | {"host": "node7"}))
        with pytest.raises(UserError, match="on node7 .* ends without saving"):
            mine.check()
    assert lock.read(tmp_path / NAME)["host"] == "node7"


def test_a_late_heartbeat_does_not_bring_a_released_lock_back(tmp_path):
    mine = Lock()
    mine.take(tmp_path)
    mine.release()
    # The thread was halted just before.
    mine._renew(tmp_path / NAME)
    assert not (tmp_path / NAME).exists()


@pytest.fixture
def no_links(monkeypatch):
    def fails(*_):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(lock.os, "link", fails)


@pytest.mark.parametrize("linked", [True, False])
def test_a_lock_that_another_took_over_first_stays_the_others(
    linked, tmp_path, monkeypatch, capsys, request
):
    if not linked:
        request.getfixturevalue("no_links")
    path = of_another_host(tmp_path / "run", 3600)
    quicker = {"id": "quicker"}

    def alive(*_):
        path.write_text(json.dumps(quicker))
        return False

    monkeypatch.setattr(lock, "_alive", alive)
    lock._remove_stale(path)
    assert lock.read(path) == quicker
    assert os.listdir(tmp_path / "run") == [NAME]
    assert "took over" not in capsys.readouterr().out


def test_a_file_system_without_hard_links(tmp_path, no_links):
    with Lock() as mine:
        mine.take(tmp_path)
        with pytest.raises(UserError, match="has been training there"):
            Lock().take(tmp_path)


def test_a_folder_that_cannot_be_made_is_one_sentence(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"file/run: .*cannot be written to \(Not a directory\)"):
        Lock().take(tmp_path / "file/run")


# ---- the command


def _ends(args):
    with contextlib.redirect_stderr(io.StringIO()) as err:
        code = train.main([str(a) for a in args])
    return code, err.getvalue()


def test_the_command_refuses_a_folder_that_is_trained_in(folder, tmp_path):
    args = tiny(folder, tmp_path, "run.max_steps=1")
    with holders(tmp_path / "tiny") as (other,):
        go(other)
        assert other.stdout.readline() == "taken\n"
        for flag in ([], ["--overwrite"]):
            code, text = ranks(1, _ends, [*args, *flag])[0]
            assert code == 2 and f"tiny: process {other.pid} on " in text
        assert [p.name for p in (tmp_path / "tiny").iterdir()] == [NAME]
        other.kill()
        other.wait()
    # A killed start has left its lock alone: the name is not blocked.
    assert ranks(1, _ends, args)[0][0] == 0
    assert not (tmp_path / "tiny" / NAME).exists()


def _configured(tmp_path):
    more = ["data.train=/data", f"run.out={tmp_path}"]
    return config.load(TESTS / "tiny.yaml", more)


def test_overwrite_deletes_the_run_and_nothing_else(tmp_path, capsys):
    cfg = _configured(tmp_path)
    run = tmp_path / "tiny"
    (run / "checkpoints/step_00000001").mkdir(parents=True)
    for name in ("config.yaml", "env.json", "metrics.jsonl", "notes.txt"):
        (run / name).write_text("")
    (run / "config.yaml").write_text(config.dump(cfg))
    clear(claim(cfg, overwrite=True))
    assert [p.name for p in run.iterdir()] == ["notes.txt"]
    assert "left what is not of the run: notes.txt" in capsys.readouterr().out


def test_an_overwrite_that_was_killed_can_be_repeated(tmp_path, monkeypatch):
    cfg = _configured(tmp_path)
    run = tmp_path / "tiny"
    (run / "checkpoints").mkdir(parents=True)
    (run / "config.yaml").write_text(config.dump(cfg))

    def killed(_):
        raise KeyboardInterrupt

    claim(cfg, overwrite=True)
    with monkeypatch.context() as patch:
        patch.setattr(folders.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            clear(run)
    clear(claim(cfg, overwrite=True))
    assert not list(run.iterdir())


def test_a_run_that_came_before_the_lock_was_taken_is_compared(tmp_path, monkeypatch):
    cfg, locked = _configured(tmp_path), folders._locked

    def late(folder, mine):
        other = config.load(TESTS / "tiny.yaml", ["data.train=/data", "run.seed=77"])
        folder.mkdir()
        (folder / "config.yaml").write_text(config.dump(other))
        return locked(folder, mine)

    monkeypatch.setattr(folders, "_locked", late)
    with Lock() as mine, pytest.raises(UserError, match="another configuration: run.seed"):
        claim(cfg, False, mine)


@pytest.mark.parametrize("theirs", ["title: My thesis\n", "", "[1, 2]\n", "{", b"\xff"])
def test_overwrite_leaves_a_folder_whose_config_is_no_runs(theirs, tmp_path):
    cfg = _configured(tmp_path)
    run = tmp_path / "tiny"
    (run / "checkpoints").mkdir(parents=True)
    data = theirs if isinstance(theirs, bytes) else theirs.encode()
    (run / "config.yaml").write_bytes(data)
    with pytest.raises(UserError, match="deletes runs alone"):
        claim(cfg, overwrite=True)
    assert sorted(p.name for p in run.iterdir()) == ["checkpoints", "config.yaml"]


# ---- several ranks


def _told(function, *args):
    torch.distributed.init_process_group("gloo")
    try:
        function(*args)
    except UserError as e:
        return str(e)
    return ""


def _facts(each):
    return _told(lambda: agreement.same(each[torch.distributed.get_rank()]))


@pytest.mark.parametrize(
    "other, says",
    [
        ({"optim.lr": "0.05", "é": "ü"}, None),
        ({"optim.lr": "0.06", "é": "ü"}, ("optim.lr: rank 1 on ", " has 0.06, ", " has 0.05; ")),
        ({"optim.lr": "0.05"}, ("é: rank 1 on ", " has None, ", " has ü; ")),
    ],
)
def test_ranks_with_other_facts_are_told_apart_on_every_rank(other, says):
    first, second = ranks(2, _facts, [{"optim.lr": "0.05", "é": "ü"}, other])
    assert first == second
    if says is None:
        assert first == ""
    else:
        assert all(x in first for x in says), first


def _settings(folder, tmp_path):
    own = [
        f"optim.lr=0.0{5 + int(os.environ['RANK'])}",
        f"run.out={tmp_path}/x{os.environ['RANK']}",
    ]
    cfg = config.load(TESTS / "tiny.yaml", [f"data.train={folder}", *own])
    return _told(agreement.same_settings, cfg)


def test_settings_are_compared_and_places_are_not(tmp_path):
    text = ranks(2, _settings, tmp_path, tmp_path)[1]
    assert text.startswith("optim.lr: rank 1 on ") and "has 0.06, rank 0" in text


def _claims(tmp_path, shared):
    """As on nodes that have a disk each, unless `shared`."""
    out = tmp_path / ("all" if shared else os.environ["RANK"])
    more = ["data.train=/data", f"run.out={out}"]
    cfg = config.load(TESTS / "tiny.yaml", more)
    with Lock() as mine:
        text = _told(claim, cfg, False, mine)
        torch.distributed.barrier()
        return text


def test_an_output_folder_that_is_not_shared_is_found_at_the_start(tmp_path):
    assert ranks(2, _claims, tmp_path, True) == ["", ""]
    first, second = ranks(2, _claims, tmp_path, False)
    assert first == second and first.startswith("run.out: rank 1 on ")
    assert f"as {tmp_path}/1/tiny; give a folder that all nodes share" in first


def _locked_claims(tmp_path):
    return _claims(tmp_path, True)


def test_a_lock_that_rank_0_meets_is_every_ranks_error(tmp_path):
    with holders(tmp_path / "all/tiny") as (other,):
        go(other)
        assert other.stdout.readline() == "taken\n"
        first, second = ranks(2, _locked_claims, tmp_path)
    assert first == second and f"process {other.pid} on " in first


def _checkpoint(run, name):
    (run / "checkpoints" / name).mkdir(parents=True)
    torch.save({"step": 1, "meta": {}}, run / "checkpoints" / name / "state.pt")
    (run / "checkpoints/last").write_text(name)


def _same_checkpoint(tmp_path):
    return _told(agreement.same_checkpoint, tmp_path / os.environ["RANK"])


def test_ranks_that_see_different_checkpoints_do_not_start(tmp_path):
    _checkpoint(tmp_path / "0", "step_00000002")
    _checkpoint(tmp_path / "1", "step_00000001")
    first, second = ranks(2, _same_checkpoint, tmp_path)
    assert first == second
    assert "last: rank 1 on " in first and " has step_00000001, rank 0" in first


def _restores(tmp_path):
    return _told(checkpoint.restore, tmp_path, {}, {})


def test_a_ranks_file_that_is_lost_is_found(tmp_path):
    _checkpoint(tmp_path, "step_00000001")
    own = tmp_path / "checkpoints/step_00000001/rank_0.pt"
    torch.save({"world": 2}, own)
    first, second = ranks(2, _restores, tmp_path)
    assert first == second and "rank_1.pt: is not there, but 2 ranks have written" in first
    # One rank wrote it: then there is none for rank 1.
    torch.save({"world": 1}, own)
    assert ranks(2, _restores, tmp_path) == ["", ""]


def _empty():
    torch.distributed.init_process_group("gloo")
    return dist.all_texts("")


def test_texts_may_all_be_empty():
    assert ranks(2, _empty) == [["", ""]] * 2


REFUSES = """
import pathlib, sys, time, torch
from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.run import agreement
from fastdisco.run.lock import Lock
torch.distributed.init_process_group("gloo")
with agreement.together() as closing, Lock() as lock:
    closing.append(lock.release)
    if dist.rank() == 0:
        lock.take(pathlib.Path(sys.argv[1]))
    dist.barrier()
    if str(dist.rank()) in sys.argv[2]:
        raise UserError("/data: no such folder", anywhere=len(sys.argv) > 3)
    dist.barrier()
"""


WHO = [("0",), ("1",), ("1", "anywhere"), ("0,1",)]
BOTH = [(who, True) for who in WHO] + [(WHO[0], False), (WHO[2], False)]


@pytest.mark.parametrize(
    "who, agent",
    [*BOTH, *(pytest.param(who, False, marks=pytest.mark.slow) for who in (WHO[1], WHO[3]))],
    ids=lambda x: {True: "torchrun", False: "srun"}.get(x) if isinstance(x, bool) else "-".join(x),
)
def test_when_one_rank_refuses_all_end_with_its_code_and_one_sentence(who, agent, tmp_path):
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    port = store.port
    if not agent:
        # Rank 0 holds the store, and takes it with it.
        del store
    shared = dict(
        os.environ,
        WORLD_SIZE="2",
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        TORCHELASTIC_USE_AGENT_STORE=str(agent),
        TORCHELASTIC_RESTART_COUNT="0",
    )
    command = [sys.executable, "-c", REFUSES, tmp_path / "run", *who]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT)
    made = [subprocess.Popen(command, env=shared | {"RANK": r}, **pipes) for r in "01"]
    said = [p.communicate(timeout=HANGS)[0] for p in made]
    assert [p.returncode for p in made] == [2, 2], said
    text = "".join(said)
    assert "Traceback" not in text and "TCPStore" not in text, text
    assert not (tmp_path / "run").exists()
    assert text.count("fastdisco: error: ") == text.count("/data: no such folder") == 1, text
