"""What a command says on the terminal; rank 0 only, unless one rank alone knows."""

import sys

from rich.console import Console

from fastdisco.common import launch
from fastdisco.common.errors import UserError

console = Console(highlight=False)


def say(text: str, anywhere: bool = False):
    """One line of rank 0, or of any with its number, above the bar where there is one."""
    if launch.rank() == 0 or anywhere:
        console.print(
            f"rank {launch.rank()}: {text}" if launch.rank() else text, markup=False, soft_wrap=True
        )


def refuse(error: UserError) -> int:
    """Says a command's error on stderr; the exit code."""
    if launch.rank() == 0 or error.anywhere:
        print(f"fastdisco: error: {error}", file=sys.stderr, flush=True)
    return 2


def shorten(names: list[str], show: int = 4) -> str:
    """'a, b, c, d and 7 more'"""
    return ", ".join(names[:show]) + (f" and {len(names) - show} more" if len(names) > show else "")
