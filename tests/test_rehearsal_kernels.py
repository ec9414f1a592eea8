"""What a GPU would be asked for, seen without one: every Triton kernel that a configuration launches,
compiled ahead of time for each architecture, and the DALI graphs of its crops.  docs/gpu.md says
what this proves."""

import functools
import sys
from typing import NamedTuple

import pytest
import torch
from conftest import ROOT
from fake_gpu import CUDA, FakeGpu
from fake_training import Rehearsal, ranks, stand_ins
from image_sets import serialised

from fastdisco import config, data

triton = pytest.importorskip(
    "triton", reason="gpu: Triton is not installed, which comes with torch for CUDA"
)
sys.path.insert(0, str(ROOT / "bench"))
from fastdisco.kernels import launch  # noqa: E402
from fastdisco.kernels import queue as triton_queue  # noqa: E402
from tune import SHARED_MEMORY, SMALLEST, compiled  # noqa: E402

CONFIGS = ROOT / "configs"
FILES = sorted(p for p in CONFIGS.rglob("*.yaml") if p.parent.name != "base")


class Chip(NamedTuple):
    capability: tuple[int, int]
    multiprocessors: int
    shared_memory: int

    @property
    def arch(self):
        return 10 * self.capability[0] + self.capability[1]


# A100, RTX 3090, L40S, H100, B200, RTX 5090.
CHIPS = [
    Chip((8, 0), 108, SHARED_MEMORY[80]),
    Chip((8, 6), 82, SMALLEST),
    Chip((8, 9), 142, SMALLEST),
    Chip((9, 0), 132, SHARED_MEMORY[90]),
    Chip((10, 0), 148, SHARED_MEMORY[100]),
    Chip((12, 0), 170, SMALLEST),
]
POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}


class Launch(NamedTuple):
    kernel: str
    types: tuple[tuple[str, str], ...]
    constants: tuple[tuple[str, object], ...]
    options: tuple[tuple[str, object], ...]


class Recorder:
    """Stands in for a Triton kernel: notes what it is launched with."""

    def __init__(self, name, kernel, seen):
        self.name, self.kernel, self.seen, self.arg_names = name, kernel, seen, kernel.arg_names

    def __getitem__(self, grid):
        assert all(
            isinstance(n, int) and n > 0 for n in (grid if isinstance(grid, tuple) else (grid,))
        )
        return self.launched

    def launched(self, *args, **named):
        values = dict(zip(self.arg_names, args)) | named
        types, constants, options = {}, {}, {}
        for name, x in values.items():
            if name not in self.arg_names:
                options[name] = x
                continue
            at = self.arg_names.index(name)
            if isinstance(x, torch.Tensor):
                assert x.device == CUDA and x.is_contiguous(), name
                # Triton asks for it where the compiled form is taken again.
                assert x.storage_offset() * x.element_size() % 16 == 0, name
                types[name] = POINTERS[x.dtype]
            elif self.kernel.params[at].is_constexpr:
                constants[name] = x
            else:
                # Else every other number of rows would be compiled anew.
                assert isinstance(x, float) or self.kernel.params[at].do_not_specialize, name
                types[name] = "fp32" if isinstance(x, float) else "i32"
        assert {*types, *constants} == {*self.arg_names}
        self.seen.add(Launch(self.name, *(tuple(d.items()) for d in (types, constants, options))))


KERNELS = (
    "units_kernel",
    "moments_kernel",
    "moco_rows_kernel",
    "seed_rows_kernel",
    "enqueue_kernel",
    "advance_kernel",
)
PRECISIONS = ("fp32", "bf16", "fp16")


# ---- what is launched


def distinct(precision: str) -> list[config.Config]:
    """The configurations of configs/ at a precision, one of those that differ in nothing that the
    kernels see, with small networks and views."""
    found = {}
    for path in FILES:
        cfg = config.load(path, [f"engine.precision={precision}"])
        seen = cfg.method.model_dump_json(), cfg.student.dim, cfg.data.batch, cfg.teacher is None
        found.setdefault(seen, path)
    return [shrunk(path, precision) for path in found.values()]


def shrunk(path, precision: str) -> config.Config:
    cfg = config.load(path, [f"engine.precision={precision}"])
    small = cfg.student.model_copy(update={"arch": "test_resnet", "kwargs": {}, "hidden": 16})
    told = cfg.teacher and cfg.teacher.model_copy(update={"arch": "test_resnet"})
    views = tuple(group.model_copy(update={"size": 32}) for group in cfg.views)
    update = dict(student=small, teacher=told, views=views)
    if cfg.method.name == "swav":
        # Its queue's kernels come at a later epoch; LARS waits under fp16, ranks in each norm.
        update["method"] = cfg.method.model_copy(update={"queue_epoch": 0})
        update["bn"] = cfg.bn.model_copy(update={"sync": False})
        update["optim"] = cfg.optim.model_copy(update={"name": "sgd"})
    return cfg.model_copy(update=update)


def called(cfg: config.Config, world: int) -> list[tuple[FakeGpu, str, tuple]]:
    """Our own operators' calls in one training step on a rank of `world`."""
    with pytest.MonkeyPatch.context() as patches, (gpu := FakeGpu()):
        stand_ins(patches)
        if world > 1:
            ranks(patches, world, rank=0)
        Rehearsal(gpu, cfg).steps(1)
    return [(gpu, name, args) for name, args in gpu.calls]


@functools.cache
def launches(precision: str, world: int) -> dict[Chip, set[Launch]]:
    """What all configurations launch, by chip."""
    calls = [call for cfg in distinct(precision) for call in called(cfg, world)]
    found = {}
    for chip in CHIPS:
        found[chip] = seen = set()
        with pytest.MonkeyPatch.context() as patches:
            patches.setattr(torch.cuda, "get_device_capability", lambda _, c=chip: c.capability)
            patches.setattr(launch, "multiprocessors", lambda _, c=chip: c.multiprocessors)
            for name in KERNELS:
                kernel = getattr(triton_queue, name)
                patches.setattr(triton_queue, name, Recorder(name, kernel, seen))
            for gpu, name, args in calls:
                with gpu:
                    as_registered(name, args, getattr(triton_queue, name)(*args))
    return found


def as_registered(name, args, got):
    """What the dispatcher is told of an operator's result is what its CUDA form gives."""
    want = getattr(torch.ops.fastdisco, name)(*args)
    for x, y in zip(want or (), got or ()):
        assert (x.shape, x.dtype, x.device) == (y.shape, y.dtype, y.device), name


def test_every_method_that_has_a_queue_launches_its_kernels():
    found = {one.kernel for one in launches("bf16", 8)[CHIPS[3]]}
    assert found == set(KERNELS)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    # A cached kernel would hide a change of compiler.
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))


def compiles(chip: Chip, one: Launch):
    """Without spilled registers and within the chip's shared memory; products of 16 bits on tensor
    cores."""
    types, constants, options = dict(one.types), dict(one.constants), dict(one.options)
    kernel = getattr(triton_queue, one.kernel)
    found = compiled(kernel, chip.arch, types, constants, options)
    assert found["stack"] == 0, (chip, one)
    assert found["shared"] <= chip.shared_memory, (chip, one)
    if one.kernel == "moments_kernel" and types["queue"] != "*fp32":
        product = {90: "wgmma.mma_async", 100: "tcgen05.mma"}.get(chip.arch, "mma.sync")
        assert product in found["ptx"], (chip, one)


@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: f"sm_{chip.arch}")
def test_the_largest_kernels_of_bf16_compile(chip):
    """One form of each; all forms are among the slow tests."""
    some = {one.kernel: one for one in sorted(launches("bf16", 8)[chip], key=str)}
    for kernel in ("moments_kernel", "moco_rows_kernel", "seed_rows_kernel"):
        compiles(chip, some[kernel])


@pytest.mark.slow
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("chip", CHIPS, ids=lambda chip: f"sm_{chip.arch}")
def test_every_kernel_that_a_configuration_launches_compiles(chip, precision):
    """On one rank and on eight, whose rows take other launches of the table."""
    for one in sorted(launches(precision, 1)[chip] | launches(precision, 8)[chip], key=str):
        compiles(chip, one)


def test_a_planted_spill_is_found():
    chip = CHIPS[0]
    one = next(x for x in launches("bf16", 8)[chip] if x.kernel == "moments_kernel")
    wide = dict(one.constants) | dict(C=256, CP=256, ROWS=256)
    with pytest.raises(AssertionError):
        compiles(chip, one._replace(constants=tuple(wide.items())))


# ---- the images' way


def crops_and_places() -> dict:
    """The crops of configs/ and where their images are decoded and augmented, each once."""
    found = {}
    for path in FILES:
        for precision in PRECISIONS[:2]:
            cfg = config.load(path, [f"engine.precision={precision}"])
            place = data.place(cfg.data, CUDA, precision)
            key = config.crops(cfg), place, cfg.data.eval_resize, cfg.data.eval_size
            found.setdefault(key, f"{path.relative_to(CONFIGS)} {precision}")
    return {name: key for key, name in found.items()}


@pytest.mark.parametrize("name", crops_and_places())
def test_the_gpu_graphs_of_every_configurations_crops_serialise(name, folder):
    crops, place, resize, size = crops_and_places()[name]
    used = serialised(data.listing(folder / "train"), "", place, crops, resize, size)
    assert ("decoders__Image", "mixed") in used and ("CropMirrorNormalize", "gpu") in used
    assert not [
        op for op, device in used if device == "cpu" and op in ("Resize", "Hsv", "GaussianBlur")
    ]
