"""What an evaluation sees of an image: torchvision's resize by either interpolation, and the memory
that a thin image takes."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as F

from fastdisco import data
from fastdisco.config import Crop

SIZES = [(97, 60), (60, 97), (33, 33), (20, 31), (41, 200), (199, 64), (400, 9)]
MODES = {"linear": InterpolationMode.BILINEAR, "cubic": InterpolationMode.BICUBIC}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("views"), np.random.default_rng(0)
    (root / "c").mkdir()
    for i, (w, h) in enumerate(SIZES):
        small = Image.fromarray(rng.integers(0, 256, size=(9, 9, 3), dtype=np.uint8))
        small.resize((w, h), Image.BICUBIC).save(root / "c" / f"{i}.png")
    return data.listing(root)


def shown(view):
    crop = Crop()
    mean, std = (torch.tensor(x).view(3, 1, 1) for x in (crop.mean, crop.std))
    return (255 * (view.float() * std + mean)).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("resize, size", [(64, 56), (75, 64), (40, 40), (33, 8), (24, 16)])
def test_a_view_is_torchvisions(images, resize, size, mode):
    loader = data.EvalLoader(images, resize, size, 4, 1, torch.device("cpu"), interpolation=mode)
    for batch in loader:
        for view, index in zip(batch.views[0], batch.index.tolist()):
            whole = F.resize(Image.open(images.root / images.files[index]), resize, MODES[mode])
            want = np.asarray(F.center_crop(whole, size), float)
            d = abs(shown(view) - want)
            # The outermost pixels differ most, see graph.py; PIL rounds between its two passes.
            inner = d[1:-1, 1:-1].max()
            assert d.mean() < 0.6 and inner <= {"linear": 4, "cubic": 6}[mode], SIZES[index]


def test_the_interpolations_differ(images):
    one, other = (
        next(iter(data.EvalLoader(images, 75, 64, 4, 1, torch.device("cpu"), interpolation=m)))
        for m in MODES
    )
    assert abs(shown(one.views[0][2]) - shown(other.views[0][2])).mean() > 1


PEAK = """
import resource, sys, torch
from fastdisco import data
listing = data.listing(sys.argv[1])
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
next(iter(data.EvalLoader(listing, 256, 224, 1, 1, torch.device("cpu"), indices=[0])))
before = peak()
next(iter(data.EvalLoader(listing, 256, 224, 1, 1, torch.device("cpu"), indices=[1])))
print(peak() - before)
"""


def test_a_thin_image_takes_memory_for_its_crop_only(tmp_path):
    """Resized as a whole, 2000 x 2 pixels are 256,000 x 256: 197 MB."""
    (tmp_path / "c").mkdir()
    for name, size in (("a", (224, 224)), ("b", (2000, 2))):
        Image.new("RGB", size, (9, 99, 199)).save(tmp_path / "c" / f"{name}.png")
    command = [sys.executable, "-c", PEAK, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 40  # MiB
