"""What the evaluation during training says of the features beside their kNN accuracy: the numbers of
evals/health.py from the same pass, and a warning where they collapse."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from fastdisco import data, engine, models
from fastdisco.common import dist
from fastdisco.common.console import say
from fastdisco.common.errors import UserError
from fastdisco.config import Config
from fastdisco.data.lines import for_shell
from fastdisco.evals import features, health, knn, passes
from fastdisco.evals.features import Features
from fastdisco.teacher import formats, runtime

# Below these the features say next to nothing about an image.  Of 1: random weights whose batch
# norms have seen some steps came to 0.02.
STD = 0.01
# Of a rank that is at least 1: all features lie along one direction and a little of another.
RANK = 2.0


class Evaluated(NamedTuple):
    """A network in eval mode, and its backbone in the precision of the run."""

    net: models.Net
    encode: Callable[[Tensor], Tensor]  # [B,3,S,S] -> [B,F]


class Online:
    """The evaluations of one run.  The teacher's features are computed once, at the first one."""

    def __init__(
        self, cfg: Config, train: data.Listing, val: data.Listing, device: torch.device
    ) -> None:
        self.cfg, self.train, self.val, self.device = cfg, train, val, device
        self.labelled = len(val.classes) > 1
        self.some = health.sample(val.kept)
        self._teacher: dict[str, Features] | None = None
        # Students that were warned of, until they are well again.
        self._warned: set[str] = set()

    def run(self, cfg: Config, name: str, found: Evaluated) -> dict[str, float]:
        """Named numbers of one student, equal on all ranks.

        cfg: the student's; name: '' where there is one."""
        collected: list[Features] = []
        if self.labelled:
            accuracy = knn.score(
                found.encode,
                self.train,
                self.val,
                cfg.data,
                cfg.view,
                cfg.eval,
                cfg.run.seed,
                self.device,
                collected.append,
            )
        else:
            # All images are of one class: an accuracy would say nothing.
            accuracy = {}
            collected.append(self._pass(lambda x: {"features": found.encode(x)})["features"])
        return accuracy | self.health(name, found.net, collected[0])

    @torch.no_grad()
    def health(self, name: str, net: models.Net, own: Features) -> dict[str, float]:
        """The numbers of this rank's part of the features, of `self.some` of the images; warns."""
        here = torch.isin(own.index.cpu(), torch.from_numpy(self.some)).to(own.x.device)
        student = features.gathered(own.take(here))
        bad = int((~student.x.isfinite().all(1)).sum())
        if bad:
            say(
                f"{_titled(name)}the features of {bad} of {len(student.x)} images are no finite numbers; "
                "take precision fp32 or bf16 (engine.precision), or go back to an earlier checkpoint"
            )
            return {}
        teacher = self._teachers() if self.cfg.teacher else {}
        zs = net.head(student.x), teacher["embedding"].x if teacher else None
        found = health.run(student, teacher.get("features"), *zs, self.labelled and _pairs(student))
        found["effective_rank"] = found.pop("rankme")
        self._warn(name, found, student.x.shape[1])
        return found

    def _warn(self, name: str, found: dict[str, float], width: int) -> None:
        """Says once that a student's features collapse; again only after they were well."""
        std, rank = found["feature_std"], found["effective_rank"]
        if std >= STD and rank >= RANK:
            self._warned.discard(name)
        elif name not in self._warned:
            self._warned.add(name)
            self._say(name, std, rank, width)

    def _say(self, name: str, std: float, rank: float, width: int) -> None:
        suspects = "lower optim.lr or optim.weight_decay"
        if self.cfg.teacher:
            suspects += f", or see fastdisco teacher check {for_shell(str(self.cfg.teacher.file))}"
        say(
            f"{_titled(name)}the features collapse: they hardly tell images apart (standard deviation "
            f"{std:.2g} of 1, effective rank {rank:.1f} of {width}); look in metrics.jsonl or "
            f"TensorBoard at feat/std and the losses for the step where they fell, and {suspects}"
        )

    # ---- the teacher

    def _teachers(self) -> dict[str, Features]:
        """Features and embedding of `self.some`, of all ranks; {} where the teacher cannot be read
        or does not take images of that size, which is said once."""
        if self._teacher is None:
            net, why = self._read()
            lacking = dist.any_rank(net is None)
            self._teacher = {}
            if net is not None and not lacking:
                self._teacher = self._of_teacher(net)
            else:
                say(f"the evaluations say nothing of the teacher: {why or 'a rank cannot read it'}")
        return self._teacher

    def _read(self) -> tuple[models.Net | None, str]:
        """The teacher anew, as evaluations read it: the one that trains is folded and in another
        precision, and with recorded embeddings there is none."""
        cfg, size = self.cfg.teacher, self.cfg.data.eval_size
        assert cfg
        try:
            # What is drawn here is overwritten: it must not shift the training's random stream.
            with torch.random.fork_rng(devices=[]):
                found = formats.read(cfg.file, cfg.arch, cfg.kwargs, student=cfg.student)
            runtime.of_noise(found.net, runtime.noise((size,)))
        except (UserError, OSError) as e:
            return None, str(e)
        return found.net.eval(), ""

    def _of_teacher(self, net: models.Net) -> dict[str, Features]:
        net.to(self.device).to(memory_format=torch.channels_last)
        features_of = engine.autocast(self.cfg.engine.precision, self.device)(net.features)

        def encode(x: Tensor) -> dict[str, Tensor]:
            f = features_of(x)
            return {"features": f, "embedding": net.head(f.float())}

        return {name: features.gathered(f) for name, f in self._pass(encode).items()}

    def _pass(self, encode: Callable[[Tensor], dict[str, Tensor]]) -> dict[str, Features]:
        """This rank's part of `self.some`."""
        view, images = passes.of_config(self.cfg), self.cfg.data
        given = (encode, self.val, self.some, view, images, self.device)
        # A damaged image is met by one rank alone.
        return dist.alike(lambda: passes.features(*given))


def _pairs(f: Features) -> bool:
    """Whether any class has two images."""
    return bool((torch.bincount(f.label) > 1).any())


def _titled(name: str) -> str:
    return f"{name}: " if name else ""
