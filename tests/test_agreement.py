"""What the ranks compare before they train: whatever decides which images a step gets."""

import contextlib
import io
import os

from conftest import ranks, tiny

from fastdisco.commands import train


def _with_own_list(args, lists):
    """(exit code, what is said of the error) on a rank whose node has a quarantine of its own."""
    own = f"data.quarantine={lists[int(os.environ['RANK'])]}"
    with contextlib.redirect_stderr(io.StringIO()) as err:
        try:
            code = train.main([str(a) for a in (*args, own)])
        except SystemExit as e:
            code = e.code
    return code, "".join(x for x in err.getvalue().splitlines(True) if x.startswith("fastdisco"))


def test_another_quarantine_on_one_node_is_refused(folder, tmp_path):
    lists = [tmp_path / "first.txt", tmp_path / "second.txt"]
    lists[0].write_text(f"{folder}/train/class0/000.jpg\tbroken\n")
    # As many, others: the number of steps is the same, the order is not.
    lists[1].write_text(f"{folder}/train/class0/003.jpg\tbroken\n")
    args = tiny(folder, tmp_path, "run.max_steps=1", "data.val=null")
    found = ranks(2, _with_own_list, args, lists)
    assert [code for code, _ in found] == [2, 2]
    said = "".join(text for _, text in found)
    assert said.count("\n") == 1, said
    assert "data.train: rank 1 on" in said and "left out by the quarantine" in said


def test_equal_lists_in_other_places_are_the_same(folder, tmp_path):
    lists = [tmp_path / "first.txt", tmp_path / "second.txt"]
    for path in lists:
        path.write_text(f"{folder}/train/class0/000.jpg\tbroken\n")
    args = tiny(folder, tmp_path, "run.max_steps=1", "data.val=null")
    assert [code for code, _ in ranks(2, _with_own_list, args, lists)] == [0, 0]
