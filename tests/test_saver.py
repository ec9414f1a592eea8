"""Saving beside the training: the bytes of a save that the training waits for, one save at a time,
and whatever fails or kills it, the newest whole checkpoint stays."""

import contextlib
import errno
import itertools
import os
import signal
import sys
import threading
import time

import pytest
import torch
from conftest import HANGS, ranks, tiny
from test_storage import _Faults, _restored, items
from training import _fails, _told, losses, metrics

from fastdisco.commands import train
from fastdisco.common import heart
from fastdisco.common.errors import UserError
from fastdisco.common.store import Texts
from fastdisco.models import checkpoints
from fastdisco.run import checkpoint, saver, saving, watchdog
from fastdisco.run.meter import Meter
from fastdisco.run.saver import Saver

WRITE = saving._to_disk


def until(condition):
    end = time.monotonic() + HANGS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


def beside():
    """Whether this is the thread of a save, not the training's."""
    return threading.current_thread().name == "saver"


def saves(run, value=1, **more):
    """A saver of one tensor, which is returned, too."""
    x = torch.full((1000,), value)
    return Saver(run, items({"x": x}), {}, 2, True, **more), x


# ---- what it writes


def _slowly(background, args):
    """Trains, while each save in the background takes until the next step is under way."""

    def write(path, content):
        if beside():
            step = int(path.parent.name.split("_")[1].split(".")[0])
            until(lambda: heart.heart.step >= step)
        return WRITE(path, content)

    saving._to_disk = write
    return _told([*args, f"checkpoint.background={background}"])


@pytest.mark.parametrize("n", [1, 2])
def test_the_bytes_are_those_of_a_save_that_the_training_waits_for(n, folder, tmp_path):
    more = ("run.max_steps=7", "checkpoint.every=2", "checkpoint.keep=9", "data.val=null")
    for background in ("true", "false"):
        out = tmp_path / background
        ranks(n, _slowly, background, tiny(folder, out, *more))
    here, there = (tmp_path / name / "tiny" for name in ("true", "false"))
    assert losses(here) == losses(there)
    assert [p.name for p in checkpoints(here)] == [f"step_{s:08}" for s in (2, 4, 6, 7)]
    for step in checkpoints(here):
        files = {p.name: p.read_bytes() for p in step.iterdir()}
        other = there / "checkpoints" / step.name
        assert files == {p.name: p.read_bytes() for p in other.iterdir()}, step
        assert files.keys() >= {"state.pt", "manifest.json", f"rank_{n - 1}.pt"}
    # The log point after a save has its stall; from then on all have the share.
    stalls = [m["step"] for m in metrics(here) if m.get("perf/save_stall", 0) > 0]
    assert stalls == [3, 5, 7]
    shares = {m["step"]: m["perf/save_share"] for m in metrics(here) if "perf/save_share" in m}
    assert list(shares) == [3, 4, 5, 6, 7] and all(0 < x < 1 for x in shares.values())


# ---- one at a time


def test_a_save_waits_for_the_one_before(tmp_path, monkeypatch):
    go, begun = threading.Event(), []

    def write(path, content):
        begun.append(path.parent.name)
        assert not beside() or go.wait(HANGS)
        return WRITE(path, content)

    monkeypatch.setattr(saving, "_to_disk", write)
    found, x = saves(tmp_path)
    found.save(1, ends=False)
    until(lambda: begun)
    x.fill_(2)
    second = threading.Thread(target=lambda: found.save(2, ends=True))
    second.start()
    time.sleep(0.1)
    assert set(begun) == {".step_00000001.part"} and second.is_alive()
    go.set()
    second.join()
    assert _restored(tmp_path) == 2
    (tmp_path / "checkpoints/last").write_text("step_00000001")
    assert _restored(tmp_path) == 1


def test_what_comes_after_a_save_comes_when_it_is_on_disk(tmp_path):
    done = []
    found, x = saves(tmp_path, then=lambda step: done.append((step, _restored(tmp_path))))
    for step, ends in ((1, False), (2, False), (3, True)):
        x.fill_(step)
        found.save(step, ends)
    assert done == [(1, 1), (2, 2), (3, 3)]


# ---- failures


@pytest.fixture(scope="module")
def faults():
    return _Faults()


def test_a_failure_at_any_call_is_said_and_the_next_save_is_tried(
    faults, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(os, "fsync", lambda fd: faults.call() if faults.folder else None)
    failed = 0
    for n in itertools.count(1):
        run = tmp_path / str(n)
        run.mkdir()
        found, x = saves(run)
        found.save(1, ends=False)
        found.wait()
        x.fill_(2)
        with faults.at(n, errno.ENOSPC, run / "checkpoints"):
            found.save(2, ends=False)
            found.wait()
        text = capsys.readouterr().out
        assert _restored(run) in (1, 2)
        if faults.left > 0:
            break
        if "could not be saved" in text:
            failed += 1
            assert text.count("\n") == 1 and os.strerror(errno.ENOSPC) in text, text
            assert text.startswith("step 2: ") and "the training goes on" in text
        x.fill_(3)
        found.save(3, ends=False)
        found.wait()
        assert _restored(run) == 3
        assert "step_00000003" in sorted(os.listdir(run / "checkpoints"))
    assert failed >= 10


def test_an_error_of_ours_is_raised_at_the_next_save(tmp_path, monkeypatch):
    def fails(path, content):
        raise RuntimeError("ours")

    monkeypatch.setattr(saving, "_to_disk", fails)
    found, _ = saves(tmp_path)
    found.save(1, ends=False)
    with pytest.raises(RuntimeError, match="ours"):
        found.save(2, ends=False)


def test_without_memory_for_a_copy_the_training_waits(tmp_path, monkeypatch, capsys):
    def lacks(size, pinned):
        raise MemoryError("can't allocate")

    monkeypatch.setattr("fastdisco.run.snapshot._buffer", lacks)
    found, _ = saves(tmp_path)
    found.save(1, ends=False)
    assert found._thread is None and _restored(tmp_path) == 1
    text = capsys.readouterr().out
    assert text.count("\n") == 1 and "can't allocate), so the training waits" in text


def test_a_folder_that_another_training_has_taken_meanwhile_is_left_alone(tmp_path, capsys):
    answers = iter([None, UserError("another training has it")])

    def allowed():
        if error := next(answers):
            raise error

    found, _ = saves(tmp_path, allowed=allowed)
    found.save(1, ends=False)
    found.wait()
    assert checkpoints(tmp_path) == [] and "another training has it" in capsys.readouterr().out


# ---- the training ends while a save is under way


def _slow(monkeypatch, *goes):
    """Saves wait for the event `goes`."""

    def write(path, content):
        assert goes[0].wait(HANGS)
        return WRITE(path, content)

    monkeypatch.setattr(saving, "_to_disk", write)


def _breaks(found, error):
    with found:
        found.save(1, ends=False)
        raise error


def test_an_error_of_the_training_waits_for_the_save(tmp_path, monkeypatch):
    go = threading.Event()
    _slow(monkeypatch, go)
    monkeypatch.setattr(saver, "_GRACE", 0.01)
    threading.Timer(0.1, go.set).start()
    with pytest.raises(UserError, match="theirs"):
        _breaks(saves(tmp_path)[0], UserError("theirs"))
    assert _restored(tmp_path) == 1


@pytest.mark.parametrize("error, grace", [(RuntimeError, 0.01), (KeyboardInterrupt, HANGS)])
def test_a_crash_not_for_ever_and_ctrl_c_not_at_all(error, grace, tmp_path, monkeypatch):
    go = threading.Event()
    _slow(monkeypatch, go)
    monkeypatch.setattr(saver, "_GRACE", grace)
    found, _ = saves(tmp_path)
    with pytest.raises(error):
        _breaks(found, error())
    assert found._thread.is_alive()
    go.set()
    found.wait()


def _stopped(args):
    """Trains; SIGTERM comes while step 2 is saved, and that save takes until step 3 is to be saved."""

    def write(path, content):
        if beside() and "rank" in path.name:
            os.kill(os.getpid(), signal.SIGTERM)
            until(lambda: heart.heart.step >= 2 and heart.heart.phase == "save")
        return WRITE(path, content)

    saving._to_disk = write
    return train.main([str(a) for a in args])


def test_a_stop_waits_for_the_save_under_way_and_saves_its_own_step(folder, tmp_path):
    args = tiny(folder, tmp_path, "run.max_steps=9", "checkpoint.every=2", "data.val=null")
    assert ranks(1, _stopped, args) == [75]
    newest = [p.name for p in checkpoints(tmp_path / "tiny")][-2:]
    assert newest[0] == "step_00000002" and newest[1] > newest[0]
    assert checkpoint.last(tmp_path / "tiny").name == newest[1]


def _not_finite(args):
    """Trains; from step 3 on the loss is nan, which is found while step 2 is saved."""

    def write(path, content):
        if beside():
            until(lambda: heart.heart.step >= 2 and heart.heart.phase == "exchange")
        return WRITE(path, content)

    values = Meter.read

    def read(self, done, steps):
        if done >= 3:
            self.rows[-1].fill_(float("nan"))
        return values(self, done, steps)

    saving._to_disk, Meter.read = write, read
    return _fails(args)


def test_a_run_that_breaks_has_its_last_checkpoint(folder, tmp_path):
    args = tiny(folder, tmp_path, "run.max_steps=9", "checkpoint.every=2", "data.val=null")
    code, error = ranks(1, _not_finite, args)[0]
    assert code == 2 and "step 3: " in error
    assert checkpoint.last(tmp_path / "tiny").name == "step_00000002"


# ---- kills

KILLED = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.listdir", "os.scandir")


def _dies(run, n):
    """Saves steps 1 and 2 in the background, and changes the state meanwhile; is killed before the
    n-th call of step 2's save, writes and fsyncs included.  Ends with 0 where there is none."""
    found, x = saves(run)
    found.save(1, ends=False)
    found.wait()
    left = [n]

    def count(*_):
        left[0] -= 1
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)

    def counted(call):
        return lambda *args: (count(), call(*args))[1]

    named = lambda event, args: event in KILLED and str(args[0]).startswith(str(run)) and count()
    x.fill_(2)
    sys.addaudithook(named)
    os.fsync = counted(os.fsync)
    saving._Hashed.write = counted(saving._Hashed.write)
    found.save(2, ends=False)
    while found._thread.is_alive():
        x.add_(1)
    found.wait()
    os._exit(0)


def _killed_everywhere(folder):
    """What a resume finds after a kill at each call; in a process that may be forked."""
    # A kill loses nothing that the system has; to wait for a disk each time would take a minute.
    os.fsync = lambda fd: None
    left = []
    for n in itertools.count(1):
        run = folder / str(n)
        run.mkdir()
        if not (pid := os.fork()):
            with contextlib.suppress(BaseException):
                _dies(run, n)
            os._exit(1)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code in (0, -signal.SIGKILL), code
        left.append(_restored(run))
        # The next training saves, whatever is left there.
        found, _ = saves(run, 3)
        found.save(3, ends=False)
        found.wait()
        assert _restored(run) == 3
        names = [x for x in os.listdir(run / "checkpoints") if x.startswith("step")]
        assert len(names) == 2, names
        if not code:
            return left


def test_a_kill_at_any_call_leaves_the_newest_whole_one(tmp_path):
    (found,) = ranks(1, _killed_everywhere, tmp_path)
    # First the old one, from the new name in `last` on the new one.
    assert len(found) >= 30 and found == sorted(found) and set(found) == {1, 2}


# ---- between the ranks


def _exchanges():
    torch.distributed.init_process_group("gloo")
    rank, texts, found = int(os.environ["RANK"]), Texts("x"), []
    keys = texts._store.num_keys()

    def exchange():
        for i in range(20):
            found.append(texts(f"{i} of {rank} \udcff" if i % 3 else ""))

    thread = threading.Thread(target=exchange)
    thread.start()
    # The training's own, in another order on each rank.
    sums = [torch.ones(1) for _ in range(50)]
    for x in sums:
        torch.distributed.all_reduce(x)
        time.sleep(0.002 * rank)
    thread.join()
    torch.distributed.barrier()
    assert [x.item() for x in sums] == [2.0] * 50
    # What all have read is removed.
    return found, texts._store.num_keys() - keys


def test_texts_go_beside_the_collectives():
    want = [[f"{i} of {r} \udcff" if i % 3 else "" for r in range(2)] for i in range(20)]
    for found, keys in ranks(2, _exchanges):
        assert found == want and keys <= 6


def test_who_waits_for_another_ranks_thread_is_in_exchange_only_if_the_training_does(monkeypatch):
    go = []
    # A function of that file, as far as its frame tells.
    code = compile("def waits(go):\n    while not go: pass", "/fastdisco/common/store.py", "exec")
    exec(code, space := {})
    monkeypatch.setattr(heart, "heart", heart.Heart())
    monkeypatch.setattr(watchdog, "heart", heart.heart)
    thread = threading.Thread(target=space["waits"], args=(go,))
    thread.start()
    try:
        phases = []
        for phase in ("forward", "save"):
            heart.enter(phase)
            phases.append(watchdog._phase())
    finally:
        go.append(1)
        thread.join()
    assert phases == ["forward", "exchange"]
    heart.enter("save")
    assert watchdog._phase() == "save"


# ---- what is logged


def test_stalls_are_logged_and_are_no_steps_time(tmp_path, monkeypatch):
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    meter, found = Meter(8, tmp_path, 0), []
    for step, seconds in enumerate((0.0, 2.0, 0.0)):
        meter.add({"loss": torch.tensor(1.0)})
        clock[0] += 4
        found.append(meter.read(step + 1, 3))
        with meter.saving():
            clock[0] += seconds
    saved = [{k: v for k, v in x.items() if "save" in k} for x in found]
    assert saved == [{}, {}, {"perf/save_share": 2 / 14, "perf/save_stall": 2.0}]
    assert [x["perf/step_time"] for x in found] == [4.0, 4.0, 4.0]


def _left_alone(folder, ends):
    """Rank 1 dies in a save; what ends the other one goes into a file."""
    torch.distributed.init_process_group("gloo")
    if torch.distributed.get_rank() == 1:
        saving._to_disk = lambda path, content: os._exit(9)
    found, _ = saves(folder)
    try:
        found.save(1, ends=ends)
        found.save(2, ends=ends)
    except RuntimeError as e:
        (folder / "told").write_text(str(e))


@pytest.mark.parametrize("ends", [True, False])
def test_who_waits_for_a_save_notices_that_another_rank_has_died(ends, tmp_path):
    """Its store would wait for a week, and its launcher would kill it after half a minute."""
    with pytest.raises(AssertionError, match="rank 1 died"):
        ranks(2, _left_alone, tmp_path, ends)
    assert "Connection" in (tmp_path / "told").read_text()
    assert checkpoints(tmp_path) == []
