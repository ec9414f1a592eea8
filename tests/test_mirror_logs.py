"""run.mirror copies the log and the loggers' ids beside the checkpoints."""

import json

# The fixtures: a server of object storage on this machine.
from test_s3_mirror import URL, copied, proxy, server, settings  # noqa: F401

from fastdisco.data import objects
from fastdisco.run.mirror import Mirror


def test_another_machine_goes_on_with_the_log_and_the_loggers_runs(proxy, tmp_path):  # noqa: F811
    cfg, here, there = settings(tmp_path), tmp_path / "here", tmp_path / "there"
    here.mkdir()
    log = "".join(json.dumps({"step": n, "train/loss": 1.5}) + "\n" for n in range(1, 6))
    (here / "metrics.jsonl").write_text(log)
    (here / "loggers.json").write_text('{"wandb": "abc"}')
    copied(cfg, here, 5)
    Mirror(cfg, there).fetch()
    assert (there / "metrics.jsonl").read_text() == log
    assert json.loads((there / "loggers.json").read_text()) == {"wandb": "abc"}


def test_a_log_that_is_there_is_left_alone(proxy, tmp_path):  # noqa: F811
    cfg, here, there = settings(tmp_path), tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
        (folder / "metrics.jsonl").write_text(f'{{"of": "{folder.name}"}}\n')
    copied(cfg, here, 5)
    Mirror(cfg, there).fetch()
    assert json.loads((there / "metrics.jsonl").read_text()) == {"of": "there"}


def test_a_mirror_of_an_older_version_has_no_log(proxy, tmp_path):  # noqa: F811
    cfg, here, there = settings(tmp_path), tmp_path / "here", tmp_path / "there"
    copied(cfg, here, 5)
    assert "metrics.jsonl" not in objects.listed(URL / "tiny")
    Mirror(cfg, there).fetch()
    assert (there / "checkpoints/last").exists() and not (there / "metrics.jsonl").exists()
