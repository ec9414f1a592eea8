"""What is done to a run's files between two attempts."""

import time
from pathlib import Path

from soaking import compare
from soaking.chain import continued, said
from soaking.session import Record, Session, refused


def torn(s: Session, r: Record) -> None:
    """A file of the run is cut short, has a flipped bit or a block of zeros, or is gone: the run goes
    on from the newest whole checkpoint."""
    # A second checkpoint must be there.
    s.chain.on(s.attempt, 1)
    while sum(map(s.chain.is_whole, steps(s))) < 2:
        s.chain.on(s.attempt, 1)
    s.moment()
    s.cut_off()
    newest = s.chain.run / "checkpoints" / f"step_{s.chain.named():08}"
    r.step = max(said(s.attempt), continued(s.attempt))
    r.unequal += s.chain.checked()
    names = [f"rank_{n}.pt" for n in range(s.chain.kind.ranks)]
    inside = ("state.pt", *names, "manifest.json", "backbone.safetensors")
    name = s.pick(*inside, "state.pt", "last", "metrics.jsonl", "config.yaml", "env.json", ".lock")
    path = newest / name if name in inside else s.chain.run / name
    path = newest.parent / name if name == "last" else path
    if not path.exists():
        r.what = f"{name} was not there"
    elif name == "metrics.jsonl":
        r.what = f"{name}: a line is torn"
        tear_the_log(path, s.chain.whole())
    else:
        # Without its manifest a checkpoint counts as an older version's.
        gone = name not in ("manifest.json", "config.yaml")
        how = s.pick("cut short", "one bit", "zeros", *(["gone"] if gone else []))
        r.what = f"{name}: {how}"
        before = path.read_bytes()
        harm(path, how, s.draw)
        if name == "config.yaml":
            return _refused_until_restored(s, r, path, before)
    expected = s.chain.whole()
    s.begin()
    s.judge(r, expected)


def steps(s: Session) -> list[int]:
    """Of the checkpoints that are there."""
    found = (s.chain.run / "checkpoints").glob("step_*")
    return sorted(int(x.name[5:]) for x in found)


def harm(path: Path, how: str, draw) -> None:
    content = bytearray(path.read_bytes())
    at = draw.randrange(max(1, len(content)))
    if how == "gone":
        return path.unlink()
    if how == "cut short":
        del content[at:]
    elif how == "one bit" and content:
        content[at] ^= 1 << draw.randrange(8)
    else:
        content[at : at + 4096] = bytes(len(content[at : at + 4096]))
    path.write_bytes(content)


def tear_the_log(path: Path, saved: int) -> None:
    """Cuts a line of a step that has to be trained again, or adds half of one."""
    lines = path.read_bytes().splitlines(True)
    if lines and len(compare.losses(path.parent)) > saved and lines[-1].endswith(b"\n"):
        path.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    else:
        path.write_bytes(b"".join(lines) + b'{"step": 77, "tr' + bytes(100))


def _refused_until_restored(s: Session, r: Record, path: Path, before: bytes) -> None:
    """Another configuration, or none: one sentence and code 2; what changes nothing goes on."""
    expected = s.chain.whole()
    s.begin()
    attempt = s.attempt
    s.soak.wait(lambda: attempt.over() or said(attempt), "it is refused or goes on")
    if not said(attempt):
        told = [x for x in attempt.text.splitlines() if x.startswith("fastdisco: error: ")]
        if not refused(attempt) or len(told) != 1:
            r.note = attempt.text[-2000:]
            return
        r.what += ", refused"
        path.write_bytes(before)
        time.sleep(0.1)
        s.begin()
    s.judge(r, expected)


FAULTS = {"torn and flipped files": (torn, ("one", "two", "tars", "evaluated", "disk", "link"), 10)}
