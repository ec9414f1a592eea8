"""The Triton kernels without a GPU: interpreted in a process of their own, and compiled ahead of
time for every architecture in the launch table."""

import functools
import json
import re
import sys

import pytest
import torch
from conftest import ROOT, run

triton = pytest.importorskip(
    "triton", reason="gpu: Triton is not installed, which comes with torch for CUDA"
)
sys.path.insert(0, str(ROOT / "bench"))
import tune  # noqa: E402
from fastdisco.kernels import launch, triton_rows, triton_sweep  # noqa: E402
from fastdisco.kernels import queue as triton_queue  # noqa: E402
from tune import SHARED_MEMORY, compiled, faults  # noqa: E402

TENSOR_CORES = {80: "mma.sync", 90: "wgmma.mma_async", 100: "tcgen05.mma"}
# Many rows of the table are alike.
sweep = functools.cache(tune.sweep)


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path, monkeypatch):
    # A cached kernel would hide a change of compiler.
    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path / "cache"))


# Rows of a chip that no aim is for are compiled with the slow tests.
LAUNCHES = [
    pytest.param(name, marks=[pytest.mark.slow] if name.startswith("sm_100 ") else [])
    for name in sorted(launch.table())
]


@pytest.mark.parametrize("name", LAUNCHES)
def test_a_shipped_launch_compiles_without_spills(name):
    arch, bits, d, _, running = tune.parse(name)
    how, dtype = (
        launch.table()[name],
        torch.float32 if bits == 32 else torch.float16 if running else torch.bfloat16,
    )
    # Without and with a look for the queue's end, which takes most beside the running maximum.
    for k in (1 << 16, 1001)[: 1 + running]:
        found = sweep(how, arch, dtype, d, k, running)
        assert not [*faults(found, arch, how, k == 1 << 16)], (name, k)
        if bits == 16:
            assert TENSOR_CORES[arch] in found["ptx"]
            # Tiles arrive beside the work.
            assert ("cp.async.bulk.tensor" if how.tma else "cp.async.c") in found["ptx"]


def test_odd_widths_compile_without_spills():
    """Rows that the copy engine cannot take, since they are no multiple of 16 bytes."""
    for arch in SHARED_MEMORY:
        for d in (100, 20):
            how = launch.table()[launch.key(arch, torch.bfloat16, d, 1024, False)]._replace(
                tma=False
            )
            assert not [
                *faults(sweep(how, arch, torch.bfloat16, d, 1001, False), arch, how, False)
            ], (arch, d)


def test_a_planted_spill_is_found():
    for how, fault in [
        (launch.Launch(256, 64, 4, 3, 1, False, None, False), "spilled"),
        (launch.Launch(128, 128, 8, 8, 1, True, None, False), "shared memory"),
        (
            launch.table()["sm_90 16-bit d128 many fixed"]._replace(registers=168),
            "2 blocks do not fit",
        ),
    ]:
        assert fault in " ".join(
            faults(sweep(how, 90, torch.bfloat16, 128, 1 << 16, False), 90, how, True)
        )


ROWS = dict(total="*fp32", top="*fp32", mean="*fp32", n="i32")


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_the_other_kernels_compile_without_spills(arch):
    gather = dict(C=128, CP=128, SPLITS=256, GATHER=triton_queue.GATHER, RUNNING=True, GRAD=True)
    moco = dict(
        z="*fp32",
        k="*fp32",
        t="*fp32",
        **ROWS,
        terms="*fp32",
        contrast="*fp32",
        distill="*fp32",
        splits="i32",
        inverse="fp32",
    )
    two = {f"{n}_{x}": "*fp32" for n in ("total", "top", "mean") for x in "st"}
    seed = dict(
        zs="*bf16",
        zt="*fp16",
        **two,
        loss="*fp32",
        grad="*fp32",
        n="i32",
        splits_s="i32",
        splits_t="i32",
        inverse_s="fp32",
        inverse_t="fp32",
    )
    for kernel, types, constants, warps in [
        (triton_rows.moco_rows_kernel, moco, gather | dict(VIEWS=2), 4),
        (triton_rows.seed_rows_kernel, seed, gather, 4),
        (
            triton_sweep.units_kernel,
            dict(first="*fp32", second="*bf16", out="*bf16", n="i32"),
            dict(C=128, CP=128),
            1,
        ),
        (
            triton_sweep.enqueue_kernel,
            dict(queue="*bf16", ptr="*i64", keys="*fp32", size="i32"),
            dict(C=128, CP=128),
            1,
        ),
        (triton_sweep.advance_kernel, dict(ptr="*i64", n="i32", size="i32"), {}, 1),
    ]:
        found = compiled(
            kernel, arch, types, constants, dict(num_warps=warps, **triton_queue.OPTIONS)
        )
        assert found["stack"] == 0, kernel.fn.__name__


# ---- the launch table


def test_every_queue_has_its_launch():
    for arch in SHARED_MEMORY:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            for d in (1, 64, 65, 128, 256):
                for n in (1, 64, 65, 10**6):
                    for running in (False, True):
                        assert launch.key(arch, dtype, d, n, running) in launch.table()
    assert len(launch.table()) == 3 * 2 * 3 * 2 * 2  # and none that nobody asks for


def test_a_chip_without_rows_of_its_own_takes_those_that_need_least():
    assert [
        launch.architecture(c) for c in ((8, 0), (8, 6), (8, 9), (9, 0), (10, 0), (10, 3), (12, 0))
    ] == [80, 80, 80, 90, 100, 100, 80]


def test_the_table_says_what_was_timed():
    rows = json.loads(launch.FILE.read_text())
    assert all(
        set(row) == set(launch.Launch._fields) and isinstance(row["timed"], bool)
        for row in rows.values()
    )
    assert all(
        row["ctas"] >= 1 and row["rows"] % 16 == 0 and row["keys"] % 16 == 0
        for row in rows.values()
    )


# Two processes of half a minute, which two workers can share, and one of large cases.
@pytest.mark.parametrize(
    "part",
    [
        ("-m", "not slow", "-k", "seed"),
        ("-m", "not slow", "-k", "not seed"),
        pytest.param(("-m", "slow"), marks=pytest.mark.slow),
    ],
    ids=["seed", "not seed", "large"],
)
def test_interpreted(part):
    """tests/interpreted.py: every kernel against float64."""
    options = ["-q", "-p", "no:cacheprovider", "-rP", *part]
    env = {"TRITON_INTERPRET": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    if triton.__version__.startswith("3.6"):
        print("Where it fails: Triton 3.6's interpreter needs numpy<2.4")
    text = run(sys.executable, "-m", "pytest", *options, ROOT / "tests/interpreted.py", env=env)
    # Each case's error, beside that of rounding the operands.
    print(*re.findall(r"^(?:seed )?B \d.*", text, re.MULTILINE), sep="\n")
    assert re.search(r"\d{2,} passed", text), text[-4000:]


@pytest.mark.parametrize("few", [True, False])
def test_narrow_rows_compile_without_spills_on_sm_100(few):
    """They take the rows of width 64, whose registers they use otherwise."""
    for dtype in (torch.bfloat16, torch.float16):
        running = dtype == torch.float16
        how = launch.table()[launch.key(100, dtype, 32, 32 if few else 1024, running)]
        for d in (16, 32):
            found = sweep(how, 100, dtype, d, 1 << 16, running)
            assert not [*faults(found, 100, how, True)], (d, dtype)
