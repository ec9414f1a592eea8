"""Images that break while a training runs: they are set aside, and others take their places in the
batches (docs/data.md, Images that break)."""

import json

import numpy as np

from fastdisco.common import dist
from fastdisco.common.console import say, shorten
from fastdisco.common.errors import UserError
from fastdisco.data import lines
from fastdisco.data.folder import Listing


class Broken(Exception):
    """A pipeline has ended at images that cannot be read."""

    def __init__(self, faults: dict[int, str], error: Exception) -> None:
        """faults  index -> reason; empty where every image can be read now
        error   what to raise where nobody can go on without the images"""
        super().__init__(str(error))
        self.faults, self.error = faults, error


class Aside:
    """The images that a run has set aside, and why.

    A rank finds them alone.  It goes on with its own list until `agree`, at a step that is the same
    for all ranks; from there on all have the same list."""

    def __init__(self, listing: Listing, share: float) -> None:
        """share: of the images, how many may be set aside; 0: none."""
        self._listing, self.allowed = listing, int(share * len(listing.kept))
        # Index -> reason.
        self.images: dict[int, str] = {}
        self._news: dict[int, str] = {}

    def __len__(self) -> int:
        return len(self.images)

    def add(self, broken: Broken) -> None:
        """Sets aside what this rank has found, and says so.

        Raises the error of `broken` where more images would be set aside than may be."""
        new = {i: why for i, why in broken.faults.items() if i not in self.images}
        if len(self) + len(new) > self.allowed or not new:
            raise self._beyond(broken.error) from broken.__cause__
        self._news |= new
        self.images |= new
        names = [f"{lines.printable(self._listing.files[i])} ({why})" for i, why in new.items()]
        say(
            f"set aside, since unreadable: {shorten(names, 8)}; others take the places "
            f"({len(self)} of at most {self.allowed}, data.bad_limit)",
            anywhere=True,
        )

    def agree(self) -> bool:
        """Gives every rank what any has found; whether that was anything.  Called by every rank.

        Raises the same UserError on every rank where all together have set aside too many."""
        # Between the hosts: no device waits for it.
        if not dist.any_rank_later(bool(self._news))():
            return False
        for text in dist.all_texts(json.dumps(list(self._news.items()))):
            self.images |= {i: why for i, why in json.loads(text) if i not in self.images}
        # Ranks found them in different orders.
        self.images = dict(sorted(self.images.items()))
        self._news = {}
        if len(self) > self.allowed:
            raise self._beyond(
                UserError(
                    f"{self._listing.shown}: images cannot be read, {self._named()}; find all by "
                    f"`{self._command()}`, then the same command continues from the last checkpoint"
                )
            )
        if dist.world() > 1:
            say(f"all ranks leave out {len(self)} images that broke: {self._named()}")
        return True

    def fill(self, used: np.ndarray, spare: np.ndarray) -> np.ndarray:
        """The images of an epoch with others in the places of those that are set aside.

        used   [U] the epoch's images in order
        spare  [S] those that follow in its order, which it does not use
        The place s gets the spare image s mod S; where no spare is left, the image half an epoch
        away that is not set aside.  So a place's image depends on no other place."""
        if not self.images:
            return used
        gone = np.fromiter(self.images, np.int64)
        places = np.flatnonzero(np.isin(used, gone))
        spare = spare[~np.isin(spare, gone)]
        if not len(spare):
            spare = np.roll(used, -(len(used) // 2))
            spare = spare[~np.isin(spare, gone)]
        used = used.copy()
        used[places] = spare[places % len(spare)]
        return used

    def without(self, listing: Listing) -> Listing:
        """The listing that leaves them out, too."""
        if not self.images:
            return listing
        return listing._replace(left_out=np.union1d(listing.left_out, list(self.images)))

    def _beyond(self, error: Exception) -> Exception:
        """The error, with the limit where there is one."""
        if not (self.allowed and isinstance(error, UserError)):
            return error
        many = f"more images than data.bad_limit allows ({self.allowed}) are broken"
        return UserError(f"{error} ({many})", anywhere=error.anywhere)

    def _named(self) -> str:
        names = [lines.printable(self._listing.files[i]) for i in self.images]
        return shorten(names, 8)

    def _command(self) -> str:
        return f"fastdisco data check {lines.for_shell(str(self._listing.source))}"
