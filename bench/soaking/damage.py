"""What is done to a run's files between two attempts."""

import time
from pathlib import Path

from soaking import chain
from soaking.chain import continued, said
from soaking.session import Record, Session


def torn(s: Session, r: Record) -> None:
    """A file of the run is cut short, has a flipped bit or a block of zeros, or is gone: the run goes
    on from the newest whole checkpoint."""
    # A second checkpoint must be there.
    s.chain.on(s.attempt, 1)
    while len(steps(s)) < 2:
        s.chain.on(s.attempt, 1)
    s.moment()
    s.cut_off()
    newest = s.chain.run / "checkpoints" / f"step_{s.chain.named():08}"
    older = max((n for n in steps(s) if n < s.chain.named()), default=0)
    r.step = max(said(s.attempt), continued(s.attempt))
    r.unequal += s.chain.checked()
    names = [f"rank_{n}.pt" for n in range(s.chain.kind.ranks)]
    name = s.pick(
        *("state.pt", "state.pt", *names, "manifest.json", "backbone.safetensors"),
        *("last", "metrics.jsonl", "config.yaml", "env.json", ".lock"),
    )
    expected = s.chain.named()
    if name in ("state.pt", *names, "manifest.json"):
        path, expected = newest / name, older
    elif name == "backbone.safetensors":
        path = newest / name
    elif name == "last":
        path = newest.parent / name
    else:
        path = s.chain.run / name
    if not path.exists() or (expected == 0 and older == 0):
        return s.goes_on(r)
    if name == "metrics.jsonl":
        r.what = f"{name}: a line is torn"
        tear_the_log(path, s.chain.named())
    else:
        # Without its manifest a checkpoint counts as an older version's.
        gone = name not in ("manifest.json", "config.yaml")
        how = s.pick("cut short", "one bit", "zeros", *(["gone"] if gone else []))
        r.what = f"{name}: {how}"
        before = path.read_bytes()
        harm(path, how, s.draw)
        if name == "config.yaml":
            return _refused_until_restored(s, r, path, before, expected)
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
    if lines and len(chain.losses(path.parent)) > saved and lines[-1].endswith(b"\n"):
        path.write_bytes(b"".join(lines[:-1]) + lines[-1][: len(lines[-1]) // 2])
    else:
        path.write_bytes(b"".join(lines) + b'{"step": 77, "tr' + bytes(100))


def _refused_until_restored(s: Session, r: Record, path: Path, before: bytes, expected: int):
    """Another configuration, or none: one sentence and code 2; what changes nothing goes on."""
    s.begin()
    attempt = s.attempt
    s.soak.wait(lambda: attempt.over() or said(attempt), "it is refused or goes on")
    if not said(attempt):
        told = [x for x in attempt.text.splitlines() if x.startswith("fastdisco: error: ")]
        if f"codes {[2] * s.chain.kind.ranks}" not in attempt.text or len(told) != 1:
            r.note = attempt.text[-2000:]
            return
        r.what += ", refused"
        path.write_bytes(before)
        time.sleep(0.1)
        s.begin()
    s.judge(r, expected)


FAULTS = {"torn and flipped files": (torn, ("one", "two", "tars", "evaluated", "disk", "link"), 10)}
