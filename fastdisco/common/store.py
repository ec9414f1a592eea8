"""Texts that the ranks exchange beside the training, each in a thread of its own.

A collective of such a thread would mix with the training's, in another order on each rank.  So these
texts go through the ranks' store."""

import json
import os
from datetime import timedelta

import torch.distributed as td

from fastdisco.common import dist

# Who waits for this long waits for a rank that hangs or has died: the training finds that out.
_PATIENCE = timedelta(days=7)


class Texts:
    """`dist.all_texts` for such threads, one call at a time.  Every rank must make the same calls."""

    def __init__(self, name: str) -> None:
        """name  of what is exchanged.  Every rank calls it, in the training's thread."""
        # A store may outlive a training, with its keys.
        mark = dist.all_texts(os.urandom(8).hex())[0]
        self._name, self._round = f"fastdisco/{name}/{mark}", 0
        self._store: td.Store | None = None
        if dist.world() > 1:
            # A connection of its own: what waits on the training's would block that.
            self._store = td.distributed_c10d._get_default_store().clone()
            self._store.set_timeout(_PATIENCE)

    def __call__(self, text: str) -> list[str]:
        """Every rank's text, in rank order; waits for all of them.

        Raises RuntimeError where the rank or launcher that holds the store is gone."""
        if self._store is None:
            return [text]
        # In JSON, which is ASCII: a text may hold names of files that are not valid UTF-8.
        self._store.set(self._key(dist.rank()), json.dumps(text))
        found = [self._store.get(self._key(r)) for r in range(dist.world())]
        self._round += 1
        # Who has come to this round has read the one before.
        self._store.delete_key(self._key(dist.rank(), back=2))
        return [json.loads(x) for x in found]

    def _key(self, rank: int, back: int = 0) -> str:
        return f"{self._name}/{self._round - back}/{rank}"
