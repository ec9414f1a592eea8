"""The variables of the launchers: understood, or refused by one sentence."""

import contextlib
import os
import re

import pytest
from conftest import tiny

from fastdisco import cli
from fastdisco.commands import train
from fastdisco.common import launch
from fastdisco.common.errors import UserError

FIVE = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
FOREIGN = re.compile(r"SLURM_|OMPI_|PMIX?_|MV2_|CUDA_VISIBLE_DEVICES$")
SLURM = {
    "SLURM_JOB_ID": "77",
    "SLURM_STEP_ID": "1",
    "SLURM_STEP_NUM_TASKS": "4",
    "SLURM_STEP_NODELIST": "gpu[03-04]",
    "SLURM_PROCID": "3",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
TORCHRUN = dict(RANK="1", LOCAL_RANK="1", WORLD_SIZE="2", MASTER_ADDR="a", MASTER_PORT="5")


@pytest.fixture
def environment(monkeypatch):
    """Takes all launchers' variables away, sets some, and undoes what the code sets."""
    monkeypatch.setattr(os, "environ", dict(os.environ))

    def of(variables):
        for name in [x for x in os.environ if x in FIVE or FOREIGN.match(x)]:
            del os.environ[name]
        os.environ.update(variables)

    return of


def five():
    return [os.environ.get(x) for x in FIVE]


def test_one_process_without_a_launcher(environment):
    environment({})
    launch.defaults()
    assert five() == ["0", "0", "1", "127.0.0.1", "0"]


def test_slurms_variables_are_understood(environment):
    ports = set()
    for rank in "03":
        environment(SLURM | {"SLURM_PROCID": rank})
        launch.defaults()
        assert five()[:4] == [rank, "1", "4", "gpu03"]
        ports.add(os.environ["MASTER_PORT"])
    # One for all ranks; another for another job.
    assert len(ports) == 1 and 10_000 <= int(*ports) < 30_000
    environment(SLURM | {"SLURM_JOB_ID": "78"})
    launch.defaults()
    assert os.environ["MASTER_PORT"] not in ports


def test_slurms_rank_0_says_once_for_whom_it_waits(environment, capsys):
    says = "waiting for 3 other processes of this Slurm step (unset SLURM_PROCID for one process)\n"
    environment(SLURM | {"SLURM_PROCID": "0"})
    launch.defaults()
    launch.defaults()
    assert capsys.readouterr().out == says
    for others in (SLURM, TORCHRUN | {"SLURM_PROCID": "0"}, OPEN_MPI, {"SLURM_PROCID": "0"}):
        environment(others)
        launch.defaults()
        assert capsys.readouterr().out == ""


def test_what_the_user_sets_beside_slurms_variables_wins(environment):
    environment(SLURM | {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "4000"})
    launch.defaults()
    assert five() == ["3", "1", "4", "10.0.0.1", "4000"]


def test_a_task_that_sees_one_gpu_calls_it_number_0(environment):
    environment(SLURM | {"CUDA_VISIBLE_DEVICES": "2"})
    launch.defaults()
    assert os.environ["LOCAL_RANK"] == "0"


def test_a_batch_script_of_slurm_is_one_process(environment):
    environment({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "8", "SLURM_PROCID": "0"})
    launch.defaults()
    assert launch.world() == 1


def test_torchrun_under_srun_is_torchruns(environment):
    environment(SLURM | TORCHRUN)
    launch.defaults()
    assert five() == list(TORCHRUN.values())


@pytest.mark.parametrize(
    "nodes, first",
    [
        ("gpu1", "gpu1"),
        ("gpu1,gpu2", "gpu1"),
        ("gpu[01-04,09],login", "gpu01"),
        ("gpu[7,9]", "gpu7"),
        ("a,gpu[7,9]", "a"),
        ("rack[1-2]-gpu,x", "rack1-gpu"),
    ],
)
def test_the_first_host_of_slurms_list(nodes, first):
    assert launch.first_host(nodes) == first


def test_open_mpis_variables_are_understood_on_one_host(environment):
    environment(OPEN_MPI)
    launch.defaults()
    assert five()[:4] == ["1", "1", "2", "127.0.0.1"]
    environment(OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "MASTER_ADDR": "node1"})
    launch.defaults()
    assert five()[:4] == ["1", "1", "2", "node1"]


@pytest.mark.parametrize(
    "variables, says",
    [
        (OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"}, "mpirun -x MASTER_ADDR=HOST"),
        ({"PMI_SIZE": "2"}, "PMI_SIZE is 2: an MPI has started several"),
        ({"MV2_COMM_WORLD_SIZE": "2"}, "MV2_COMM_WORLD_SIZE is 2"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 .* without RANK, MASTER_ADDR, MASTER_PORT"),
        ({"WORLD_SIZE": "2", "RANK": "0"}, "without MASTER_ADDR, MASTER_PORT"),
        ({"RANK": "1"}, "RANK is 1 and WORLD_SIZE 1"),
        (TORCHRUN | {"RANK": "2"}, "RANK is 2 and WORLD_SIZE 2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE is 'two'"),
        ({"RANK": ""}, "RANK is ''"),
        ({"LOCAL_RANK": "-1"}, "LOCAL_RANK is '-1'"),
        (TORCHRUN | {"MASTER_PORT": "http"}, "MASTER_PORT is 'http'"),
    ],
    ids=lambda v: v if isinstance(v, str) else "",
)
def test_what_cannot_be_understood_is_refused(variables, says, environment, tmp_path, capsys):
    environment(variables)
    with pytest.raises(UserError, match=says):
        launch.defaults()
    environment(variables)
    # The command says it before it reads anything.
    code = train.main(["--config", "nowhere.yaml"])
    # Whatever RANK is: nobody can tell which process is rank 0.
    assert code == 2 and re.search(says, capsys.readouterr().err)


def test_a_dry_run_takes_the_number_of_processes_from_slurm(environment, tmp_path, capsys):
    (tmp_path / "data/a").mkdir(parents=True)
    args = [str(x) for x in tiny(tmp_path, tmp_path, "--dry-run")]
    environment(SLURM | {"SLURM_PROCID": "0"})
    with contextlib.suppress(UserError):
        train.main(args)
    assert launch.world() == 4


# ---- commands that are one process


@pytest.mark.parametrize("left", [{"WORLD_SIZE": "2"}, {"RANK": "1"}, TORCHRUN, {"RANK": "x"}])
def test_commands_of_one_process_take_no_notice(left, environment, tmp_path, capsys):
    environment(left)
    assert cli.main(["teacher", "show", str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert "nowhere" in error and "this command is one process; " in error
    assert five() == [None] * 5


def test_plain_variables_are_nothing_to_speak_of(environment, tmp_path, capsys):
    environment({"RANK": "0", "WORLD_SIZE": "1"})
    assert cli.main(["teacher", "show", str(tmp_path / "nowhere")]) == 2
    assert "one process" not in capsys.readouterr().err


@pytest.mark.parametrize("left", [{"WORLD_SIZE": "2"}, {"RANK": "1"}, {"RANK": "x"}])
@pytest.mark.parametrize("command", [("eval", "knn"), ("teacher", "record", "--config")])
def test_commands_of_several_refuse_what_a_launcher_left_over(
    command, left, environment, tmp_path, capsys
):
    environment(left)
    assert cli.main([*command, str(tmp_path / "nowhere")]) == 2
    error = capsys.readouterr().err
    assert error.count("fastdisco: error: ") == 1 and next(iter(left)) in error
