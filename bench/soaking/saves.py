"""A save that is killed at each of its changes of files: every open, write, fsync, rename, removal, new
folder; each write also after its first half.  With one rank, and on each of two.

The library in front of libc counts (shim.c), so that whatever thread or library writes is seen."""

import shutil
import time
import zlib

from soaking import chain
from soaking.chain import EVERY, Chain, Soak, continued, said
from soaking.session import Record

# The save that is killed: the one that also removes a checkpoint.
_BEFORE, _AT = 2 * EVERY, 3 * EVERY
NAMES = dict(o="open", w="write", f="fsync", r="rename", u="unlink", d="rmdir", m="mkdir")
NAMES |= dict(l="link", t="truncate")
# Rank 0 makes the folder; what it does before that is no part of the save.
_ARMED = {0: 2, 1: 1}


def places(soak: Soak) -> list[str]:
    """Keys of all deaths: <ranks>/<rank>/<number of the change>/<kind>[ half]/<digest of all kinds>.

    The save is counted anew each time: of other code, whose changes are others, all are to be done."""
    found = []
    for name, rank in (("one", 0), ("two", 0), ("two", 1)):
        kinds = _counted(soak, name, rank)
        digest = f"{zlib.crc32(kinds.encode()):08x}"
        for n, kind in enumerate(kinds, 1):
            about = f"{chain.KINDS[name].ranks}/{rank}/{n}/{NAMES[kind]}"
            found.append(f"{about}/{digest}")
            if kind == "w":
                found.append(f"{about} half/{digest}")
    return found


def _counted(soak: Soak, name: str, rank: int) -> str:
    """The kinds of all changes of the save."""
    some = _from_template(soak, name)
    attempt = some.start(_AT, armed=(rank, {"armed": _ARMED[rank]}))
    soak.wait(attempt.over, "the counted save ends")
    kinds = attempt.controls[rank].kinds
    assert some.named() == _AT and ("f" if rank else "r") in kinds, attempt.text
    some.close()
    return kinds


def _template(soak: Soak, name: str):
    """The folder of a run with two checkpoints."""
    folder = soak.state / f"template-{name}-{soak.code}"
    if not (folder / "whole").exists():
        some = Chain(soak, name, chain.KINDS[name], folder).open()
        attempt = some.start(_BEFORE)
        soak.wait(attempt.over, "the template ends")
        assert some.named() == _BEFORE, attempt.text
        (folder / "whole").touch()
    return folder


def _from_template(soak: Soak, name: str) -> Chain:
    folder = soak.state / f"saves-{name}"
    some = Chain(soak, name, chain.KINDS[name], folder, chain.reference(soak, name)).open()
    shutil.copytree(_template(soak, name) / "out", folder / "out")
    return some


class Saves:
    """Kills saves, one change after another; `todo` are keys that are left."""

    def __init__(self, soak: Soak, todo: list[str]) -> None:
        self.soak, self.todo = soak, todo
        self.chain: Chain | None = None
        self.attempt = None
        self.key = ""

    def close(self) -> None:
        if self.attempt:
            self.attempt.kill()
        if self.chain:
            self.chain.close()
        self.attempt = self.chain = None

    def next(self) -> Record:
        """One death, and the start after it, which is the next death's attempt where it can be."""
        key = self.todo.pop(0)
        try:
            return self._next(key)
        except chain.Hang as e:
            record = self._record(key)
            record.hang, record.note = True, f"{e}\n{self.attempt.end}"
        except chain.Ended as e:
            record = self._record(key)
            record.note = str(e)
        self.close()
        return record

    def _record(self, key: str) -> Record:
        world, _, _, what, _ = key.split("/")
        name = "one" if world == "1" else "two"
        return Record("SIGKILL in a save", name, int(world), what=what, key=key)

    def _next(self, key: str) -> Record:
        record = self._record(key)
        if self.attempt is None or self.key != key:
            self.close()
            self.chain = _from_template(self.soak, record.chain)
            self.attempt = self._start(key)
        some, before = self.chain, self.attempt
        assert some
        some.gone(before)
        record.step = max(said(before), continued(before))
        record.unequal += some.checked()
        rank, number = key.split("/")[1:3]
        if before.controls[int(rank)].get("count") < int(number):
            raise chain.Ended(f"it was not killed at change {number}:\n{before.end}")
        expected = some.whole()
        following = self.todo[0] if self.todo else ""
        same = expected == _BEFORE and following.split("/")[:2] == key.split("/")[:2]
        self.key = following if same else ""
        self.attempt = self._start(following if same else "")
        record.seconds = self._goes_on()
        record.resumed = continued(self.attempt)
        record.lost = max(0, record.step - record.resumed)
        record.beyond = max(0, expected - record.resumed)
        record.unequal += some.checked()
        record.survived = not (record.beyond or record.unequal)
        if not same:
            self.close()
        if some.unequal:
            record.note = "\n".join(some.unequal[:5])
            some.unequal.clear()
        return record

    def _start(self, key: str):
        assert self.chain
        if not key:
            return self.chain.start(_AT + 2 * EVERY)
        _, rank, number, what, _ = key.split("/")
        fields = dict(armed=_ARMED[int(rank)], die_at=int(number), torn=what.endswith("half"))
        return self.chain.start(_AT, armed=(int(rank), fields))

    def _goes_on(self) -> float:
        begin = time.monotonic()
        assert self.chain
        self.chain.on(self.attempt)
        return time.monotonic() - begin
