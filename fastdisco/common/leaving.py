"""The end of a rank's process, at once: Python would free every object of torch, DeepSpeed and DALI
first, some two seconds of a core that the system frees in a tenth.  When a machine is about to be
taken away, or many processes share it, that is too long."""

import atexit
import os
import sys

_code: list[int] = []


def prepare() -> None:
    """Call it before libraries are imported: what is registered first is called last at the exit."""
    atexit.register(_leave)


def with_code(code: int) -> int:
    """The exit code that this process ends with.  An exception later, or none, ends it as usual."""
    _code.append(code)
    return code


def _leave() -> None:
    if _code:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(_code[-1])
