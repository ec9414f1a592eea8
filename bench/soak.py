"""A soak: faults in random order, until a training has lost something, hung, or lied.

    python bench/soak.py --state DIR --minutes 60 [--seed 0] [--faults 1000]

Kills ranks, launchers and saves, halts processes, moves clocks, fills disks, cuts links, damages files
(bench/soaking/faults.py has all) in small trainings of one and two ranks on the CPU.  Every loss of every
attempt is compared with that of the uninterrupted run, to the last bit; so are the checkpoints at the
end.

The folder of the state keeps what has been done, so that a soak is run in pieces: the same command goes
on.  It ends after --minutes, or when so many faults are in and each change of a save has had its kill;
--minutes 0 tells of what is done alone.
Writes bench/results/soak-cpu.json.
Mounts and network namespaces need root; without it, their faults are left out."""

import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from harness import ROOT, command, parser, tables
from soaking import shim

if TYPE_CHECKING:
    from soaking.session import Session

# Every so many faults of the chains, so many of these.
_SAVES, _REAL = 24, 2


def main() -> int:
    options = parser(__doc__)
    options.add_argument("--state", type=Path, required=True, help="folder of what has been done")
    options.add_argument("--minutes", type=float, default=60.0)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--faults", type=int, default=1000, help="ends when so many are in")
    options.add_argument("--stop-scale", type=float, default=0.05, help="of a minute's SIGSTOP")
    options.add_argument("--steps", type=int, default=120, help="of each run")
    options.add_argument("--only", nargs="+", default=[], help="faults whose names contain a word")
    options.add_argument("--once", action="store_true", help="each fault once, the short ones")
    options.add_argument(
        "--saves-every", type=int, default=1, help="every so many changes of a save"
    )
    options.add_argument("--out", type=Path, help="folder of the result, if not bench/results")
    args = options.parse_args()
    args.state = args.state.resolve()
    args.state.mkdir(parents=True, exist_ok=True)
    _with_the_library(args.state)
    from soaking import places, ranks
    from soaking.chain import Soak

    # In the background of a shell SIGINT would be ignored, also by what is started here.
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.default_int_handler)
    why = places.reason()
    if why:
        print(f"root: no mounts and network namespaces here ({why}): faults of these are left out")
    ranks.warm()
    data(args.state)
    faults = Faults(args, Soak(args.state, args.steps, mounts=not why, once=args.once))
    try:
        faults.run()
    except KeyboardInterrupt:
        print("stopped; the same command goes on", flush=True)
    finally:
        faults.close()
    return report(faults.done, args)


def _with_the_library(state: Path) -> None:
    """Starts this program again with the library in front of libc."""
    library = str(shim.build(state))
    if os.environ.get("LD_PRELOAD") != library:
        env = dict(LD_PRELOAD=library, OMP_NUM_THREADS="1", CUDA_VISIBLE_DEVICES="")
        env |= dict(DS_ACCELERATOR="cpu", PYTHONPATH=str(ROOT))
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | env)


def data(state: Path) -> None:
    """43 small images to train on and 12 to validate, as files and in tars."""
    import startup

    from fastdisco.data import pack

    if not (state / "tars").exists():
        shutil.rmtree(state / "images", ignore_errors=True)
        startup.images(state / "images")
        part = state / "tars.part"
        shutil.rmtree(part, ignore_errors=True)
        for name in ("train", "val"):
            pack.pack(state / "images" / name, part / name, shard_mb=30 / 1024)
        part.rename(state / "tars")


class Faults:
    """All that has been done and is to be done."""

    def __init__(self, args, soak) -> None:
        self.args, self.soak = args, soak
        self.path = args.state / "faults.jsonl"
        text = self.path.read_text() if self.path.exists() else ""
        self.done = [json.loads(line) for line in text.splitlines()]
        self.end = time.monotonic() + 60 * args.minutes
        self.session = self.saves = self.real = None
        # Deaths in a save that are left.
        self.todo: list[str] = []

    @property
    def over(self) -> bool:
        enough = len(self.done) >= self.args.faults and not self.todo
        return time.monotonic() > self.end or enough

    def run(self) -> None:
        if not self.over:
            self._prepare()
        while not self.over:
            draw = random.Random(f"{self.args.seed}/{len(self.done)}")
            for part in (self._of_chains, self._of_saves, self._of_data, self._of_launchers):
                if not self.over:
                    part(draw)
            if self.args.once:
                break

    def close(self) -> None:
        for some in (self.session, self.saves, self.real):
            if some:
                some.close()

    # ---- which

    def _prepare(self) -> None:
        from soaking import damage, faults, saves

        known = faults.FAULTS | damage.FAULTS
        if self.args.once:
            del known["SIGSTOP for a minute"]
        self.faults = {k: v for k, v in known.items() if self._wanted(k)}
        usable = lambda kind: self.soak.mounts or kind not in ("disk", "link")
        kinds = {kind for _, some, _ in self.faults.values() for kind in some}
        self.kinds = sorted(filter(usable, kinds))
        if self._wanted("SIGKILL in a save"):
            done = {x["key"] for x in self.done}
            every = saves.places(self.soak)[:: self.args.saves_every]
            self.todo = [key for key in every if key not in done]
            print(
                f"{len(self.todo)} of a save's {len(every)} changes of files are left", flush=True
            )
        self.saves = saves.Saves(self.soak, self.todo)

    def _wanted(self, name: str) -> bool:
        return not self.args.only or any(word in name for word in self.args.only)

    # ---- one after another

    def _of_chains(self, draw: random.Random) -> None:
        """The faults of one run, to its end; with --once each fault, in as few runs as that takes."""
        if self.args.once:
            left = dict(self.faults)
            for kind in ("two", "one", "disk", "link"):
                mine = [name for name in left if kind in left[name][1] and kind in self.kinds]
                for name in mine:
                    del left[name]
                names = iter(mine)
                while mine and self._chain(kind, names, draw) and not self.over:
                    pass
            self.faults, self.kinds = {}, []
        elif self.kinds:
            kind = draw.choice(self.kinds)
            some = {k: v[2] for k, v in self.faults.items() if kind in v[1]}
            forever = iter(lambda: draw.choices([*some], [*some.values()])[0], "")
            self._chain(kind, forever, draw)

    def _chain(self, kind: str, names: Iterator[str], draw: random.Random) -> bool:
        """One run, until it ends, a fault is not survived, or there are no more; whether there are."""
        from soaking.session import Session

        folder = self.args.state / "chain"
        self.session = session = Session(self.soak, kind, folder, draw, self.args.stop_scale)
        more = True
        while not self.over:
            name = None if session.near_the_end() else next(names, "")
            if not name:
                more = name is None
                self._to_the_end(kind, session)
                break
            record = session.suffer(name, self.faults[name][0])
            self._add(record)
            if not record.survived:
                break
        session.close()
        self.session = None
        return more

    def _to_the_end(self, kind: str, session: "Session") -> None:
        """Keeps what a run's end shows with its last fault."""
        from soaking.chain import Ended, Hang

        try:
            unequal, differ = session.finish()
        except (Ended, Hang) as e:
            unequal, differ = 1, [str(e)]
        print(f"a run of kind {kind} has ended; unequal: {unequal} losses, {differ}", flush=True)
        if (unequal or differ) and self.done:
            last = self.done[-1]
            last["unequal"] += max(unequal, len(differ))
            last["survived"] = False
            last["note"] += f"\nat its end: {differ[:9]}"
            self._write()

    def _of_saves(self, draw: random.Random) -> None:
        for _ in range(len(self.todo) if self.args.once else _SAVES):
            if self.todo and not self.over:
                self._add(self.saves.next())

    def _of_data(self, draw: random.Random) -> None:
        from soaking import others

        for kind, name in (("two", "damaged images"), ("tars", "damaged tar")):
            if self._wanted(name) and not self.over:
                self._add(others.broken(self.soak, kind, self.args.state / "broken", draw))

    def _of_launchers(self, draw: random.Random) -> None:
        from soaking import others

        if not self._wanted("real launchers"):
            return
        if self.real is None:
            self.real = others.Real(self.soak, self.args.state / "real", draw)
        for _ in range(_REAL):
            if not self.over:
                record = self.real.next()
                self._add(record)
                if not record.survived:
                    self.real.close()
                    self.real = None
                    return

    def _add(self, record) -> None:
        self.done.append(record.as_dict() | {"code": self.soak.code})
        self._write()
        seconds = "" if record.seconds is None else f", {record.seconds:.1f} s"
        ended = "" if record.ended is None else f", ended in {record.ended:.1f} s"
        said = "went on" if record.survived else f"NOT SURVIVED: {record.note[-1500:]}"
        print(
            f"{len(self.done)} {time.strftime('%H:%M:%S')} {record.chain} {record.by} {record.fault} "
            f"({record.what}{record.key}): step {record.step}, from {record.resumed}{seconds}{ended}; "
            f"{said}",
            flush=True,
        )

    def _write(self) -> None:
        part = self.path.with_suffix(".part")
        part.write_text("".join(json.dumps(x) + "\n" for x in self.done))
        part.replace(self.path)


def report(done: list[dict], args) -> int:
    """Writes the result and shows the table; 1 where something was lost, unequal or hung."""
    from soaking import table
    from soaking.processes import last_lines

    done = [x | {"note": last_lines(x["note"])} for x in done]
    made = table.table(done)
    tables.show_table("faults", made["columns"], made["rows"])
    summary = table.rows(done)
    notes = [x for x in done if not x["survived"]]
    samples = dict(seed=args.seed, steps=args.steps, load=os.getloadavg()[0], faults=done)
    command.finish("soak", "cpu", summary, samples, args.out, tables=dict(faults=made))
    return int(bool(notes))


if __name__ == "__main__":
    sys.exit(main())
