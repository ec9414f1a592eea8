"""How the teacher runs: frozen, in eval mode, all views of a resolution in one forward."""
import hashlib

import torch
from torch import Tensor, nn

from fastdisco import models
from fastdisco.models import Out


class Teacher:
    """Eval mode, no gradient, all views of a resolution in one forward.  Not a module: nothing that is checkpointed may hold it.

    The official DisCo code leaves its teacher in train mode, so that its targets depend on the other 31 images of a GPU and its running
    statistics drift away from the checkpoint; SEED's and SwAV+DisCo's teachers are in eval mode, as here."""

    def __init__(self, net: models.Net):
        self.net = net.eval().requires_grad_(False).to(memory_format=torch.channels_last)
        self.fingerprint = fingerprint(net)

    @torch.no_grad()  # not inference_mode: the loss saves the targets for its backward
    def __call__(self, views: list[Tensor]) -> Out:
        return self.net(views)


def fingerprint(net: nn.Module) -> str:
    """sha256, hex, over names, shapes and values of the weights and running statistics, the same for every wrapping and file format."""
    digest = hashlib.sha256()
    for name, x in sorted(net.state_dict().items()):
        if x.is_floating_point():  # not the batch counters of batch norm, which old files lack and eval mode ignores
            digest.update(f"{name} {tuple(x.shape)} ".encode())
            digest.update(x.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()
