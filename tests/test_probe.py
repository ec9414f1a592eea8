"""`fastdisco teacher show` and `check`: what they print of a file, and which teachers they
refuse."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import tiny
from layouts import dino, dino_head, save, small_swav, vit_small
from PIL import Image
from test_knn import Batch, vote

from fastdisco import cli, teacher
from fastdisco.commands import train
from fastdisco.evals import probe


@pytest.fixture
def tmp_path(tmp_path):
    yield tmp_path
    shutil.rmtree(tmp_path)


class Fake(torch.nn.Module):
    """Features are some of the pixels, the embedding some of the features."""

    def __init__(self, take, head):
        super().__init__()
        self.take, self.head = take, head

    def features(self, x):
        return x.flatten(1)[:, self.take]


def test_the_shares_are_the_vote_written_out():
    rng = np.random.default_rng(0)
    centre = np.random.default_rng(1).normal(size=(5, 3 * 32 * 32))

    def made(n):
        y = rng.integers(5, size=n)
        return (rng.normal(size=(n, 3 * 32 * 32)) + 0.1 * centre[y]).astype(np.float32), y

    bank, query = made(120), made(60)
    batches = [
        [
            Batch(torch.tensor(x[i : i + 50]).view(-1, 3, 32, 32), torch.tensor(y[i : i + 50]))
            for i in range(0, len(x), 50)
        ]
        for x, y in (bank, query)
    ]
    net, untrained = Fake(slice(0, 600), lambda f: f[:, :50]), Fake(slice(600, 800), None)
    got = probe.run(net, untrained, *batches, classes=5, k=7, temp=0.1)
    small = lambda x: F.avg_pool2d(torch.tensor(x).view(-1, 3, 32, 32), 2).flatten(1).numpy()
    of = {
        "features": lambda x: x[:, :600],
        "embedding": lambda x: x[:, :50],
        "untrained": lambda x: x[:, 600:800],
        "pixels": small,
    }
    want = {
        k: vote((f(bank[0]), bank[1]), (f(query[0]), query[1]), 5, 7, 0.1) for k, f in of.items()
    }
    assert got == pytest.approx(want | {"chance": 0.2}) and len(set(want.values())) == 4


@pytest.mark.parametrize(
    "shares, says",
    [
        (dict(features=0.70, embedding=0.40), None),
        (
            dict(features=0.59, embedding=0.58),
            "its features tell the class of 59.0% of 100 images, pixels 50.0%, to be passed by "
            "10.0%",
        ),
        (
            dict(features=0.70, embedding=0.29),
            "its embedding tell the class of 29.0% of 100 images, chance 20.0%",
        ),
        (dict(features=float("nan"), embedding=0.4), "features"),
        (dict(features=0.70, embedding=0.4, untrained=0.69), "untrained 69.0%"),
    ],
)
def test_the_verdict(shares, says):
    found = probe.verdict(dict(untrained=0.45, pixels=0.5, chance=0.2) | shares, 100)
    assert found is None if says is None else says in found


def test_show_says_what_the_file_is(tmp_path, capsys):
    file = save(tmp_path, small_swav(**{"prototypes.weight": torch.ones(3, 16)})[0])
    assert cli.main(["teacher", "show", str(file)]) == 0
    out = capsys.readouterr().out
    weights = 11.176512 + (512 * 24 + 24 + 48 + 24 * 16 + 16) / 1e6
    assert (
        "SwAV" in out
        and "resnet18, 11.18 M weights" in out
        and "512 -> 24 -> 16, 0.01 M weights; student.dim must be 16" in out
    )
    assert (
        "prototypes: prototypes.weight" in out
        and teacher.load(file, None, {}, 16).fingerprint in out
    )
    assert weights == pytest.approx(
        sum(p.numel() for p in teacher.load(file, None, {}, 16).net.parameters()) / 1e6
    )
    assert (
        cli.main(["teacher", "show", str(file), "--arch", "resnet34"]) == 2
        and "those of resnet18" in capsys.readouterr().err
    )
    assert (
        cli.main(["teacher", "show", str(tmp_path / "none")]) == 2
        and "cannot be read" in capsys.readouterr().err
    )


@pytest.fixture(scope="module")
def stripes(tmp_path_factory):
    """Images whose class is the direction of faint lines, one pixel wide, over clouds: gone in
    pixels at half the size, plain to a convolution."""
    root, rng = tmp_path_factory.mktemp("stripes"), np.random.default_rng(0)
    at = np.arange(32)
    for part, n in (("train", 60), ("val", 80)):
        for i in range(n):
            label = i % 2
            wave = (-1.0) ** at * 15
            cloud = rng.integers(40, 216, size=(4, 4, 3)).astype(np.uint8)
            x = np.asarray(Image.fromarray(cloud).resize((32, 32), Image.BICUBIC)).transpose(
                2, 0, 1
            ) + (wave[:, None] if label else wave[None])
            (root / part / f"class{label}").mkdir(parents=True, exist_ok=True)
            Image.fromarray(x.clip(0, 255).astype(np.uint8).transpose(1, 2, 0)).save(
                root / part / f"class{label}/{i:03}.png"
            )
    return root


def striped(kind):
    """A SwAV file by the published names, whose ResNet-18 tells nothing, or the direction of lines
    by its first convolution alone."""
    state = small_swav()[0]
    for k, x in state.items():
        if (
            kind == "told"
            and ".layer" in k
            and k.endswith(("bn2.weight", "bn2.bias", "downsample.1.bias"))
        ):
            x.zero_()  # what is left of each block is the shortcut
        if kind == "told" and k.endswith("downsample.0.weight"):
            x.zero_()
            x[torch.arange(len(x)), torch.arange(len(x)) % x.shape[1]] = 1
        if kind == "told" and k == "module.conv1.weight":
            wave = (-1.0) ** torch.arange(7)
            for i, lines in enumerate((wave[:, None], -wave[:, None], wave[None], -wave[None])):
                x[i::4] = (lines - lines.mean()).expand(7, 7)
        if kind == "broken" and k.endswith("bn1.weight") and ".layer" not in k:
            x.zero_()
    return state


@pytest.mark.parametrize("bank", [True, False])
def test_check_lets_a_teacher_pass_that_tells_the_classes_and_refuses_one_that_does_not(
    stripes, tmp_path, capsys, bank
):
    command = [
        "teacher",
        "check",
        str(tmp_path / "file.pth"),
        "--data",
        str(stripes / "val"),
        "--resize",
        "32",
        "--size",
        "32",
        "--threads",
        "1",
    ]
    command += ["--bank", str(stripes / "train")] if bank else ["--images", "30"]
    for kind, code in (("told", 0), ("broken", 2)):
        save(tmp_path, striped(kind))
        assert cli.main(command) == code
        out, err = capsys.readouterr()
        shares = json.loads(out.splitlines()[-1])
        assert (
            ("80 images" in out and "among 60 of" in out)
            if bank
            else ("30 images" in out and "among 30 others" in out)
        )
        assert re.search(
            r"length of its embeddings: [\d.]+ on average, standard deviation [\d.]+", out
        )
        assert (kind, shares["teacher/features"]) == ("told", 1) or (
            kind == "broken" and "do not train with it" in err
        )


def test_too_few_images_are_refused(stripes, tmp_path, capsys):
    file = save(tmp_path, small_swav()[0])
    assert (
        cli.main(["teacher", "check", str(file), "--data", str(stripes / "val"), "--images", "0"])
        == 2
    )
    assert "0 images to ask and 0 to answer are too few" in capsys.readouterr().err


def test_a_vit_of_another_size_is_told_before_the_check_and_in_a_dry_run(
    stripes, folder, tmp_path, capsys
):
    file = save(tmp_path, dino(vit_small(192), dino_head({}, 192, hidden=16)))
    assert (
        cli.main(
            [
                "teacher",
                "check",
                str(file),
                "--data",
                str(stripes / "val"),
                "--resize",
                "32",
                "--size",
                "32",
            ]
        )
        == 2
    )
    assert "images of 32 px" in (err := capsys.readouterr().err) and "--size" in err
    run = [
        str(a)
        for a in tiny(folder, tmp_path, f"teacher.file={file}", "student.dim=256", "--dry-run")
    ]
    assert train.main(run) == 2 and "dynamic_img_size: true" in capsys.readouterr().err
    assert (
        train.main(
            [*run, "teacher.arch=vit_tiny_patch16_224", "teacher.kwargs={dynamic_img_size: true}"]
        )
        == 0
    )
