"""The teacher's embeddings of all views of some rounds of epochs: recorded once, then replayed in
place of the teacher.

FOLDER/cache.json  what the embeddings are of; written last
FOLDER/z.f16       [rounds,slots,V,d] float16: unit rows, since the losses normalise and a half ends
                   at 65504; slots: images, in whole blocks
FOLDER/sums.u32    [rounds,slots] uint32: checksum of an image's rows in z.f16; 0: not recorded"""

import fcntl
import hashlib
import json
import mmap
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from fastdisco import config
from fastdisco.common import dist
from fastdisco.common.console import console, say
from fastdisco.common.errors import UserError
from fastdisco.common.files import write_whole
from fastdisco.data import TrainLoader, reading_order
from fastdisco.models import Out
from fastdisco.teacher.runtime import Options, Teacher

VERSION = 1
# Images whose rows only one rank writes: whole pages of both files, since a network disk may lose
# what two machines write into one.
BLOCK = 1024
COMMAND = "`fastdisco teacher record --config ...`"


class CachedTeacher:
    """Called like a Teacher, after `at` has said whose views these are."""

    def __init__(
        self,
        cfg: config.Teacher,
        dim: int,
        run: Options,
        loader: TrainLoader,
        load: Callable[[Options], Teacher],
        teacher_views: int | None = None,
    ):
        """run: of the teacher; loader: with cfg.cache_rounds rounds; load: the teacher of cfg, to
        run so; teacher_views: as of methods.Method.

        Of the teacher only the fingerprint is needed, unless `complete` has to record: it is loaded
        on the CPU and let go. Raises UserError where the folder holds embeddings of anything else,
        naming what, or a damaged file, and with cfg.cache replay where some are missing."""
        self.folder, self.rounds, self.loader, self._load = (
            cfg.cache_folder,
            cfg.cache_rounds,
            loader,
            lambda: load(run._replace(graph=False)),
        )
        self.recording = cfg.cache == "record"
        found = self._header()
        if found is None and not self.recording:
            raise UserError(
                f"{self.folder}: no recorded embeddings there (teacher.cache_folder); record them "
                f"by {COMMAND}, or set teacher.cache=record"
            )
        if not self.recording and not cfg.file.exists():
            say(
                f"{cfg.file} is not here: the embeddings in {self.folder} are taken as those of "
                "this teacher"
            )
            of = found["teacher"]
        else:
            of = load(Options()).fingerprint
        self._precision = str(run.dtype).removeprefix("torch.")
        self.about = {
            "version": VERSION,
            "teacher": of,
            "precision": self._precision,
            "dim": dim,
            **loader.recipe(teacher_views),
        }
        self.fingerprint = hashlib.sha256(
            json.dumps([self.about, self.rounds], sort_keys=True).encode()
        ).hexdigest()
        self._row = len(loader.crops[:teacher_views]), dim
        self._block = (found or {}).get("block", BLOCK)
        self._slots = -(-len(loader.listing.files) // self._block) * self._block
        self._now = self._round = None
        if found:
            self._agree(found)
        if self.recording:
            return
        if found["rounds"] < self.rounds:
            raise UserError(
                f"{self.folder}: holds {found['rounds']} rounds and teacher.cache_rounds asks for "
                f"{self.rounds}; lower it, or record the rest by {COMMAND}"
            )
        self._map(found["rounds"])
        self._whole()
        say(
            f"{self.folder}: its embeddings are replayed instead of the teacher, {self.rounds} "
            "rounds"
        )

    def at(self, index: Tensor, epoch: int):
        """Fetches the rows of these images [B] (int64, on the CPU) in the views of the epoch; waits
        for no device.

        Raises UserError where a row is not the one that was recorded."""
        r, i = epoch % self.rounds, index.numpy()
        if r != self._round:
            self._round = r
            size, page = self._z[0].nbytes, mmap.PAGESIZE
            # Reads the round ahead: random rows would come one by one.
            self._z_map.madvise(mmap.MADV_WILLNEED, r * size // page * page, size)
        cuda = self.loader.device.type == "cuda"
        # Torch keeps pinned memory until its copy is done.
        rows = torch.empty(len(i), *self._row, dtype=torch.float16, pin_memory=cuda)
        self._z[r].take(i, axis=0, out=rows.numpy(), mode="clip")  # the mode that needs no buffer
        if len(wrong := i[_sums(rows.numpy()) != self._sums[r].take(i)]):
            raise UserError(
                f"{self.folder}: recorded embeddings are damaged, in round {r} those of "
                f"{self.loader.listing.files[wrong[0]]}"
                f"{f' and {len(wrong) - 1} others of its batch' if len(wrong) > 1 else ''}; "
                f"{COMMAND} finds and records such anew, "
                "then the same command continues",
                anywhere=True,
            )
        # [V,B,d]
        self._now = rows.to(self.loader.device, non_blocking=True).float().transpose(0, 1)

    def __call__(self, views: list[Tensor]) -> Out:
        assert self._now is not None and len(views[0]) == self._now.shape[1], "at() comes first"
        return Out(self._now[: len(views)])

    def complete(self):
        """When recording: runs the teacher over what is missing or damaged, each rank its part;
        called by every rank.  Then all is there.

        May be stopped at any moment and called again."""
        if not self.recording:
            return
        lock = self._lock()
        rounds = max(self.rounds, (self._header() or {"rounds": 0})["rounds"])
        if dist.rank() == 0:
            self._allocate(rounds)
        dist.barrier()
        self._map(rounds, write=True)
        encode = None
        for r in range(self.rounds):
            lacks = self._lacks(r)
            dist.barrier()  # every rank has looked before any writes
            what = f"recording the teacher, round {r + 1} of {self.rounds}"
            if len(lacks):
                say(f"{what}: {len(lacks)} images")
            mine = _part(lacks, self._block)
            if len(mine):  # a rank without a part loads no teacher
                encode = encode or self._encode()
                self._record(r, mine, encode, what)
            dist.barrier()  # a rank may be slower, but not for hours: the others would give it up
        self._map(rounds)  # opened anew: on a network disk that shows what other machines wrote
        self._whole()
        dist.barrier()
        if lock:
            lock.close()
        say(
            f"{self.folder}: the teacher's embeddings of {len(self.loader.listing.kept)} images in "
            f"{self._row[0]} views, {self.rounds} rounds, {self._z.nbytes / 1e9:.2f} GB"
        )

    def _record(self, r: int, mine: np.ndarray, encode: Callable, what: str):
        """Writes the rows of these images in the round; what: the bar's title."""
        batches = self.loader.views_of(reading_order(self.loader.listing, mine), r)
        for batch in track(
            batches,
            what,
            -(-len(mine) // self.loader.batch),
            transient=True,
            console=console,
            disable=dist.rank() > 0 or not console.is_terminal,
        ):
            rows = encode(batch.views)
            if not np.isfinite(rows).all():
                raise UserError(
                    f"teacher: its embeddings of {self.loader.listing.files[batch.index[0]]} and "
                    f"what follows are not finite in {self._precision}; take another precision or "
                    "teacher",
                    anywhere=True,
                )
            i = batch.index.numpy()
            self._z[r, i] = rows
            self._sums[r, i] = _sums(rows)
        self._z_map.flush()
        self._sums_map.flush()

    def _lacks(self, r: int) -> np.ndarray:
        """Indices, ascending, of the images that are missing or damaged in the round."""
        good = np.zeros(self._slots, bool)
        for at in range(0, self._slots, self._block):
            there = slice(at, at + self._block)
            if self._sums[r, there].any():
                good[there] = self._sums[r, there] == _sums(self._z[r, there])
        return self.loader.listing.kept[~good[self.loader.listing.kept]]

    def _encode(self) -> Callable[[list[Tensor]], np.ndarray]:
        """Views -> unit rows [B,V,d] float16."""
        teacher = self._load()

        @torch.no_grad()
        def encode(views):
            return (
                F.normalize(teacher(views[: self._row[0]]).z.float(), dim=-1)
                .transpose(0, 1)
                .half()
                .cpu()
                .numpy()
            )

        return encode

    def _whole(self):
        """Raises UserError where the rounds lack images of the listing."""
        kept = self.loader.listing.kept
        if lacks := sum(int((self._sums[r].take(kept) == 0).sum()) for r in range(self.rounds)):
            raise UserError(
                f"{self.folder}: lacks {lacks} of the {self.rounds * len(kept)} embeddings "
                f"({self.rounds} rounds of {len(kept)} images); record them by {COMMAND}, or set "
                "teacher.cache=record"
            )

    def _header(self) -> dict | None:
        path = self.folder / "cache.json"
        try:
            return json.loads(path.read_text())
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as e:
            raise UserError(
                f"{path}: cannot be read ({e}); take another teacher.cache_folder, or remove this "
                "one and record anew"
            ) from None

    def _agree(self, found: dict):
        here, there = config.flatten(json.loads(json.dumps(self.about))), config.flatten(found)
        there = {k: v for k, v in there.items() if k not in ("rounds", "block")}
        differ = [
            f"{k} ({_short(there.get(k))} there, {_short(here.get(k))} here)"
            for k in sorted(here | there)
            if here.get(k) != there.get(k)
        ]
        if differ:
            raise UserError(
                f"{self.folder}: its recorded embeddings are of another "
                f"{', another '.join(differ)}; restore that, or record into another "
                "teacher.cache_folder"
            )
        for name, size in self._sizes(found["rounds"]).items():
            path = self.folder / name
            if (has := path.stat().st_size if path.exists() else 0) < size:
                raise UserError(
                    f"{path}: cut short, {has} of {size} bytes; remove {self.folder} and record "
                    f"anew by {COMMAND}"
                )

    def _sizes(self, rounds: int) -> dict[str, int]:
        """Bytes of the files."""
        return {
            "z.f16": rounds * self._slots * 2 * int(np.prod(self._row)),
            "sums.u32": rounds * self._slots * 4,
        }

    def _lock(self):
        """An open file that keeps other commands from recording there; on rank 0."""
        if dist.rank():
            return None
        self.folder.mkdir(parents=True, exist_ok=True)
        f = (self.folder / "lock").open("w")
        try:
            fcntl.flock(f, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(
                f"{self.folder}: another command is recording there; wait for its end, then this "
                "one finds what it recorded"
            ) from None
        return f

    def _allocate(self, rounds: int):
        """Files of that many rounds; what they hold stays, the rest is zeros.  The space is taken
        now: a mapped file on a full disk kills."""
        for name, size in self._sizes(rounds).items():
            with (self.folder / name).open("ab") as f:
                try:
                    os.posix_fallocate(f.fileno(), 0, size)
                except OSError as e:
                    raise UserError(
                        f"{self.folder / name}: {size} bytes cannot be taken there ({e.strerror}); "
                        "make space, take another teacher.cache_folder or lower "
                        "teacher.cache_rounds"
                    ) from None
        write_whole(
            self.folder / "cache.json",
            json.dumps(self.about | {"rounds": rounds, "block": self._block}, indent=1) + "\n",
        )

    def _map(self, rounds: int, write: bool = False):
        self._z_map, self._z = _mapped(
            self.folder / "z.f16", np.float16, (rounds, self._slots, *self._row), write
        )
        self._sums_map, self._sums = _mapped(
            self.folder / "sums.u32", np.uint32, (rounds, self._slots), write
        )


def _part(lacks: np.ndarray, block: int) -> np.ndarray:
    """This rank's part: whole blocks, as many images on each rank as goes."""
    starts = np.unique(lacks // block, return_index=True)[1]  # of each block in lacks
    ends = np.append(starts, len(lacks))[
        np.searchsorted(starts, np.arange(dist.world() + 1) * len(lacks) / dist.world())
    ]
    return lacks[ends[dist.rank()] : ends[dist.rank() + 1]]


def _mapped(path: Path, dtype, shape: tuple[int, ...], write: bool) -> tuple[mmap.mmap, np.ndarray]:
    with path.open("r+b" if write else "rb") as f:
        m = mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_WRITE if write else mmap.ACCESS_READ)
    return m, np.frombuffer(m, dtype, int(np.prod(shape))).reshape(shape)


def _sums(rows: np.ndarray) -> np.ndarray:
    """[n,V,d] float16 -> [n] uint32: a sum of 16-bit words times odd numbers, which any one changed
    word changes; never 0."""
    words = rows.reshape(len(rows), -1).view(np.uint16).astype(np.uint32)
    odd = np.arange(words.shape[1], dtype=np.uint32) * np.uint32(0x9E3779B2) | np.uint32(1)
    return np.maximum((words * odd).sum(1, dtype=np.uint32), 1)


def _short(value) -> str:
    return value[:12] if isinstance(value, str) else str(value)
