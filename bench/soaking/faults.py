"""What is done to a running training.  Each function takes the session and the record of the fault."""

import errno
import signal
import time

from soaking import processes, ranks
from soaking.session import Record, Session, kill_everything, refused

# ---- kills and signals


def kill_rank(s: Session, r: Record) -> None:
    s.moment()
    processes.send(s.draw.choice(s.attempt.ranks), signal.SIGKILL)
    s.chain.gone(s.attempt)
    s.goes_on(r)


def kill_all(s: Session, r: Record) -> None:
    s.moment()
    kill_everything(s.attempt)
    s.chain.gone(s.attempt)
    s.goes_on(r)


def kill_launcher(s: Session, r: Record) -> None:
    """The ranks notice, save and end."""
    s.moment()
    processes.send(s.attempt.top, signal.SIGKILL)
    r.ended = s.end_ranks(s.attempt.ranks)
    s.chain.gone(s.attempt)
    s.goes_on(r)


def kill_in_start(s: Session, r: Record) -> None:
    """Anywhere between the start and the first step; a rank, the launcher or all."""
    s.cut_off()
    s.begin()
    time.sleep(s.draw.random() * s.startup)
    r.what = s.pick("a rank", "the launcher", "all", "SIGTERM to a rank", "SIGTERM to the launcher")
    s.attempt.find_ranks(s.chain.kind.ranks)
    number = signal.SIGTERM if "SIGTERM" in r.what else signal.SIGKILL
    if r.what == "all":
        kill_everything(s.attempt)
    elif "a rank" in r.what and s.attempt.ranks:
        processes.send(s.draw.choice(s.attempt.ranks), number)
    else:
        processes.send(s.attempt.top, number)
    s.chain.gone(s.attempt)
    s.goes_on(r)


def ask(s: Session, r: Record) -> None:
    """A signal to a process of the tree: the run saves its last step and ends."""
    number = s.pick(signal.SIGTERM, signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
    s.moment()
    target = s.draw.choice([s.attempt.top, *s.attempt.ranks])
    r.what = f"{number.name} to {'the launcher' if target == s.attempt.top else 'a rank'}"
    processes.send(target, number)
    r.ended = s.end_ranks(s.attempt.ranks)
    s.chain.gone(s.attempt)
    s.goes_on(r, asked=True)


# ---- halts, clocks, others


def halt(s: Session, r: Record, seconds: float = 60.0) -> None:
    """SIGSTOP of a rank or of all, for a minute or a part of it."""
    s.moment()
    seconds *= s.stop_scale
    some = s.attempt.ranks if s.draw.random() < 0.3 else [s.draw.choice(s.attempt.ranks)]
    r.what = f"{len(some)} of {s.chain.kind.ranks} ranks for {seconds:.0f} s"
    for pid in some:
        processes.send(pid, signal.SIGSTOP)
    time.sleep(seconds)
    for pid in some:
        processes.send(pid, signal.SIGCONT)
    s.stays(r)


def halt_a_minute(s: Session, r: Record) -> None:
    halt(s, r, 60.0 / s.stop_scale)


def clock(s: Session, r: Record) -> None:
    """The clock of the wall jumps, on one rank or on all, and half of the time back again."""
    s.moment()
    jump = s.pick(3600, -3600, 86400, -86400, 10 * 365 * 86400, -10 * 365 * 86400, 5, -5)
    some = s.pick(s.attempt.controls, [s.draw.choice(s.attempt.controls)])
    r.what = f"by {jump:+d} s"
    for control in some:
        control.put("clock", jump)
    if s.draw.random() < 0.5:
        s.chain.on(s.attempt, s.draw.randint(1, 4))
        for control in some:
            control.put("clock", 0)
    s.stays(r)


def second(s: Session, r: Record) -> None:
    """The same command beside the running one is refused, and the first one goes on."""
    s.moment()
    more = ["--overwrite"] if s.draw.random() < 0.4 else []
    r.what = " ".join(more)
    log = s.chain.folder / f"second{s.chain.attempts:04}-{time.monotonic_ns()}.txt"
    other = ranks.fork([*s.chain.arguments(), *more], s.chain.kind.ranks, log)
    try:
        s.chain.gone(other)
    finally:
        other.kill()
    told = [x for x in other.text.splitlines() if x.startswith("fastdisco: error: ")]
    s.stays(r)
    if not refused(other) or len(told) != 1 or "has been training there" not in told[0]:
        r.survived, r.note = False, f"the second one: {other.text[-2000:]}"


# ---- file systems


def errors(s: Session, r: Record) -> None:
    """Every change of a file in the run's folder fails for some steps, on a rank or on all."""
    s.moment()
    names = ("EIO", "ENOSPC", "EDQUOT", "EROFS", "ESTALE", "EACCES")
    r.what = s.draw.choice(names)
    some = s.pick(s.attempt.controls, [s.draw.choice(s.attempt.controls)])
    for control in some:
        control.put("error", getattr(errno, r.what))
    s.hold()
    for control in some:
        control.put("error", 0)
    s.stays(r)
    r.what += f", {sum(control.get('failed') for control in some)} calls failed"


def disk_full(s: Session, r: Record) -> None:
    s.moment()
    assert s.chain.disk
    ballast = s.chain.disk.fill()
    s.hold()
    ballast.unlink()
    s.stays(r)


def disk_full_and_killed(s: Session, r: Record) -> None:
    s.moment()
    assert s.chain.disk
    ballast = s.chain.disk.fill()
    s.hold()
    kill_everything(s.attempt)
    s.chain.gone(s.attempt)
    ballast.unlink()
    s.goes_on(r)


def read_only(s: Session, r: Record) -> None:
    s.moment()
    assert s.chain.disk
    s.chain.disk.read_only(True)
    s.hold()
    s.chain.disk.read_only(False)
    s.stays(r)


def vanish(s: Session, r: Record) -> None:
    """The mount is gone and comes back; nothing may be written into the folder behind it."""
    s.moment()
    assert s.chain.disk
    s.chain.disk.vanish()
    try:
        s.hold()
        behind = [x.name for x in s.chain.disk.path.iterdir()]
    finally:
        s.chain.disk.show()
    s.stays(r)
    if behind:
        r.survived, r.note = False, f"written behind the mount: {behind}"


# ---- links


def cut_short(s: Session, r: Record) -> None:
    s.moment()
    assert s.chain.nodes
    seconds = s.draw.uniform(0.2, 4)
    r.what = f"{seconds:.1f} s"
    s.chain.nodes.cut()
    time.sleep(seconds)
    s.chain.nodes.mend()
    s.stays(r)


def cut_for_good(s: Session, r: Record) -> None:
    """The watchdogs of both ranks end the run."""
    s.moment()
    assert s.chain.nodes
    s.chain.nodes.cut()
    begin = time.monotonic()
    try:
        s.chain.gone(s.attempt)
    finally:
        s.chain.nodes.mend()
    r.what = f"ended after {time.monotonic() - begin:.0f} s"
    s.goes_on(r)


ANY, DISK, LINK = ("one", "two", "tars", "evaluated", "disk", "link"), ("disk",), ("link",)
ALONE = ("one", "two", "tars", "evaluated", "disk")
# Name -> (what is done, kinds of runs, how often among the others)
FAULTS = {
    "SIGKILL of a rank": (kill_rank, ANY, 8),
    "SIGKILL of all": (kill_all, ANY, 5),
    "SIGKILL of the launcher": (kill_launcher, ANY, 5),
    "killed or asked in start-up": (kill_in_start, ANY, 5),
    "SIGTERM, SIGINT, SIGUSR1": (ask, ANY, 14),
    "SIGSTOP": (halt, ANY, 4),
    "SIGSTOP for a minute": (halt_a_minute, ANY, 0.3),
    "clock jumps": (clock, ANY, 5),
    "a second trainer": (second, ALONE, 4),
    "failing file system": (errors, ANY, 6),
    "disk full": (disk_full, DISK, 8),
    "disk full, then SIGKILL": (disk_full_and_killed, DISK, 4),
    "mount read-only": (read_only, DISK, 8),
    "mount gone": (vanish, DISK, 8),
    "link cut for seconds": (cut_short, LINK, 16),
    "link cut": (cut_for_good, LINK, 4),
}
