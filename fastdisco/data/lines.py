r"""The text files that name images, one a line: list files and quarantines.

File names are bytes and need not be UTF-8; Python hands such bytes over as surrogates.  A line that
begins with `#` is a comment.  A name that begins with `#` or `\` stands there with a `\` before
it, so that no name is taken for a comment."""

import codecs
import os
import shlex
from pathlib import Path

from fastdisco.common.files import open_regular


def read(path: Path) -> list[str]:
    """The lines of a text file, without a byte-order mark.

    Raises OSError, and ValueError for a file that is no UTF-8 text."""
    with open_regular(path) as f:
        content = f.read()
    if content.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise ValueError("it is UTF-16; save it as UTF-8")
    if b"\0" in content:
        raise ValueError("it holds zero bytes, which no text does")
    text = content.removeprefix(codecs.BOM_UTF8).decode(errors="surrogateescape")
    return text.replace("\r\n", "\n").replace("\r", "\n").split("\n")


def is_comment(line: str) -> bool:
    """Whether the line names no image."""
    return not line or line.startswith("#")


def escaped(name: str) -> str:
    """A name as it stands at the beginning of a line."""
    return f"\\{name}" if name.startswith(("#", "\\")) else name


def unescaped(text: str) -> str:
    """The name that stands at the beginning of a line."""
    return text[1:] if text.startswith("\\") else text


def is_utf8(name: str) -> bool:
    """Whether a name can be printed, and given to a library that takes text."""
    return not any("\ud800" <= c <= "\udfff" for c in name)


def printable(text: str) -> str:
    """The text with a mark in place of each byte that a terminal may not be able to show."""
    return text.encode(errors="surrogateescape").decode(errors="replace")


def for_shell(name: str) -> str:
    """An image's name as an argument of a command that the user copies from the terminal."""
    # An option begins with a dash.
    return quoted(f"./{name}" if name.startswith("-") else name)


def quoted(name: str) -> str:
    """A name as bash reads it back, whatever bytes it has."""
    if is_utf8(name):
        return shlex.quote(name)
    shown = {ord("'"): r"\'", ord("\\"): r"\\"}
    as_is = lambda byte: chr(byte) if 32 <= byte < 127 else f"\\x{byte:02x}"
    # Bash's form for any bytes.
    return "$'" + "".join(shown.get(b) or as_is(b) for b in os.fsencode(name)) + "'"
