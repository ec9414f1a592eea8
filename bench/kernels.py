"""The queue losses against whatever else computes them, forward and backward: time, memory, error,
and the distance to the hardware's floors.

    python bench/kernels.py [--minutes 8]      writes bench/results/kernels-<device>.json, also of
    what the time sufficed for

On a GPU at every B, K of SHAPES, those with aims first.  A contender runs under CUDA-graph replay
and eagerly, in interleaved rounds whose order is drawn anew, over as many sets of inputs as
overflow the L2 cache twice.  Then, and alone where there is no GPU, the CPU forms at B=256,
K=65536.

  eager fp32, bf16       the paper's formula, logits and all; TF32 off, or queue and logits in
  bfloat16
  compile fp32, bf16     torch.compile of the same, where there are aims
  sdpa, sdpa split       PyTorch's flash attention with keys = values = queue: its output and
                         log-sum-exp give loss and gradient; as it is, and with the queue dealt to a
                         batch that fills the chip
  ours                   fastdisco.kernels, the queue in bfloat16
Errors are against chunked float64 on the float32 queue, so rounding the queue counts.  Memory is
what a call allocates beyond its inputs: on a GPU the allocator's peak, on the CPU the growth of a
fresh process's peak resident set."""

import argparse
import gc
import itertools
import json
import math
import operator
import os
import random
import signal
import statistics
import subprocess
import sys
import time

import torch
import torch.nn.functional as F
from common import elapsed_ms, row, write
from torch import Tensor

from fastdisco import kernels

# MoCo's; SEED's of student and teacher, the latter the coldest for a queue in bfloat16.
TEMP, TEMP_S, TEMP_T = 0.2, 0.2, 0.01
AIMED = [(1024, 65536, 128), (256, 65536, 128)]  # B, K, d
SHAPES = (
    AIMED
    + [(1024, 65536, 256)]
    + [
        s
        for s in itertools.product((64, 256, 1024, 4096), (4096, 65536, 1 << 20), (128,))
        if s not in AIMED
    ]
)
CPU_SHAPE = (256, 65536, 128)
ROUNDS = {True: 15, False: 5}  # where there are aims; elsewhere
LATE = "the time was up"
ROUND_MS = 15  # of a contender in a round


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--minutes", type=float, default=8, help="then what is there is written (%(default)s)"
    )
    # Loss, contender, B, K, d: the fresh process.
    parser.add_argument("--memory", nargs=5, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory:
        return print(json.dumps(resident_growth(*args.memory[:2], *map(int, args.memory[2:]))))
    import fastdisco.run.environment  # noqa: F401  the result needs it: were it missing only at the end, all would have been measured for nothing

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what is there is written below
    end = time.monotonic() + 60 * args.minutes
    device = "gpu" if torch.cuda.is_available() else "cpu"
    found = dict(shapes=[], cpu={}, ceilings=None)
    try:
        if device == "gpu":
            on_gpu(found, end - 45)  # what the CPU forms take
        on_cpu(found["cpu"], end)
    finally:
        rows = summary(found, device == "gpu")
        print("kept in", write("kernels", device, rows, found, load_before=os.getloadavg()[0]))
    for r in rows:
        print(
            f"{r['name']:32}",
            f"{r['value']:.3g}" if r["value"] is not None else r["reason"],
            f"(aim {r['aim']:g})",
        )
    ours = {
        f"{s['loss']} {s['shape']}": s.get("failed")
        or s["contenders"].get("ours", {}).get("failed", LATE)
        for s in found["shapes"]
    }
    return "\n".join(f"{where}: {why}" for where, why in ours.items() if why != LATE) or None


# ---- the contenders: raw rows [B,d], the key's or teacher's raw rows [B,d], the queue's unit rows
# [K,d] -> loss, gradient to the first [B,d]


def plain_moco(z: Tensor, key: Tensor, queue: Tensor) -> Tensor:
    """MoCo's loss as in its paper, the logits in the queue's dtype."""
    q, k = F.normalize(z, dim=1), F.normalize(key, dim=1)
    logits = (
        torch.cat([(q * k).sum(1, keepdim=True).to(queue.dtype), q.to(queue.dtype) @ queue.T], 1)
        / TEMP
    )
    return F.cross_entropy(logits.float(), torch.zeros(len(q), dtype=torch.long, device=q.device))


def plain_seed(zs: Tensor, zt: Tensor, queue: Tensor) -> Tensor:
    """SEED's loss as in its paper, the scores in the queue's dtype."""
    s, t = F.normalize(zs, dim=1), F.normalize(zt, dim=1)
    scores = lambda x: torch.cat(
        [(x * t).sum(1, keepdim=True).to(queue.dtype), x.to(queue.dtype) @ queue.T], 1
    )
    return F.cross_entropy((scores(s) / TEMP_S).float(), F.softmax((scores(t) / TEMP_T).float(), 1))


def our_moco(z, key, queue):
    return kernels.info_nce(z, key, queue, TEMP)


def our_seed(zs, zt, queue):
    return kernels.seed(zs, zt, queue, TEMP_S, TEMP_T)


PLAIN, OURS = dict(moco=plain_moco, seed=plain_seed), dict(moco=our_moco, seed=our_seed)


def graded(loss):
    """Loss and gradient by autograd."""

    def call(z, other, queue):
        z = z.detach().requires_grad_()
        value = loss(z, other, queue)
        return value.detach(), torch.autograd.grad(value, z)[0]

    return call


@torch.no_grad()
def sdpa_moco(z: Tensor, key: Tensor, queue: Tensor, splits: int = 1) -> tuple[Tensor, Tensor]:
    """With E and M the log-sum-exp and the softmax mean of the negatives: log(1 + exp(E-s)) and
    sigmoid(E-s) (M - k) / temp."""
    q, k = F.normalize(z, dim=1), F.normalize(key, dim=1)
    lse, mean = attend(q / TEMP, queue, splits)
    margin = (q * k).sum(1) / TEMP - lse
    return F.softplus(-margin).mean(), through_unit(
        torch.sigmoid(-margin)[:, None] * (mean - k) / (TEMP * len(q)), q, z
    )


@torch.no_grad()
def sdpa_seed(zs: Tensor, zt: Tensor, queue: Tensor, splits: int = 1) -> tuple[Tensor, Tensor]:
    """Student and teacher attend to the queue together, each row over its temperature; the
    teacher's own feature joins as in kernels/chunked.py."""
    s, t = F.normalize(zs, dim=1), F.normalize(zt, dim=1)
    n = len(s)
    lse, mean = attend(torch.cat([s / TEMP_S, t / TEMP_T]), queue, splits)
    own = (s * t).sum(1)
    margin, b = own / TEMP_S - lse[:n], torch.sigmoid(lse[n:] - 1 / TEMP_T)
    loss = F.softplus(-margin) + b * (own - (s * mean[n:]).sum(1)) / TEMP_S
    grad = torch.sigmoid(-margin)[:, None] * (mean[:n] - t) - b[:, None] * (mean[n:] - t)
    return loss.mean(), through_unit(grad / (TEMP_S * n), s, zs)


SDPA = dict(moco=sdpa_moco, seed=sdpa_seed)


def attend(rows: Tensor, queue: Tensor, splits: int) -> tuple[Tensor, Tensor]:
    """Of rows [N,d] that are over their temperature: log-sum-exp [N] of their products with the
    queue, and the softmax mean [N,d] of its rows."""
    flash = (
        torch.ops.aten._scaled_dot_product_flash_attention
        if rows.is_cuda
        else torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    )
    parts = queue.view(splits, 1, -1, queue.shape[1])  # [S,1,K/S,d]
    # [S,1,N,d], [S,1,N]
    mean, lse = flash(rows.to(queue.dtype).expand(splits, 1, -1, -1), parts, parts, scale=1.0)[:2]
    if splits == 1:
        return lse[0, 0], mean[0, 0].float()
    total = lse[:, 0].logsumexp(0)
    return total, torch.einsum("sn,snd->nd", (lse[:, 0] - total).exp(), mean[:, 0].float())


def through_unit(grad: Tensor, x: Tensor, z: Tensor) -> Tensor:
    return (grad - (grad * x).sum(1, keepdim=True) * x) / z.norm(dim=1, keepdim=True)


def contenders(loss: str, shape: tuple[int, int, int], aimed: bool, multiprocessors: int) -> dict:
    """{name: (the queue's dtype, call)}"""
    b, k, _ = shape
    blocks = math.ceil((1 if loss == "moco" else 2) * b / 128)  # of a flash attention's rows
    splits = min(1 << max(0, math.ceil(math.log2(multiprocessors / blocks))), k // 256)
    fp32, bf16, sdpa = torch.float32, torch.bfloat16, SDPA[loss]
    plain, ours = graded(PLAIN[loss]), graded(OURS[loss])
    out = {
        "ours": (bf16, ours),
        "eager fp32": (fp32, plain),
        "eager bf16": (bf16, plain),
        "sdpa": (bf16, sdpa),
    }
    if splits > 1:
        out["sdpa split"] = bf16, lambda *x: sdpa(*x, splits=splits)
    if aimed:
        out |= {
            f"compile {name}": (dtype, graded(torch.compile(PLAIN[loss], dynamic=False)))
            for name, dtype in (("fp32", fp32), ("bf16", bf16))
        }
    return out


# ---- data, reference, floors


def inputs(
    loss: str, b: int, k: int, d: int, device: str, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Raw student rows, and raw key or teacher rows at a cosine of about 0.7 to them; a queue of
    random directions, of which each eighth is near such a row, for without rivals a cold teacher
    sees itself alone.  float32."""
    g = torch.Generator(device).manual_seed(seed)
    z, other = torch.randn(2, b, d, device=device, generator=g)
    other = F.normalize(z, dim=1) + F.normalize(other, dim=1)
    queue = F.normalize(torch.randn(k, d, device=device, generator=g), dim=1)
    near = queue[::8]
    near.mul_(0.3).add_(F.normalize(other, dim=1)[torch.arange(len(near), device=device) % b])
    return 3 * z, other, F.normalize(queue, dim=1)


@torch.no_grad()
def exact(
    loss: str, z: Tensor, other: Tensor, queue: Tensor, rows: int | None = None
) -> tuple[Tensor, Tensor]:
    """Loss and gradient in float64, by pieces of the queue (of `rows` rows)."""
    x, y = F.normalize(z.double(), dim=1), F.normalize(other.double(), dim=1)
    own, n = (x * y).sum(1, keepdim=True), len(x)

    def beside(rows_of, positive, temp):
        """sum_j exp((s_j - positive) / temp) [B,1], and the mean row under these weights"""
        total, mean = 0.0, 0.0
        for part in queue.split(rows or max(1, (1 << 26) // n)):
            p = torch.exp((rows_of @ part.double().T - positive) / temp)
            total, mean = total + p.sum(1, keepdim=True), mean + p @ part.double()
        return total, mean / total.clamp_min(1e-300)

    if loss == "moco":
        total, mean = beside(x, own, TEMP)
        return torch.log1p(total).mean(), through_unit(
            total / (1 + total) * (mean - y) / (TEMP * n), x, z.double()
        )
    (total, mean), (total_t, mean_t) = beside(x, own, TEMP_S), beside(y, 1.0, TEMP_T)
    a, b = total / (1 + total), total_t / (1 + total_t)
    value = torch.log1p(total) + b * (own - (x * mean_t).sum(1, keepdim=True)) / TEMP_S
    return value.mean(), through_unit(
        (a * (mean - y) - b * (mean_t - y)) / (TEMP_S * n), x, z.double()
    )


def errors(got: tuple[Tensor, Tensor], want: tuple[Tensor, Tensor]) -> dict[str, float]:
    """RMS(error) / RMS(reference) of loss and gradient."""
    return {
        name: float((g.double() - w).norm() / w.norm())
        for name, g, w in zip(("loss_error", "grad_error"), got, want)
    }


def floors(loss: str, b: int, k: int, d: int, ceilings: dict[str, float]) -> dict[str, float]:
    """Microseconds that no method can beat: the queue in bfloat16 and the rows through memory once,
    two matrix products, an exponential a logit."""
    work = 1 if loss == "moco" else 2  # SEED scores the teacher too
    return {
        "hbm": 1e6 * (2 * k * d + 3 * 4 * b * d) / ceilings["bytes_per_s"],
        "tensor": 1e6 * work * 4 * b * k * d / ceilings["flop_per_s"],
        "exp": 1e6 * work * b * k / ceilings["exp_per_s"],
    }


# ---- on a GPU


def on_gpu(found: dict, end: float):
    """Fills found["ceilings"] and found["shapes"] until `end` on time.monotonic()'s clock."""
    torch.set_float32_matmul_precision("highest")
    found["ceilings"] = measure_ceilings()
    print("ceilings:", {k: f"{v:.3g}" for k, v in found["ceilings"].items()}, flush=True)
    for shape, loss in itertools.product(SHAPES, OURS):
        if time.monotonic() > end:
            found["out_of_time"] = True
            return print("out of time")
        found["shapes"].append(
            one := dict(
                loss=loss,
                shape=list(shape),
                floors_us=floors(loss, *shape, found["ceilings"]),
                contenders={},
            )
        )
        # Whatever happens at one shape, the others are measured.
        attempt(one, lambda: measure(one, loss, shape, end))
        print(
            loss,
            *shape,
            {n: c.get("graph_us") or c for n, c in one["contenders"].items()},
            flush=True,
        )


def measure(one: dict, loss: str, shape: tuple[int, int, int], end: float):
    """Fills one["contenders"]: {name: graph_us, eager_us (medians), *_rounds_us, memory_bytes,
    loss_error, grad_error, or oom, or failed}."""
    properties = torch.cuda.get_device_properties(0)
    b, k, d = shape
    sets = max(2, min(64, math.ceil(2 * properties.L2_cache_size / (2 * k * d + 8 * b * d))))
    data = {torch.float32: [inputs(loss, *shape, "cuda", seed) for seed in range(sets)]}
    data[torch.bfloat16] = [(z, o, q.bfloat16()) for z, o, q in data[torch.float32]]
    want = exact(loss, *data[torch.float32][0])
    runs = contenders(loss, shape, shape in AIMED, properties.multi_processor_count)
    for name, (dtype, call) in list(runs.items()):
        one["contenders"][name] = result = {}
        if time.monotonic() > end:
            result["failed"] = LATE
            del runs[name]
            continue
        if not attempt(result, lambda: [call(*x) for x in data[dtype]]):  # compiles
            del runs[name]
            continue
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        got = call(*data[dtype][0])
        result |= errors(got, want) | {"memory_bytes": torch.cuda.max_memory_allocated() - before}
        del got
    rounds = ROUNDS[shape in AIMED]
    eager = {
        name: lambda call=call, dtype=dtype: [call(*x) for x in data[dtype]] and None
        for name, (dtype, call) in runs.items()
    }
    interleave(one["contenders"], "eager", eager, sets, rounds)
    fresh()
    # One pool: never two at a time, and no result outlives its replay.
    graphs, pool = {}, torch.cuda.graph_pool_handle()
    for name, (dtype, call) in runs.items():
        graph = torch.cuda.CUDAGraph()

        def capture():
            # Torch does not leave its own where a capture fails.
            with torch.cuda.stream(torch.cuda.Stream()), torch.cuda.graph(graph, pool=pool):
                for x in data[dtype]:
                    call(*x)

        if attempt(one["contenders"][name], capture):
            graphs[name] = graph.replay
    interleave(one["contenders"], "graph", graphs, sets, rounds)
    del graphs, data, runs, eager
    torch._dynamo.reset()
    fresh()


def attempt(result: dict, work) -> bool:
    """Whether it ran; else result says why not."""
    try:
        work()
        torch.cuda.synchronize()
        return True
    except torch.OutOfMemoryError:
        result["oom"] = True
    # A contender that this GPU or version refuses is a finding, not the bench's end.
    except Exception as e:
        result["failed"] = f"{type(e).__name__}: {e}"[:300]
    fresh()
    return False


def fresh():
    gc.collect()
    torch.cuda.empty_cache()


def interleave(results: dict, what: str, runs: dict, sets: int, rounds: int):
    """Adds <what>_us, the median time of a call, and the rounds' times; a run makes `sets`
    calls."""
    repeats = {}
    for name, run in list(runs.items()):
        if attempt(results[name], run):
            repeats[name] = max(1, round(ROUND_MS / max(elapsed_ms(run, 1), 1e-3)))
    times = {name: [] for name in repeats}
    for r in range(rounds):
        for name in random.Random(r).sample(sorted(repeats), len(repeats)):
            times[name].append(1e3 * elapsed_ms(runs[name], repeats[name]) / (repeats[name] * sets))
    for name, t in times.items():
        results[name] |= {
            f"{what}_us": statistics.median(t),
            f"{what}_rounds_us": [round(x, 3) for x in t],
        }


def measure_ceilings() -> dict[str, float]:
    """Of this GPU, now: bytes read plus written by a copy of 1 GiB, bfloat16 operations of a square
    product, exponentials in float32; a second."""
    x = torch.randn(1 << 28, device="cuda")
    y, n = torch.empty_like(x), 8192
    a, b = torch.randn(2, n, n, device="cuda", dtype=torch.bfloat16)
    c = torch.empty_like(a)
    exps, programs, block, loops = exponentials(), 132 * 64, 1024, 2048
    work = dict(
        bytes_per_s=(lambda: y.copy_(x), 2 * 4 * x.numel()),
        flop_per_s=(lambda: torch.mm(a, b, out=c), 2 * n**3),
        exp_per_s=(
            lambda: exps[programs,](x, LOOPS=loops, BLOCK=block, num_warps=4),
            programs * block * loops,
        ),
    )
    out = {}
    for name, (run, amount) in work.items():
        [run() for _ in range(3)]
        out[name] = amount / (1e-3 * statistics.median(elapsed_ms(run, 3) / 3 for _ in range(10)))
    return out


def exponentials():
    """A kernel that does nothing else."""
    import triton
    import triton.language as tl

    @triton.jit
    def kernel(x, LOOPS: tl.constexpr, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        v = tl.load(x + at)
        for _ in range(LOOPS):
            v = tl.exp2(v - 1.0)
        tl.store(x + at, v)

    return kernel


# ---- on the CPU


def on_cpu(found: dict, end: float, shape: tuple[int, int, int] = CPU_SHAPE, rounds: int = 15):
    """found[loss] = times in interleaved rounds and peak memory of the plain form and ours, in
    float32."""
    for loss in OURS:
        data, runs = (
            inputs(loss, *shape, "cpu"),
            dict(plain=graded(PLAIN[loss]), ours=graded(OURS[loss])),
        )
        want = exact(loss, *data)
        one = {name: errors(run(*data), want) | {"times_s": []} for name, run in runs.items()}
        for r in range(rounds):
            if r > 2 and time.monotonic() > end - 10:
                break
            for name in sorted(runs, reverse=r % 2 == 1):
                begin = time.perf_counter()
                runs[name](*data)
                one[name]["times_s"].append(time.perf_counter() - begin)
        for name in runs:
            alone = [sys.executable, __file__, "--memory", loss, name, *map(str, shape)]
            one[name]["memory_bytes"] = json.loads(
                subprocess.run(alone, text=True, capture_output=True, check=True).stdout
            )
        found[loss] = one | {
            "shape": list(shape),
            "threads": torch.get_num_threads(),
            "memory": "growth of a fresh process's peak resident set",
        }


def resident_growth(loss: str, name: str, b: int, k: int, d: int) -> int:
    """Bytes by which this process's peak resident set grows in one call; a small call first loads
    the libraries."""
    run = graded(dict(plain=PLAIN, ours=OURS)[name][loss])
    run(*inputs(loss, 64, 64, d, "cpu"))
    data = inputs(loss, b, k, d, "cpu")
    run(*[x[:64].clone() for x in data])
    gc.collect()
    with open("/proc/self/clear_refs", "w") as f:
        f.write("5")  # the peak is now what is resident
    before = status("VmHWM")
    run(*data)
    return status("VmHWM") - before


def status(name: str) -> int:
    with open("/proc/self/status") as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith(name))


# ---- the summary


def summary(found: dict, gpu: bool) -> list[dict]:
    """The rows of both losses; one without a number says why."""
    out = []
    for loss, (what, (aim, better, unit, number)) in itertools.product(OURS, ROWS.items()):
        try:
            value, reason = number(found, loss), None
        except Missing as e:
            value, reason = None, str(e) if gpu or what.startswith("cpu") else "no GPU has run this"
        out.append(row(f"{loss}_{what}", value, unit, aim, better, reason))
    return out


class Missing(Exception):
    """Why a number is not there."""


def at(found: dict, loss: str, b: int) -> dict:
    for s in found["shapes"]:
        if s["loss"] == loss and s["shape"] == [b, 65536, 128]:
            return s
    raise Missing(LATE)


def got(one: dict, name: str, key: str) -> float:
    result = one["contenders"].get(name, {})
    if key not in result:
        raise Missing(f"{name}: {'oom' if 'oom' in result else result.get('failed', LATE)}")
    return result[key]


def versus(*names: str, key: str = "graph_us"):
    """The best of these over ours, at B=1024."""

    def number(found, loss):
        one = at(found, loss, 1024)
        there = [n for n in names if key in one["contenders"].get(n, {})] or names[:1]
        return min(got(one, n, key) for n in there) / got(one, "ours", key)

    return number


def over_floor(b: int):
    return lambda found, loss: (
        got(at(found, loss, b), "ours", "graph_us") / max(at(found, loss, b)["floors_us"].values())
    )


def cpu(key: str, ratio):
    """ratio(plain's, ours)"""

    def number(found, loss):
        if loss not in found["cpu"]:
            raise Missing(LATE)
        return ratio(*(found["cpu"][loss][name][key] for name in ("plain", "ours")))

    return number


ROWS = {  # aim, what is better, unit, value; the aims for SEED are MoCo's
    "cpu_speedup_b256": (
        2,
        "higher",
        "x plain torch's speed, on the CPU",
        cpu("times_s", lambda *t: statistics.median(map(operator.truediv, *t))),
    ),
    "cpu_memory_ratio_b256": (
        10,
        "higher",
        "x less memory than plain torch, on the CPU",
        cpu("memory_bytes", operator.truediv),
    ),
    "over_floor_b1024": (2, "lower", "x the time of the binding floor", over_floor(1024)),
    "over_floor_b256": (3, "lower", "x the time of the binding floor", over_floor(256)),
    "vs_eager_b1024": (10, "higher", "x the speed of eager fp32", versus("eager fp32")),
    "vs_compile_fp32_b1024": (
        4,
        "higher",
        "x the speed of torch.compile fp32",
        versus("compile fp32"),
    ),
    "vs_compile_bf16_b1024": (
        2,
        "higher",
        "x the speed of torch.compile bf16",
        versus("compile bf16"),
    ),
    "vs_sdpa_b1024": (
        1.3,
        "higher",
        "x the speed of flash SDPA, the faster form",
        versus("sdpa", "sdpa split"),
    ),
    "memory_ratio_b1024": (
        50,
        "higher",
        "x less memory than eager fp32",
        versus("eager fp32", key="memory_bytes"),
    ),
}


if __name__ == "__main__":
    sys.exit(main())
