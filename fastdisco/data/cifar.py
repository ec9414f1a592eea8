"""CIFAR-10 and CIFAR-100 from their python archives, without running anything that such an archive
may hold.

N is the number of images."""

import io
import pickle
import re
import tarfile
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, NoReturn

import numpy as np

from fastdisco.common.errors import UserError


class Kind(NamedTuple):
    """The files in one of the two archives, and the keys that are read."""

    parts: dict[str, list[str]]  # {"train", "val"}: files with images
    labels: str  # key of their labels
    meta: str  # file with the names of the classes
    names: str  # key of these


KINDS = (
    Kind(
        {"train": [f"data_batch_{i}" for i in range(1, 6)], "val": ["test_batch"]},
        "labels",
        "batches.meta",
        "label_names",
    ),
    Kind({"train": ["train"], "val": ["test"]}, "fine_labels", "meta", "fine_label_names"),
)
LARGEST = 1 << 30  # bytes of a file in the archive; CIFAR's have 180 MB


def is_archive(src: Path) -> bool:
    """Whether the name is that of a tar.gz."""
    return src.is_file() and re.search(r"\.(tar\.gz|tgz)$", src.name) is not None


def load(src: Path) -> dict[str, tuple[np.ndarray, np.ndarray, list[str]]]:
    """{"train", "val"}: pixels [N,32,32,3] uint8, labels [N] int64 and class names.  The index of
    an image is its place in the archive.

    Nothing is unpacked to disk, and links in the archive are not followed.
    Raises UserError for anything that is not CIFAR's python version."""
    files = _files(src)
    kind = _kind_of(src, files)
    classes = _classes(src, kind, files)
    loaded = {}
    for part, names in kind.parts.items():
        batches = [_batch(src, name, files[name], kind.labels, len(classes)) for name in names]
        pixels, labels = zip(*batches)
        loaded[part] = np.ascontiguousarray(np.concatenate(pixels)), np.concatenate(labels), classes
    return loaded


def _files(src: Path) -> dict[str, bytes]:
    """The archive's regular files by the last part of their name."""
    found = {}
    try:
        with tarfile.open(src, "r:gz") as t:
            for m in t:
                if not m.isreg() or m.issparse():
                    continue
                if m.size > LARGEST:
                    raise UserError(
                        f"{src}: its file {m.name} has {m.size} bytes, more than any of CIFAR's; "
                        "is this the right archive?"
                    )
                # The binary version's data, and readme.html, need not be held.
                file = t.extractfile(m)
                if file and not re.search(r"\.(html|txt|binary)$", m.name):
                    found[PurePosixPath(m.name).name] = file.read()
    except (tarfile.TarError, OSError, EOFError, ValueError) as e:
        raise UserError(f"{src}: truncated or no tar.gz ({e}); download it again") from None
    return found


def _kind_of(src: Path, files: dict[str, bytes]) -> Kind:
    for kind in KINDS:
        needed = {kind.meta}.union(*kind.parts.values())
        if needed <= files.keys():
            return kind
    raise UserError(
        f"{src}: is not cifar-10-python.tar.gz or cifar-100-python.tar.gz (its files: "
        f"{', '.join(sorted(files)[:8]) or 'none'}); give one of them, or unpack the archive and "
        "give a folder of class folders"
    )


def _classes(src: Path, kind: Kind, files: dict[str, bytes]) -> list[str]:
    classes = _unpickled(src, kind.meta, files[kind.meta]).get(kind.names)
    if not (isinstance(classes, list) and classes):
        _foreign(src, kind.meta, f"no {kind.names}")
    if not all(isinstance(c, (bytes, str)) for c in classes):
        _foreign(src, kind.meta, f"no {kind.names}")
    return [_text(c) for c in classes]


def _batch(
    src: Path, name: str, content: bytes, key: str, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    """Pixels [n,32,32,3] and labels [n] of one file of the archive."""
    found = _unpickled(src, name, content)
    pixels, labels = found.get("data"), found.get(key)
    pixels = pixels.array() if isinstance(pixels, _Array) else None
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != 3072:
        _foreign(src, name, "no rows of 3072 bytes")
    one_each = isinstance(labels, list) and len(labels) == len(pixels)
    # Not isinstance, since True is an int, too.
    if not (one_each and all(type(x) is int and 0 <= x < classes for x in labels)):
        _foreign(src, name, f"{key} are not one class of {classes} for each image")
    # Stored as three planes a row.
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels, np.int64)


def _foreign(src: Path, name: str, what: str) -> NoReturn:
    raise UserError(
        f"{src}: its file {name} is not CIFAR's ({' '.join(what.split())}); download the archive "
        "again"
    ) from None


# ---- unpickling that runs nothing


def _unpickled(src: Path, name: str, content: bytes) -> dict[Any, Any]:
    try:
        found = _Inert(io.BytesIO(content), encoding="bytes").load()
    # A foreign pickle can raise anything.
    except Exception as e:
        _foreign(src, name, str(e))
    if not isinstance(found, dict):
        _foreign(src, name, "no dictionary")
    return {_text(key): value for key, value in found.items()}


def _text(x: Any) -> Any:
    """Bytes, which Python 2 wrote for text, as text; anything else as it is."""
    return x.decode(errors="replace") if isinstance(x, bytes) else x


class _Array:
    """Stands in for a numpy array while unpickling: keeps the state that it is given, does
    nothing."""

    def __init__(self, *_: Any) -> None:
        self.state = None

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def array(self) -> np.ndarray | None:
        """The array, where its state is that of an array of uint8; else None."""
        if not isinstance(self.state, tuple) or len(self.state) != 5:
            return None
        _, shape, dtype, fortran, data = self.state
        of_bytes = isinstance(dtype, _Dtype) and dtype.code in ("u1", b"u1")
        if not (of_bytes and isinstance(data, bytes)):
            return None
        try:
            return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")
        except (TypeError, ValueError):
            return None


class _Dtype:
    """Stands in for numpy's dtype."""

    def __init__(self, code: Any = None, *_: Any) -> None:
        self.code = code

    def __setstate__(self, state: Any) -> None:
        pass


def _latin1(text: str, encoding: Any) -> bytes:
    """Stands in for codecs.encode, by which Python 3 stores bytes in old pickles."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


KNOWN = {
    ("numpy.core.multiarray", "_reconstruct"): _Array,
    ("numpy._core.multiarray", "_reconstruct"): _Array,
    ("numpy", "ndarray"): _Array,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _latin1,
}


class _Inert(pickle.Unpickler):
    """Knows the few names that CIFAR's pickles need, and gives a stand-in for each: no code of
    numpy or of the pickle's choice is run."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in KNOWN:
            raise pickle.UnpicklingError(f"asks for {module}.{name}, which images do not need")
        return KNOWN[module, name]
