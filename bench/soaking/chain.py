"""A run with everything that happens to it, compared with the run that nothing happened to.

A kind of run has a reference: the same training, uninterrupted, once per soak.  A chain is one run
folder in which attempts follow each other until the last step.  After each fault every loss that its
log holds must be the reference's to the last bit, and at its end the checkpoint's, too."""

import re
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from harness import ROOT

from soaking import compare, places, ranks, shim
from soaking.processes import Attempt

STEPS, EVERY = 120, 4
# Seconds after which what should have happened counts as a hang.
HANGS = 420.0
_STEP = re.compile(r"^step (\d+)/", re.MULTILINE)
_CONTINUED = re.compile(r"^continuing after step (\d+)$", re.MULTILINE)


class Kind(NamedTuple):
    """A kind of run.

    place  where its folder lies: "" on the disk of the state, "disk" on one of its own, "link": its
           ranks are in two network namespaces
    like   the kind whose reference it has"""

    ranks: int
    data: str = "images"
    place: str = ""
    like: str = ""
    more: tuple[str, ...] = ()
    steps: int = STEPS


KINDS = {
    "one": Kind(1),
    "two": Kind(2),
    "tars": Kind(2, "tars"),
    "evaluated": Kind(2, like="two", more=("eval.every=3", "data.val={data}/val")),
    "disk": Kind(2, like="two", place="disk"),
    "link": Kind(2, like="two", place="link", more=("run.stall_seconds=30",)),
}


class Hang(Exception):
    """Something that should have happened has not."""


class Ended(Exception):
    """An attempt has ended that should go on."""


@dataclass
class Soak:
    """What all chains share.

    steps   of each run;  hangs: seconds after which something hangs
    code    digest of the project's code: that of another one has references of its own
    mounts  whether there are mounts and network namespaces;  once: faults are short"""

    state: Path
    steps: int = STEPS
    hangs: float = HANGS
    code: str = field(default_factory=lambda: compare.code())
    mounts: bool = False
    once: bool = False

    def wait(self, condition: Callable[[], object], what: str, attempt: Attempt | None = None):
        """The condition's value when it is true.  With an attempt: Ended where that ends before."""
        end = time.monotonic() + self.hangs
        while not (value := condition()):
            if attempt and attempt.over() and not (value := condition()):
                raise Ended(f"{what}: the training ended instead:\n{attempt.end}")
            if value:
                break
            if time.monotonic() > end:
                raise Hang(f"{what}: not after {self.hangs:.0f} s")
            time.sleep(0.05)
        return value


@dataclass
class Chain:
    """One run folder.  `joined` has the losses of all attempts, `want` those of the reference."""

    soak: Soak
    name: str
    kind: Kind
    folder: Path
    want: dict[int, float] = field(default_factory=dict)
    joined: dict[int, float] = field(default_factory=dict)
    data: Path | None = None
    disk: places.Disk | None = None
    nodes: places.Nodes | None = None
    attempts: int = 0
    unequal: list[str] = field(default_factory=list)

    @property
    def run(self) -> Path:
        return self.folder / "out" / "tiny"

    @property
    def steps(self) -> int:
        return self.soak.steps

    def open(self) -> "Chain":
        """Makes the folder and what the kind needs."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.folder.mkdir(parents=True)
        if self.kind.place == "disk":
            self.disk = places.Disk(self.folder, 24)
        elif self.kind.place == "link":
            self.nodes = places.Nodes()
        return self

    def close(self) -> None:
        if self.disk:
            self.disk.close()
        if self.nodes:
            self.nodes.close()
        shutil.rmtree(self.folder, ignore_errors=True)

    def arguments(self, steps: int | None = None) -> list[str]:
        images = self.data or self.soak.state / self.kind.data
        more = [x.format(data=images) for x in self.kind.more]
        if not any(x.startswith("data.val") for x in more):
            more.append("data.val=null")
        return [
            *("--config", str(ROOT / "tests/tiny.yaml"), f"data.train={images}/train"),
            *(f"run.out={self.folder}/out", "run.epochs=400", "run.stall_seconds=150"),
            *(f"checkpoint.every={EVERY}", "checkpoint.keep=2", "data.bad_limit=0.3"),
            *(f"run.max_steps={steps or self.steps}", *more),
        ]

    # ---- attempts

    def start(self, steps: int | None = None, armed: tuple[int, dict] | None = None, agent=True):
        """A new attempt.

        armed  (rank, fields of its control): that rank's changes of checkpoints count"""
        self.attempts += 1
        controls = []
        for rank in range(self.kind.ranks):
            path = self.folder / f"control{rank}"
            if armed and armed[0] == rank:
                controls.append(shim.Control(path, f"{self.run}/checkpoints/", **armed[1]))
            else:
                controls.append(shim.Control(path, self.run))
        nodes = self.nodes.names if self.nodes else ()
        arguments = self.arguments(steps)
        return ranks.fork(arguments, self.kind.ranks, self._log(), controls, agent, nodes)

    def start_real(self, launcher: str) -> Attempt:
        self.attempts += 1
        return ranks.real(launcher, self.arguments(), self.kind.ranks, self._log())

    def _log(self) -> Path:
        return self.folder / f"log{self.attempts:04}.txt"

    def up(self, attempt: Attempt) -> None:
        """Waits until the ranks are there."""
        what = "the ranks start"
        self.soak.wait(lambda: attempt.find_ranks(self.kind.ranks), what, attempt)

    def on(self, attempt: Attempt, more: int = 1) -> int:
        """Waits until the attempt has logged so many more steps; the step."""
        goal = min(said(attempt) + more, self.steps)
        what = f"step {goal}"
        self.soak.wait(lambda: said(attempt) >= goal, what, attempt)
        return said(attempt)

    def gone(self, attempt: Attempt) -> float:
        """Waits until all is gone; seconds."""
        begin = time.monotonic()
        self.soak.wait(attempt.over, "its processes end")
        return time.monotonic() - begin

    # ---- what it has come to

    def named(self) -> int:
        """The step that `last` names; 0 where there is none."""
        try:
            return int((self.run / "checkpoints/last").read_text().removeprefix("step_"))
        except (OSError, ValueError):
            return 0

    def whole(self) -> int:
        """The step of the checkpoint that the run must continue from: the one that `last` names, if
        its files are whole, or the newest that is; 0 without any."""
        steps = sorted(int(x.name[5:]) for x in (self.run / "checkpoints").glob("step_*"))
        named = self.named()
        found = filter(self.is_whole, [*([named] if named else []), *steps[::-1]])
        return next(found, 0)

    def is_whole(self, step: int) -> bool:
        return compare.is_whole(self.run / "checkpoints" / f"step_{step:08}")

    def checked(self) -> int:
        """Compares what the log holds now with the reference; how many losses are not equal, or
        missing between others."""
        wrong, before = 0, 0
        for step, loss in compare.losses(self.run):
            if step != before + 1:
                wrong += 1
                self.unequal.append(f"step {step} follows {before}")
            if loss != self.want.get(step) or self.joined.setdefault(step, loss) != loss:
                wrong += 1
                self.unequal.append(f"step {step}: {loss}, not {self.want.get(step)}")
            before = step
        return wrong


def said(attempt: Attempt) -> int:
    """The last step that rank 0 has said; 0 before the first."""
    found = _STEP.findall(attempt.text)
    return int(found[-1]) if found else 0


def continued(attempt: Attempt) -> int:
    """The step after which the attempt has continued."""
    found = _CONTINUED.findall(attempt.text)
    return int(found[-1]) if found else 0


def reference(soak: Soak, name: str) -> dict[int, float]:
    """The losses of the kind's uninterrupted run, which is made where it is not there."""
    kind = KINDS[name]
    if kind.like:
        return reference(soak, kind.like)
    folder = soak.state / f"reference-{name}-{soak.steps}-{soak.code}"
    chain = Chain(soak, name, kind, folder)
    if not (folder / "whole").exists():
        chain.open()
        attempt = chain.start()
        soak.wait(attempt.over, "the reference ends")
        if "codes [0" not in attempt.text:
            raise Ended(attempt.end)
        (folder / "whole").touch()
    found = dict(compare.losses(chain.run))
    assert sorted(found) == [*range(1, soak.steps + 1)], sorted(found)
    return found


def same_end(soak: Soak, chain: Chain) -> list[str]:
    """Names of what the chain's last checkpoint has not bit-equal to its reference's."""
    kind = chain.kind.like or chain.name
    there = soak.state / f"reference-{kind}-{soak.steps}-{soak.code}" / "out/tiny"
    return compare.apart(lambda: compare.differences(there, chain.run, chain.kind.ranks))
