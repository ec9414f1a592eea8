"""CIFAR-10 and CIFAR-100 from their python archives, without running anything that such an archive
may hold."""

import io
import pickle
import re
import tarfile
from pathlib import Path, PurePosixPath

import numpy as np

from fastdisco.common.errors import UserError

# member -> the key of its labels; names and their key
KINDS = {
    "cifar-10": (
        {"train": [f"data_batch_{i}" for i in range(1, 6)], "val": ["test_batch"]},
        "labels",
        "batches.meta",
        "label_names",
    ),
    "cifar-100": ({"train": ["train"], "val": ["test"]}, "fine_labels", "meta", "fine_label_names"),
}
LARGEST = 1 << 30  # bytes of a member; CIFAR's have 180 MB


def is_archive(src: Path) -> bool:
    return src.is_file() and re.search(r"\.(tar\.gz|tgz)$", src.name) is not None


def load(src: Path) -> dict[str, tuple[np.ndarray, np.ndarray, list[str]]]:
    """{"train", "val"}: pixels [N,32,32,3] uint8, labels [N] int64 and class names; the index of an
    image is its place in the archive.

    Nothing is unpacked to disk, links in the archive are not followed.  Raises UserError for
    anything that is not CIFAR's python version."""
    members = _members(src)
    kind = next(
        (
            k
            for k, (parts, _, meta, _) in KINDS.items()
            if {meta, *sum(parts.values(), [])} <= members.keys()
        ),
        None,
    )
    if kind is None:
        raise UserError(
            f"{src}: is not cifar-10-python.tar.gz or cifar-100-python.tar.gz (its files: "
            f"{', '.join(sorted(members)[:8]) or 'none'}); give one of them, or unpack the archive "
            "and give a folder of class folders"
        )
    parts, labels, meta, names = KINDS[kind]
    classes = _unpickled(src, meta, members[meta]).get(names)
    if not (
        isinstance(classes, list) and classes and all(isinstance(c, (bytes, str)) for c in classes)
    ):
        raise _foreign(src, meta, f"no {names}")
    classes = [c.decode(errors="replace") if isinstance(c, bytes) else c for c in classes]
    return {
        part: (
            *_together([_batch(src, m, members[m], labels, len(classes)) for m in files]),
            classes,
        )
        for part, files in parts.items()
    }


def _members(src: Path) -> dict[str, bytes]:
    """The archive's regular files by their last name."""
    try:
        with tarfile.open(src, "r:gz") as t:
            out = {}
            for m in t:
                if m.isreg() and not m.issparse():
                    if m.size > LARGEST:
                        raise UserError(
                            f"{src}: its file {m.name} has {m.size} bytes, more than any of "
                            "CIFAR's; is this the right archive?"
                        )
                    if not re.search(r"\.(html|txt|binary)$", m.name):
                        out[PurePosixPath(m.name).name] = t.extractfile(m).read()
            return out
    except (tarfile.TarError, OSError, EOFError, ValueError) as e:
        raise UserError(f"{src}: truncated or no tar.gz ({e}); download it again") from None


def _batch(
    src: Path, name: str, content: bytes, key: str, classes: int
) -> tuple[np.ndarray, np.ndarray]:
    d = _unpickled(src, name, content)
    pixels, labels = d.get("data"), d.get(key)
    pixels = pixels.array() if isinstance(pixels, _Array) else None
    if pixels is None or pixels.ndim != 2 or pixels.shape[1] != 3072:
        raise _foreign(src, name, "no rows of 3072 bytes")
    if not (
        isinstance(labels, list)
        and len(labels) == len(pixels)
        and all(type(x) is int and 0 <= x < classes for x in labels)
    ):
        raise _foreign(src, name, f"{key} are not one class of {classes} for each image")
    return pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1), np.array(labels, np.int64)


def _together(batches) -> tuple[np.ndarray, np.ndarray]:
    pixels, labels = zip(*batches)
    return np.ascontiguousarray(np.concatenate(pixels)), np.concatenate(labels)


def _unpickled(src: Path, name: str, content: bytes) -> dict:
    try:
        d = _Inert(io.BytesIO(content), encoding="bytes").load()
    except Exception as e:  # whatever a foreign pickle brings about
        raise _foreign(src, name, str(e)) from None
    if not isinstance(d, dict):
        raise _foreign(src, name, "no dictionary")
    return {k.decode(errors="replace") if isinstance(k, bytes) else k: v for k, v in d.items()}


def _foreign(src: Path, name: str, what: str) -> UserError:
    return UserError(
        f"{src}: its file {name} is not CIFAR's ({' '.join(what.split())}); download the archive "
        "again"
    )


class _Array:
    """Stands for a numpy array while unpickling: keeps the state it is given, does nothing."""

    def __init__(self, *_):
        self.state = None

    def __setstate__(self, state):
        self.state = state

    def array(self) -> np.ndarray | None:
        """The array where its state is one of bytes."""
        try:
            _, shape, dtype, fortran, data = self.state
            if (
                isinstance(dtype, _Dtype)
                and dtype.code in ("u1", b"u1")
                and isinstance(data, bytes)
            ):
                return np.frombuffer(data, np.uint8).reshape(shape, order="F" if fortran else "C")
        except (TypeError, ValueError):
            pass
        return None


class _Dtype:
    def __init__(self, code=None, *_):
        self.code = code

    def __setstate__(self, state):
        pass


def _latin1(text: str, encoding: str) -> bytes:
    """How Python 3 stores bytes in old pickles."""
    if encoding not in ("latin1", b"latin1"):
        raise pickle.UnpicklingError(f"text encoded as {encoding!r}")
    return text.encode("latin1")


class _Inert(pickle.Unpickler):
    """Knows the few names that CIFAR's pickles need, and gives a stand-in for each: no code of
    numpy or of the pickle's choice is run."""

    KNOWN = {(f"numpy.{core}.multiarray", "_reconstruct"): _Array for core in ("core", "_core")} | {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _latin1,
    }

    def find_class(self, module, name):
        if (module, name) not in self.KNOWN:
            raise pickle.UnpicklingError(f"asks for {module}.{name}, which images do not need")
        return self.KNOWN[module, name]
