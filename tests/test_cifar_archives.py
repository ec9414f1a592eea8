"""CIFAR's archives: packed without loss, and evil ones that run nothing."""

import io
import os
import pickle
import shlex
import tarfile

import numpy as np
import torch
from image_sets import CPU, refuse
from PIL import Image

from fastdisco import cli, data
from fastdisco.data import pack

# --- CIFAR


def archive(path, files):
    with tarfile.open(path, "w:gz") as t:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))


def cifar10(change=None):
    rng = np.random.default_rng(0)
    names = [
        b"airplane",
        b"automobile",
        b"bird",
        b"cat",
        b"deer",
        b"dog",
        b"frog",
        b"horse",
        b"ship",
        b"truck",
    ]
    # As it was in 2009.
    dump = lambda x: pickle.dumps(x, protocol=2).replace(
        b"cnumpy._core.multiarray\n", b"cnumpy.core.multiarray\n"
    )
    batch = lambda n: {
        b"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
        b"labels": rng.integers(0, 10, n).tolist(),
    }
    batches = {f"data_batch_{i}": batch(4 + i) for i in range(1, 6)} | {"test_batch": batch(6)}
    return batches, {k: dump(v) for k, v in batches.items()} | {
        "batches.meta": dump({b"label_names": names}),
        "readme.html": b"x",
    } | (change or {})


def test_cifar_archives_are_packed_without_loss(tmp_path):
    batches, files = cifar10()
    archive(tmp_path / "cifar-10-python.tar.gz", files)
    assert (
        cli.main(["data", "pack", str(tmp_path / "cifar-10-python.tar.gz"), str(tmp_path / "c")])
        == 0
    )
    five = [batches[f"data_batch_{i}"] for i in range(1, 6)]
    want = np.concatenate([part[b"data"] for part in five]).reshape(-1, 3, 32, 32)
    labels_of_five = [label for part in five for label in part[b"labels"]]
    for part, pixels, labels in (
        ("train", want, labels_of_five),
        (
            "val",
            batches["test_batch"][b"data"].reshape(-1, 3, 32, 32),
            batches["test_batch"][b"labels"],
        ),
    ):
        found = data.listing(tmp_path / "c" / part)
        assert found.labels.tolist() == labels and found.classes[9] == "truck"
        for i, x in enumerate(pixels):
            image = Image.open(io.BytesIO(found.read(i)))
            assert image.format == "PNG" and np.array_equal(np.asarray(image).transpose(2, 0, 1), x)
        views = next(
            iter(data.EvalLoader(found, 32, 32, len(pixels), 1, CPU, mean=(0,) * 3, std=(1,) * 3))
        ).views[0]
        assert torch.equal((views * 255).round().byte(), torch.from_numpy(pixels))
    pack.pack(tmp_path / "cifar-10-python.tar.gz", tmp_path / "j", jpeg=95)
    assert data.listing(tmp_path / "j/val").read(0)[:3] == b"\xff\xd8\xff"
    refuse(pack.pack, tmp_path / "c/val", tmp_path / "k", jpeg=95, parts=["--jpeg"])
    rng = np.random.default_rng(1)
    part = lambda n: pickle.dumps(
        {
            b"data": rng.integers(0, 256, (n, 3072), dtype=np.uint8),
            b"fine_labels": list(range(n)),
            b"coarse_labels": [0] * n,
        }
    )
    meta = pickle.dumps({b"fine_label_names": [b"c%d" % i for i in range(100)]})
    archive(
        tmp_path / "cifar-100-python.tar.gz", {"train": part(20), "test": part(9), "meta": meta}
    )
    pack.pack(tmp_path / "cifar-100-python.tar.gz", tmp_path / "h")
    assert (
        data.listing(tmp_path / "h/train").labels.tolist() == list(range(20))
        and len(data.listing(tmp_path / "h/val").classes) == 100
    )


class Evil:
    def __init__(self, call, *args):
        self.call = call, args

    def __reduce__(self):
        return self.call


def test_an_evil_cifar_archive_runs_nothing(tmp_path):
    mark = tmp_path / "mark"

    bad = {
        "system": pickle.dumps({b"data": Evil(os.system, f"touch {shlex.quote(str(mark))}")}, 2),
        "eval": pickle.dumps(Evil(eval, f"open({str(mark)!r}, 'w')"), 2),
        "getattr": b"cbuiltins\ngetattr\n(cos\nsystem\nS'x'\ntR.",
        "numpy": pickle.dumps(Evil(np.fromfile, str(mark)), 2),
        "codec": pickle.dumps(Evil(__import__("_codecs").encode, "x" * 9, "zip"), 2),
        "cut": cifar10()[1]["data_batch_2"][:-500],
        "objects": pickle.dumps(
            {b"data": np.array([[None] * 3072] * 6, object), b"labels": [0] * 6}, 2
        ),
        "floats": pickle.dumps({b"data": np.zeros((6, 3072)), b"labels": [0] * 6}, 2),
        "shape": pickle.dumps({b"data": np.zeros((6, 100), np.uint8), b"labels": [0] * 6}, 2),
        "labels": pickle.dumps(
            {b"data": np.zeros((6, 3072), np.uint8), b"labels": [0, 1, 2, 3, 4, 10]}, 2
        ),
        "list": pickle.dumps([1], 2),
        "text": b"not a pickle",
    }
    for name, content in bad.items():
        archive(tmp_path / "cifar-10-python.tar.gz", cifar10({"data_batch_2": content})[1])
        refuse(
            pack.pack,
            tmp_path / "cifar-10-python.tar.gz",
            tmp_path / name,
            parts=["data_batch_2", "is not CIFAR's"],
        )
        assert not mark.exists() and not (tmp_path / name).exists()
    link = tarfile.TarInfo("cifar-10-batches-py/data_batch_1")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    with tarfile.open(tmp_path / "cifar-10-python.tar.gz", "w:gz") as t:
        t.addfile(link)
    refuse(
        pack.pack,
        tmp_path / "cifar-10-python.tar.gz",
        tmp_path / "x",
        parts=["is not cifar-10-python.tar.gz"],
    )
    (tmp_path / "cifar-10-python.tar.gz").write_bytes(b"\x1f\x8b garbage")
    refuse(pack.pack, tmp_path / "cifar-10-python.tar.gz", tmp_path / "x", parts=["no tar.gz"])
