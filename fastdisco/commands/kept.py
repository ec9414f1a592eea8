"""A training of an evaluation that is kept while it goes on, so that the same command continues
it."""

import io
import time
from typing import Any

import torch

from fastdisco.commands.measure import Stopped, Work, plain
from fastdisco.common import dist
from fastdisco.common.console import console, say
from fastdisco.common.errors import UserError
from fastdisco.common.files import naming
from fastdisco.evals.finetune import Tuning
from fastdisco.evals.linear import Training
from fastdisco.evals.results import short_hash

# Steps between two looks for a stop, and seconds between two saves.
LOOK, SAVE = 20, 60.0


class Kept:
    """Where a training is kept while it goes on, its bar, and how it is stopped."""

    def __init__(
        self,
        work: Work,
        what: str,
        protocol: dict[str, Any],
        training: Training | Tuning,
        text: str,
        epochs: int,
    ) -> None:
        """Continues where a training by the same protocol was stopped."""
        self.work, self.training, self.saved = work, training, time.monotonic()
        self.what, self.epochs = what, epochs
        self.path = work.network.folder / f"{what}-{short_hash(plain(protocol))}.pt"
        self._bar = work.bar(f"{what}: {text}, {epochs} epochs", epochs, shared=False)
        if self.path.exists():
            training.load_state_dict(self._load())
            say(f"{what}: continues after epoch {training.epoch}, step {training.step}")

    def _load(self) -> dict[str, Any]:
        try:
            return torch.load(self.path, map_location=self.work.device, weights_only=True)
        # Torch's readers raise whatever the bytes lead them to.
        except Exception:
            raise UserError(
                f"{self.path}: is damaged; remove it, the evaluation starts over"
            ) from None

    def __enter__(self) -> None:
        self._tick = self._bar.__enter__()

    def __exit__(self, *error: Any) -> None:
        self._bar.__exit__(*error)

    def watch(self, training: Training | Tuning) -> None:
        """Called after every step and epoch."""
        ended, stop = training.step == 0, self.work.stop
        if ended and dist.rank() == 0 and time.monotonic() - self.saved > SAVE:
            self.save()
            if not console.is_terminal:
                say(f"{self.what}: epoch {training.epoch} of {self.epochs} done")
        # Every rank asks at the same steps, for asking waits for all.
        looks = stop is not None and (ended or training.step % LOOK == 0)
        if looks and dist.any_rank(stop.asked):
            self.save()
            dist.barrier()
            raise Stopped
        if ended:
            self._tick(1)

    def save(self) -> None:
        if dist.rank() == 0:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            content = io.BytesIO()
            torch.save(self.training.state_dict(), content)
            part = self.path.with_suffix(".part")
            with naming(self.path):
                part.write_bytes(content.getvalue())
                part.replace(self.path)
            self.saved = time.monotonic()

    def finish(self) -> None:
        """The result is written.  Of a command in several parts the training stays until the last one
        ends: where that is stopped, the same command does not train this one again."""
        if self.work.in_parts:
            self.save()
            self.work.finished.append(self.path)
        elif dist.rank() == 0:
            self.path.unlink(missing_ok=True)
