"""An arm: one training, its teacher, and the hash of all that can change it."""

import copy
import hashlib
import json
from typing import NamedTuple, Optional

from appendix.settings import NETS, SHARED, TEACHERS, TESTBEDS, Cfg, Size

# To be raised where a change of the trainer makes earlier arms incomparable.
VERSION = 1


class Arm(NamedTuple):
    # For people: testbed, student, teacher, seed.
    title: str
    # Without run.name, run.out, the data's paths and the teacher's file.
    cfg: Cfg
    teacher: Optional["Arm"] = None

    @property
    def name(self) -> str:
        """Of its run and its files: the title, and the hash of everything that it depends on."""
        return f"{self.title}-{digest(self._depends())}"

    def _depends(self) -> list:
        return [VERSION, self.cfg, self.teacher and self.teacher._depends()]

    @property
    def cache(self) -> str:
        """The folder of its teacher's recorded embeddings: all arms with the same views share it."""
        assert self.teacher, self.title
        views = {k: self.cfg[k] for k in ("view", "views")} | {
            "seed": self.cfg["run"]["seed"],
            "dim": self.cfg["student"]["dim"],
            "method": self.cfg["method"]["name"],
        }
        return f"{self.teacher.name}-for-{digest([VERSION, views])}"


def digest(content: object) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:8]


def overlaid(under: Cfg, over: Cfg) -> Cfg:
    """A copy of `under` with the keys of `over` laid over it, dictionary by dictionary."""
    out = copy.deepcopy(under)
    for key, value in over.items():
        both = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = overlaid(out[key], value) if both else copy.deepcopy(value)
    return out


def teacher(name: str, size: Size) -> Arm:
    """Teachers have one seed: students of all seeds learn from the same."""
    how = TEACHERS[name]
    cfg = _cfg(how.testbed, how.net, 0, size.teacher_epochs[name], size)
    above = teacher(how.taught_by, size) if how.taught_by else None
    return Arm(f"teacher-{name}", overlaid(cfg, how.differs), above)


def student(
    testbed: str, net: str, taught_by: str | None, seed: int, size: Size, epochs: int | None = None
) -> Arm:
    """A student alone, or with DisCo from the named teacher.

    epochs  in place of the testbed's own"""
    length = epochs or size.epochs[testbed]
    cfg = _cfg(testbed, net, seed, length, size)
    what = taught_by or ("alone" if epochs is None else f"alone{epochs}")
    of = teacher(taught_by, size) if taught_by else None
    return Arm(f"{testbed}-{net}-{what}-s{seed}", cfg, of)


def _cfg(testbed: str, net: str, seed: int, epochs: int, size: Size) -> Cfg:
    cfg = overlaid(SHARED, TESTBEDS[testbed])
    # Students of one table begin and are augmented by the same seed.
    own = dict(run=dict(seed=seed, epochs=epochs), student=NETS[net])
    return overlaid(overlaid(cfg, own), size.differs)
