"""Files that are whole or not there."""

import os
from pathlib import Path


def write_whole(path: Path, text: str):
    """The file has all of the text, or what it had before; several processes may write the same."""
    part = path.with_name(f".{path.name}.{os.urandom(6).hex()}.part")
    with part.open("w", errors="surrogateescape") as f:  # names of files are bytes
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    os.replace(part, path)
