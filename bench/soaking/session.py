"""A chain under fault: what a fault finds and does, and how it is judged."""

import dataclasses
import json
import os
import random
import re
import signal
import time
from dataclasses import dataclass, field

from soaking import chain, processes
from soaking.chain import Chain, Ended, Hang, Soak, continued, said

# Steps before the end of a run in which no more faults come.
MARGIN = 20


@dataclass
class Record:
    """A fault, and what became of the run.

    lost     steps that were logged and had to be trained again
    beyond   of these, those that a whole checkpoint held;  unequal: losses that are not the reference's
    seconds  from the next start, or from the end of the fault, to the next step
    ended    from a signal to the end of the ranks, seconds
    load     of the machine, at the beginning of the fault
    key      which of the enumerated changes of files it was"""

    fault: str
    chain: str
    ranks: int
    by: str = "fork"
    what: str = ""
    key: str = ""
    step: int = 0
    resumed: int = 0
    lost: int = 0
    beyond: int = 0
    unequal: int = 0
    hang: bool = False
    survived: bool = False
    seconds: float | None = None
    ended: float | None = None
    load: float = field(default_factory=lambda: os.getloadavg()[0])
    note: str = ""

    def as_dict(self) -> dict:
        return dataclasses.asdict(self)


class Session:
    """One chain, the attempt that runs in it, and the fault of the moment.

    startup  seconds that the last attempt took to its first step"""

    def __init__(self, soak: Soak, name: str, folder, draw: random.Random, stop_scale: float):
        kind = chain.KINDS[name]
        self.soak, self.draw, self.stop_scale = soak, draw, stop_scale
        self.chain = Chain(soak, name, kind, folder, chain.reference(soak, name)).open()
        self.attempt = self.begin()
        self.startup = 5.0

    def begin(self, **how) -> processes.Attempt:
        """Starts an attempt and waits until its ranks are there."""
        self.attempt = self.chain.start(agent=self.draw.random() < 0.7, **how)
        return self.attempt

    def close(self) -> None:
        self.attempt.kill()
        self.chain.close()

    # ---- what faults are made of

    def pick(self, *choices):
        return self.draw.choice(choices)

    def moment(self) -> None:
        """Some steps on, anywhere within one."""
        self.chain.on(self.attempt, self.draw.randint(1, 2 if self.soak.once else 6))
        time.sleep(self.draw.random() * 0.3)
        self.attempt.find_ranks(self.chain.kind.ranks)

    def hold(self) -> None:
        """Steps during which a fault lasts."""
        self.chain.on(self.attempt, 5 if self.soak.once else self.draw.randint(1, 10))

    def near_the_end(self) -> bool:
        step = max(said(self.attempt), continued(self.attempt), self.chain.named())
        return step > self.chain.steps - MARGIN

    def finish(self) -> tuple[int, list[str]]:
        """Lets the run come to its end; how many losses, and what of the checkpoint, are unequal."""
        self.chain.soak.wait(self.attempt.over, "the run ends")
        found = self.chain.checked()
        if self.chain.named() != self.chain.steps:
            raise Ended(f"it ended at {self.chain.named()}:\n{self.attempt.end}")
        missing = self.chain.steps - len(self.chain.joined)
        return found + missing, chain.same_end(self.soak, self.chain)

    def goes_on(self, record: Record, asked: bool = False) -> None:
        """After a fault that has ended the attempt: starts the next one and judges.

        asked  the run was asked to stop, so it must have saved its last step"""
        before = self.attempt
        record.step = max(said(before), continued(before))
        record.unequal += self.chain.checked()
        expected = self.chain.whole()
        if asked and said(before):
            expected = max(expected, record.step)
        self.begin()
        self.judge(record, expected)

    def judge(self, record: Record, expected: int) -> None:
        """Waits for the attempt's first step, and compares where it has continued."""
        begin = time.monotonic()
        self.chain.on(self.attempt)
        record.seconds = self.startup = time.monotonic() - begin
        self.chain.up(self.attempt)
        record.resumed = continued(self.attempt)
        record.lost = max(0, record.step - record.resumed)
        record.beyond = max(0, expected - record.resumed)
        record.unequal += self.chain.checked()
        record.survived = not (record.beyond or record.unequal or record.hang)

    def stays(self, record: Record, begin: float | None = None) -> None:
        """After a fault that has not ended the attempt, and is over: waits for the next step."""
        begin = begin or time.monotonic()
        self.chain.on(self.attempt, 2)
        record.seconds = time.monotonic() - begin
        record.step = record.resumed = said(self.attempt)
        record.unequal += self.chain.checked()
        record.survived = not record.unequal

    def cut_off(self) -> None:
        """Ends the attempt, as a machine does that loses its power."""
        self.attempt.kill()
        self.chain.gone(self.attempt)

    def end_ranks(self, pids: list[int]) -> float:
        """Waits until these processes are gone; seconds."""
        begin = time.monotonic()
        self.soak.wait(lambda: not any(map(processes.signals.alive, pids)), "the ranks end")
        return time.monotonic() - begin

    def suffer(self, name: str, fault) -> Record:
        """Does a fault to the chain and judges it; after a hang or a failure the chain has to begin
        anew."""
        kind = self.chain.kind
        record = Record(name, self.chain.name, kind.ranks)
        try:
            fault(self, record)
        except Hang as e:
            record.hang, record.note = True, f"{e}\n{self.attempt.end}"
        except Ended as e:
            record.note = str(e)[-4000:]
        if self.chain.unequal:
            record.note += "\n".join(self.chain.unequal[:5])
            self.chain.unequal.clear()
        return record


def kill_everything(attempt: processes.Attempt) -> None:
    for pid in attempt.tree():
        processes.send(pid, signal.SIGKILL)


def refused(attempt: processes.Attempt) -> bool:
    """Whether every rank has ended with 2, or by the launcher while it was ending with that."""
    found = re.findall(r"^codes (\[.*\])$", attempt.text, re.MULTILINE)
    codes = json.loads(found[-1]) if found else []
    return 2 in codes and set(codes) <= {2, -signal.SIGTERM}
