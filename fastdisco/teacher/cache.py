"""Recorded embeddings in the teacher's place: those of all views of some rounds of epochs, recorded
once and then replayed (docs/teacher_cache.md)."""

import hashlib
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor

from fastdisco import config
from fastdisco.common import dist
from fastdisco.common.console import console, say, shorten
from fastdisco.common.errors import UserError
from fastdisco.data import TrainLoader, reading_order
from fastdisco.data.lines import printable
from fastdisco.models import Out
from fastdisco.teacher.cache_files import COMMAND, VERSION, Files, checksums, header
from fastdisco.teacher.runtime import Options, Teacher

# Images whose rows only one rank writes: whole pages of both files, since a network disk may lose
# what two machines write into one page.
BLOCK = 1024


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
    ) -> None:
        """dim            width of the embeddings
        run            how the teacher runs
        loader         with cfg.cache_rounds rounds
        load           gives the teacher of cfg
        teacher_views  see methods.Method
        Unless `complete` has to record, only the teacher's fingerprint is needed: it is loaded on
        the CPU and let go.  Raises UserError where the folder holds embeddings of anything else,
        naming what, or a damaged file, and with cfg.cache replay where some are missing."""
        self.folder, self.rounds, self.loader = cfg.cache_folder, cfg.cache_rounds, loader
        self.recording = cfg.cache == "record"
        # Recording fetches every embedding at once: a graph's beside would gain nothing.
        self._load = lambda: load(run._replace(graph=False))
        found = self._header()
        self._precision = str(run.dtype).removeprefix("torch.")
        self.about = {
            "version": VERSION,
            "teacher": self._teacher(cfg, found, load),
            "precision": self._precision,
            "dim": dim,
            **loader.recipe(teacher_views),
        }
        about = json.dumps([self.about, self.rounds], sort_keys=True)
        self.fingerprint = hashlib.sha256(about.encode()).hexdigest()
        self._block = found.get("block", BLOCK) if found else BLOCK
        slots = -(-len(loader.listing.files) // self._block) * self._block
        views = len(loader.crops[:teacher_views])
        self.files = Files(self.folder, slots, (views, dim))
        # What `at` has fetched: [V,B,d], and the round that was read ahead, with its checksums.
        self._now: Tensor | None = None
        self._round: int | None = None
        self._sums = np.zeros(0, np.uint32)
        if found:
            self._agree(found)
        if found and not self.recording:
            self._open(found["rounds"])

    def at(self, index: Tensor, epoch: int) -> None:
        """Fetches the rows of these images [B] (int64, on the CPU) in the views of the epoch; waits
        for no device.

        Raises UserError where a row is not the one that was recorded."""
        r, i = epoch % self.rounds, index.numpy()
        if r != self._round:
            self.files.read_ahead(r)
            self._round, self._sums = r, self.files.sums(r)
        cuda = self.loader.device.type == "cuda"
        # Torch keeps pinned memory until its copy is done.
        rows = torch.empty(len(i), *self.files.row, dtype=torch.float16, pin_memory=cuda)
        self.files.rows(r, i, out=rows.numpy())
        wrong = i[checksums(rows.numpy()) != self._sums[i]]
        if len(wrong):
            others = f" and {len(wrong) - 1} others of its batch" if len(wrong) > 1 else ""
            raise UserError(
                f"{self.folder}: recorded embeddings are damaged, in round {r} those of "
                f"{self.loader.listing.files[wrong[0]]}{others}; {COMMAND} finds and records such "
                "anew, then the same command continues",
                anywhere=True,
            )
        self._now = rows.to(self.loader.device, non_blocking=True).float().transpose(0, 1)

    def __call__(self, views: list[Tensor]) -> Out:
        """z [V,B,d] in float32 of the images that `at` was told; the views are only counted."""
        assert self._now is not None and len(views[0]) == self._now.shape[1], "at() comes first"
        return Out(self._now[: len(views)])

    # ---- recording

    def complete(self) -> None:
        """When recording: runs the teacher over what is missing or damaged, each rank its part.
        Called by every rank; then all embeddings are there.

        It may be stopped at any moment and called again."""
        if not self.recording:
            return
        lock = self.files.lock() if dist.rank() == 0 else None
        found = header(self.folder)
        rounds = max(self.rounds, found["rounds"] if found else 0)
        if dist.rank() == 0:
            self.files.allocate(rounds, self.about | {"rounds": rounds, "block": self._block})
        dist.barrier()
        self.files.open(write=True)
        encode = None
        for r in range(self.rounds):
            lacks = self._lacks(r)
            # Every rank has looked before any writes.
            dist.barrier()
            what = f"recording the teacher, round {r + 1} of {self.rounds}"
            if len(lacks):
                say(f"{what}: {len(lacks)} images")
            mine = _part(lacks, self._block)
            # A rank without a part loads no teacher.
            if len(mine):
                encode = encode or self._encoder()
                self._record(r, mine, encode, what)
            # After each round: a rank may be slower than the others, but by hours they would take
            # it for lost.
            dist.barrier()
            # What one rank could not record, no rank will ask for.
            self.loader.agree()
        self.files.open()
        self._refuse_missing()
        dist.barrier()
        if lock:
            lock.close()
        say(
            f"{self.folder}: the teacher's embeddings of {len(self.loader.listing.kept)} images in "
            f"{self.files.row[0]} views, {self.rounds} rounds, {self.files.bytes(rounds) / 1e9:.2f} GB"
        )

    def _record(self, r: int, mine: np.ndarray, encode: Callable, what: str) -> None:
        """Writes the rows of these images in the round; what: the bar's title."""
        listing = self.loader.listing
        batches = track(
            self.loader.views_of(reading_order(listing, mine), r),
            what,
            -(-len(mine) // self.loader.batch),
            transient=True,
            console=console,
            disable=dist.rank() > 0 or not console.is_terminal,
        )
        for batch in batches:
            rows = encode(batch.views)
            if not np.isfinite(rows).all():
                raise UserError(
                    f"teacher: its embeddings of {listing.files[batch.index[0]]} and what follows "
                    f"are not finite in {self._precision}; take another precision or teacher",
                    anywhere=True,
                )
            self.files.write(r, batch.index.numpy(), rows)
        self.files.flush()

    def _encoder(self) -> Callable[[list[Tensor]], np.ndarray]:
        """The teacher as a function of views that gives unit rows [B,V,d] float16."""
        teacher = self._load()

        @torch.no_grad()
        def encode(views: list[Tensor]) -> np.ndarray:
            z = teacher(views[: self.files.row[0]]).z
            return F.normalize(z.float(), dim=-1).transpose(0, 1).half().cpu().numpy()

        return encode

    def _lacks(self, r: int) -> np.ndarray:
        """Indices, ascending, of the images that are missing or damaged in the round."""
        kept = self.loader.remaining.kept
        return kept[~self.files.good(r, self._block)[kept]]

    # ---- what must be so before they are used

    def _header(self) -> dict[str, Any] | None:
        found = header(self.folder)
        if found is None and not self.recording:
            raise UserError(
                f"{self.folder}: no recorded embeddings there (teacher.cache_folder); record them "
                f"by {COMMAND}, or set teacher.cache=record"
            )
        return found

    def _teacher(
        self,
        cfg: config.Teacher,
        found: dict[str, Any] | None,
        load: Callable[[Options], Teacher],
    ) -> str:
        """The teacher's fingerprint.  To replay its file is not needed: the header is believed."""
        if found and not self.recording and not cfg.file.exists():
            say(
                f"{cfg.file} is not here: the embeddings in {self.folder} are taken as those of "
                "this teacher"
            )
            return found["teacher"]
        return load(Options()).fingerprint

    def _agree(self, found: dict[str, Any]) -> None:
        """Raises UserError where the folder's embeddings are of anything else, or cut short."""
        # By way of JSON, which has lists for tuples.
        here = config.flatten(json.loads(json.dumps(self.about)))
        there = config.flatten(found)
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
        self.files.refuse_cut_short(found["rounds"])

    def _open(self, rounds: int) -> None:
        """Opens the files to replay them; rounds: that they hold."""
        if rounds < self.rounds:
            raise UserError(
                f"{self.folder}: holds {rounds} rounds and teacher.cache_rounds asks for "
                f"{self.rounds}; lower it, or record the rest by {COMMAND}"
            )
        self.files.open()
        self._refuse_missing()
        say(
            f"{self.folder}: its embeddings are replayed instead of the teacher, {self.rounds} "
            "rounds"
        )

    def _refuse_missing(self) -> None:
        """Raises UserError where the rounds lack images of the listing."""
        listing, kept = self.loader.listing, self.loader.remaining.kept
        lacks = [kept[self.files.sums(r)[kept] == 0] for r in range(self.rounds)]
        if missing := sum(map(len, lacks)):
            names = [printable(listing.files[i]) for i in np.unique(np.concatenate(lacks)).tolist()]
            raise UserError(
                f"{self.folder}: lacks {missing} of the {self.rounds * len(kept)} embeddings "
                f"({self.rounds} rounds of {len(kept)} images), those of {shorten(names)}; record "
                f"them by {COMMAND}, or set teacher.cache=record"
            )


def _part(lacks: np.ndarray, block: int) -> np.ndarray:
    """This rank's part of these images: whole blocks, and as many images for each rank as blocks
    allow."""
    # Where each block begins in lacks.
    starts = np.unique(lacks // block, return_index=True)[1]
    even = np.arange(dist.world() + 1) * len(lacks) / dist.world()
    ends = np.append(starts, len(lacks))[np.searchsorted(starts, even)]
    return lacks[ends[dist.rank()] : ends[dist.rank() + 1]]


def _short(value: Any) -> str:
    return value[:12] if isinstance(value, str) else str(value)
