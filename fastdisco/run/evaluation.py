"""The kNN evaluation of a run's students while it trains, which does not end the run where it fails."""

import torch

from fastdisco import data, engine, models
from fastdisco.common.console import say
from fastdisco.common.errors import UserError
from fastdisco.config import Config
from fastdisco.run.meter import named
from fastdisco.run.online import Evaluated, Online
from fastdisco.run.students import TrainState


class Evaluation:
    """When the run is evaluated, and how."""

    def __init__(
        self,
        cfg: Config,
        states: list[TrainState],
        train: data.Listing,
        val: data.Listing | None,
        device: torch.device,
        steps: int,
    ) -> None:
        """steps: of the whole run, which is evaluated at its end."""
        self.cfg, self.states, self.device, self.steps = cfg, states, device, steps
        self.online = Online(cfg, train, val, device) if val else None

    def due(self, step: int) -> bool:
        """Whether the run is to be evaluated after that many steps."""
        every = self.cfg.eval.every
        return self.online is not None and (step == self.steps or bool(every and step % every == 0))

    def run(self, step: int, train: data.Listing) -> dict[str, float]:
        """kNN accuracy of every student's features, 0..1, as eval/[<student>/]knn_top1, and how
        healthy they are.  Called by every rank.

        train: the training images that are left, among which neighbours are looked for.
        Where an image is damaged, or there are too few, that is said and nothing returned; with
        eval.fatal it is a UserError, on every rank alike."""
        assert self.online
        self.online.train = train
        try:
            return evaluate(self.states, self.online, self.device)
        except UserError as e:
            if self.cfg.eval.fatal:
                raise
            say(f"step {step}: not evaluated, and the training goes on (eval.fatal: false): {e}")
            return {}


def evaluate(states: list[TrainState], online: Online, device: torch.device) -> dict[str, float]:
    """See `Evaluation.run`.

    The network has the weights and batch-norm statistics that a checkpoint would hold: statistics
    are the mean over ranks."""
    scores = {}
    for s in states:
        # What is drawn here is overwritten: it must not shift the training's random stream.
        with torch.random.fork_rng(devices=[]):
            net = models.of(s.cfg)
        net.load_state_dict(engine.weights(s.engine) | models.mean_buffers(s.net))
        net.to(device).to(memory_format=torch.channels_last).eval()
        encode = engine.autocast(s.cfg.engine.precision, device)(net.features)
        found = online.run(s.cfg, s.name, Evaluated(net, encode))
        scores |= named({f"eval/{k}": v for k, v in found.items()}, student=s.name)
    return scores
