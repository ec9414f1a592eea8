"""A configuration's training on a fake GPU (fake_gpu.py), with all of the project's own code but the
data's: networks, teacher, method, queue, mean student (EMA), exchange of gradients, optimizer,
schedules, checkpoint.  DeepSpeed, CUDA graphs and NCCL have stand-ins that do what they do."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.distributed as td
from fake_gpu import CUDA, FINAL, FakeGpu, backward
from fastdisco.kernels import checks
from torch import Tensor, nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_map_only

from fastdisco import config, data, models, teacher
from fastdisco.common import dist
from fastdisco.common.precision import DTYPE
from fastdisco.engine import cudagraph, optim
from fastdisco.engine.exchange import Exchange
from fastdisco.methods import Progress
from fastdisco.models import heads
from fastdisco.models.queue import Queue
from fastdisco.run import checkpoint, students
from fastdisco.run.meter import Meter
from fastdisco.teacher import fold, runtime

STEPS_PER_EPOCH = 5004


def stand_ins(monkeypatch):
    """Patches what asks for a driver, and what reads the values of a network as it is loaded."""
    put = monkeypatch.setattr
    put(dist, "device", lambda: CUDA)
    put(torch.cuda, "is_current_stream_capturing", lambda: False)
    put(torch.cuda, "is_bf16_supported", lambda *_: True)
    put(torch.cuda, "get_device_capability", lambda *_: (9, 0))
    put(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    put(torch._C, "_select_conv_backend", _convolution(torch._C._select_conv_backend))
    put(Tensor, "pin_memory", _pinned)
    # `backward` does what the engine does.
    run = torch.autograd.Variable._execution_engine.run_backward
    engine = SimpleNamespace(queue_callback=FINAL.append, run_backward=run)
    put(torch.autograd.Variable, "_execution_engine", engine)
    put(nn.Module, "_apply", _apply)
    put(models, "of", faked(models.of))
    put(students.engine, "create", FakeEngine)
    put(cudagraph.Capture, "__init__", _capture)
    put(cudagraph.Capture, "__call__", _replay)
    put(runtime, "fingerprint", lambda net: "none")
    put(runtime, "of_noise", lambda net, probe: None)
    put(runtime, "fold", _fold)


def ranks(monkeypatch, world: int, rank: int) -> list[tuple[str, int]]:
    """Makes this process one of several; returns the list that takes (name, elements) of every
    exchange."""
    sent = []

    def gather(out, x, async_op):
        assert out.device == x.device == CUDA and out.dtype == x.dtype and x.is_contiguous()
        assert out.numel() == world * x.numel()
        return work("gather", x)

    def work(name, x):
        sent.append((name, x.numel()))
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setenv("WORLD_SIZE", str(world))
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setattr(dist, "_GATHER", gather)
    monkeypatch.setattr(td, "all_reduce", lambda x, op=None, async_op=False: work("reduce", x))
    return sent


def _convolution(select):
    """Without a driver torch believes that cuDNN has no bfloat16; from sm_80 on it has it as it has
    float16, and answers channels_last in channels_last."""

    def backend(x, weight, **how):
        if x.is_cuda and x.dtype == torch.bfloat16:
            x, weight = x.half(), weight.half()
        return select(x, weight, **how)

    return backend


def _pinned(x: Tensor) -> Tensor:
    out = x.clone()
    out.pinned = True  # what FakeGpu asks of a copy's source
    return out


def _apply(self, fn, recurse=True):
    """Module._apply that keeps a parameter the same object, as it does for real tensors; of fake
    ones torch's swaps two objects, which it refuses where anything else knows them."""
    for child in self.children() if recurse else ():
        child._apply(fn)
    with torch.no_grad():
        for p in self._parameters.values():
            if p is not None:
                new = fn(p)
                p.data, p.fake_device = new, new.device
        for name, b in self._buffers.items():
            self._buffers[name] = b if b is None else fn(b)
    return self


def faked(make):
    """`make`, which makes a network, outside the mode and without memory; the weights of what it
    returns are fake ones on the CPU."""

    def made(*args, **kwargs):
        with unset_fake_temporarily(), torch.device("meta"):
            net = make(*args, **kwargs)
        like = lambda x: torch.empty_strided(x.shape, x.stride(), dtype=x.dtype)
        for m in net.modules():
            for name, p in m._parameters.items():
                m._parameters[name] = p if p is None else nn.Parameter(like(p), p.requires_grad)
            for name, b in m._buffers.items():
                m._buffers[name] = b if b is None else like(b)
        return net

    return made


def _capture(self, forward, views, kept, dtype):
    self.forward = forward
    self.inputs = [torch.empty_like(v, dtype=dtype).copy_(v) for v in views]


def _replay(self, views):
    for mine, view in zip(self.inputs, views):
        mine.copy_(view, non_blocking=True)
    out = self.forward(self.inputs)
    return type(out)(*(x if x is None else x.clone() for x in out))


def _fold(net, probe):
    """teacher.fold without its look at the numbers."""
    for layer, norm, *_ in fold._run(net, probe)[1]:
        new = fold._folded(layer, norm)
        layer.weight, layer.bias = new.weight, new.bias
        fold._replace(net, norm)


class FakeEngine(nn.Module):
    """What DeepSpeed does at ZeRO stage 0: autocast, scaler, clipping, the optimizer's step."""

    def __init__(self, net, optimizer, cfg, micro_batch, accumulate, clip):
        super().__init__()
        self.module, self.basic_optimizer, self.cfg, self.clip = net, optimizer, cfg, clip
        self.accumulate, self.micro_steps = accumulate, 0
        net.to(memory_format=torch.channels_last)
        self.exchange = Exchange(net, 8 << 20, self.boundary)
        self.torch_autocast_z0_gradscaler = None
        if cfg.precision == "fp16":
            self.torch_autocast_z0_gradscaler = torch.amp.GradScaler("cuda")
            self.torch_autocast_z0_gradscaler._enabled = True  # it has looked for a driver

    def boundary(self) -> bool:
        return (self.micro_steps + 1) % self.accumulate == 0

    def forward(self, views):
        precision = self.cfg.precision
        with torch.autocast("cuda", DTYPE[precision], precision != "fp32"):
            return self.module(views)

    def backward(self, loss):
        assert loss.device == CUDA and loss.dtype == torch.float32 and loss.shape == ()
        scaler = self.torch_autocast_z0_gradscaler
        backward(scaler.scale(loss) if scaler else loss)
        lost = [name for name, p in self.module.named_parameters() if p.grad is None]
        assert not lost, f"the loss does not depend on {lost}"
        self.exchange.finish()

    def step(self):
        if self.boundary():
            self._move()
        self.micro_steps += 1

    def _move(self):
        scaler, optimizer = self.torch_autocast_z0_gradscaler, self.basic_optimizer
        if self.clip:
            if scaler:
                scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(list(self.module.parameters()), self.clip)
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        optimizer.zero_grad()

    def zero_optimization(self) -> bool:
        return False

    def zero_optimization_stage(self) -> int:
        return 0


@dataclass
class Loader:
    """What is asked of the loader beside its batches."""

    batch: int
    crops: tuple
    placement: data.placement.Placement
    device: torch.device = CUDA
    state: int = 0

    def views(self) -> list[Tensor]:
        """As DALI hands them over."""
        dtype = torch.float16 if self.placement.half else torch.float32
        new = lambda size: torch.empty(self.batch, size, size, 3, dtype=dtype, device=CUDA)
        return [new(crop.size).permute(0, 3, 1, 2) for crop in self.crops]


class Rehearsal:
    """The training of a configuration on `gpu`, step by step as train.py has it; inside the mode
    and with `stand_ins`."""

    def __init__(self, gpu: FakeGpu, cfg: config.Config):
        self.gpu, self.cfg, self.done = gpu, cfg, 0
        place = data.place(cfg.data, CUDA, cfg.engine.precision)
        micro = config.micro_batch(cfg, dist.world())
        self.loader = Loader(micro, config.crops(cfg), place)
        with gpu.reads(0):
            state = students.create("", cfg, micro, CUDA)
            self.teacher = cfg.teacher and self._teacher(state.method.teacher_views)
            # The one read of a loss, at a queue's first use.
            for m in state.method.modules():
                if isinstance(m, Queue):
                    checks._unit_rows("rehearsal", m.rows)
            (self.state,) = students.prepare([state], self.teacher, self.loader)
        self.meter = Meter(cfg.data.batch, None, 0)

    def _teacher(self, teacher_views: int | None) -> runtime.Teacher:
        cfg = self.cfg
        sizes = tuple(dict.fromkeys(crop.size for crop in self.loader.crops[:teacher_views]))
        run = teacher.options(cfg.teacher, cfg.engine.precision, sizes, CUDA, cfg.perf.graphs)
        head = {"mlp": heads.mlp, "dino": heads.dino_mlp}[cfg.student.head]
        make = lambda width: head(width, 2048, cfg.student.dim)
        return runtime.Teacher(
            faked(models.create)(cfg.teacher.arch, make, cfg.teacher.kwargs), run
        )

    def steps(self, count: int):
        """That many optimizer steps between two log points, in which nothing may wait."""
        for _ in range(count):
            self._step()
            self.done += 1

    def _step(self):
        cfg, p, step = self.cfg, self.state, self.done
        epoch = step / STEPS_PER_EPOCH
        lr = optim.rate(cfg.optim, p.lr, epoch, cfg.run.epochs)
        optim.move(p.optimizer, lr, optim.decay(cfg.optim, epoch, cfg.run.epochs))
        for i in range(cfg.data.accumulate):
            micro_step = step * cfg.data.accumulate + i
            progress = Progress(micro_step, epoch / cfg.run.epochs, epoch, step)
            targets = self.teacher and students.once(self.teacher)
            terms = p.method.step(p.nets(targets), self.loader.views(), progress)
            loss = p.method.loss(terms)
            p.engine.backward(loss)
            optim.freeze(p.net, p.method.frozen(progress))
            p.engine.step()
            self.meter.add({"loss": loss, **terms})
        if p.ema:
            models.ema_update(p.ema, p.net, p.method.momentum(progress))
        p.method.after_step()

    def resume(self):
        """Takes the training's state to the CPU, as a checkpoint's file would, and back."""
        p = self.state
        items = checkpoint.items(p.engine, p.ema, p.method, self.loader)
        del items["rng"]
        with self.gpu.reads(0):
            for item in items.values():
                item.set(tree_map_only(Tensor, lambda x: x.to("cpu", copy=True), item.get()))
