"""Classes that the names of samples tell, for tars whose samples have none.

They serve the check for sorted data alone: tars of one class each, such as those in ImageNet's
archive, or one that was written of class folders.  Names tell nothing where they are all alike, or
where they only count (shard-0007 or 00031/)."""

import re
from pathlib import PurePosixPath

import numpy as np

# What counts, then the separator before it: the `_10026` of n01440764_10026.
COUNT = re.compile(r"[-_ ]*\d*$")
NUMBERED = re.compile(r"(.*?)(\d+)(\D*)")


def of_members(members: list[str]) -> np.ndarray | None:
    """Labels [N] from members' folders, or else from what is before the count in their names; None
    where neither tells anything."""
    paths = [PurePosixPath(name) for name in members]
    folders = [str(path.parent) for path in paths]
    starts = [COUNT.sub("", path.name.split(".", 1)[0]) for path in paths]
    for names in (folders, starts):
        distinct = sorted(set(names))
        if len(distinct) > 1 and not is_series(distinct):
            return np.unique(names, return_inverse=True)[1]
    return None


def is_series(names: list[str]) -> bool:
    """Whether names only count: one text around consecutive numbers, or around one or two letters
    as in `split`'s xaa, xab."""
    parts = [NUMBERED.fullmatch(name) for name in names]
    if all(parts):
        around = {(m[1], m[3]) for m in parts if m}
        numbers = sorted(int(m[2]) for m in parts if m)
        return len(around) == 1 and numbers[-1] - numbers[0] + 1 == len(set(numbers))
    before, ends = {name[:-2] for name in names}, [name[-2:] for name in names]
    if len(before) > 1 or not all(re.fullmatch("[a-z]{1,2}", end) for end in ends):
        return False
    # Of one letter the first is the last, too; mixed lengths follow no count.
    places = sorted(26 * ord(end[0]) + ord(end[-1]) for end in ends)
    step = 27 if {len(end) for end in ends} == {1} else 1
    return places[-1] - places[0] == step * (len(names) - 1)
