"""The soak's short form: each of its faults once (bench/soak.py; `make soak` goes on for longer).

Most of them are slow; two are in `make test`."""

import json
import os
import sys

import pytest
from conftest import ROOT, run

sys.path.insert(0, str(ROOT / "bench"))
from soaking import chain, places, table


def soak(tmp_path, *words, more=()):
    """What a short soak has found of the faults whose names contain one of the words."""
    state = ("--state", tmp_path / "state", "--out", tmp_path, "--steps", "72", "--minutes", "20")
    command = [sys.executable, "bench/soak.py", *state, "--once", *more, "--only", *words]
    # Its library is loaded into what it starts, not into this process.
    said = run(*command, env={"PYTHONPATH": str(ROOT)}, timeout=1500)
    found = json.loads((tmp_path / "soak-cpu.json").read_text())
    rows = {row["name"]: row["value"] for row in found["summary"]}
    assert rows["soak_lost_beyond_checkpoint"] == rows["soak_unequal"] == rows["soak_hangs"] == 0
    assert rows["soak_survived"] == rows["soak_faults"], said
    return {x["fault"] for x in found["samples"]["faults"]}, said


def test_a_few_faults(tmp_path):
    found, said = soak(tmp_path, "torn", "damaged images")
    assert found == {"torn and flipped files", "damaged images"}
    assert "has ended; unequal: 0 losses, []" in said


@pytest.mark.slow
def test_ranks_launchers_clocks_and_files(tmp_path):
    words = (
        "SIGKILL of",
        "start-up",
        "SIGTERM",
        "SIGSTOP",
        "clock",
        "second trainer",
        "system",
        "torn",
    )
    found, said = soak(tmp_path, *words)
    assert len(found) == 10 and "has ended; unequal: 0 losses, []" in said


@pytest.mark.slow
def test_saves_and_data(tmp_path):
    # `make soak` kills every change of files of a save; here every 101st.
    found, _ = soak(tmp_path, "in a save", "damaged images", more=("--saves-every", "101"))
    assert found == {"SIGKILL in a save", "damaged images"}


@pytest.mark.slow
def test_disks_and_links(tmp_path):
    # In a process of its own: mounts would be this one's from then on.
    pid = os.fork()
    if not pid:
        reason = "not tried"
        try:
            reason = places.reason()
        finally:
            (tmp_path / "reason").write_text(reason)
            os._exit(0)
    os.waitpid(pid, 0)
    if reason := (tmp_path / "reason").read_text():
        pytest.skip(f"root: no mounts and network namespaces here ({reason})")
    found, _ = soak(tmp_path, "disk full", "mount", "link cut for seconds")
    assert len(found) == 5


def test_the_table_counts_what_was_lost():
    one = dict(fault="a", lost=3, beyond=1, unequal=2, hang=True, survived=False, seconds=2.0)
    two = one | dict(beyond=0, unequal=0, hang=False, survived=True, seconds=4.0)
    some = [x | {"ended": None} for x in (one, two)]
    rows = {row["name"]: row["value"] for row in table.rows(some)}
    assert rows["soak_faults"] == 2 and rows["soak_lost_beyond_checkpoint"] == 1
    assert rows["soak_unequal"] == 2 and rows["soak_hangs"] == 1 and rows["sigterm_p99_s"] is None
    assert table.table(some)["rows"] == [
        ["a", "2", "1", "6", "3.0, at most 4"],
        ["all", "2", "1", "6", "3.0, at most 4"],
    ]


def test_signals_on_a_busy_machine_give_no_percentile():
    one = dict(fault="SIGTERM", lost=0, beyond=0, unequal=0, hang=False, survived=True, seconds=1.0)
    quiet = [one | {"ended": 0.1 * n, "load": 1.0} for n in range(100)]
    last = lambda some: table.rows(some)[-1]
    assert last(quiet)["value"] == pytest.approx(9.801, abs=0.01)
    # Those of a busy one do not count.
    busy = [one | {"ended": 77.0, "load": 99.0}] * 50
    assert last(quiet + busy)["value"] == last(quiet)["value"]
    told = last(quiet[:99] + busy)
    assert told["value"] is None and "99 signals" in told["reason"] and "77.0 s" in told["reason"]


def test_another_loss_and_a_missing_one_are_found(tmp_path):
    some = chain.Chain(chain.Soak(tmp_path), "one", chain.KINDS["one"], tmp_path)
    some.want = {1: 0.5, 2: 0.25, 3: 0.125}
    log = some.run / "metrics.jsonl"
    log.parent.mkdir(parents=True)
    write = lambda *pairs: log.write_text(
        "".join(json.dumps({"step": s, "train/loss": x}) + "\n" for s, x in pairs)
    )
    write((1, 0.5), (2, 0.25))
    assert some.checked() == 0
    # One bit of the last place.
    write((1, 0.5), (2, 0.25000000000000006), (3, 0.125))
    assert some.checked() == 1
    write((1, 0.5), (3, 0.125))
    assert some.checked() == 1 and "step 3 follows 1" in some.unequal[-1]


def test_a_damaged_checkpoint_is_not_whole(tmp_path):
    import hashlib

    some = chain.Chain(chain.Soak(tmp_path), "one", chain.KINDS["one"], tmp_path)
    for step in (4, 8):
        folder = some.run / f"checkpoints/step_{step:08}"
        folder.mkdir(parents=True)
        (folder / "state.pt").write_bytes(b"x")
        files = {"state.pt": {"sha256": hashlib.sha256(b"x").hexdigest()}}
        (folder / "manifest.json").write_text(json.dumps({"files": files}))
    last = folder.parent / "last"
    last.write_text("step_00000004")
    assert some.whole() == 4
    last.write_text("nonsense")
    assert some.whole() == 8
    (folder / "state.pt").write_bytes(b"y")
    assert some.whole() == 4
