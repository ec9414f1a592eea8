"""TensorBoard's event files, written without a thread of their own, so that an error is met where it
can be told."""

import importlib
import io
import os
import platform
import time
from pathlib import Path
from typing import Any

from fastdisco.run.appended import Appended


class Board:
    """The scalars of one attempt of a run, in an event file of its own."""

    def __init__(self, folder: Path, start: int) -> None:
        """start: the step that the run continues at; TensorBoard drops what earlier attempts wrote
        after it.  Raises OSError where the file cannot be made."""
        # Imported here: only rank 0 needs them, and protocol buffers take their time.
        events: Any = importlib.import_module("tensorboard.compat.proto.event_pb2")
        summaries: Any = importlib.import_module("tensorboard.compat.proto.summary_pb2")
        self._event, self._summary = events.Event, summaries.Summary
        folder.mkdir(exist_ok=True)
        # TensorBoard reads them in the order of their names.
        second, rest = divmod(time.time_ns(), 10**9)
        stamp = f"{second:010}.{rest:09}.{platform.node()}.{os.getpid()}"
        self._file = Appended(folder / f"events.out.tfevents.{stamp}", 0)
        now, begun = time.time(), events.SessionLog(status=events.SessionLog.START)
        version = events.Event(wall_time=now, file_version="brain.Event:2")
        purge = events.Event(wall_time=now, step=start + 1, session_log=begun)
        self._file.add(_record(version.SerializeToString()) + _record(purge.SerializeToString()))

    def write(self, step: int, values: dict[str, float]) -> None:
        scalars = [self._summary.Value(tag=k, simple_value=float(v)) for k, v in values.items()]
        event = self._event(wall_time=time.time(), step=step, summary=self._summary(value=scalars))
        self._file.add(_record(event.SerializeToString()))

    def close(self) -> None:
        self._file.close()


def _record(content: bytes) -> bytes:
    """The content with its length and checksums, as in a TFRecord file."""
    from tensorboard.summary.writer.record_writer import RecordWriter

    found = io.BytesIO()
    RecordWriter(found).write(content)
    return found.getvalue()
