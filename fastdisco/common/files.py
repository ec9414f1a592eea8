"""Files that are written completely or not at all."""

import os
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Writes the text through a temporary file beside it, which then takes the file's name.

    Whenever the process is killed, the file has either its old content or all of the new.  Several
    processes may write the same file at once: each has a temporary file of its own."""
    part = path.with_name(f".{path.name}.{os.urandom(6).hex()}.part")
    # A file name is bytes and need not be valid UTF-8; Python hands such bytes over as surrogates.
    with part.open("w", errors="surrogateescape") as f:
        f.write(text)
        f.flush()
        # Without this the new name could reach the disk before the content.
        os.fsync(f.fileno())
    os.replace(part, path)
