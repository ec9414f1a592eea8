"""The arms of each table and figure.

A table's cell is a student in a column: alone, alone for DisCo's time, or with DisCo from the
teacher of that name."""

from typing import NamedTuple

from appendix.arms import Arm, student
from appendix.settings import Size

ALONE, EQUAL = "alone", "equal_time"


class Table(NamedTuple):
    """What a table compares: every student alone and with DisCo from every teacher."""

    testbed: str
    students: tuple[str, ...]
    teachers: dict[str, tuple[str, ...]]
    # The student that is also trained alone for the time of DisCo.
    equal: tuple[str, ...] = ()


CNNS = ("mobile", "resnet")
TABLES: dict[str, Table] = {
    "table2": Table("moco", CNNS, dict.fromkeys(CNNS, ("moco", "swav", "seed")), ("mobile",)),
    "table1": Table("swav", CNNS, dict.fromkeys(CNNS, ("swav",))),
    "table3": Table("dino", ("vit", "xcit"), {"vit": ("dino_vit",), "xcit": ("dino_xcit",)}),
}
# Figures look at table 2's networks of one student.
FIGURES = ("fig1", "fig2", "fig3")
FIGURES_STUDENT = "mobile"
# Figure 3's networks: the student alone, the teacher, and DisCo, as in the paper.
FIGURE3_TEACHER = "moco"
# In the order in which they are carried out.
ALL = (*TABLES, *FIGURES)


class Cell(NamedTuple):
    """A place in a table, and the arm that fills it."""

    student: str
    column: str
    arm: Arm


def cells(table: str, seed: int, size: Size) -> list[Cell]:
    """The table's cells, but for those of equal time, whose length is known by DisCo's time alone.

    Each student alone comes before the same with DisCo."""
    of = TABLES[table]
    arm = lambda s, t: student(of.testbed, s, t, seed, size)
    out = []
    # Teacher by teacher, since each is recorded once for all students.
    for s in of.students:
        out.append(Cell(s, ALONE, arm(s, None)))
    for t in dict.fromkeys(t for names in of.teachers.values() for t in names):
        for s in of.students:
            if t in of.teachers[s]:
                out.append(Cell(s, t, arm(s, t)))
    return out


def equal(table: str, net: str, seed: int, size: Size, alone: dict, disco: dict) -> Cell:
    """The student alone for as many epochs as fit into DisCo's CPU time with all of the recording.

    alone, disco  what `training.train` returned of the two"""
    per_epoch = alone["cpu_minutes"] / alone["epochs"]
    epochs = round((disco["cpu_minutes"] + disco["recording"]) / per_epoch)
    longer = max(alone["epochs"] + 1, epochs)
    return Cell(net, EQUAL, student(TABLES[table].testbed, net, None, seed, size, longer))


def of_figures(seed: int, size: Size) -> list[Cell]:
    """The networks that figures 1 and 2 look at: the student alone and with every teacher."""
    return [c for c in cells("table2", seed, size) if c.student == FIGURES_STUDENT]


def of_maps(seed: int, size: Size) -> dict[str, Arm]:
    """Figure 3's networks by title: the student alone, its teacher, and the student with DisCo."""
    by = {c.column: c.arm for c in of_figures(seed, size)}
    taught = by[FIGURE3_TEACHER]
    assert taught.teacher, taught.title
    return {"student alone": by[ALONE], "teacher": taught.teacher, "student with DisCo": taught}
