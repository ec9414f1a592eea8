"""Texts that no configuration is: each is refused in one sentence, within bounds of time and memory."""

import os
import subprocess
import sys
import time

import pytest
from conftest import ROOT, run
from test_config import BASE, error, load

from fastdisco import config

HEAD = "run: {name: x}\ndata: {train: /t}\n"
LAUGHS = HEAD + "student:\n  kwargs:\n    a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
for i in range(1, 10):
    LAUGHS += f"    a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n"
VALUES = {
    "no float": "!!float x",
    "no int": "!!int x",
    "empty int": "!!int ''",
    "no bool": "!!bool x",
    "no time": "!!timestamp x",
    "no day": "2001-13-45",
    "no hour": "2001-01-01 99:99:99",
    "digits": "9" * 5000,
    "hex digits": "0x" + "f" * 5000,
    "deep": "[" * 1500 + "]" * 1500,
    "deep maps": "{a: " * 1500 + "1" + "}" * 1500,
    "bytes": "!!binary x",
    "object": "!!python/object:os.system x",
    "no key": "{? [a] : 1}",
    "merged": "{<<: 3}",
    "itself": "&a [*a]",
    "own key": "&a {x: *a}",
    "own merge": "&a {<<: *a}",
    "set": "!!set {a, b}",
    "pairs": "!!omap [a: 1]",
    "bits": "0b",
    "control": '"\\x00"',
    "surrogate": '"\\ud800"',
}


@pytest.mark.parametrize("key", ["optim.lr", "run.epochs", "student.kwargs", "data.train"])
@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES)
def test_what_is_no_value_is_refused_in_a_file_and_as_an_override(tmp_path, key, value):
    block, name = key.split(".")
    raw = {"run": "name: x", "data": "train: /t"}
    raw[block] = f"{raw.get(block, 'nothing: 0')}\n  {name}: {value}".replace("nothing: 0\n  ", "")
    if key == "data.train":
        raw["data"] = f"train: {value}"
    text = "".join(f"{k}:\n  {v}\n" for k, v in raw.items())
    for overrides in ((), (f"{key}={value}",)):
        begin, says, cfg = time.perf_counter(), "", None
        try:
            cfg = load(tmp_path, HEAD if overrides else text, *overrides)
        except config.UserError as e:
            says = str(e)
        assert len(says) < 700 and says.isprintable(), says
        # A name or a path may be such a text.
        assert says or (key == "data.train" and load(tmp_path, config.dump(cfg)) == cfg)
        assert time.perf_counter() - begin < 20


def test_anchors_in_anchors_are_refused_before_they_unfold(tmp_path):
    says = error(tmp_path, LAUGHS)
    assert "c.yaml" in says and "anchors" in says, says
    # Some sharing is fine.
    load(tmp_path, HEAD + "view: {mean: &m [0.5, 0.5, 0.5], std: *m}\n")


@pytest.mark.parametrize(
    "content, says",
    [
        (b"run: {name: \xff}\n", "UTF-8"),
        (b"\xff\xfer\0u\0n\0", "UTF-8"),
        (b"run: {name: x}\0", "not valid YAML"),
        (b"#" * 2_000_000, "larger"),
        (b"- " * 10_000, "not valid YAML"),
        (b"{" * 100_000, "nested too deep"),
    ],
)
def test_files_that_are_no_configuration(tmp_path, content, says):
    (tmp_path / "c.yaml").write_bytes(content)
    with pytest.raises(config.UserError) as e:
        config.load(tmp_path / "c.yaml")
    assert says in str(e.value) and "\n" not in str(e.value), e.value


def test_an_endless_file_is_refused():
    with pytest.raises(config.UserError, match="larger"):
        config.load("/dev/zero")


@pytest.mark.parametrize(
    "override, says",
    [
        (f"run.name={'x' * 300}", "run.name"),
        (f"run.out={'x' * 300}", "run.out"),
        (f"run.out={'x/' * 3000}", "run.out"),
        ("data.train='a\\0b'", ""),
        ('data.train="a\\0b"', "data.train"),
        ('data.train="a\\ud800b"', "data.train"),
        ("student.kwargs={a: 2001-01-01}", "student.kwargs.a"),
        ("student.kwargs={a: .nan}", "student.kwargs"),
        ('"a\\nb"=1', "unknown key"),
        ("optim.\nlr=1", "unknown key"),
        ("run={1: 2}", "run"),
        ("1=2", "unknown key"),
        ("views=[{1: 2}]", "views"),
        ("method={name: 'mo\\nco'}", "method"),
        ("students=[{arch: a, name: b}, 3]", "students"),
    ],
)
def test_strange_values_and_keys_are_told(tmp_path, override, says):
    if not says:
        load(tmp_path, BASE, override)
        return
    found = error(tmp_path, BASE, override)
    assert says in found and found.isprintable(), found


def test_a_terminal_of_ascii_shows_what_it_can(folder, tmp_path):
    """Names that it cannot show are escaped, in a plan, in tables and in errors."""
    (tmp_path / "größe").mkdir()
    (tmp_path / "größe/bilder").symlink_to(folder / "train")
    ascii_only = {"PYTHONIOENCODING": "ascii"}
    arguments = ["--config", ROOT / "tests/tiny.yaml", f"run.out={tmp_path}/größe"]
    train = f"data.train={tmp_path}/größe/bilder"
    text = run(
        sys.executable, ROOT / "fastdisco/train.py", *arguments, train, "--dry-run", env=ascii_only
    )
    assert "43 images of 3 classes" in text and "gr\\xf6\\xdfe" in text, text
    missing = [*arguments, f"data.train={tmp_path}/größe/fehlt"]
    text = run(sys.executable, ROOT / "fastdisco/train.py", *missing, env=ascii_only, code=2)
    assert "no such folder" in text and "Traceback" not in text and text.count("\n") == 1, text
    check = [
        sys.executable,
        "-m",
        "fastdisco.cli",
        "data",
        "check",
        f"{tmp_path}/größe/bilder",
        "--fast",
    ]
    found = subprocess.run(
        [*check, f"--out={tmp_path}/größe"],
        cwd=ROOT,
        env={**os.environ, **ascii_only},
        capture_output=True,
    )
    assert found.returncode == 0 and b"Traceback" not in found.stderr, found
