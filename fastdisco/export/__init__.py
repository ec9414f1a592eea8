"""A network as files that others load: timm, torchvision, detectron2, ONNX, int8.

formats.py  weights and configuration under the names of timm, torchvision and detectron2
onnx.py     an ONNX file, its comparison with the network, and the file as a network
int8.py     quantisation, what each layer costs, and which layers stay in float
bench.py    size and speed on a CPU, of the network and of its files
card.py     the model card
place.py    the folder: what is there before, and how files take their places

Level 3: imports what lies below, and reads a run by its files.  Only this package imports onnx and
onnxruntime, and only inside functions: they are an extra."""

from fastdisco.export.onnx import Session, about, is_onnx

__all__ = ["Session", "about", "is_onnx"]
