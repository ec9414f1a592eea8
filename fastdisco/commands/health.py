"""What a network's features look like, and how near they are to its teacher's."""

import time
from typing import Any

import numpy as np
from torch import Tensor

from fastdisco import data
from fastdisco.commands import networks
from fastdisco.commands.measure import Work
from fastdisco.common import dist
from fastdisco.common.console import say
from fastdisco.common.errors import UserError
from fastdisco.common.files import write_whole
from fastdisco.data.lines import printable
from fastdisco.engine import autocast
from fastdisco.evals import features as feats
from fastdisco.evals import health, results
from fastdisco.evals.features import Features
from fastdisco.models import Net
from fastdisco.teacher import formats, runtime


def run(work: Work) -> list[results.Result]:
    """Spread and rank; where there is a teacher, how near the network is to it, as a result of its
    own, so that networks with and without a teacher stand in one table."""
    begin = time.perf_counter()
    _refuse_nothing_to_compare(work)
    if work.cfg.data.val is None and work.network.has_train:
        work = _on_training_images(work)
    kinds = {name: feats.gathered(f) for name, f in work.val_kinds().items()}
    student = kinds["features"]
    labelled = len(work.val.classes) > 1
    teacher, of_teacher = _features_of(work, _teacher(work))
    z, zt = kinds.get("embedding"), teacher.get("embedding")
    same = z is not None and zt is not None and z.x.shape == zt.x.shape
    values = health.run(
        student,
        teacher.get("features"),
        z.x if same and z is not None else None,
        zt.x if same and zt is not None else None,
        labelled,
    )
    seconds = time.perf_counter() - begin
    near = {name: values.pop(name) for name in list(values) if name.startswith("teacher_")}
    found = [work.save("health", values, work.protocol("health", {}), seconds)]
    if teacher:
        own: dict[str, Any] = {"k": work.settings.health.k}
        rows: list[list[Any]] = []
        if labelled:
            alone = work.settings.health.alone
            beside, own["alone"] = _features_of(work, networks.of_run(alone) if alone else None)
            gap, rows = _gap(work, student, teacher["features"], beside.get("features"))
            near |= gap
        protocol = work.protocol("health", own) | {"teacher": of_teacher}
        found.append(work.save("health-teacher", near, protocol, time.perf_counter() - begin))
        if rows:
            _write_classes(work, found[-1], rows)
    return found


def _write_classes(work: Work, result: results.Result, rows: list[list[Any]]) -> None:
    path = work.network.folder / f"{result.what}-{result.hash}.classes.csv"
    if dist.rank() == 0:
        shown = results.Table(["class", "images", "student", "teacher", "gap"], rows, [])
        write_whole(path, results.as_csv(shown) + "\n")
    say(f"{path}: the accuracies of each class")


def _refuse_nothing_to_compare(work: Work) -> None:
    if work.settings.health.alone is None:
        return
    if work.settings.health.teacher is None and work.cfg.teacher is None:
        raise UserError("health.alone: there is no teacher to compare with; give health.teacher")
    if work.cfg.data.val is not None and len(work.val.classes) < 2:
        raise UserError(
            f"health.alone: {work.val.source} has no classes, so no gap can be told; leave it out"
        )


def _on_training_images(work: Work) -> Work:
    """For runs without validation images: some of the training images, as training looks at them."""
    train = data.listing(work.cfg.data.train, work.cfg.data.quarantine, images=work.cfg.data)
    some = health.sample(train.kept)
    say(f"data.val: none, so health looks at {len(some)} training images")
    found = Work(work.network, work.settings, work.device, work.stop)
    found.val = train._replace(left_out=np.setdiff1d(np.arange(len(train.files)), some))
    return found


def _gap(
    work: Work, student: Features, teacher: Features, alone: Features | None
) -> tuple[dict[str, float], list[list[Any]]]:
    """To the teacher, by nearest neighbours among the other validation images, and a row for each class;
    the classes that are furthest behind are said.  alone: of the same student without distillation."""
    k, classes = work.settings.health.k, len(work.val.classes)
    vote = lambda f: health.among_others(f, classes, min(k, len(f.x) - 1), work.cfg.eval.temp)
    voted = vote(student), vote(teacher), student.label
    found, worst = health.gap(*voted, work.val.classes, vote(alone) if alone else None)
    if alone and "teacher_gap_closed" not in found:
        say(
            "teacher_gap_closed: left out: the teacher is no better than the student of health.alone, so "
            "there is no gap to close"
        )
    behind = ", ".join(f"{name} {share:.1%}" for name, share in worst.items() if share > 0)
    if behind:
        say(f"furthest behind the teacher (kNN among the validation images): {behind}")
    rows = []
    for name, (n, s, t) in zip(work.val.classes, health.by_class(*voted, classes)):
        there = s is not None and t is not None
        rows.append([printable(name), n, *([s, t, t - s] if there else [""] * 3)])
    return found, rows


def _teacher(work: Work) -> Net | None:
    if work.settings.health.teacher is not None:
        return networks.of_run(work.settings.health.teacher)
    t = work.cfg.teacher
    if t and not t.file.exists():
        say(f"{t.file}: the teacher of this run is not here; health says nothing of it")
        return None
    # What the file does not tell stands in the run's configuration.
    return formats.read(t.file, t.arch, t.kwargs, student=t.student).net.eval() if t else None


def _features_of(work: Work, net: Net | None) -> tuple[dict[str, Features], str | None]:
    """Features and embeddings of another network for the same images, of all ranks, and its
    fingerprint; ({}, None) of none."""
    if net is None:
        return {}, None
    mark = runtime.fingerprint(net)
    net.to(work.device)
    precision = autocast(work.cfg.engine.precision, work.device)

    def encode(x: Tensor) -> dict[str, Tensor]:
        with precision:
            f = net.features(x)
        return {"features": f, "embedding": net.head(f.float())}

    found = work.pass_over(work.val, work.val.kept, work.view, encode, mark)
    return {name: feats.gathered(f) for name, f in found.items()}, mark
