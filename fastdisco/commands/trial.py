"""What the doctor asks of the run's own code: its sizes, its plan, the teacher's check and some real
steps.

The last two run in processes of their own, so that what ends them (no memory, a broken library) does
not end the doctor, and so that their memory is theirs alone."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

import torch

from fastdisco import config, data
from fastdisco.common import launch, temporary
from fastdisco.common.errors import UserError
from fastdisco.config import Config
from fastdisco.data import Listing, shards
from fastdisco.doctor import cgroup, disk, training
from fastdisco.doctor.disk import Writing
from fastdisco.doctor.finding import Finding, Report, failure, skipped
from fastdisco.doctor.machine import total_memory
from fastdisco.doctor.node import Needs
from fastdisco.run import following, plan
from fastdisco.run.environment import environment
from fastdisco.run.folder import agree
from fastdisco.run.sizes import Sizes, cache_bytes, sizes

# Variables of torchrun's, whose store a process of our own must not take.
_OF_TORCHRUN = "TORCHELASTIC_"


class Wanted(NamedTuple):
    """What is known of the run; each None where it is not."""

    cfg: Config | None
    needs: Needs
    sizes: Sizes | None
    listing: Listing | None
    # Why the run would be refused.
    refused: Finding | None


def wanted(cfg: Config | None, nodes: int, look: bool) -> Wanted:
    """What the run needs of this machine.  look: whether its images are looked for, which may take
    some seconds."""
    world = launch.world()
    commit = environment()["commit"]
    if cfg is None:
        needs = Needs(commit=commit, ranks=ranks_here(), nodes=nodes)
        return Wanted(None, needs, None, None, None)
    listing, found, refused = None, None, None
    try:
        found = sizes(_followed(cfg), world)
    except UserError as e:
        refused = _refusal(e)
    if look:
        # The plan says what is wrong with the data.
        with contextlib.suppress(UserError, OSError):
            listing = data.listing(cfg.data.train, cfg.data.quarantine)
    needs = Needs(
        commit=commit,
        ranks=ranks_here(),
        nodes=nodes,
        threads=cfg.data.threads,
        tars=min(len(listing.places.tars), shards.OPEN) if listing and listing.places else 0,
        optimizer=cfg.optim.name,
        held=found.held if found else 0,
        checkpoint=found.checkpoint if found else 0,
        cache=cache_bytes(cfg, len(listing.files)) if listing else 0,
        keep=cfg.checkpoint.keep,
        folder=cfg.run.out / cfg.run.name,
        cache_folder=cfg.teacher.cache_folder if cfg.teacher else None,
    )
    return Wanted(cfg, needs, found, listing, refused)


def ready(run: Wanted, report: Report) -> bool:
    """Reports the plan and the teacher's check; whether steps can be tried."""
    assert run.cfg
    if run.refused:
        report.add("training", [run.refused])
        return False
    try:
        lines = list(plan.lines(run.cfg, launch.world(), agree(run.cfg)))
    except UserError as e:
        report.add("training", [_refusal(e)])
        return False
    planned = list(training.planned(lines))
    report.add("training", planned)
    if run.listing is None or any(f.level == "failure" for f in planned):
        return False
    report.add("training", [teacher(run.cfg, len(run.listing.classes))])
    return True


def teacher(cfg: Config, classes: int) -> Finding:
    """What `fastdisco teacher check` says of the run's teacher, in a process of its own."""
    found = training.teacher_check(cfg, classes)
    if isinstance(found, str):
        return skipped("teacher", found)
    done = _fastdisco(found, {}, ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
    return training.teacher_words(done.returncode, done.stdout, done.stderr)


def steps(cfg: Config, folder: Path, port: int | None) -> tuple[int, str]:
    """Trains some steps into the folder, as this rank of the training; exit code and output.

    port: where the ranks meet; None: there is one rank"""
    with tempfile.TemporaryDirectory(prefix=temporary.prefix()) as own:
        file = Path(own, "trial.yaml")
        file.write_text(config.dump(training.trial(_followed(cfg), folder)))
        given = {} if port is None else {"MASTER_PORT": str(port)}
        done = _fastdisco(["train", "--config", str(file)], given, ())
    return done.returncode, done.stdout + done.stderr


def judged(
    run: Wanted, report: Report, folder: Path, writing: Writing | None, average_s: float | None
) -> None:
    """Reports what the steps in the folder have measured.

    average_s: seconds of an average of gradients alone; None: there is one rank"""
    assert run.cfg and run.sizes and run.listing
    trial = folder / "trial"
    found = training.speed(trial / "metrics.jsonl")
    if found is None:
        report.add("training", [failure("steps", "no step was logged", "lower checkpoint.every")])
        return
    count, saves = training.steps_of(run.cfg, len(run.listing.kept))
    save_s = run.sizes.checkpoint / writing.rate if writing else 0.0
    ranks, world = run.needs.ranks, launch.world()
    report.add(
        "training",
        [
            training.waits(found),
            training.fits(found, *_memory(ranks)),
            training.checkpoint_size(
                run.sizes.checkpoint, sorted((trial / "checkpoints").glob("*/*.pt"))
            ),
            training.eta(found, count, saves, save_s),
        ],
    )
    if average_s is not None:
        report.add("training", [training.exchange_share(average_s, found)])
    try:
        reading: disk.Reading | OSError = disk.reads(run.listing, run.cfg.data.threads * ranks)
    except OSError as e:
        reading = e
    report.add("disk", [disk.feeds(reading, found.compute * ranks / world, ranks)])


def _followed(cfg: Config) -> Config:
    """As the run in the configuration's folder would go on with these ranks."""
    began = following.began(cfg, cfg.run.out / cfg.run.name)
    return following.followed(cfg, launch.world(), began).cfg


def _fastdisco(
    arguments: list[str], given: dict[str, str], without: tuple[str, ...]
) -> subprocess.CompletedProcess[str]:
    """Runs a command of ours with other variables."""
    env = {k: v for k, v in os.environ.items() if not k.startswith(_OF_TORCHRUN)}
    env = {k: v for k, v in env.items() if k not in without} | given
    command = [sys.executable, "-m", "fastdisco.cli", *arguments]
    return subprocess.run(command, env=env, capture_output=True, text=True, errors="replace")


def ranks_here() -> int:
    """Ranks of this machine: each launcher says it in its own way."""
    said = (
        os.environ.get("LOCAL_WORLD_SIZE"),
        os.environ.get("LOCAL_SIZE"),
        os.environ.get("OMPI_COMM_WORLD_LOCAL_SIZE"),
        # 2(x3) for three nodes of two.
        os.environ.get("SLURM_STEP_TASKS_PER_NODE"),
    )
    found = re.match(r"\d+", next(filter(None, said), ""))
    return int(found[0]) if found else launch.world()


def _memory(ranks: int) -> tuple[float, str]:
    """GB that a rank may have, and of what."""
    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(launch.local_rank())
        return properties.total_memory / 1e9, properties.name
    has = min(total_memory(), cgroup.limits().memory)
    return has / ranks / 1e9, "the CPU" if ranks == 1 else f"the CPU, for each of {ranks} ranks"


def _refusal(e: UserError) -> Finding:
    what, _, remedy = str(e).rpartition("; ")
    return failure("refused", what or str(e), remedy if what else "correct it")
