"""An ONNX file in int8 by onnxruntime's static quantisation: convolutions and matrix products alone,
weights per channel, in QDQ form; and the search for the layers that must stay in float.

Small networks with hard-swish, swish and squeeze-excite can lose most of their accuracy in int8, so
a file is taken for good only by what is measured on it."""

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np

from fastdisco.common.errors import UserError
from fastdisco.export.onnx import INPUT, Session

# Everything else stays in float: what it costs in accuracy, it does not bring in speed.
TYPES = ("Conv", "Gemm", "MatMul")
# Images of the calibration on which the cost of a layer is measured.
COSTED = 64
# Layers in float are doubled from try to try, up to this share of all.
MOST = 0.5


class Layer(NamedTuple):
    name: str
    # Squared error of the features relative to their spread, where this layer alone is in int8.
    cost: float


class Try(NamedTuple):
    floats: tuple[str, ...]  # layers that stayed in float
    values: dict[str, float]  # accuracies of the file, 0..1; {} where its features tell nothing
    drop: float  # points; the largest of them


class Found(NamedTuple):
    best: Try  # the one that the file is of
    passed: bool
    tries: tuple[Try, ...]
    layers: tuple[Layer, ...]  # the costliest first; (): nobody had to ask


class Quantiser:
    """A float32 file and the ranges of its activations; writes it in int8."""

    def __init__(self, path: Path, images: Sequence[np.ndarray]) -> None:
        """images: batches [B,3,S,S] float32, normalised, that the ranges are taken of.

        Raises UserError where nothing in the file can be quantised."""
        import onnx
        from onnxruntime.quantization import calibrate, quant_utils

        self.images = images
        self._model = quant_utils.load_model_with_shape_infer(path)
        weights = {w.name for w in self._model.graph.initializer}
        self.layers = [
            node.name
            for node in self._model.graph.node
            # A product of two activations, as in attention, stays in float.
            if node.op_type in TYPES and weights & {*node.input}
        ]
        if not self.layers:
            raise UserError(
                f"--to int8: {path.name} has no {', '.join(TYPES)} with weights; leave int8 out"
            )
        with tempfile.TemporaryDirectory(prefix="fastdisco-int8-") as folder:
            calibrator = calibrate.create_calibrator(
                path,
                list(TYPES),
                augmented_model_path=str(Path(folder) / "augmented.onnx"),
                calibrate_method=calibrate.CalibrationMethod.MinMax,
            )
            for batch in images:
                calibrator.collect_data(_Reader([batch]))
            self._ranges = calibrator.compute_data()
        assert isinstance(self._model, onnx.ModelProto)

    def write(self, path: Path, layers: Sequence[str]) -> None:
        """The file with these layers in int8, in which all others stay in float."""
        import copy

        from onnxruntime.quantization import QuantType
        from onnxruntime.quantization.qdq_quantizer import QDQQuantizer

        with _quiet():
            quantizer = QDQQuantizer(
                copy.deepcopy(self._model),
                True,  # per channel
                False,  # all 8 bits
                QuantType.QInt8,  # weights
                QuantType.QUInt8,  # activations
                self._ranges,
                list(layers),
                [],
                list(TYPES),
                {},
            )
            quantizer.quantize_model()
            quantizer.model.save_model_to_file(str(path), False)

    def costs(self, float_file: Path, tick: Callable[[int], None] = lambda n: None) -> list[Layer]:
        """Each layer with its cost, the costliest first.  tick: is told of each layer."""
        images = np.concatenate(self.images)[:COSTED]
        want = Session(float_file).run(images)
        spread = float(((want - want.mean(0)) ** 2).sum()) or 1.0
        found = []
        with tempfile.TemporaryDirectory(prefix="fastdisco-int8-") as folder:
            file = Path(folder) / "one.onnx"
            for name in self.layers:
                self.write(file, [name])
                error = float(((Session(file).run(images) - want) ** 2).sum())
                # What is no number costs more than anything.
                found.append(Layer(name, error / spread if np.isfinite(error) else float("inf")))
                tick(1)
        return sorted(found, key=lambda layer: -layer.cost)


def search(
    layers: Sequence[str],
    write: Callable[[Sequence[str]], None],
    measure: Callable[[], dict[str, float]],
    costs: Callable[[], list[Layer]],
    want: dict[str, float],
    most: float,
    told: Callable[[Try], None] = lambda t: None,
) -> Found:
    """Keeps the costliest layers in float, more from try to try, until the file is good enough.

    layers   all that can be in int8
    write    the file, with these in int8
    measure  accuracies of that file, 0..1
    want     those of the float file
    most     how many points of any may be lost
    told     is called after each try
    Where none is good enough, the file of the best try is written again."""
    tries, ranked, kept = [], [], 0
    while True:
        floats = tuple(layer.name for layer in ranked[:kept])
        write([name for name in layers if name not in floats])
        values = measure()
        tries.append(Try(floats, values, dropped(want, values)))
        told(tries[-1])
        if values and tries[-1].drop <= most:
            return Found(tries[-1], True, tuple(tries), tuple(ranked))
        kept = 2 * kept or 1
        if kept > MOST * len(layers):
            break
        ranked = ranked or costs()
    best = min(tries, key=lambda t: t.drop)
    write([name for name in layers if name not in best.floats])
    return Found(best, False, tuple(tries), tuple(ranked))


def dropped(want: dict[str, float], got: dict[str, float]) -> float:
    """Points of accuracy that are lost, of the value that loses most; negative where all gain."""
    # What is not there, or no number, is lost altogether.
    lost = (100 * (x - got.get(name, float("nan"))) for name, x in want.items())
    return max(x if x == x else 100.0 for x in lost)


def leading(features: np.ndarray) -> float:
    """Share, 0..1, of the variance of the features [N,F] that lies along their first direction.

    Where it is nearly all, the neighbours of an image depend on what little is left, and an error of
    one percent changes them, whatever makes it."""
    centred = features - features.mean(0)
    small = centred @ centred.T if len(centred) < centred.shape[1] else centred.T @ centred
    total = float(np.trace(small))
    return float(np.linalg.eigvalsh(small)[-1]) / total if total else 1.0


class _Reader:
    """onnxruntime's interface for calibration images, which it takes from anything that has it."""

    def __init__(self, batches: Sequence[np.ndarray]) -> None:
        self.left = iter(batches)

    def get_next(self) -> dict[str, np.ndarray] | None:
        x = next(self.left, None)
        return None if x is None else {INPUT: x}


@contextmanager
def _quiet() -> Iterator[None]:
    """onnxruntime advises, through the root logger, what is done already."""
    import logging

    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)
