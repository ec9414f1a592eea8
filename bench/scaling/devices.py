"""Seconds of the parts of a step on one device: as bench/throughput.py measured them, or from a
GPU's published peaks."""

import json
from pathlib import Path
from typing import NamedTuple, Protocol

import yaml

from fastdisco import config
from scaling.links import Link, Steps
from scaling.networks import Work
from scaling.overlap import Layer
from scaling.work import Job

HARDWARE = Path(__file__).with_name("hardware.yaml")
# Bytes of a number by precision.
BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}


class Parts(NamedTuple):
    """Seconds of one micro batch on one device.  `backward` has a layer each, the last one first;
    `optimizer` is once a step."""

    teacher: float
    ema: float
    forward: float
    backward: list[Layer]
    loss: float
    optimizer: float

    @property
    def compute(self) -> float:
        """Of a micro batch."""
        back = sum(layer.seconds for layer in self.backward)
        return self.teacher + self.ema + self.forward + back + self.loss


class Device(Protocol):
    def parts(self, job: Job, images: float) -> Parts:
        """The parts of a micro batch of so many images."""
        ...


class Machine(NamedTuple):
    """What surrounds the devices.

    spread    standard deviation of a rank's step, as a share of it
    read      bytes/s of the storage, all nodes together;  write: of one rank's checkpoint
    loader    images/s that a node's cores decode and augment
    image     bytes of a training image
    graphs    whether gathered keys wait for the student's forward, as CUDA graphs make them
    busy      share of a collective's time that the device cannot compute in: 1 on a CPU, whose
              cores also send"""

    name: str
    link: Link
    spread: float
    read: float
    write: float
    loader: float
    image: float
    graphs: bool
    busy: float


class Peak(NamedTuple):
    """A GPU by its published peaks and stated shares of them."""

    flops: dict[str, float]
    memory: float
    compute: float
    traffic: float
    launch: float
    graph: float

    def parts(self, job: Job, images: float) -> Parts:
        own, frozen = job.precision, job.teacher_precision
        teacher = [x for x in job.teacher if not x.norm]
        forward = [self._seconds(x, images, own) for x in job.student]
        # The host launches ahead of the GPU: whichever takes longer over the whole network.
        stretch = max(1.0, len(forward) * self.launch / sum(forward))
        # A backward computes and moves twice what a forward does.
        back = [
            Layer(2 * stretch * seconds, 4 * layer.weights)
            for seconds, layer in zip(forward[::-1], job.student[::-1])
        ]
        return Parts(
            teacher=self._graph(teacher, images, frozen),
            ema=self._graph(job.ema, images, own),
            forward=stretch * sum(forward),
            backward=back,
            loss=images * job.loss / (self.flops["bf16"] * self.compute),
            optimizer=job.optimizer / (self.memory * self.traffic),
        )

    def _seconds(self, layer: Work, images: float, precision: str) -> float:
        moved = layer.elements * BYTES[precision] * images + layer.weights * BYTES[precision]
        computed = layer.flops * images
        peak = self.flops[precision] * self.compute
        return max(computed / peak, moved / (self.memory * self.traffic))

    def _graph(self, net: list[Work], images: float, precision: str) -> float:
        """A forward within a CUDA graph."""
        return sum(max(self.graph, self._seconds(x, images, precision)) for x in net)


class Measured(NamedTuple):
    """A device by seconds a step: `fixed` and for each image, of each part.

    The student's seconds are of forward and backward; the backward takes two thirds."""

    fixed: dict[str, float]
    image: dict[str, float]

    def parts(self, job: Job, images: float) -> Parts:
        took = {k: self.fixed[k] + images * self.image[k] for k in self.fixed}
        student = took["student"]
        # Layers share the time as their operations do.
        whole = sum(x.flops for x in job.student)
        back = [Layer(2 / 3 * student * x.flops / whole, 4 * x.weights) for x in job.student[::-1]]
        # The teacher is not asked where its embeddings are replayed.
        teacher, ema = (
            took[k] if net else 0.0 for k, net in (("teacher", job.teacher), ("ema", job.ema))
        )
        return Parts(teacher, ema, student / 3, back, took["loss"], took["optimizer"])


def line(seconds: dict[int, float]) -> tuple[float, float]:
    """(fixed, for each image) of seconds by batch: through the smallest and the largest batch; one
    batch alone has no fixed part."""
    low, high = min(seconds), max(seconds)
    if low == high:
        return 0.0, seconds[low] / low
    slope = max(0.0, (seconds[high] - seconds[low]) / (high - low))
    fixed = max(0.0, seconds[low] - low * slope)
    # Without a fixed part the line goes through the largest batch.
    return fixed, slope if fixed else seconds[high] / high


def from_throughput(file: Path, cfg: config.Config) -> Measured:
    """The device that a result of bench/throughput.py measured, for the networks that it measured.

    Raises UserError where the configuration has others."""
    found = json.loads(file.read_text())
    if found.get("bench") != "throughput" or found["ranks"] != 1:
        raise config.UserError(f"--device {file}: no result of bench/throughput.py on one device")
    by_batch = {int(batch): about for batch, about in found["details"].items()}
    about = next(iter(by_batch.values()))
    teacher = cfg.teacher.arch if cfg.teacher else None
    asked = dict(student=cfg.student.arch, teacher=teacher, precision=cfg.engine.precision)
    for key, value in asked.items():
        if about[key] != value:
            raise config.UserError(
                f"--device {file}: measured {key} {about[key]}, but the configuration has {value}; "
                "run bench/throughput.py --config with it"
            )
    fits = {
        part: line({b: b / x["rates"][part] for b, x in by_batch.items()})
        for part in ("teacher", "student", "ema", "loss", "optimizer")
    }
    return Measured(*({k: fit[i] for k, fit in fits.items()} for i in (0, 1)))


def published(name: str, loader_core: float) -> tuple[Peak, Machine]:
    """A node of hardware.yaml; loader_core: images/s that one core decodes and augments."""
    known = yaml.safe_load(HARDWARE.read_text())
    node, stated = known["nodes"][name], known["stated"]
    share = stated["links"]
    link = Link(
        node["gpus"],
        share * node["inside"],
        share * node["outside"],
        Steps(**known["ring"]),
        Steps(**known["tree"]),
    )
    speeds = (stated[key] for key in ("compute", "traffic", "launch", "graph"))
    machine = Machine(
        name=node["name"],
        link=link,
        spread=stated["spread"],
        read=stated["read"],
        write=stated["write"],
        loader=node["cores"] * loader_core,
        image=known["image_bytes"],
        graphs=True,
        busy=0.0,
    )
    return Peak(node["flops"], node["memory"], *speeds), machine
