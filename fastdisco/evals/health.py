"""What features look like without training anything on them: spread, effective rank, alignment and
uniformity, and how near they are to the teacher's.

Letters: N images, F features.  Everything here takes the features of all ranks (`gathered`), so that
every rank finds the same."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from fastdisco.common.errors import UserError
from fastdisco.evals.features import Features
from fastdisco.evals.neighbours import nearest

# Images whose pairs are compared at most: the first ones by index, as they come mixed.
PAIRS = 10_000
NEIGHBOURS = 20
# Images that training looks at, at most.
ONLINE = 5_000


@torch.no_grad()
def run(
    student: Features,
    teacher: Features | None = None,
    z: Tensor | None = None,
    z_teacher: Tensor | None = None,
    labelled: bool = True,
) -> dict[str, float]:
    """Named numbers of one network, and of the two where there is a teacher.

    student, teacher  features of the same images in the same order
    z, z_teacher      [N,d] embeddings of both, where they are of one width
    labelled          whether the labels mean anything"""
    some = torch.arange(0, len(student.x), max(1, math.ceil(len(student.x) / PAIRS)))
    few = student.take(some.to(student.x.device))
    found = {
        "feature_std": spread(student.x),
        "rankme": rankme(student.x),
        "uniformity": uniformity(few.x),
    }
    if labelled:
        found["alignment"] = class_alignment(student.x, student.label)
    if teacher is not None:
        if not torch.equal(student.index, teacher.index):
            raise UserError("health: student and teacher saw other images; give both the same")
        found["teacher_cka"] = cka(student.x, teacher.x)
        rows = some.to(teacher.x.device)
        found["teacher_neighbours"] = agreement(few.x, teacher.x[rows])
    if z is not None and z_teacher is not None:
        found["teacher_cosine"] = float(F.cosine_similarity(z.double(), z_teacher.double()).mean())
    return found


def sample(indices: np.ndarray, most: int = ONLINE) -> np.ndarray:
    """Every n-th of them, `most` at most: of images that are sorted by class, some of every class."""
    return indices[:: max(1, math.ceil(len(indices) / most))]


def spread(x: Tensor) -> float:
    """Standard deviation of the unit rows' coordinates times sqrt(F): 1 where directions are even,
    0 where all rows are alike (SimSiam, arXiv:2011.10566, section 4.1)."""
    unit = F.normalize(x.double(), dim=1)
    return float(unit.std(0, correction=0).mean() * math.sqrt(x.shape[1]))


def rankme(x: Tensor) -> float:
    """Effective rank: exp of the entropy of the singular values (RankMe, arXiv:2210.02885).  The
    rows are taken as they are, not centred."""
    x = x.double()
    small = x.T @ x if x.shape[1] <= x.shape[0] else x @ x.T
    values = torch.linalg.eigvalsh(small).clamp(min=0).sqrt()
    # Features that are all zero have one direction, too: none.
    p = values / values.sum().clamp(min=torch.finfo(values.dtype).tiny) + 1e-7
    return float((-p * p.log()).sum().exp())


def alignment(x: Tensor, y: Tensor) -> float:
    """Mean squared distance of the unit rows of positives [N,F] each: two views of an image
    (arXiv:2005.10242, with alpha 2)."""
    x, y = (F.normalize(t.double(), dim=1) for t in (x, y))
    return float((x - y).square().sum(1).mean())


def class_alignment(x: Tensor, label: Tensor) -> float:
    """`alignment` over all pairs of different images of one class.  Raises UserError where there is
    no such pair."""
    unit = F.normalize(x.double(), dim=1)
    classes = int(label.max()) + 1
    there = torch.bincount(label, minlength=classes).double()
    total = unit.new_zeros(classes, x.shape[1]).index_add_(0, label, unit)
    pairs = (there * (there - 1)).sum()
    if not pairs:
        raise UserError("health: no class has two images, so nothing is to be aligned")
    # Of a class's n unit rows with sum s: |s|^2 = n + 2 x (sum of cosines of pairs).
    cosines = (total.square().sum(1) - there).sum()
    return float(2 - 2 * cosines / pairs)


def uniformity(x: Tensor, t: float = 2.0, rows: int = 1024) -> float:
    """log of the mean of exp(-t |a - b|^2) over all pairs of different unit rows
    (arXiv:2005.10242): smaller is more even."""
    unit = F.normalize(x, dim=1)
    total = x.new_zeros((), dtype=torch.float64)
    for part in unit.split(rows):
        total += (2 * t * (part @ unit.T - 1)).double().exp().sum()
    n = len(x)
    # Each row with itself has distance 0.
    return float(((total - n) / (n * (n - 1))).log())


def cka(x: Tensor, y: Tensor) -> float:
    """Linear centred kernel alignment of two sets of features of the same images, 0..1
    (arXiv:1905.00414, equation 4)."""
    x, y = (t.double() - t.double().mean(0) for t in (x, y))
    cross = (y.T @ x).square().sum()
    return float(cross / ((x.T @ x).norm() * (y.T @ y).norm()))


def agreement(x: Tensor, y: Tensor, k: int = NEIGHBOURS) -> float:
    """Share, 0..1, of an image's k nearest by x that are among its k nearest by y, averaged; chance
    is k / (N - 1)."""
    k = min(k, len(x) - 1)
    index = torch.arange(len(x), device=x.device)
    near = []
    for t in (x, y):
        unit = F.normalize(t, dim=1)
        found = torch.cat([_others(unit, index, rows, k) for rows in index.split(1024)])
        near.append(found)
    both = (near[0][:, :, None] == near[1][:, None, :]).sum((1, 2))
    return float((both.double() / k).mean())


def among_others(f: Features, classes: int, k: int, temp: float) -> Tensor:
    """[N] the classes that the k nearest other images vote for, each with exp(cos / temp)."""
    unit = F.normalize(f.x, dim=1)
    index = torch.arange(len(unit), device=unit.device)
    out = []
    for rows in index.split(1024):
        near = _others(unit, index, rows, k)
        cosine = (unit[rows][:, None] * unit[near]).sum(2).double()
        votes = cosine.new_zeros(len(rows), classes)
        votes.scatter_add_(1, f.label[near], ((cosine - 1) / temp).exp())
        out.append(votes.argmax(1))
    return torch.cat(out)


def _others(unit: Tensor, index: Tensor, rows: Tensor, k: int) -> Tensor:
    """[n,k] nearest rows of these rows, themselves left out."""
    found = nearest(unit, index, unit[rows], k + 1)[1]
    # Of exact copies another may stand before the row itself; then the last one goes.
    own = found == rows[:, None]
    own[~own.any(1), -1] = True
    return found[~own].view(len(rows), k)


def gap(
    student: Tensor,
    teacher: Tensor,
    label: Tensor,
    classes: list[str],
    alone: Tensor | None = None,
    worst: int = 5,
) -> tuple[dict[str, float], dict[str, float]]:
    """How far the student is behind its teacher, and its gap in each class (teacher's accuracy less
    student's), the largest first, `worst` of them.

    student, teacher, alone  [N] predicted classes; alone: of the student without distillation,
    whose gap to the teacher is what can be closed."""
    right = {"student": student == label, "teacher": teacher == label}
    if alone is not None:
        right["alone"] = alone == label
    share = {k: float(v.double().mean()) for k, v in right.items()}
    found = {"teacher_gap": share["teacher"] - share["student"]}
    if alone is not None and share["teacher"] > share["alone"]:
        closed = share["student"] - share["alone"]
        found["teacher_gap_closed"] = closed / (share["teacher"] - share["alone"])
    less = right["teacher"].double() - right["student"].double()
    there = torch.bincount(label, minlength=len(classes)).clamp(min=1)
    by_class = less.new_zeros(len(classes)).index_add_(0, label, less) / there
    order = by_class.argsort(descending=True, stable=True)[:worst].tolist()
    return found, {classes[i]: float(by_class[i]) for i in order}


def by_class(
    student: Tensor, teacher: Tensor, label: Tensor, classes: int
) -> list[tuple[int, float | None, float | None]]:
    """(images, student's accuracy, teacher's) of each class, 0..1; None where a class has no image.

    student, teacher  [N] predicted classes"""
    there = torch.bincount(label, minlength=classes)
    right = [torch.bincount(label[p == label], minlength=classes) for p in (student, teacher)]
    return [
        (n, s / n, t / n) if n else (0, None, None)
        for n, s, t in zip(there.tolist(), *(r.tolist() for r in right))
    ]
