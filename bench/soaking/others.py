"""Faults that need more than one running training: data that break, and the real launchers."""

import json
import random
import re
import shutil
import signal
import tarfile
import time
from pathlib import Path

from soaking import chain, compare, processes, ranks
from soaking.chain import EVERY, Chain, Soak, continued, said
from soaking.session import Record

# A run whose images break: when they do, and its length.
_BROKEN, _LONG = 6, 44
# What a supervisor says.
_AGAIN = re.compile(r"is started again from step (\d+)")


def broken(soak: Soak, name: str, folder: Path, draw: random.Random) -> Record:
    """Images (or a tar) break while a run goes on; it is killed, and goes on.

    What comes after must be what the same checkpoint gives without a kill: a copy of the run that
    trains to the end undisturbed is the reference from there on."""
    kind = chain.KINDS[name]
    record = Record("damaged images" if name == "two" else "damaged tar", name, kind.ranks)
    some = Chain(soak, name, kind, folder, chain.reference(soak, name)).open()
    some.data = folder / "data"
    shutil.copytree(soak.state / kind.data, some.data)
    attempt = some.start(_LONG)
    try:
        some.on(attempt, _BROKEN)
        record.what = _break(some.data / "train", draw)
        text = "set aside, since unreadable"
        soak.wait(lambda: text in attempt.text, "images are set aside", attempt)
        # A checkpoint that holds the list.
        step = said(attempt)
        later = lambda: some.named() >= step + 2
        soak.wait(later, "a checkpoint after that", attempt)
        attempt.kill()
        record.step = max(said(attempt), continued(attempt))
        record.unequal = _before(some, record)
        expected = some.whole()
        other = Chain(soak, name, kind, folder / "undisturbed")
        other.data = some.data
        shutil.copytree(folder / "out", other.folder / "out")
        alone = other.start(_LONG)
        soak.wait(alone.over, "the undisturbed one ends")
        some.want = dict(compare.losses(other.run))
        some.joined.clear()
        attempt = some.start(_LONG)
        begin = time.monotonic()
        some.on(attempt)
        record.seconds = time.monotonic() - begin
        record.resumed = continued(attempt)
        record.lost = max(0, record.step - record.resumed)
        record.beyond = max(0, expected - record.resumed)
        some.on(attempt, draw.randint(1, EVERY + 2))
        attempt.kill()
        attempt = some.start(_LONG)
        soak.wait(attempt.over, "it ends")
        record.unequal += some.checked()
        last = max(some.joined, default=0)
        record.survived = last == _LONG and not (record.unequal or record.beyond)
        if not record.survived:
            record.note = f"it ended at {last}: {some.unequal[:3]}\n{attempt.end}"
    except chain.Hang as e:
        record.hang, record.note = True, f"{e}\n{attempt.end}"
    except chain.Ended as e:
        record.note = str(e)[-4000:]
    attempt.kill()
    some.close()
    return record


def _before(some: Chain, record: Record) -> int:
    """Losses before the images broke that are not the reference's."""
    found = [step for step, loss in compare.losses(some.run) if loss != some.want[step]]
    # From the first batch on that lacks an image they are others.
    return len([step for step in found if step <= _BROKEN])


def _break(root: Path, draw: random.Random) -> str:
    """Damages some images, in files or in tars, in place: the run may have the files open.

    Names and headers stay: other ones are other data, which a run refuses to continue with."""
    tars, told, inside = sorted(root.glob("*.tar")), [], []
    for path in tars:
        with tarfile.open(path) as members:
            inside += [(path, m) for m in members if m.name.endswith(".jpg")]
    for path, member in draw.sample(inside, draw.randint(2, 4)) if tars else []:
        with path.open("r+b") as f:
            f.seek(member.offset_data)
            f.write(bytes(member.size))
        told.append(f"{path.name}/{member.name}")
    for path in [] if tars else draw.sample(sorted(root.rglob("*.jpg")), draw.randint(2, 4)):
        how = draw.choice(["garbage", "empty", "half"])
        content = path.read_bytes()
        with path.open("r+b") as f:
            f.truncate(0 if how == "empty" else len(content) // 3)
            f.write(b"no image" if how == "garbage" else b"")
        told.append(f"{path.name}: {how}")
    return ", ".join(told)


class Real:
    """Chains whose attempts are started by the real launchers."""

    def __init__(self, soak: Soak, folder: Path, draw: random.Random) -> None:
        self.soak, self.draw = soak, draw
        self.chain = Chain(soak, "two", chain.KINDS["two"], folder, chain.reference(soak, "two"))
        self.chain.open()
        self.attempt: processes.Attempt | None = None
        self.launcher, self.again = "", 0

    def close(self) -> None:
        if self.attempt:
            self.attempt.kill()
        self.chain.close()

    def begin(self) -> None:
        self.launcher = self.draw.choice(ranks.LAUNCHERS)
        self.attempt = self.chain.start_real(self.launcher)
        self.chain.on(self.attempt)
        self.chain.up(self.attempt)

    def next(self) -> Record:
        record = Record("", "two", 2)
        try:
            self._next(record)
        except chain.Hang as e:
            record.hang, record.note = True, f"{e}\n{self.attempt.end}"
        except chain.Ended as e:
            record.note = str(e)[-4000:]
        if self.chain.unequal:
            record.note += "\n".join(self.chain.unequal[:5])
            self.chain.unequal.clear()
        return record

    def _next(self, r: Record) -> None:
        some = self.chain
        if self.attempt is None or said(self.attempt) > some.steps - 30:
            if self.attempt:
                self.attempt.kill()
            some.open()
            some.joined.clear()
            self.begin()
        attempt = self.attempt
        r.by = self.launcher
        r.fault, number, targets = self._drawn(attempt)
        some.on(attempt, self.draw.randint(1, 5))
        time.sleep(self.draw.random() * 0.3)
        r.step = said(attempt)
        steps = r.step
        r.what = signal.Signals(number).name
        trained = list(attempt.ranks)
        begin = time.monotonic()
        for pid in targets:
            processes.send(pid, number)
        self.soak.wait(lambda: not any(map(processes.signals.alive, trained)), "the ranks end")
        if number != signal.SIGKILL or r.fault == "SIGKILL of the launcher":
            r.ended = time.monotonic() - begin
        if r.fault == "SIGKILL of a rank" and self.launcher == "fastdisco run":
            # The supervisor goes on by itself.
            r.what += ", started again by the supervisor"
            again = lambda: _AGAIN.findall(attempt.text)[self.again :]
            start = int(self.soak.wait(again, "a restart", attempt)[0])
            begin = time.monotonic()
            since = lambda: _AGAIN.split(attempt.text)[-1]
            self.soak.wait(lambda: "\nstep " in since(), "a step", attempt)
            r.unequal += some.checked()
        else:
            some.gone(attempt)
            steps = max(said(attempt), r.step)
            r.unequal += some.checked()
            expected = some.whole()
            begin = time.monotonic()
            self.begin()
            start = continued(self.attempt)
            if number != signal.SIGKILL:
                expected = max(expected, steps)
            r.beyond = max(0, expected - start)
        r.seconds = time.monotonic() - begin
        r.step, r.resumed = steps, start
        r.lost = max(0, steps - start)
        some.up(self.attempt)
        r.unequal += some.checked()
        r.survived = not (r.unequal or r.beyond)

    def _drawn(self, attempt) -> tuple[str, int, list[int]]:
        """(fault, signal, whom)"""
        self.again = len(_AGAIN.findall(attempt.text))
        tree = attempt.tree()
        between = [pid for pid in tree if pid != attempt.top and pid not in attempt.ranks]
        u = self.draw.random()
        if u < 0.25:
            return "SIGKILL of a rank", signal.SIGKILL, [self.draw.choice(attempt.ranks)]
        if u < 0.4:
            return "SIGKILL of all", signal.SIGKILL, tree
        if u < 0.55:
            one = self.draw.choice([attempt.top, *between[:1]])
            return "SIGKILL of the launcher", signal.SIGKILL, [one]
        number = self.draw.choice([signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
        one = self.draw.choice([attempt.top, *attempt.ranks, *between[:1]])
        return "SIGTERM, SIGINT, SIGUSR1", number, [one]


def as_line(record: Record) -> str:
    return json.dumps(record.as_dict())
