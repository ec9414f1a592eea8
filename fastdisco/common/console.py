"""What a command prints on the terminal.

`console` is the one rich.Console of the process, for tables and progress bars.  It is made when it
is first asked for: importing rich takes longer than a command needs to print its help."""

import functools
import io
import sys
from typing import TYPE_CHECKING

from fastdisco.common import launch
from fastdisco.common.errors import UserError

if TYPE_CHECKING:
    from rich.console import Console

    console: Console


def say(text: str, anywhere: bool = False) -> None:
    """Prints one line, above the progress bar if there is one.

    Only rank 0 prints, unless `anywhere`; then any rank does, and ranks other than 0 put their
    number before the text."""
    rank = launch.rank()
    if rank == 0 or anywhere:
        line = f"rank {rank}: {text}" if rank else text
        _console().print(line, markup=False, soft_wrap=True)


def escape_what_cannot_be_shown() -> None:
    """Lets the terminal show, escaped, the characters that its encoding lacks, where Python would
    end the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def refuse(error: UserError) -> int:
    """Prints the error that ends a command on stderr; returns the command's exit code.

    Ranks other than 0 print it only where the error may be theirs alone (`error.anywhere`)."""
    if launch.rank() == 0 or error.anywhere:
        print(f"fastdisco: error: {error}", file=sys.stderr, flush=True)
    return 2


def shorten(names: list[str], show: int = 4) -> str:
    """'a, b, c, d and 7 more'"""
    left = len(names) - show
    return ", ".join(names[:show]) + (f" and {left} more" if left > 0 else "")


@functools.cache
def _console() -> "Console":
    from rich.console import Console

    return Console(highlight=False)


def __getattr__(name: str) -> object:
    """Makes `console` an attribute of this module without importing rich with it (PEP 562)."""
    if name == "console":
        return _console()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
