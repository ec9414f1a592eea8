"""The files of deploy/ are what their programs read: by their schemas, and by fastdisco's own
commands."""

import importlib.resources
import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import jsonschema
import kubeflow_trainer_api.models as kubernetes
import pytest
import yaml
from conftest import ROOT, run

from fastdisco import config
from fastdisco.common import launch

DEPLOY = ROOT / "deploy"
SLURM = DEPLOY / "slurm.sh"


def read(name):
    return yaml.safe_load((DEPLOY / name).read_text())


def shellcheck(path):
    run(Path(sys.prefix) / "bin/shellcheck", "--exclude=SC1091", path)


@pytest.mark.parametrize(
    "name, model",
    [("trainjob.yaml", "TrainerV1alpha1TrainJob"), ("job.yaml", "IoK8sApiBatchV1Job")],
)
def test_kubernetes_knows_every_field(name, model):
    given = read(name)
    # A field that the model does not know is lost on the way.
    assert json.loads(getattr(kubernetes, model).from_dict(given).to_json()) == given


def test_compose_knows_every_field():
    package = importlib.resources.files("check_jsonschema")
    schema = package / "builtin_schemas/vendor/compose-spec.json"
    jsonschema.validate(read("compose.yaml"), json.loads(schema.read_text()))


def test_the_shell_scripts_pass_the_linter(tmp_path):
    shellcheck(SLURM)
    for part in ("setup", "run"):
        script = tmp_path / f"{part}.sh"
        script.write_text("#!/usr/bin/env bash\n" + read("sky.yaml")[part])
        shellcheck(script)


def commands():
    """{file: the words of its training command}"""
    job = read("job.yaml")["spec"]["template"]["spec"]["containers"][0]
    trainer = read("trainjob.yaml")["spec"]["trainer"]
    compose = re.sub(
        r"\$\{\w+:\?[^}]*\}", "0", read("compose.yaml")["services"]["train"]["command"]
    )
    (hostfile,) = re.findall(r"#   (deepspeed [^\\\n]+)\n", (DEPLOY / "hostfile").read_text())
    return {
        "job.yaml": job["command"] + job["args"],
        "trainjob.yaml": trainer["command"] + trainer["args"],
        "compose.yaml": shlex.split(compose),
        "sky.yaml": shlex.split(read("sky.yaml")["run"].splitlines()[-1]),
        "hostfile": shlex.split(hostfile),
    }


@pytest.mark.parametrize("name", commands())
def test_the_training_is_one_that_the_trainer_takes(name):
    words = commands()[name]
    at = words.index("fastdisco/train.py")
    assert words[0] in ("torchrun", "deepspeed") and words[at + 1] == "--config"
    config.load(ROOT / words[at + 2], words[at + 3 :])


def batch(tmp_path, code):
    """What slurm.sh asks of Slurm where the training ends with `code`; its own exit code."""
    (tmp_path / ".venv/bin").mkdir(parents=True)
    (tmp_path / ".venv/bin/activate").touch()
    for name, ends in (("srun", code), ("scontrol", 0)):
        program = tmp_path / name
        program.write_text(f'#!/bin/sh\necho {name} "$@" >> "{tmp_path}/asked"\nexit {ends}\n')
        program.chmod(0o755)
    env = {
        "PATH": f"{tmp_path}:/usr/bin:/bin",
        "SLURM_JOB_ID": "77",
        "SLURM_SUBMIT_DIR": str(tmp_path),
    }
    done = subprocess.run(["bash", SLURM, "a.yaml", "optim.lr=1"], env=env)
    return done.returncode, (tmp_path / "asked").read_text().splitlines()


def test_slurm_queues_a_stopped_run_again_and_no_other(tmp_path):
    training = "srun --kill-on-bad-exit=1 python fastdisco/train.py --config a.yaml optim.lr=1"
    for code in (0, 1, 2):
        (tmp_path / str(code)).mkdir()
        assert batch(tmp_path / str(code), code) == (code, [training])
    (tmp_path / "stopped").mkdir()
    found = batch(tmp_path / "stopped", launch.STOPPED)
    assert found == (0, [training, "scontrol requeue 77"])


def test_slurms_warning_is_a_signal_that_stops_a_run_and_comes_to_the_ranks():
    options = dict(re.findall(r"#SBATCH --(\S+?)(?:=(\S+))?$", SLURM.read_text(), re.MULTILINE))
    # With "B:" in front it would come to the shell alone.
    assert options["signal"] == "USR1@120" and "requeue" in options


def test_kubernetes_tells_a_refusal_from_a_stop():
    rules = read("job.yaml")["spec"]["podFailurePolicy"]["rules"]
    actions = {x: r["action"] for r in rules for x in r.get("onExitCodes", {}).get("values", ())}
    assert actions == {2: "FailJob", launch.STOPPED: "Ignore"}
    assert launch.STOPPED in read("sky.yaml")["resources"]["job_recovery"]["recover_on_exit_codes"]
