"""Weights from files: read without running code from them, and copied strictly into a network."""

import argparse
import pathlib
import pickle
import re
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fastdisco.common.console import shorten
from fastdisco.common.errors import UserError

# Beside tensors and torch's own list, what a pickle may ask for: plain values, the command line in
# DINO's checkpoints.
_HARMLESS: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    argparse.Namespace,
    (pathlib.PosixPath, "pathlib.PosixPath"),
]


def read(file: Path) -> dict[str, Any]:
    """What torch.save or safetensors wrote, on the CPU.  No code from the file runs (weights_only).

    The tensors of a torch file that is a zip are mapped, not read, until they are used.  Raises
    UserError for a missing, damaged or unsafe file, or one that holds no dict."""
    try:
        open(file, "rb").close()
    except OSError as e:
        raise UserError(
            f"{file}: cannot be read ({e.strerror}); give the path of an existing checkpoint"
        ) from None
    try:
        found = _contents(file)
    # torch's readers raise RuntimeError, EOFError, OSError, struct.error ... wherever the bytes
    # stop making sense.
    except Exception as e:
        asked = isinstance(e, pickle.UnpicklingError) and re.search(r"GLOBAL (\S+)", str(e))
        raise UserError(_unsafe(file, asked[1]) if asked else _damaged(file)) from None
    if not isinstance(found, dict):
        raise UserError(
            f"{file}: holds a {type(found).__name__}, not a dict of weights; give a checkpoint file"
        )
    return found


def load_weights(net: nn.Module, weights: dict[str, Any], source: Path | str, remedy: str) -> None:
    """Copies named weights into the network; every name and shape must agree.

    Only batch norm's counters of batches may be missing, which nothing here reads.

    Raises UserError, which names `source`, with the names that do not agree and the remedy, or with
    the weights that are not finite numbers.  The network is unchanged then."""
    own = net.state_dict()
    _refuse_disagreement(own, weights, source, remedy)
    common = {name: x for name, x in own.items() if name in weights}
    broken = [
        name
        for name, x in common.items()
        # On the meta device there are only shapes to compare.
        if x.is_floating_point() and not x.is_meta and not _finite(weights[name])
    ]
    if broken:
        raise UserError(
            f"{source}: not finite real numbers: {shorten(broken)}; its training broke down or the "
            "file is damaged: take another"
        )
    # Not strict, for the counters; all else is there.
    net.load_state_dict(weights, strict=False)


def _contents(file: Path) -> object:
    if Path(file).suffix == ".safetensors":
        return safetensors.torch.load_file(file)
    # torch before 1.6 wrote no zip files.
    zipped = zipfile.is_zipfile(file)
    if zipped:
        with zipfile.ZipFile(file) as records:
            # torch does not compare the checksums of what it maps.
            if records.testzip():
                raise zipfile.BadZipFile
    with torch.serialization.safe_globals(_HARMLESS):
        return torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)


def _refuse_disagreement(
    own: dict[str, Any], weights: dict[str, Any], source: Path | str, remedy: str
) -> None:
    missing = [k for k in own if k not in weights and not k.endswith(".num_batches_tracked")]
    unexpected = [k for k in weights if k not in own]
    other_shape = []
    for name, x in own.items():
        if name in weights and (found := _shape(weights[name])) != tuple(x.shape):
            other_shape.append(f"{name} {found} for {tuple(x.shape)}")
    wrong = {"missing": missing, "unexpected": unexpected, "of another shape": other_shape}
    told = [f"{what}: {shorten(names)}" for what, names in wrong.items() if names]
    if told:
        raise UserError(f"{source}: {'; '.join(told)}; {remedy}")


def _shape(x: object) -> tuple[int, ...] | str:
    return tuple(x.shape) if isinstance(x, Tensor) else type(x).__name__


def _finite(x: Tensor) -> bool:
    plain = x.is_floating_point() and x.layout == torch.strided and not x.is_meta
    return plain and bool(x.isfinite().all())


def _unsafe(file: Path, asked: str) -> str:
    return (
        f"{file}: refused, since its pickle asks for {asked}, and building what a pickle asks for "
        "can run code; if you trust its author, run this in a throw-away container without network "
        f"and give what it writes: torch.save({{k: v for k, v in torch.load('{file}', "
        "map_location='cpu', weights_only=False).items() if k in ('state_dict', 'model', "
        f"'teacher') or torch.is_tensor(v)}}, 'weights.pth.tar')"
    )


def _damaged(file: Path) -> str:
    return (
        f"{file}: not a readable torch checkpoint (cut short, damaged, or of another kind); "
        "copy or download it again and compare its size or checksum"
    )
