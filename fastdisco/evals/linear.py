"""Linear evaluation: classifiers on frozen features, trained by SGD.  A grid of learning rates and
weight decays is trained at once, on one pass of the features.

Letters: G heads, N images of one step on this rank, F features, C classes, E epochs."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.evals import choice, protocols, shares
from fastdisco.evals.features import Features
from fastdisco.evals.protocols import Protocol

# Logits in memory at a time where images are measured.
CELLS = 2**24


class Rate(NamedTuple):
    """What sets one head apart; the schedule is the protocol's."""

    lr: float
    weight_decay: float


class Step(NamedTuple):
    x: Tensor  # [N,F] float32: this rank's part, perhaps of no image
    label: Tensor  # [N] int64
    images: int  # over all ranks


# (epoch, first step) -> the steps from there to the end of the epoch, of equal number on all ranks.
Source = Callable[[int, int], Iterator[Step]]


def grid(p: Protocol, lrs: Sequence[float] = (), decays: Sequence[float] = ()) -> tuple[Rate, ...]:
    """The protocol's own rate first, then every lr with every weight decay that is another."""
    own = Rate(p.lr, p.weight_decay)
    more = [Rate(lr, wd) for wd in decays or [p.weight_decay] for lr in lrs or [p.lr]]
    return tuple(dict.fromkeys([own, *more]))


class Heads:
    """G linear layers side by side: each is trained as it would be alone."""

    def __init__(
        self,
        rates: Sequence[Rate],
        features: int,
        classes: int,
        protocol: Protocol,
        seed: int,
        device: torch.device | str = "cpu",
    ):
        """All begin with the same weights, drawn by the seed."""
        self.rates, self.protocol = tuple(rates), protocol
        draw = torch.Generator().manual_seed(dist.mix(seed, 0x11EA))
        weight = torch.randn(classes, features, generator=draw) * 0.01
        self.weight = weight.to(device).repeat(len(self.rates), 1, 1)  # [G,C,F]
        self.bias = torch.zeros(len(self.rates), classes, device=device)  # [G,C]
        self.velocity = torch.zeros_like(self.weight), torch.zeros_like(self.bias)
        # [G] each, and of which epoch: made once an epoch, for the step must not wait for the device.
        self._decay = self._column([r.weight_decay for r in self.rates])
        self._decays = any(r.weight_decay for r in self.rates)
        self._lr, self._lr_epoch = self._decay, -1

    @torch.no_grad()
    def step(self, step: Step, epoch: int) -> Tensor:
        """One SGD step of every head, with momentum as torch's; the loss before it, [G], over all
        ranks."""
        logits = self.logits(step.x)
        at = step.label[:, None, None].expand(-1, len(self.rates), 1)
        log_p = logits.log_softmax(2)
        loss = -log_p.gather(2, at)[..., 0].sum(0) / step.images
        # d loss / d logits = p - one-hot, written over the logits' memory.
        slope = shares.normal_(log_p.exp_())
        slope.scatter_add_(2, at, slope.new_full((1, 1, 1), -1.0).expand_as(at))
        # Features are fewer than logits, so that it is they that the sum is divided over.
        x = step.x / step.images
        grad = (slope.flatten(1).T @ x).view_as(self.weight), slope.sum(0) / step.images
        if epoch != self._lr_epoch:
            lrs = [protocols.rate(self.protocol, epoch, r.lr) for r in self.rates]
            self._lr, self._lr_epoch = self._column(lrs), epoch
        for value, g, velocity in zip((self.weight, self.bias), grad, self.velocity):
            self._move(value, dist.all_sum(g), velocity)
        return dist.all_sum(loss)

    def logits(self, x: Tensor) -> Tensor:
        """[N,F] -> [N,G,C]"""
        out = x @ self.weight.flatten(0, 1).T
        return out.view(len(x), *self.bias.shape).add_(self.bias)

    def _move(self, value: Tensor, grad: Tensor, velocity: Tensor) -> None:
        shape = (-1, *(1,) * (value.ndim - 1))
        velocity.mul_(self.protocol.momentum).add_(grad)
        # Of 64 heads each pass over the weights is a tenth of the step.
        if self._decays:
            velocity.addcmul_(self._decay.view(shape), value)
        value.addcmul_(self._lr.view(shape), velocity, value=-1)

    def _column(self, numbers: list[float]) -> Tensor:
        return self.weight.new_tensor(numbers)

    def finite(self) -> Tensor:
        """[G] bool: heads whose weights are numbers."""
        return self.weight.isfinite().flatten(1).all(1) & self.bias.isfinite().all(1)


class Training:
    """A linear evaluation under way: heads, position and what was measured; `state_dict` is all
    that a resume needs."""

    def __init__(self, heads: Heads):
        self.heads = heads
        self.epoch = self.step = 0  # the next to be done
        # Of each finished epoch, [G] on the CPU: accuracies 0..1 and the mean loss.
        self.curves: dict[str, list[Tensor]] = {"val": [], "val_top5": [], "held": [], "loss": []}
        self._loss = torch.zeros(len(heads.rates), device=heads.weight.device)

    def state_dict(self) -> dict[str, Any]:
        h = self.heads
        return {
            "rates": [tuple(r) for r in h.rates],
            "protocol": h.protocol.model_dump(mode="json"),
            "weight": h.weight,
            "bias": h.bias,
            "velocity": list(h.velocity),
            "loss": self._loss,
            "position": (self.epoch, self.step),
            "curves": self.curves,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError where the state is of other rates or another protocol."""
        h, mine = self.heads, self.state_dict()
        for key in ("rates", "protocol"):
            if state[key] != mine[key]:
                raise UserError(
                    f"linear: the saved evaluation has {key} {state[key]}, this one {mine[key]}; "
                    "remove the saved one or give the same"
                )
        for own, saved in zip(
            (h.weight, h.bias, *h.velocity, self._loss),
            (state["weight"], state["bias"], *state["velocity"], state["loss"]),
        ):
            own.copy_(saved)
        self.epoch, self.step = state["position"]
        self.curves = {k: list(v) for k, v in state["curves"].items()}

    def run(
        self,
        source: Source,
        val: Features,
        held: Features | None,
        watch: Callable[["Training"], None] = lambda training: None,
    ) -> None:
        """Trains from the position to the end.  watch: is called after every step and every epoch,
        and may raise to stop."""
        while self.epoch < self.heads.protocol.epochs:
            for step in source(self.epoch, self.step):
                self._loss += self.heads.step(step, self.epoch)
                self.step += 1
                watch(self)
            self._measure(val, held)
            self.epoch, self.step = self.epoch + 1, 0
            watch(self)

    def _measure(self, val: Features, held: Features | None) -> None:
        top1, top5 = accuracies(self.heads, val)
        self.curves["val"].append(top1.cpu())
        self.curves["val_top5"].append(top5.cpu())
        if held is not None:
            self.curves["held"].append(accuracies(self.heads, held)[0].cpu())
        self.curves["loss"].append((self._loss / max(1, self.step)).cpu())
        self._loss.zero_()


def run(
    source: Source,
    val: Features,
    held: Features | None,
    classes: int,
    protocol: Protocol,
    rates: Sequence[Rate] = (),
    seed: int = 0,
    saved: dict[str, Any] | None = None,
    watch: Callable[[Training], None] = lambda training: None,
) -> dict[str, float]:
    """Accuracies 0..1 by names that say how they came about, see `report`.

    val, held  this rank's own parts; held: images held out of training to choose among the rates,
               None: no choice
    rates      see `grid`; (): the protocol's own
    saved      a state dict of `Training`: go on from there
    Equal for any number of ranks, up to the rounding of sums."""
    rates = rates or grid(protocol)
    heads = Heads(rates, val.x.shape[1], classes, protocol, seed, val.x.device)
    training = Training(heads)
    if saved is not None:
        training.load_state_dict(saved)
    training.run(source, val, held, watch)
    return report(training)[0]


def report(training: Training, what: str = "linear") -> tuple[dict[str, float], int]:
    """Named numbers, and the head that was chosen, or the protocol's own where nothing was held out.
    what: begins every name.

    linear_top1_selected         last epoch; the head that is best on the images held out
    linear_top1_preset_last      last epoch of the protocol's own lr and weight decay
    linear_top1_preset_best_on_val  its best epoch on val, as the official scripts report it
    linear_top1_best_on_val      the best of all heads and epochs on val
    Those named top5 are of the same head and epoch as top1's.  Raises UserError where every head
    diverged."""
    heads, curves = training.heads, training.curves
    finite = heads.finite().cpu()
    choice.refuse_all_broken(what, finite)
    val, top5 = torch.stack(curves["val"]), torch.stack(curves["val_top5"])  # [E,G]
    names = [f"lr {r.lr:g} wd {r.weight_decay:g}" for r in heads.rates]
    held = curves["held"][-1] if curves["held"] else None
    found, at = choice.report(what, names, val[-1], held)
    # Not chosen on the reported images: the protocol's own.
    at = 0 if held is None else at
    found[f"{what}_top1_best_on_val"] = float(val.max())
    found |= {
        f"{what}_top1_preset_last": float(val[-1, 0]),
        f"{what}_top5_preset_last": float(top5[-1, 0]),
        f"{what}_top1_preset_best_on_val": float(val[:, 0].max()),
        f"{what}_diverged_heads": float((~finite).sum()),
    }
    if held is not None:
        found |= {
            f"{what}_top5_selected": float(top5[-1, at]),
            f"{what}_lr_selected": heads.rates[at].lr,
            f"{what}_weight_decay_selected": heads.rates[at].weight_decay,
        }
    return found, at


@torch.no_grad()
def accuracies(heads: Heads, own: Features) -> tuple[Tensor, Tensor]:
    """Top-1 and top-5 of every head, [G] float64, over all ranks.  Logits that are no finite
    numbers are never right, and the class must win: among equal logits it loses at top-5, and at
    top-1 unless it is the first."""
    sums = torch.zeros(2, len(heads.rates), dtype=torch.float64, device=own.x.device)
    for x, y in _pieces(heads, own):
        logits = heads.logits(x)
        true = logits.gather(2, y[:, None, None].expand(-1, logits.shape[1], 1))
        number = logits.isfinite().all(2)
        sums[0] += ((logits.argmax(2) == y[:, None]) & number).sum(0)
        sums[1] += (((logits >= true).sum(2) <= 5) & number).sum(0)
    dist.all_sum(sums)
    n = dist.all_sum(torch.tensor(float(len(own.label)), device=own.x.device))
    return sums[0] / n, sums[1] / n


@torch.no_grad()
def predictions(heads: Heads, own: Features, head: int) -> Tensor:
    """The classes that a head predicts for this rank's images, [n], as `choice.classes_of`."""
    weight, bias = heads.weight[head], heads.bias[head]
    rows = max(1, CELLS // len(weight))
    return torch.cat([choice.classes_of(x @ weight.T + bias) for x in own.x.split(rows)])


def _pieces(heads: Heads, own: Features) -> Iterator[tuple[Tensor, Tensor]]:
    rows = max(1, CELLS // heads.bias.numel())
    return zip(own.x.split(rows), own.label.split(rows))
