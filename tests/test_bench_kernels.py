"""bench/kernels.py and bench/tune.py as far as they need no GPU: the contenders' formulas, the
float64 reference, floors, rows, candidates, table."""

import contextlib
import importlib.util
import json
import math
import random
import sys
import time
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT
from fastdisco.kernels import launch, reference

sys.path.insert(0, str(ROOT / "bench"))
# `kernels` is the package.
spec = importlib.util.spec_from_file_location("bench_kernels", ROOT / "bench/kernels.py")
bench = importlib.util.module_from_spec(spec)
spec.loader.exec_module(bench)
from harness import results  # noqa: E402
from losses import contenders, exact, launches, on_cpu, on_gpu  # noqa: E402
from losses.rows import summary  # noqa: E402

SHAPE = (20, 512, 16)


def paper(loss, z, other, queue):
    """Loss and gradient by autograd in float64, all logits at once."""
    z = z.double().requires_grad_()
    temps = (contenders.TEMP,) if loss == "moco" else (contenders.TEMP_S, contenders.TEMP_T)
    value = dict(moco=reference.info_nce, seed=reference.seed)[loss](
        z, other.double(), queue.double(), *temps
    )
    return value.detach(), torch.autograd.grad(value, z)[0]


@pytest.mark.parametrize("rows", [None, 1, 100])
@pytest.mark.parametrize("loss", contenders.OURS)
def test_the_reference_is_the_formula(loss, rows):
    data = exact.inputs(loss, *SHAPE, "cpu")
    value, grad = exact.exact(loss, *data, rows)
    want, gradient = paper(loss, *data)
    assert value.dtype == grad.dtype == torch.float64
    torch.testing.assert_close(value, want, rtol=1e-12, atol=0)
    torch.testing.assert_close(grad, gradient, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("loss", contenders.OURS)
def test_every_contender_computes_the_same(loss):
    """Also attention's output and log-sum-exp, in one piece and dealt out: exact in float32, to the
    queue's rounding in bfloat16."""
    data = exact.inputs(loss, *SHAPE, "cpu")
    want = paper(loss, *data)
    runs = contenders.contenders(loss, SHAPE, False, multiprocessors=132)
    assert list(runs) == ["ours", "eager fp32", "eager bf16", "sdpa", "sdpa split"]
    for name, (dtype, call) in runs.items():
        bounds = {torch.float32: 2e-6, torch.bfloat16: 1e-2}
        for given in {torch.float32, dtype}:
            found = exact.errors(call(*data[:2], data[2].to(given)), want)
            assert max(found.values()) < bounds[given], (name, given, found)
    assert [*contenders.contenders(loss, SHAPE, True, 132)][-2:] == ["compile fp32", "compile bf16"]


def test_the_data_has_rivals():
    """Without rows near the teacher's own feature SEED at a low temperature is MoCo, and shows
    nothing of the teacher's distribution."""
    zs, zt, queue = (x.double() for x in exact.inputs("seed", *SHAPE, "cpu"))
    zs, zt = reference.unit(zs), reference.unit(zt)
    own = 1 / (1 + torch.exp((zt @ queue.T - 1) / contenders.TEMP_T).sum(1))
    assert own.median() < 0.95 and ((zs * zt).sum(1) - 0.7).abs().mean() < 0.2
    assert (queue.norm(dim=1) - 1).abs().max() < 1e-6


def test_flash_attention_is_dealt_to_a_batch_that_fills_the_chip(monkeypatch):
    seen = []
    monkeypatch.setitem(contenders.SDPA, "moco", lambda *x, splits=1: seen.append(splits))
    # A block has 128 rows; a part at least 256 keys.
    for b, k, want in ((1024, 65536, 32), (64, 65536, 256), (4096, 65536, 8), (64, 4096, 16)):
        contenders.contenders("moco", (b, k, 128), False, 132)["sdpa split"][1](None)
        assert seen.pop() == want and k % want == 0
    assert "sdpa split" not in contenders.contenders("moco", (128 * 132, 65536, 128), False, 132)


def test_floors():
    """The design's table: 4.3 TB/s, 790 TFLOP/s and 3.87 T exponentials a second at B=1024,
    K=65536, d=128."""
    ceilings = dict(bytes_per_s=4.3e12, flop_per_s=790e12, exp_per_s=3.87e12)
    moco, seed = (exact.floors(loss, 1024, 65536, 128, ceilings) for loss in ("moco", "seed"))
    assert (
        moco["tensor"] == pytest.approx(43.5, abs=0.1)
        and moco["exp"] == pytest.approx(17.4, abs=0.1)
        and 3.9 < moco["hbm"] < 4.4
    )
    assert (
        seed["tensor"] == 2 * moco["tensor"]
        and seed["exp"] == 2 * moco["exp"]
        and seed["hbm"] == moco["hbm"]
    )


def found():
    """What a GPU might have measured, of one loss: round numbers."""
    contenders = {
        "ours": dict(graph_us=100.0, memory_bytes=10),
        "eager fp32": dict(graph_us=2000.0, memory_bytes=900),
        "eager bf16": dict(graph_us=900.0),
        "compile fp32": dict(failed="RuntimeError: no"),
        "compile bf16": dict(graph_us=300.0),
        "sdpa": dict(graph_us=180.0),
        "sdpa split": dict(graph_us=150.0),
    }
    one = lambda b, c: dict(
        loss="moco",
        shape=[b, 65536, 128],
        floors_us=dict(hbm=4.0, tensor=b / 20, exp=3.0),
        contenders=c,
    )
    cpu = dict(
        plain=dict(times_s=[0.4, 0.6, 0.9], memory_bytes=200),
        ours=dict(times_s=[0.2, 0.2, 0.2], memory_bytes=10),
    )
    return dict(
        shapes=[one(1024, contenders), one(256, {"ours": dict(graph_us=25.6)})], cpu=dict(moco=cpu)
    )


def test_the_rows():
    rows = {r["name"]: r for r in summary(found(), gpu=True)}
    assert [*rows] == [
        f"{loss}_{what}"
        for loss in ("moco", "seed")
        for what in (
            "cpu_speedup_b256",
            "cpu_memory_ratio_b256",
            "over_floor_b1024",
            "over_floor_b256",
            "vs_eager_b1024",
            "vs_compile_fp32_b1024",
            "vs_compile_bf16_b1024",
            "vs_sdpa_b1024",
            "memory_ratio_b1024",
        )
    ]
    value = {n.removeprefix("moco_"): r["value"] for n, r in rows.items() if n.startswith("moco")}
    assert value == pytest.approx(
        dict(
            cpu_speedup_b256=3,
            cpu_memory_ratio_b256=20,
            over_floor_b1024=100 / 51.2,
            over_floor_b256=2,
            vs_eager_b1024=20,
            vs_compile_fp32_b1024=None,
            vs_compile_bf16_b1024=3,
            vs_sdpa_b1024=1.5,
            memory_ratio_b1024=90,
        )
    )
    assert rows["moco_vs_compile_fp32_b1024"]["reason"] == "compile fp32: RuntimeError: no"
    assert (
        rows["seed_vs_sdpa_b1024"]["reason"]
        == rows["seed_cpu_speedup_b256"]["reason"]
        == "the time was up"
    )
    aims = [2, 10, 2, 3, 10, 4, 2, 1.3, 50]
    assert [r["aim"] for r in rows.values()] == aims + aims
    assert {n for n, r in rows.items() if r["better"] == "lower"} == {
        f"{x}_over_floor_b{b}" for x in contenders.OURS for b in (1024, 256)
    }
    lost = found()
    lost["shapes"][0]["contenders"]["eager fp32"] = dict(oom=True)
    assert {r["name"]: r.get("reason") for r in summary(lost, True)}[
        "moco_vs_eager_b1024"
    ] == "eager fp32: oom"


def test_without_a_gpu_its_rows_say_so():
    rows = summary(dict(found(), shapes=[]), gpu=False)
    assert {r["reason"] for r in rows if r["value"] is None and "cpu" not in r["name"]} == {
        "no GPU in this machine"
    }
    assert sum(r["value"] is not None for r in rows) == 2


def test_one_part_alone(monkeypatch, capsys):
    rows = summary(dict(found(), shapes=[], only="cpu"), gpu=True)
    assert {r["reason"] for r in rows if r["value"] is None} >= {"not asked for (--only)"}
    rows = summary(dict(found(), cpu={}, only="gpu"), gpu=True)
    of_cpu = [r for r in rows if "_cpu_" in r["name"]]
    assert of_cpu and all(r["reason"] == "not asked for (--only)" for r in of_cpu)
    monkeypatch.setattr(sys, "argv", ["kernels.py", "--only", "gpu"])
    with pytest.raises(SystemExit) as e:
        bench.main()
    assert e.value.code == 2 and "there is no GPU here" in capsys.readouterr().err


def test_the_shapes_with_aims_come_first_and_none_is_left_out():
    assert (
        on_gpu.SHAPES[:2] == [(1024, 65536, 128), (256, 65536, 128)]
        and len(set(on_gpu.SHAPES)) == len(on_gpu.SHAPES) == 4 * 3 + 1
    )
    assert {s[:2] for s in on_gpu.SHAPES} == {
        (b, k) for b in (64, 256, 1024, 4096) for k in (4096, 65536, 1 << 20)
    }


def test_the_cpu_part():
    parts = {}
    on_cpu.on_cpu(parts, math.inf, shape=(64, 4096, 32), rounds=3)
    for one in parts.values():
        assert len(one["plain"]["times_s"]) == len(one["ours"]["times_s"]) == 3
        assert (
            max(one["ours"]["loss_error"], one["ours"]["grad_error"], one["plain"]["grad_error"])
            < 2e-6
        )
        # One matrix of logits at least: the method sees them.
        assert one["plain"]["memory_bytes"] > 64 * 4096 * 4
    assert parts.keys() == contenders.OURS.keys()


def test_a_contender_that_does_not_fit_or_fails_is_recorded(monkeypatch):
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)

    def fails(error):
        raise error

    result = {}
    assert on_gpu.attempt(result, lambda: None) and not result
    assert not on_gpu.attempt(
        result, lambda: fails(torch.OutOfMemoryError("2 GiB"))
    ) and result == {"oom": True}
    assert (
        not on_gpu.attempt(result, lambda: fails(RuntimeError("unsupported")))
        and result["failed"] == "RuntimeError: unsupported"
    )


def test_rounds_are_interleaved_and_their_median_counts(monkeypatch):
    clock, calls = random.Random(0), []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(
        on_gpu, "elapsed_ms", lambda run, repeats: repeats * run() * clock.uniform(0.9, 1.1)
    )
    results = {"a": {}, "b": {}, "c": {"oom": True}}
    on_gpu.interleave(
        results,
        "graph",
        {"a": lambda: calls.append("a") or 1.0, "b": lambda: calls.append("b") or 2.0},
        sets=4,
        rounds=9,
    )
    assert results["a"]["graph_us"] == pytest.approx(250, rel=0.1) and results["b"][
        "graph_us"
    ] == pytest.approx(500, rel=0.1)
    assert len(results["a"]["graph_rounds_us"]) == 9 and results["c"] == {"oom": True}
    # After the two runs and two timings that find the repeats.
    rounds = ["".join(calls[4 + 2 * r : 6 + 2 * r]) for r in range(9)]
    assert set(rounds) == {"ab", "ba"}


class Event:
    """torch.cuda.Event on the host's clock."""

    def __init__(self, enable_timing):
        pass

    def record(self):
        self.at = time.perf_counter()

    def synchronize(self):
        pass

    def elapsed_time(self, end):
        return 1e3 * (end.at - self.at)


def test_the_gpu_part_on_a_pretended_gpu(monkeypatch, tmp_path):
    """Every step but the device: shapes, contenders, one that does not fit, graphs that record
    nothing, rows, the file."""
    nothing = lambda *args, **kwargs: None
    for name, what in dict(
        get_device_properties=lambda i: SimpleNamespace(
            L2_cache_size=1 << 16, multi_processor_count=4
        ),
        Event=Event,
        synchronize=nothing,
        empty_cache=nothing,
        reset_peak_memory_stats=nothing,
        memory_allocated=lambda: 100,
        max_memory_allocated=lambda: 1100,
        graph_pool_handle=nothing,
        graph=lambda graph, pool: contextlib.nullcontext(),
        Stream=nothing,
        stream=contextlib.nullcontext,
        CUDAGraph=lambda: SimpleNamespace(replay=lambda: time.sleep(1e-3)),
        is_available=lambda: True,
    ).items():
        monkeypatch.setattr(torch.cuda, name, what)
    small = [(128, 2048, 16), (8, 256, 16), (8, 255, 16)]
    monkeypatch.setattr(on_gpu, "SHAPES", small)
    monkeypatch.setattr(on_gpu, "AIMED", small[:1])
    monkeypatch.setattr(on_gpu, "ROUNDS", {True: 3, False: 2})
    monkeypatch.setattr(on_gpu, "ROUND_MS", 1)
    monkeypatch.setattr(
        on_gpu, "measure_ceilings", lambda: dict(bytes_per_s=1e12, flop_per_s=1e14, exp_per_s=1e12)
    )
    inputs = exact.inputs
    monkeypatch.setattr(
        on_gpu,
        "inputs",
        lambda loss, b, k, d, device, seed=0: inputs(
            loss, b, k, d, "cpu" if k != 255 else "nowhere", seed
        ),
    )
    monkeypatch.setattr(bench, "on_cpu", nothing)
    monkeypatch.setattr(
        torch,
        "compile",
        lambda f, dynamic: lambda *x: (_ for _ in ()).throw(torch.OutOfMemoryError("too large")),
    )
    monkeypatch.setattr(bench.signal, "signal", nothing)
    monkeypatch.setattr(sys, "argv", ["bench/kernels.py"])
    monkeypatch.setattr(results, "RESULTS", tmp_path)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert "moco [8, 255, 16]: RuntimeError" in bench.main()  # the data of a shape that cannot be
    kept = json.loads((tmp_path / "kernels-gpu.json").read_text())
    shapes = kept["samples"]["shapes"]
    assert [(x["loss"], x["shape"][1]) for x in shapes] == [
        (loss, k) for k in (2048, 256, 255) for loss in ("moco", "seed")
    ]
    assert len(kept["summary"]) == 18
    for one in shapes[:4]:
        ours = one["contenders"]["ours"]
        assert (
            ours["memory_bytes"] == 1000
            and ours["graph_us"] > 0
            and ours["eager_us"] > 0
            and ours["grad_error"] < 1e-2
        )
        assert "eager fp32" in one["contenders"] and one["floors_us"]["tensor"] > 0
    assert (
        shapes[0]["contenders"]["compile bf16"] == {"oom": True}
        and "compile bf16" not in shapes[2]["contenders"]
    )


# ---- the tuner

tune = pytest.importorskip(
    "tune", reason="gpu: Triton is not installed, which comes with torch for CUDA"
)


def test_the_table_is_written_as_it_was_read():
    assert tune.dump(launch.table()) == launch.FILE.read_text()
    changed = dict(launch.table())
    name = "sm_90 16-bit d128 many fixed"
    changed[name] = changed[name]._replace(keys=128, timed=True)
    back = {n: launch.Launch(**row) for n, row in json.loads(tune.dump(changed)).items()}
    assert (
        back == changed
        and [n for n in back if back[n] != launch.table()[n]] == [name]
        and back[name].timed
    )


def test_the_rows_that_training_uses_come_first():
    names = tune.order(90)
    assert (
        names[0] == "sm_90 16-bit d128 many fixed"
        and names[1] == "sm_90 16-bit d128 few fixed"
        and len(names) == 24
    )
    assert {n.split()[0] for n in names} == {"sm_90"} and tune.parse(names[0]) == (
        90,
        16,
        128,
        False,
        False,
    )


def test_candidates():
    for name, present in launch.table().items():
        arch, bits, d, few, _ = tune.parse(name)
        some = tune.candidates(arch, bits, d, few, present)
        assert some[0] == present and len(set(some)) == len(some) <= 50
        assert arch >= 90 or not any(how.tma for how in some)
        assert all(how.rows <= 64 for how in some[1:]) or not few
        for how in some:
            assert not how.registers or how.ctas * how.registers * 32 * how.warps <= tune.REGISTERS
            assert all(math.log2(x).is_integer() for x in (how.rows, how.keys, how.warps))


def test_what_spills_is_refused_and_what_fits_comes_with_each_number_of_blocks(monkeypatch):
    how = launch.Launch(64, 64, 4, 2, 1, False, None, False)
    usage = dict(registers=120, stack=0, shared=60_000, threads=128)
    monkeypatch.setattr(tune, "sweep", lambda *args: usage)
    assert [x.ctas for x in tune.fits_of(90, 16, 128, False, how)] == [1, 2, 3]  # by shared memory
    usage["registers"] = 255
    assert [x.ctas for x in tune.fits_of(90, 16, 128, False, how)] == [1, 2]
    usage["stack"] = 8
    assert tune.fits_of(90, 16, 128, False, how) == []
    usage |= dict(stack=0, shared=240_000)
    assert tune.fits_of(90, 16, 128, False, how) == []
    usage |= dict(shared=60_000, registers=128, threads=256)
    capped = how._replace(registers=128, ctas=2, warps=8)
    assert tune.fits_of(90, 16, 128, False, capped) == [capped]
    monkeypatch.setattr(
        tune, "sweep", lambda how, arch, dtype, d, k, running: usage | dict(stack=8 * (k == 1001))
    )
    # The running maximum's worst is an odd queue.
    assert tune.fits_of(90, 16, 128, True, how) == [] and tune.fits_of(90, 16, 128, False, how)


def test_a_real_spill_is_refused():
    assert (
        tune.fits_of(90, 16, 128, False, launch.Launch(256, 64, 4, 3, 1, False, None, False)) == []
    )


def test_the_fastest_by_the_median_wins():
    clock = {"slow": iter([9, 2, 9, 9, 9]), "fast": iter([8, 8, 30, 8, 8])}
    assert launches.winner(
        ["slow", "fast"], lambda how: how, lambda how: next(clock[how]), rounds=5
    ) == ("fast", 8)


def test_the_tuner_on_a_pretended_gpu(monkeypatch, tmp_path):
    """It writes the fastest of what fits, row by row, and leaves other architectures and what it
    had no time for alone."""
    file, before = tmp_path / "launch.json", dict(launch.table())
    monkeypatch.setattr(launch, "FILE", file)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(
        tune.concurrent.futures,
        "ProcessPoolExecutor",
        lambda mp_context: contextlib.nullcontext(SimpleNamespace(map=map)),
    )
    monkeypatch.setattr(
        tune, "fits_of", lambda arch, bits, d, running, how: [] if how.keys == 64 else [how]
    )
    monkeypatch.setattr(launches, "prepared", lambda name, how: None if how.stages == 4 else how)
    monkeypatch.setattr(launches, "clocked", lambda how: 100.0 - how.rows / 10 - how.stages)
    monkeypatch.setattr(sys, "argv", ["bench/tune.py"])
    assert tune.main() is None
    after = {n: launch.Launch(**row) for n, row in json.loads(file.read_text()).items()}
    assert {n for n in after if after[n].timed} == {
        n for n in after if n.startswith("sm_90")
    } and list(after) == list(before)
    best = after["sm_90 16-bit d128 many fixed"]
    assert (best.rows, best.keys, best.stages) == (128, 128, 3) and all(
        after[n] == before[n] for n in after if not n.startswith("sm_90")
    )
    file.unlink()
    monkeypatch.setattr(sys, "argv", ["bench/tune.py", "--minutes", "0"])
    assert tune.main() is None and not file.exists()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 9))
    assert "borrows sm_80's rows" in tune.main()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert "no GPU" in tune.main()


def test_the_loop_of_exponentials_is_nothing_else():
    found = tune.compiled(
        on_gpu.exponentials(), 90, dict(x="*fp32"), dict(LOOPS=64, BLOCK=1024), dict(num_warps=4)
    )
    assert found["ptx"].count("ex2.approx") >= 8 and found["stack"] == 0
