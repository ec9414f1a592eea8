"""Fine-tuning on some of the labels, as SwAV's eval_semisup.py does it: the whole network is trained,
in train mode, the backbone at a rate of its own.  Not to be mixed up with a linear evaluation.

Letters: N images of one step on this rank, C classes, E epochs."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.evals import choice, protocols
from fastdisco.evals.protocols import Protocol
from fastdisco.models import sync_bn

# (images [n,3,S,S], labels [n]) of this rank: of equal number on all ranks, from a step on.
Source = Callable[[int, int], Iterator[tuple[Tensor, Tensor]]]


class Tuning:
    """A fine-tuning under way; `state_dict` is all that a resume needs."""

    def __init__(
        self, backbone: nn.Module, features: int, classes: int, protocol: Protocol, seed: int
    ) -> None:
        """The backbone is copied, and a new linear layer drawn by the seed is put after it.  Batch
        norm takes its statistics over all ranks."""
        assert protocol.trunk_lr is not None
        device = next(backbone.parameters()).device
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(dist.mix(seed, 0xF17E))
            layer = nn.Linear(features, classes)
        if protocol.init == "normal":
            nn.init.normal_(layer.weight, std=0.01)
            nn.init.zeros_(layer.bias)
        body = copy.deepcopy(backbone).requires_grad_()
        self.net = nn.Sequential(body, layer.to(device))
        sync_bn(self.net)
        self.protocol, self.seed = protocol, seed
        groups = [{"params": self.net[0].parameters()}, {"params": self.net[1].parameters()}]
        self.optimizer = torch.optim.SGD(
            groups,
            lr=protocol.trunk_lr,
            momentum=protocol.momentum,
            weight_decay=protocol.weight_decay,
        )
        self.epoch = self.step = 0  # the next to be done
        self.curves: dict[str, list[float]] = {"val": [], "val_top5": [], "loss": []}
        self._loss = torch.zeros((), device=device)

    def state_dict(self) -> dict[str, Any]:
        return {
            "protocol": self.protocol.model_dump(mode="json"),
            "net": self.net.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "loss": self._loss,
            "position": (self.epoch, self.step),
            "curves": self.curves,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError where the state is of another protocol."""
        if state["protocol"] != self.protocol.model_dump(mode="json"):
            raise UserError("finetune: the saved training has another protocol; remove it")
        self.net.load_state_dict(state["net"])
        self.optimizer.load_state_dict(state["optimizer"])
        self._loss.copy_(state["loss"])
        self.epoch, self.step = state["position"]
        self.curves = {k: list(v) for k, v in state["curves"].items()}

    def run(
        self,
        source: Source,
        val: Callable[[nn.Module], tuple[Tensor, Tensor]],
        watch: Callable[["Tuning"], None] = lambda tuning: None,
    ) -> None:
        """Trains from the position to the end.

        val    of the network in eval mode: logits [n,C] and labels [n] of this rank's images
        watch  is called after every step and every epoch, and may raise to stop"""
        cuda = [self._loss.device] if self._loss.is_cuda else []
        with torch.random.fork_rng(cuda):
            while self.epoch < self.protocol.epochs:
                self.net.train()
                for x, y in source(self.epoch, self.step):
                    self._loss += self._learn(x.float(), y)
                    self.step += 1
                    watch(self)
                self._measure(val)
                self.epoch, self.step = self.epoch + 1, 0
                watch(self)

    def _learn(self, x: Tensor, y: Tensor) -> Tensor:
        for group, rate in zip(self.optimizer.param_groups, self._rates()):
            group["lr"] = rate
        # What dropout draws belongs to the step, so that a resume draws it again.
        torch.manual_seed(dist.mix(self.seed, self.epoch, self.step, dist.rank()))
        # As DistributedDataParallel has it, each rank's mean counts alike.
        loss = F.cross_entropy(self.net(x), y)
        self.optimizer.zero_grad()
        loss.backward()
        for p in self.net.parameters():
            if p.grad is not None:
                dist.all_mean(p.grad)
        self.optimizer.step()
        return loss.detach()

    def _rates(self) -> tuple[float, float]:
        p = self.protocol
        return protocols.trunk_rate(p, self.epoch), protocols.rate(p, self.epoch)

    def _measure(self, val: Callable[[nn.Module], tuple[Tensor, Tensor]]) -> None:
        with torch.no_grad():
            logits, label = val(self.net.eval())
        true, found = logits.gather(1, label[:, None]), choice.classes_of(logits)
        right = torch.stack(
            [
                (found == label).double().sum(),
                (((logits >= true).sum(1) <= 5) & (found >= 0)).double().sum(),
                torch.tensor(float(len(label)), dtype=torch.float64, device=label.device),
            ]
        )
        top1, top5, n = dist.all_sum(right).tolist()
        self.curves["val"].append(top1 / n)
        self.curves["val_top5"].append(top5 / n)
        self.curves["loss"].append(float(dist.all_mean(self._loss.clone())) / max(1, self.step))
        self._loss.zero_()


def run(
    backbone: nn.Module,
    features: int,
    classes: int,
    protocol: Protocol,
    source: Source,
    val: Callable[[nn.Module], tuple[Tensor, Tensor]],
    seed: int = 0,
) -> dict[str, float]:
    """Accuracies 0..1 by names that say how they came about, see `report`.  The backbone itself is
    left as it is."""
    tuning = Tuning(backbone, features, classes, protocol, seed)
    tuning.run(source, val)
    return report(tuning)


def report(tuning: Tuning) -> dict[str, float]:
    """finetune_top1_last         after the last epoch
    finetune_top1_best_on_val  the best epoch on val, as the official script reports it

    Raises UserError where the training diverged."""
    top1, loss = tuning.curves["val"], tuning.curves["loss"]
    whole = all(x.isfinite().all() for x in tuning.net.state_dict().values())
    if not (whole and torch.tensor(loss).isfinite().all()):
        raise UserError("finetune: the training diverged; give smaller semi.lr and semi.trunk_lr")
    return {
        "finetune_top1_last": top1[-1],
        "finetune_top5_last": tuning.curves["val_top5"][-1],
        "finetune_top1_best_on_val": max(top1),
    }
