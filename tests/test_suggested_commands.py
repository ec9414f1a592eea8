"""Commands that a message suggests are one shell command, whatever a path's name is."""

import re
import shlex

import pytest
import reports
from training import command

from fastdisco.report import collect

NAMES = ["a b", "x; touch INJECTED", "$(touch INJECTED)", "it's"]


@pytest.mark.parametrize("name", NAMES)
def test_watch_names_the_folder_as_one_word(tmp_path, name):
    (tmp_path / name).mkdir()
    code, _, err = command("watch", tmp_path / name)
    found = re.search("`(.*)`", err)
    assert code == 2 and found
    assert shlex.split(found[1]) == ["fastdisco", "runs", str(tmp_path / name)]


@pytest.mark.parametrize("name", NAMES)
def test_so_does_a_report(tmp_path, name):
    folder = reports.run(tmp_path, "r", weights=False)
    folder = folder.rename(tmp_path / name)
    for path in (folder / "eval").rglob("*.json"):
        path.unlink()
    (run,) = collect.read([folder.resolve()])
    (said,) = (x for x in run.remarks if "no evaluation yet" in x)
    assert shlex.split(said.partition(": ")[2]) == ["fastdisco", "eval", "all", str(folder)]
