"""Trains an arm and records its teacher's embeddings, unless that is done."""

import json
import sys
from pathlib import Path
from typing import NamedTuple

from comparison.arms import finished, trained_minutes
from harness.runs import command, metrics

from appendix.arms import Arm
from appendix.processes import Processes, written


class Lab(NamedTuple):
    """Where arms are trained and kept."""

    state: Path
    # data.train and data.val
    images: dict[str, str]
    processes: Processes


def train(lab: Lab, arm: Arm) -> dict[str, float]:
    """Trains the arm, and before it its teacher; epochs and minutes.  What is finished is not done
    again.

    cpu_minutes  of the training's process, with its start and its last kNN evaluation
    recording    CPU minutes of recording the teacher, which all arms with the same views share"""
    kept = lab.state / f"trained/{arm.name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    more = []
    if arm.teacher:
        train(lab, arm.teacher)
        more = [*_taught(lab, arm), "teacher.cache=replay"]
        record(lab, arm)
    run = lab.state / "runs" / arm.name
    if not finished(run):
        lab.processes.run(arm.name, command(base(lab, arm), *more))
    found = dict(
        epochs=arm.cfg["run"]["epochs"],
        minutes=trained_minutes(metrics(run)),
        cpu_minutes=lab.processes.cpu_minutes(arm.name),
        recording=lab.processes.cpu_minutes(arm.cache) if arm.teacher else 0.0,
    )
    written(kept, found)
    return found


def record(lab: Lab, arm: Arm) -> None:
    """Records the arm's teacher in the views of all epochs, unless that is done."""
    done = lab.state / f"caches/{arm.cache}.json"
    if done.exists() and json.loads(done.read_text())["rounds"] >= arm.cfg["run"]["epochs"]:
        return
    line = [sys.executable, "-m", "fastdisco.cli", "teacher", "record", "--config"]
    lab.processes.run(arm.cache, [*line, str(base(lab, arm)), *_taught(lab, arm)])
    written(done, dict(rounds=arm.cfg["run"]["epochs"]))


def base(lab: Lab, arm: Arm) -> Path:
    """The arm's configuration as a file; JSON is YAML."""
    path = lab.state / f"configs/{arm.name}.yaml"
    path.parent.mkdir(exist_ok=True)
    run = arm.cfg["run"] | dict(name=arm.name, out=str(lab.state / "runs"))
    settings = arm.cfg | dict(run=run, data=arm.cfg["data"] | lab.images)
    path.write_text(json.dumps(settings, indent=1))
    return path


def _taught(lab: Lab, arm: Arm) -> list[str]:
    assert arm.teacher, arm.title
    return [
        f"teacher.file={lab.state / 'runs' / arm.teacher.name}",
        f"teacher.cache_folder={lab.state / 'caches' / arm.cache}",
        f"teacher.cache_rounds={arm.cfg['run']['epochs']}",
    ]
