"""Files whose content is not what it was: teachers by their SHA-256, manifests by their format; and
commands that we suggest, which no file name can change."""

import io
import json
import shlex
import subprocess
import tarfile

import pytest
import torch
from conftest import tiny
from image_sets import one_sentence
from safetensors.torch import save_file
from test_plan import dry
from training import train_a_teacher

from fastdisco import cli, data
from fastdisco.config import UserError
from fastdisco.data import lines, pack, tar_index
from fastdisco.teacher import formats


def flipped(path, at):
    content = bytearray(path.read_bytes())
    content[at] ^= 4
    path.write_bytes(content)


@pytest.mark.parametrize("kind", ["legacy", "safetensors", "zip"])
def test_a_flipped_bit_in_a_teacher_is_refused_by_its_digest(kind, tmp_path):
    path = tmp_path / ("t.safetensors" if kind == "safetensors" else "t.pth")
    weights = {"a": torch.arange(4096.0)}
    if kind == "safetensors":
        save_file(weights, path)
    else:
        torch.save(weights, path, _use_new_zipfile_serialization=kind == "zip")
    digest = formats.sha256(path)
    told = subprocess.run(["sha256sum", path], capture_output=True, text=True).stdout
    assert told.split()[0] == digest
    formats.refuse_other(path, digest)
    formats.refuse_other(path, None)
    flipped(path, -3000)
    with pytest.raises(UserError) as e:
        formats.refuse_other(path, digest)
    one_sentence(e, path.name, digest, "teacher.sha256")


def test_the_digest_of_a_run_is_shown_and_compared(folder, tmp_path, capsys):
    train_a_teacher(folder, tmp_path, steps=1)
    run = tmp_path / "teacher"
    assert cli.main(["teacher", "show", str(run), "--sha256"]) == 0
    digest = formats.sha256(run / "checkpoints/step_00000001/state.pt")
    assert f"sha256        {digest}" in capsys.readouterr().out
    args = lambda sha: tiny(
        *(folder, tmp_path, f"teacher.file={run}", "teacher.arch=test_resnet"),
        f"teacher.sha256={sha}",
    )
    assert "missing     nothing" in dry(capsys, *args(digest))
    assert "teacher.sha256 says" in dry(capsys, *args("0" * 64), code=2)
    assert "teacher.sha256: 64 digits" in dry(capsys, *args("abc"), code=2)


@pytest.mark.parametrize("version", [2, "1", None, [1], True])
def test_a_manifest_of_another_version_is_refused(folder, tmp_path, version):
    pack.pack(folder / "val", tmp_path / "tars")
    path = tmp_path / "tars/manifest.json"
    manifest = json.loads(path.read_text()) | {"version": version}
    del manifest["checksum"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(UserError) as e:
        data.listing(tmp_path / "tars")
    one_sentence(e, "manifest.json", "version")


def test_a_flipped_key_of_a_manifest_or_line_of_an_index_is_refused(folder, tmp_path):
    pack.pack(folder / "val", tmp_path / "tars")
    tar = tmp_path / "tars/000000.tar"
    for path in (tmp_path / "tars/manifest.json", tar_index.path_of(tar)):
        whole = path.read_bytes()
        for at in range(0, len(whole), 29):
            flipped(path, at)
            with pytest.raises(UserError) as e:
                data.listing(tmp_path / "tars")
            assert "\n" not in str(e.value)
        path.write_bytes(whole)
    assert len(data.listing(tmp_path / "tars").files) == 12


EVIL = [
    "$(touch x).jpg",
    "a b'c.jpg",
    "-rf.jpg",
    "`id`.jpg",
    'x"; y.jpg',
    b"\xff\xfe.jpg",
    "#.jpg",
    "größe.jpg",
]


@pytest.mark.parametrize("name", EVIL)
def test_bash_reads_a_quoted_name_back(name):
    name = name.decode("utf-8", "surrogateescape") if isinstance(name, bytes) else name
    said = subprocess.run(
        ["bash", "-c", f"printf %s\\\\0 {lines.quoted(name)} {lines.for_shell(name)}"],
        capture_output=True,
    ).stdout.decode("utf-8", "surrogateescape")
    first, second, _ = said.split("\0")
    assert first == name and second.removeprefix("./") == name and not second.startswith("-")


def test_the_command_for_a_sample_without_image_works_for_any_name(tmp_path):
    tar = tmp_path / "x '$(id).tar"
    with tarfile.open(tar, "w") as t:
        for name, content in (("1.jpg", b"x"), ("-a 'b.json", b"{}")):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))
    with pytest.raises(UserError) as e:
        data.listing(tmp_path)
    command = str(e.value).rsplit("`", 2)[1]
    assert shlex.split(command)[:2] == ["tar", "--delete"]
    subprocess.run(["bash", "-c", command], check=True)
    assert data.listing(tmp_path).files == [f"{tar.name}/1.jpg"]
