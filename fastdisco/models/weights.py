"""Weights from files: read without running code from them, and copied strictly into a network; and
weights into files for others."""

import pickle
import re
import shlex
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from fastdisco.common.console import shorten
from fastdisco.common.errors import UserError
from fastdisco.common.files import open_regular
from fastdisco.models import manifest
from fastdisco.models.pickles import HARMLESS

# Keeps of a file the weights alone, where there are whole networks and other objects in it.  By torch
# alone, since it must run where the code of those objects is; in one line, to be copied.
_REWRITE = (
    "import sys, torch; "
    "weights = lambda x: weights(x.state_dict()) if isinstance(x, torch.nn.Module) "
    "else {str(k): weights(v) for k, v in x.items()} if isinstance(x, dict) "
    "else x if torch.is_tensor(x) else None; "
    'torch.save(weights(torch.%s(sys.argv[1], map_location="cpu"%s)), sys.argv[2])'
)
# Characters that are shown of a name in a pickle.
_LONGEST = 100
_PICKLE = _REWRITE % ("load", ", weights_only=False")
_SCRIPT = _REWRITE % ("jit.load", "")


def read(file: Path) -> dict[str, Any]:
    """What torch.save or safetensors wrote, on the CPU.  No code from the file runs (weights_only).

    The tensors of a torch file that is a zip are mapped, not read, until they are used.  Raises
    UserError for a missing, damaged or unsafe file, for one that holds no dict, or that is not the
    one in the manifest beside it."""
    try:
        open_regular(file).close()
        manifest.verify(Path(file))
    except OSError as e:
        raise UserError(
            f"{file}: cannot be read ({e.strerror}); give the path of an existing checkpoint"
        ) from None
    try:
        found = _contents(file)
    # torch's readers raise RuntimeError, EOFError, OSError, struct.error ... wherever the bytes
    # stop making sense.
    except Exception as e:
        raise UserError(_refusal(file, e)) from None
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


def plain(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Copies on the CPU, each with a memory of its own and its dimensions in the usual order."""
    usual = torch.contiguous_format
    return {k: x.detach().cpu().clone(memory_format=usual) for k, x in weights.items()}


def as_safetensors(weights: Mapping[str, Tensor]) -> bytes:
    """The content of a safetensors file, as timm and the Hugging Face hub expect it."""
    return safetensors.torch.save(plain(weights), metadata={"format": "pt"})


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
    with torch.serialization.safe_globals(HARMLESS), warnings.catch_warnings():
        # Of another pickle protocol, or of TorchScript; where it matters, an error follows.
        warnings.filterwarnings(
            "ignore", "Detected pickle protocol|'torch.load' received a zip file"
        )
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


def _refusal(file: Path, error: Exception) -> str:
    """What to tell of a file that torch's reader gave up with `error`."""
    found = str(error)
    if "TorchScript" in found:
        return _unsafe(file, "it is a TorchScript archive, and loading one can run code", _SCRIPT)
    if isinstance(error, pickle.UnpicklingError):
        if asked := re.search(r"GLOBAL (\S+)", found):
            # The file decides how long it is, and whether a terminal takes it for a command.
            name = ascii(asked[1])[1:-1]
            name = name if len(name) <= _LONGEST else f"{name[:_LONGEST]}..."
            why = f"its pickle asks for {name}, and building what a pickle asks for can run code"
            return _unsafe(file, why, _PICKLE)
        if "Unsupported operand" in found and (protocol := _protocol(file)) > 2:
            why = f"its pickle is of protocol {protocol}, and without running code torch reads 2 alone"
            return _unsafe(file, why, _PICKLE)
    return (
        f"{file}: not a readable torch checkpoint (cut short, damaged, or of another kind); "
        "copy or download it again and compare its size or checksum"
    )


def _unsafe(file: Path, why: str, code: str) -> str:
    # The file's name is an argument and no part of the code, so that it cannot bring code of its own.
    command = shlex.join(["python", "-c", code, str(file), "weights.pth.tar"])
    return (
        f"{file}: refused, since {why}; if you trust its author, run this in a throw-away container "
        f"without network, in a folder with the training's code, and give what it writes: `{command}`"
    )


def _protocol(file: Path) -> int:
    """Of the file's pickle, by its first two bytes; 0 where they say none."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as records:
            name = next((n for n in records.namelist() if n.endswith("/data.pkl")), None)
            start = records.read(name)[:2] if name else b""
    else:
        with open(file, "rb") as f:
            start = f.read(2)
    return start[1] if len(start) == 2 and start[0] == pickle.PROTO[0] else 0
