"""Teachers that are refused: without head, with strange or missing weights, damaged."""

import math
import os
import shutil
import types

import pytest
import safetensors.torch
import torch
from layouts import (
    dino,
    dino_head,
    refused,
    save,
    small_resnet,
    small_swav,
    swav,
    vit_small,
    xcit_small,
)

from fastdisco import models, teacher
from fastdisco.config import UserError
from fastdisco.teacher import formats


@pytest.fixture
def tmp_path(tmp_path):
    """Emptied after each test: its checkpoints have 45 MB each."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def test_a_backbone_without_head_is_refused_with_what_to_take(tmp_path):
    torch.manual_seed(0)
    refused(
        save(tmp_path, vit_small()),
        "holds vit_small_patch16_224 alone",
        "dino_deitsmall16_pretrain_full_checkpoint.pth",
    )
    refused(
        save(tmp_path, xcit_small()),
        "holds xcit_small_12_p16_224 alone",
        "dino_xcit_small_12_p16_pretrain_full_checkpoint.pth",
    )
    # Supervised, as torchvision's and timm's.
    classifier = {"fc.weight": torch.ones(1000, 512), "fc.bias": torch.ones(1000)}
    refused(
        save(tmp_path, small_resnet().state_dict() | classifier),
        "holds resnet18 alone",
        "without the projection head",
    )
    refused(save(tmp_path, {"model": small_resnet().state_dict()}), "holds resnet18 alone")
    safetensors.torch.save_file(small_resnet().state_dict(), tmp_path / "model.safetensors")
    refused(tmp_path / "model.safetensors", "holds resnet18 alone")


def test_missing_heads_are_named(tmp_path):
    state = small_swav()[0]
    head = "module.projection_head."
    refused(
        save(tmp_path, {k: v for k, v in state.items() if not k.startswith(head)}),
        "holds resnet18 alone",
    )
    refused(
        save(tmp_path, {k: v for k, v in state.items() if not k.startswith(head + "3")}),
        "missing: head.3.weight, head.3.bias",
    )
    refused(
        save(tmp_path, {k: v for k, v in state.items() if not k.startswith(head + "1.running")}),
        "missing: head.1.running_mean",
    )
    found = dino(small_resnet().state_dict(), dino_head({}, 512, 24))
    found["teacher"] = {k: v for k, v in found["teacher"].items() if "mlp" not in k}
    refused(save(tmp_path, found), "no projection head (no head.mlp.*")


def test_wrong_prefixes_and_strangers_are_named(tmp_path):
    state = small_swav(prefix="")[0]
    refused(
        save(tmp_path, {f"net.{k}": v for k, v in state.items()}),
        "holds net.conv1.weight",
        "no known format",
        "SwAV",
        "DINO",
        "MoCo",
    )
    refused(
        save(tmp_path, state | {"layer9.weight": torch.ones(1)}),
        "unexpected: backbone.layer9.weight",
        "architecture known here is resnet18",
    )
    found = dino(
        {f"x.{k}": v for k, v in small_resnet().state_dict().items()}, dino_head({}, 512, 24)
    )
    refused(save(tmp_path, found), "of no architecture known here", "set teacher.arch")
    del found["teacher"]
    refused(save(tmp_path, found), "holds student, optimizer", "no known format")


def test_an_arch_that_contradicts_the_file_is_named_with_the_files(tmp_path):
    file = save(tmp_path, small_swav()[0])
    refused(
        file,
        "teacher.arch is resnet34 with {}, but the weights are those of resnet18",
        arch="resnet34",
    )
    refused(
        file,
        "those of resnet18: set teacher.arch=resnet18 and no teacher.kwargs",
        arch="resnet18",
        kwargs={"stem_type": "deep"},
    )
    with pytest.raises(UserError, match="name it as teacher.arch"):
        formats.read(file, None, {"stem_type": "deep"})
    with pytest.raises(UserError, match="embeds into 16 numbers and the student into 128"):
        teacher.load(file, None, {}, 128)


@pytest.mark.parametrize("share", [0.001, 0.5, 0.999])
def test_a_file_cut_short_is_refused(tmp_path, share):
    for suffix, write in ((".pth", torch.save), (".safetensors", safetensors.torch.save_file)):
        file = tmp_path / f"file{suffix}"
        write({k: v.clone() for k, v in small_swav()[0].items()}, file)
        os.truncate(file, int(share * file.stat().st_size))
        refused(file, "cut short")


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {self.mark}",)


def test_a_flipped_bit_is_refused(tmp_path):
    """Which torch reads without a word where it maps the file."""
    file = save(tmp_path, swav(1, 256))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    refused(file, "damaged")


@pytest.mark.parametrize(
    "spoil",
    [
        lambda x: x.fill_(math.nan),
        lambda x: x.fill_(math.inf),
        lambda x: x.to(torch.complex64),
        lambda x: x.to(torch.int32),
        lambda x: x.to_sparse(),
        lambda x: torch.empty_like(x, device="meta"),
    ],
    ids=["nan", "inf", "complex", "int", "sparse", "meta"],
)
def test_weights_that_are_no_finite_numbers_are_named(spoil, tmp_path):
    state = swav(1, 256)
    state["module.layer1.0.conv1.weight"] = spoil(state["module.layer1.0.conv1.weight"])
    refused(save(tmp_path, state), "not finite real numbers: backbone.layer1.0.conv1.weight;")


def test_an_evil_command_line_in_dinos_args_is_refused_and_not_run(tmp_path):
    found = dino(small_resnet().state_dict(), dino_head({}, 512, 24))
    found["args"].output_dir = Evil(tmp_path / "mark")
    file = save(tmp_path, found)
    refused(file, "asks for posix.system", "throw-away container", "python -c ")
    assert not (tmp_path / "mark").exists()
    torch.load(file, weights_only=False)  # the test's file does run code where it is allowed to
    assert (tmp_path / "mark").exists()


def test_of_a_dino_run_the_mean_student_teaches_and_of_others_the_student(tmp_path, monkeypatch):
    made = {
        which: models.Net(torch.nn.Identity(), torch.nn.Linear(4, 3))
        for which in ("student", "ema")
    }
    for method, which in (("dino", "ema"), ("moco", "student"), ("swav", "student")):
        cfg = types.SimpleNamespace(
            method=types.SimpleNamespace(name=method),
            student=types.SimpleNamespace(arch="resnet18", kwargs={}, dim=3),
        )
        monkeypatch.setattr(
            models,
            "from_run",
            lambda folder, net="student", student=None, cfg=cfg: (made[net], cfg),
        )
        found = formats.read(tmp_path)
        assert (
            found.net is made[which]
            and (found.arch, found.head, found.dim) == ("resnet18", "4 -> 3", 3)
            and method in found.format
        )
