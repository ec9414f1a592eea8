"""`fastdisco eval table` with --versus, and results that are damaged."""

import csv
import io
from pathlib import Path

import pytest
from test_eval_results import result

from fastdisco import cli
from fastdisco.common.errors import UserError
from fastdisco.evals import results


@pytest.fixture
def folders(tmp_path):
    for name, seed in (("a", 0), ("b", 5), ("c", 7)):
        results.write(tmp_path / name, result(name, acc=0.6, seed=seed))
    return [str(tmp_path / n) for n in "abc"]


def table(*arguments, code=0):
    assert cli.main(["eval", "table", *arguments]) == code


def test_differences_as_csv_and_markdown(folders, capsys):
    a, b, c = folders
    table(a, b, "--versus", c, "--format=csv", "--only", "knn_top1_k20")
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert [(r["network"], r["value"]) for r in rows] == [
        ("a", "knn_top1_k20"),
        ("b", "knn_top1_k20"),
    ]
    pair = results.versus(*(results.read_all(Path(f)) for f in (a, c)))["knn_top1_k20"]
    assert float(rows[0]["difference"]) == pytest.approx(100 * pair.difference, abs=0.005)
    low, high = (float(rows[0][k]) for k in ("low", "high"))
    assert (low, high) == pytest.approx([100 * x for x in pair.interval], abs=0.005)
    assert float(rows[0]["p"]) == pytest.approx(pair.p, rel=0.05)
    assert (rows[0]["only_first"], rows[0]["only_second"]) == (
        str(pair.only_first),
        str(pair.only_second),
    )
    table(a, "--versus", c, "--format=markdown")
    out = capsys.readouterr().out
    assert out.startswith("| network | value | difference | low | high | p |")
    assert "versus c" in out


def test_rows_and_versus_do_not_go_together(folders, capsys):
    table(folders[0], "--versus", folders[1], "--rows=networks", code=2)
    assert "--rows: belongs to the table without --versus" in capsys.readouterr().err


@pytest.mark.parametrize("damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"x" * 99])
def test_predictions_that_are_damaged_are_told(folders, capsys, tmp_path, damage):
    (path,) = (tmp_path / "a").glob("*.npz")
    path.write_bytes(damage(path.read_bytes()))
    table(folders[0], "--versus", folders[1], code=2)
    err = capsys.readouterr().err
    assert f"{path}: is damaged" in err and "run the evaluation again" in err


def test_a_result_that_lacks_a_part_is_told(folders, tmp_path):
    (path,) = (tmp_path / "a").glob("*.json")
    path.write_text(path.read_text().replace('"seconds"', '"minutes"'))
    with pytest.raises(UserError, match="is no result of an evaluation"):
        results.read(path)
