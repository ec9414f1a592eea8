"""How the teacher runs: frozen, batch norm folded away, in half precision, all views of a
resolution in one forward, as a CUDA graph."""

import hashlib
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdisco import config, models
from fastdisco.common.errors import UserError
from fastdisco.engine import cudagraph
from fastdisco.models import Out
from fastdisco.teacher.fold import fold

# The least cosine of an embedding of noise to that of the network as it was loaded.  bf16 has 8
# bits: a ResNet-50 of random weights, which is worse conditioned than a trained one, came to 0.997.
NEAR = {torch.float32: 0.9995, torch.float16: 0.9995, torch.bfloat16: 0.99}


class Options(NamedTuple):
    """How and where a teacher runs; the defaults leave the network as it is."""

    device: torch.device | str = "cpu"
    # Of weights, views and activations; None: the network's own.
    dtype: torch.dtype | None = None
    # Batch norm into the layers before it.
    fold: bool = False
    # > 0: batch norm by the statistics of that many images of a view, as in the official code.
    bn_group: int = 0
    # A CUDA graph.
    graph: bool = False
    # Pixels, of the noise that all this is checked with: those of the views.
    sizes: tuple[int, ...] = (64,)


def options(
    cfg: config.Teacher, precision: str, sizes: tuple[int, ...], device: torch.device, graphs: bool
) -> Options:
    """What the configuration asks for.

    precision  of the engine
    sizes      of the views, pixels
    graphs     whether there may be CUDA graphs
    Raises UserError for fp16 on a CPU."""
    cuda = device.type == "cuda"
    asked = cfg.precision
    if asked == "auto":
        asked = "fp16" if cuda else precision
    if asked == "fp16" and not cuda:
        raise UserError("teacher.precision: fp16 needs a GPU; take fp32, bf16 or auto")
    group = cfg.bn_group if cfg.bn == "batch" else 0
    return Options(
        device,
        dtype=models.DTYPE[asked],
        # The statistics of a batch differ from those that folding would write into the weights.
        fold=cfg.fold and not group,
        bn_group=group,
        graph=cfg.graph and graphs and cuda,
        sizes=sizes,
    )


class Teacher:
    """A network without gradient that takes all views of a resolution in one forward.  It is no
    module: nothing that is checkpointed may hold it.

    In eval mode a target is a function of its image alone.  The official DisCo code leaves its
    teacher in train mode: its targets depend on the other 31 images of a GPU, and its running
    statistics drift away from the checkpoint.  `bn_group` gives those targets, but leaves the
    running statistics alone.  The teachers of SEED and SwAV+DisCo are in eval mode."""

    def __init__(self, net: models.Net, options: Options | None = None) -> None:
        """net: on the CPU, as loaded.

        Raises UserError where it does not take views of those sizes, or where its embeddings of
        noise in half precision are not near the original ones."""
        self.net = net.eval().requires_grad_(False)
        self.options = options = options or Options()
        self.fingerprint = fingerprint(net)
        probe = noise(options.sizes, next(net.parameters()).dtype)
        # With the statistics of a batch there is nothing to compare with.
        want = of_noise(net, probe) if options.dtype and not options.bn_group else None
        if options.fold:
            fold(net, probe[:1])
        for m in net.modules():
            norm = isinstance(m, _BatchNorm)
            if norm and options.bn_group:
                _use_batch_statistics(m)
            # Half precision would round a batch norm's statistics; it takes inputs of any dtype.
            if options.dtype and not norm:
                _cast_own(m, options.dtype)
        net.to(options.device).to(memory_format=torch.channels_last)
        if want is not None:
            self._check(want, probe)
        self.forward = self.eager
        if options.graph:
            self.forward = cudagraph.Graphed("teacher", self.eager, dtype=options.dtype)

    def __call__(self, views: list[Tensor]) -> Out | cudagraph.Later:
        """[B,3,S,S] per view, in any float dtype -> z [V,B,d] in float32 or wider.

        As a CUDA graph it is computed beside what the caller does next, until z is read."""
        return cast(Out | cudagraph.Later, self.forward(views))

    # Not inference_mode: a loss may save the targets for its backward.
    @torch.no_grad()
    def eager(self, views: list[Tensor]) -> Out:
        """The same without a graph."""
        views = [v.to(self.options.dtype or v.dtype) for v in views]
        with torch.autocast(views[0].device.type, enabled=False):
            if group := self.options.bn_group:
                z = torch.stack([self._in_groups(v, group) for v in views])
            else:
                z = self.net(views).z
        return Out(z.to(torch.promote_types(z.dtype, torch.float32)))

    def _in_groups(self, view: Tensor, group: int) -> Tensor:
        """[B,d]: the forward of so many images at a time."""
        return torch.cat([self.net([part]).z[0] for part in view.split(group)])

    def _check(self, want: Tensor, probe: list[Tensor]) -> None:
        """Raises UserError where the embeddings of noise are not near those in float32."""
        device, dtype = self.options.device, self.options.dtype
        assert dtype
        views = [v.to(device).to(memory_format=torch.channels_last) for v in probe]
        got = self.eager(views).z.to(want)
        near = F.cosine_similarity(got, want, dim=-1).min().item()
        least = NEAR[dtype]
        # So written that nan, which an overflow gives, fails too.
        if not near >= least:
            name = str(dtype).removeprefix("torch.")
            other = " or bf16" if dtype == torch.float16 else ""
            raise UserError(
                f"teacher.precision: of noise, the embedding in {name} has a cosine of {near:.5f} "
                f"to the one in float32, less than {least}; set teacher.precision=fp32{other}"
            )


def noise(sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Two images of each size, [2,3,S,S], always the same."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, size, size, generator=g).to(dtype) for size in sizes]


@torch.no_grad()
def of_noise(net: models.Net, probe: list[Tensor]) -> Tensor:
    """z [V,2,d] of `noise`, in eval mode.

    Raises UserError where the network does not take images of that size, or gives no embedding."""
    try:
        z = net.eval()(probe).z
    except (AssertionError, RuntimeError) as e:
        raise UserError(
            "teacher.arch: this network cannot take images of "
            f"{' and '.join(str(x.shape[-1]) for x in probe)} px ({e}); take its own "
            "size (view.size, or --size), or for a ViT name teacher.arch and set "
            "teacher.kwargs={dynamic_img_size: true}"
        ) from e
    if not z.isfinite().all() or not z.norm(dim=-1).all():
        raise UserError(
            "teacher.file: its weights give no embedding of noise, but zeros or what is no number; "
            "the file is broken: take another"
        )
    return z


def fingerprint(net: nn.Module) -> str:
    """sha256, hex, over names, shapes and values of the weights and running statistics: the same
    for every wrapping and file format."""
    digest = hashlib.sha256()
    for name, x in sorted(net.state_dict().items()):
        # Without the batch counters of batch norm, which old files lack and eval mode ignores.
        if x.is_floating_point():
            digest.update(f"{name} {tuple(x.shape)} ".encode())
            digest.update(x.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def _use_batch_statistics(norm: Any) -> None:
    norm.train()
    # The batch's statistics are used, and nothing is written into the running ones.
    norm.track_running_stats = False


def _cast_own(m: nn.Module, dtype: torch.dtype) -> None:
    """Casts the module's own weights, and not those of the modules in it."""
    m._apply(lambda x: x.to(dtype) if x.is_floating_point() else x, recurse=False)
