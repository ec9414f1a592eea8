"""The command line: what help lists, what is answered before torch is imported, and `fastdisco
train` beside train.py."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT, tiny

from fastdisco import __version__, cli
from fastdisco.commands import train

COMMANDS = {
    f"{name} {command}".strip(): what
    for name, group in cli.GROUPS.items()
    for command, what in group.COMMANDS.items()
}

HEAVY = ("torch", "numpy", "timm", "deepspeed", "nvidia", "triton", "tensorboard", "skimage")

# Runs commands one after another in one fresh process, and tells code and output of each, and which
# heavy modules are imported in the end.
FRESH = """
import contextlib, io, json, sys
from fastdisco import cli
from fastdisco.commands import train

told = []
for start, argv in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = {"fastdisco": cli, "train.py": train}[start].main(argv)
        except SystemExit as e:
            code = e.code
    told.append([code, out.getvalue(), err.getvalue()])
print(json.dumps([told, [m for m in json.loads(sys.argv[2]) if m in sys.modules]]))
"""


def fresh(*commands):
    """[(exit code, stdout, stderr)] of (start, argv) each, and the heavy modules."""
    arguments = [json.dumps(commands), json.dumps(HEAVY)]
    done = subprocess.run(
        [sys.executable, "-c", FRESH, *arguments], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_help_has_one_line_for_each_command_in_the_order_of_a_users_work():
    (alone, asked), heavy = fresh(("fastdisco", []), ("fastdisco", ["--help"]))
    assert alone[0] == asked[0] == 0 and alone[1] == asked[1] and not heavy
    lines = alone[1].partition("commands:\n")[2].partition("\n\n")[0].splitlines()
    assert [line.split(None, len(name.split()))[-1] for name, line in zip(COMMANDS, lines)] == list(
        COMMANDS.values()
    )
    assert [line.strip().startswith(name) for name, line in zip(COMMANDS, lines)] == [True] * len(
        lines
    )
    groups = [
        "data",
        "doctor",
        "train",
        "run",
        "runs",
        "watch",
        "teacher",
        "eval",
        "export",
        "report",
    ]
    assert list(cli.GROUPS) == groups
    assert len(lines) == len(COMMANDS)


def test_help_of_every_command_and_the_version_come_before_torch():
    asked = [("fastdisco", [*name.split(), "--help"]) for name in COMMANDS]
    told, heavy = fresh(*asked, ("fastdisco", ["--version"]), ("train.py", ["--help"]))
    for name, (code, out, _) in zip(COMMANDS, told):
        assert code == 0 and out.startswith(f"usage: fastdisco {name} [-h]"), out
    assert told[-2][:2] == [0, f"fastdisco {__version__}\n"]
    assert told[-1][0] == 0 and told[-1][1].startswith("usage: train.py [-h]")
    assert not heavy


WRONG = [
    (["nothing"], "invalid choice: 'nothing'"),
    (["data"], "required: demo|pack|check"),
    (["data", "pack", "x", "y", "z"], "fastdisco data pack: error: unrecognized arguments: z"),
    (["data", "pack", "x", "y", "--jpeg", "101"], "argument --jpeg: invalid choice"),
    (["eval", "knn", "run", "eval.k=5", "--nett"], "unrecognized arguments: --nett"),
    (["teacher", "check", "file"], "required: --data"),
    (["train"], "required: --config"),
    (["train", "--config", "tests/tiny.yaml", "--overwrite", "--dry-run"], "not allowed with"),
    (["train", "--config", "none.yaml"], "none.yaml: cannot be read"),
    (["train", "--config", "tests/tiny.yaml", "optim.lrr=1"], "unknown key optim.lrr; did you"),
    (["train", "--config", "tests/tiny.yaml", "--dry-run", "lr"], "expected block.key=value"),
]


def test_wrong_arguments_and_wrong_keys_are_answered_before_torch():
    told, heavy = fresh(*(("fastdisco", argv) for argv, _ in WRONG))
    for (argv, says), (code, out, err) in zip(WRONG, told):
        assert (code, out) == (2, "") and says in err, (argv, err)
    assert not heavy


@pytest.mark.parametrize(
    "wrong", ["--bogus", "--bogus=1", "--lr 0.1", "optim.lr=1 --bogus data.batch=8"]
)
def test_train_py_refuses_the_same_arguments(wrong):
    argv = ["--config", "tests/tiny.yaml", *wrong.split()]
    ours = ("fastdisco", ["train", *argv]), ("train.py", argv)
    ((code, _, err), (other, _, theirs)), heavy = fresh(*ours)
    assert code == other == 2 and not heavy
    message = err.partition("error: ")[2]
    assert message == theirs.partition("error: ")[2]
    assert message.startswith("unrecognized arguments: ") and "--" in message


def test_fastdisco_train_is_train_py(folder, tmp_path, capsys):
    def plan(main, argv):
        assert main(argv) == 0
        return capsys.readouterr().out

    config, file, *overrides = map(str, tiny(folder, tmp_path, "run.max_steps=7"))
    # As the launcher starts it, and with options between the overrides.
    mixed = [overrides[0], config, file, overrides[1], "--dry-run", *overrides[2:], "data.batch=16"]
    for argv in ([config, file, *overrides, "--dry-run"], ["--local_rank=0", *mixed]):
        theirs = plan(train.main, argv)
        assert plan(cli.main, ["train", *argv]) == theirs
        assert "= 7 steps" in theirs and f"{tmp_path}/tiny" in theirs
    # The launcher puts its argument before the command.
    assert plan(cli.main, ["--local_rank=0", "train", *mixed]) == theirs
    assert "batch       16 = 1 ranks x 16 images" in theirs


def test_both_starts_as_processes():
    """With a wrong key, which takes little time."""
    argv = ["--config", "tests/tiny.yaml", "optim.lrr=1"]
    starts = (["fastdisco/train.py"], ["-m", "fastdisco.train"], ["-m", "fastdisco.cli", "train"])
    done = [
        subprocess.run([sys.executable, *s, *argv], cwd=ROOT, capture_output=True, text=True)
        for s in starts
    ]
    assert [d.returncode for d in done] == [2, 2, 2]
    assert {d.stderr for d in done} == {done[0].stderr} and "optim.lrr" in done[0].stderr
