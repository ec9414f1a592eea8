"""A backbone as an ONNX file, how near the file is to the network, and the file as a network.

Letters: B images, S pixels, F features."""

import contextlib
import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from fastdisco.common.errors import UserError

# A file that lost too much accuracy has the second.
_SUFFIXES = (".onnx", ".onnx.rejected")
# onnxruntime's static quantisation refuses or breaks files of opset 21 and above.
OPSETS = (18, 19, 20)
# Of the largest feature: how far the file may be from the network.
NEAR = 1e-4
INPUT, OUTPUT = "image", "features"
# Key of the file's metadata under which ours is, as JSON.
_KEY = "fastdisco"


def is_onnx(path: Path) -> bool:
    """Whether the name is that of an ONNX file."""
    return path.name.endswith(_SUFFIXES)


def needed() -> None:
    """Raises UserError where a package of the extra is not installed."""
    names = ("onnx", "onnxruntime", "onnxscript")
    if absent := [name for name in names if importlib.util.find_spec(name) is None]:
        raise UserError(
            f"--to onnx, int8: {', '.join(absent)} is not installed; pip install 'fastdisco[onnx]'"
        )


def write(
    backbone: nn.Module, size: int, path: Path, told: dict[str, Any], opset: int = OPSETS[0]
) -> None:
    """The file: `image` [B,3,S,S] float32, normalised -> `features` [B,F] float32, for any B.

    backbone  on the CPU, in eval mode
    told      goes into the file's metadata, see `about`
    Raises UserError where torch cannot export the network."""
    import onnx

    assert opset in OPSETS, opset
    # An example of one image would make the file take one image only (pytorch#148886).
    example = torch.zeros(2, 3, size, size)
    batch = {0: torch.export.Dim("batch")}
    names: dict[str, Any] = dict(input_names=[INPUT], output_names=[OUTPUT])
    try:
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                backbone,
                (example,),
                dynamo=True,
                opset_version=opset,
                dynamic_shapes=(batch,),
                verbose=False,
                **names,
            )
    # Whatever the exporter trips over.
    except Exception as e:
        first = str(e).strip().splitlines()[0] if str(e).strip() else ""
        raise UserError(
            f"--to onnx: torch cannot export this network ({type(e).__name__}: {first}); leave onnx "
            "and int8 out of --to"
        ) from e
    assert program is not None
    model = program.model_proto
    _name_layers(model)
    model.metadata_props.add(key=_KEY, value=json.dumps(told))
    onnx.checker.check_model(model, full_check=True)
    onnx.save(model, path)


def about(path: Path) -> dict[str, Any]:
    """What `write` was told.  Raises UserError where the file is none of ours, or is damaged."""
    needed()
    import onnx

    try:
        model = onnx.load(path, load_external_data=False)
        found = {p.key: p.value for p in model.metadata_props}
    # protobuf's own errors, which differ by version.
    except Exception:
        raise UserError(f"{path}: is no readable ONNX file; export it again") from None
    if _KEY not in found:
        raise UserError(
            f"{path}: was not written by fastdisco export, so its normalisation is not known; give a "
            "file that was"
        )
    return json.loads(found[_KEY])


class Session(nn.Module):
    """An ONNX file as a network, [B,3,S,S] -> [B,F] float32 on the input's device; it computes on
    the CPU by onnxruntime."""

    def __init__(self, path: Path, threads: int = 0) -> None:
        """threads: 0 means onnxruntime's own choice, a thread for each core.  Raises UserError for
        a file that onnxruntime cannot run."""
        super().__init__()
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        # Warnings are of no use to the user: the file is ours.
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(
                str(path), options, providers=["CPUExecutionProvider"]
            )
        # onnxruntime's errors have no common class of their own.
        except Exception as e:
            raise UserError(f"{path}: onnxruntime cannot run it ({e}); export it again") from None
        self.num_features = self.session.get_outputs()[0].shape[-1]

    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.run(x.float().cpu().numpy())).to(x.device)

    def run(self, x: np.ndarray) -> np.ndarray:
        return self.session.run(None, {INPUT: x})[0]


@torch.no_grad()
def parity(backbone: nn.Module, path: Path, images: Iterable[Tensor]) -> float:
    """The largest difference of the file's features from the network's, relative to the largest
    feature, over batches of real images [B,3,S,S] and over their first image alone.

    Raises UserError where it is above NEAR."""
    session, found = Session(path), []
    for i, batch in enumerate(images):
        parts = (batch[:1], batch) if i == 0 else (batch,)
        found += [compare(backbone(x), session(x)) for x in parts]
    # Python's max would lose a nan.
    off = float(np.max(found))
    # So written that nan fails, too.
    if not off <= NEAR:
        raise UserError(
            f"--to onnx: the file's features differ by {off:.2g} of the largest from the network's, "
            f"more than {NEAR:g}; leave onnx and int8 out of --to"
        )
    return off


def compare(want: Tensor, got: Tensor) -> float:
    """The largest difference, relative to the largest number wanted; nan where one is none."""
    return float((got - want).abs().max() / want.abs().max().clamp_min(1e-12))


def _name_layers(model: Any) -> None:
    """Gives every node with weights the name of its module, so that people know it."""
    weights = {w.name for w in model.graph.initializer}
    taken: set[str] = set()
    for node in model.graph.node:
        if node.op_type not in ("Conv", "Gemm", "MatMul"):
            continue
        named = [
            x.removesuffix(".weight") for x in node.input if x.endswith(".weight") and x in weights
        ]
        name = named[0] if named else _module(node) or node.name
        while name in taken:
            name += "'"
        taken.add(name)
        node.name = name


def _module(node: Any) -> str:
    """The innermost module that the node was made in, by the exporter's notes; '' without one."""
    scopes = [p.value for p in node.metadata_props if p.key == "pkg.torch.onnx.name_scopes"]
    parts = json.loads(scopes[0].replace("'", '"')) if scopes else []
    return parts[-2] if len(parts) > 1 else ""


@contextlib.contextmanager
def _quiet() -> Any:
    """The exporter prints its progress and warns of what it does itself."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        before = logging.root.manager.disable
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(before)
