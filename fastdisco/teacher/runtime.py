"""How the teacher runs: frozen, batch norm folded away, in half precision, all views of a
resolution in one forward, as a CUDA graph."""

import hashlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastdisco import config, models
from fastdisco.common.errors import UserError
from fastdisco.engine import cudagraph
from fastdisco.models import Out
from fastdisco.teacher.fold import fold

# Least cosine of an embedding of noise to that of the network as it was loaded.  bf16 has 8 bits: a
# ResNet-50 of random weights, which is worse conditioned than a trained one, came to 0.997.
NEAR = {torch.float32: 0.9995, torch.float16: 0.9995, torch.bfloat16: 0.99}


class Options(NamedTuple):
    """The defaults leave the network as it is."""

    device: torch.device | str = "cpu"
    dtype: torch.dtype | None = None  # of weights, views and activations; None: the network's own
    fold: bool = False
    # > 0: batch norm by the statistics of that many images of a view, as in the official code.
    bn_group: int = 0
    graph: bool = False
    sizes: tuple[int, ...] = (64,)  # pixels; of the noise that checks the above


def options(
    cfg: config.Teacher, precision: str, sizes: tuple[int, ...], device: torch.device, graphs: bool
) -> Options:
    """What the configuration asks for.  precision: of the engine; sizes: of the views; graphs:
    whether there may be any.

    Raises UserError for fp16 on a CPU."""
    cuda = device.type == "cuda"
    asked = cfg.precision if cfg.precision != "auto" else "fp16" if cuda else precision
    if asked == "fp16" and not cuda:
        raise UserError("teacher.precision: fp16 needs a GPU; take fp32, bf16 or auto")
    group = cfg.bn_group if cfg.bn == "batch" else 0
    return Options(
        device,
        models.DTYPE[asked],
        cfg.fold and not group,
        group,
        cfg.graph and graphs and cuda,
        sizes,
    )


class Teacher:
    """No gradient, all views of a resolution in one forward.  Not a module: nothing that is
    checkpointed may hold it.

    In eval mode a target is a function of its image alone.  The official DisCo code leaves its
    teacher in train mode, so that its targets depend on the other 31 images of a GPU and its
    running statistics drift away from the checkpoint; `bn_group` gives those targets, with the
    running statistics left alone.  SEED's and SwAV+DisCo's teachers are in eval mode."""

    def __init__(self, net: models.Net, options: Options = Options()):
        """net: on the CPU, as loaded.  Raises UserError where it does not take views of that size,
        or its embeddings of noise in half precision are not near those of before."""
        self.net, self.options, self.fingerprint = (
            net.eval().requires_grad_(False),
            options,
            fingerprint(net),
        )
        probe = noise(options.sizes, next(net.parameters()).dtype)
        want = of_noise(net, probe) if options.dtype and not options.bn_group else None
        if options.fold:
            fold(net, probe[:1])
        for m in net.modules():
            if options.bn_group and isinstance(m, _BatchNorm):
                m.train()
                # The batch's statistics, and nothing is written into the running ones.
                m.track_running_stats = False
            # Whose statistics half precision would round; it takes inputs of any.
            if options.dtype and not isinstance(m, _BatchNorm):
                m._apply(
                    lambda x: x.to(options.dtype) if x.is_floating_point() else x, recurse=False
                )
        net.to(options.device, memory_format=torch.channels_last)
        if want is not None:
            self._check(want, probe)
        self.forward = (
            cudagraph.Graphed("teacher", self.eager, dtype=options.dtype)
            if options.graph
            else self.eager
        )

    def __call__(self, views: list[Tensor]) -> Out | cudagraph.Later:
        """[B,3,S,S] per view, in any float dtype -> z [V,B,d] in float32 or wider, which as a graph
        is computed beside what the caller does next."""
        return self.forward(views)

    @torch.no_grad()  # not inference_mode: a loss may save the targets for its backward
    def eager(self, views: list[Tensor]) -> Out:
        """The same without a graph."""
        views = [v.to(self.options.dtype or v.dtype) for v in views]
        with torch.autocast(views[0].device.type, enabled=False):
            if group := self.options.bn_group:
                z = torch.stack(
                    [torch.cat([self.net([part]).z[0] for part in v.split(group)]) for v in views]
                )
            else:
                z = self.net(views).z
        return Out(z.to(torch.promote_types(z.dtype, torch.float32)))

    def _check(self, want: Tensor, probe: list[Tensor]):
        got = self.eager(
            [v.to(self.options.device, memory_format=torch.channels_last) for v in probe]
        ).z.to(want)
        near = F.cosine_similarity(got, want, dim=-1).min().item()
        least = NEAR[self.options.dtype]
        if not near >= least:  # nor nan, which an overflow gives
            dtype = str(self.options.dtype).removeprefix("torch.")
            raise UserError(
                f"teacher.precision: of noise, the embedding in {dtype} has a cosine of {near:.5f} "
                f"to the one in float32, less than {least}; set "
                f"teacher.precision=fp32{' or bf16' if self.options.dtype == torch.float16 else ''}"
            )


def noise(sizes: tuple[int, ...], dtype: torch.dtype = torch.float32) -> list[Tensor]:
    """Two images of each size, [2,3,S,S], always the same."""
    g = torch.Generator().manual_seed(0)
    return [torch.randn(2, 3, size, size, generator=g).to(dtype) for size in sizes]


@torch.no_grad()
def of_noise(net: models.Net, probe: list[Tensor]) -> Tensor:
    """z [V,2,d] of `noise`, in eval mode.  Raises UserError where the network does not take images
    of that size, or gives no embedding."""
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
    """sha256, hex, over names, shapes and values of the weights and running statistics, the same
    for every wrapping and file format."""
    digest = hashlib.sha256()
    for name, x in sorted(net.state_dict().items()):
        # Not the batch counters of batch norm, which old files lack and eval mode ignores.
        if x.is_floating_point():
            digest.update(f"{name} {tuple(x.shape)} ".encode())
            digest.update(x.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
