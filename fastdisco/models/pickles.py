"""What a pickle may ask for beside tensors and torch's own list: plain values.

`torch.load(weights_only=True)` calls what a pickle names, so that each name here is a way in.
Where the real thing could do more than hold a value, a stand-in takes its place:
numpy's own `dtype.__setstate__` takes a file's word for sizes and offsets in memory."""

import argparse
import pathlib
import pickle
import struct
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

# numpy's codes of numbers, and struct's.
_NUMBERS = {
    "b1": "?",
    "i1": "b",
    "i2": "h",
    "i4": "i",
    "i8": "q",
    "u1": "B",
    "u2": "H",
    "u4": "I",
    "u8": "Q",
    "f2": "e",
    "f4": "f",
    "f8": "d",
    "c8": "ff",
    "c16": "dd",
}
_UTF32 = {"<": "utf-32-le", ">": "utf-32-be"}


class Dtype:
    """In the place of numpy.dtype: its code, as 'f8', and its byte order."""

    def __init__(self, code: str, *_: object) -> None:
        self.code = code
        self.order = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        # numpy's is (version, byte order, ...); the rest describes structs and arrays.
        self.order = ">" if state[1] == ">" else "<"


class Ndarray:
    """In the place of numpy.ndarray: that there was one, as in the state of a random generator."""

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        pass


def scalar(dtype: Dtype, raw: bytes) -> bool | int | float | complex | str | bytes:
    """In the place of numpy.core.multiarray.scalar: Python's own number or text.

    Raises UnpicklingError for what is neither (objects, structs, dates), struct.error where there
    are more or fewer bytes than the number has."""
    code = dtype.code
    if code[:1] == "U":
        return raw.decode(_UTF32[dtype.order]).rstrip("\0")
    if code[:1] == "S":
        return bytes(raw).rstrip(b"\0")
    if code not in _NUMBERS:
        raise pickle.UnpicklingError(f"GLOBAL numpy.dtype({code!r})")
    parts = struct.unpack(dtype.order + _NUMBERS[code], raw)
    return complex(*parts) if len(parts) == 2 else parts[0]


def _no_array(*_: object) -> Ndarray:
    """In the place of numpy.core.multiarray._reconstruct."""
    return Ndarray()


def _no_default(*_: object) -> dict[Any, Any]:
    """In the place of collections.defaultdict: a dict, which never calls the factory."""
    return {}


# (what is called, the name in the file).
HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    # The command line, in DINO's checkpoints.
    argparse.Namespace,
    # Paths that no method of can reach a disk.  Python 3.13 writes them by the second name.
    (pathlib.PurePosixPath, "pathlib.PosixPath"),
    (pathlib.PurePosixPath, "pathlib._local.PosixPath"),
    (pathlib.PureWindowsPath, "pathlib.WindowsPath"),
    (pathlib.PureWindowsPath, "pathlib._local.WindowsPath"),
    # numpy 1 and numpy 2 name their modules differently.
    (scalar, "numpy.core.multiarray.scalar"),
    (scalar, "numpy._core.multiarray.scalar"),
    (_no_array, "numpy.core.multiarray._reconstruct"),
    (_no_array, "numpy._core.multiarray._reconstruct"),
    (Ndarray, "numpy.ndarray"),
    (Dtype, "numpy.dtype"),
    (_no_default, "collections.defaultdict"),
    (OrderedDict, "collections.OrderedDict"),
    # As factories of a defaultdict.
    *((kind, f"builtins.{kind.__name__}") for kind in (bool, dict, float, int, list, str, tuple)),
]
