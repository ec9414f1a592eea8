"""Where images are decoded and augmented: the graphs of a GPU, and on one its views against the
CPU's."""

import shutil

import pytest
import torch
from image_sets import (
    CPU,
    GPU,
    PLACEMENTS,
    PLAIN,
    SMALL,
    Spy,
    make,
    one_sentence,
    pixels,
    serialised,
)
from PIL import Image

from fastdisco import config, data
from fastdisco.config import Crop, UserError
from fastdisco.data.placement import default_placement


@pytest.mark.parametrize("name", PLACEMENTS)
def test_the_gpu_graphs_serialise_and_every_operator_exists_for_its_device(name, few):
    placement = PLACEMENTS[name]
    used = serialised(few, "", placement)
    assert (
        (("decoders__Image", "mixed") in used)
        == (placement.decode == "gpu")
        != (("decoders__Image", "cpu") in used)
    )
    assert (("Hsv", "gpu") in used) == (placement.augment == "gpu") != (("Hsv", "cpu") in used)
    assert ("CropMirrorNormalize", "gpu") in used and ("CropMirrorNormalize", "cpu") not in used


def test_the_way_follows_configuration_and_device():
    gpu, base = torch.device("cuda", 0), dict(train="x")
    placement = lambda device, precision="fp32", **keys: data.place(
        config.Data(**base, **keys), device, precision
    )
    assert placement(CPU) == default_placement(CPU) == ("cpu", "cpu", "cpu", False, 0.65, 2, False)
    assert placement(CPU, "bf16").half is False  # on the CPU halves are slower
    assert (
        placement(gpu) == default_placement(gpu) == ("gpu", "gpu", "gpu", False, 0.65, 2, False)
        and placement(gpu, "fp16").half
        and placement(gpu, "bf16").half
    )
    assert placement(gpu, decode="cpu")[:3] == ("cpu", "gpu", "gpu") and placement(
        gpu, augment="cpu"
    )[:3] == ("cpu", "cpu", "gpu")
    chosen = placement(gpu, decode="gpu", hw_decoder_load=0.2, prefetch=5, copy_views=True)
    assert chosen[3:] == (False, 0.2, 5, True)
    for key in ("decode", "augment"):
        with pytest.raises(UserError) as e:
            placement(CPU, **{key: "gpu"})
        one_sentence(e, f"data.{key}", "no", "GPU", "auto or cpu")
    with pytest.raises(UserError) as e:
        config.validate(
            dict(run=dict(name="x"), data=base | dict(decode="gpu", augment="cpu")), "here"
        )
    one_sentence(e, "here", "decode: gpu", "data.augment: cpu")


def test_copied_views_are_the_same_in_memory_of_torchs_own(few):
    place = default_placement(CPU)
    ways = place, place._replace(copy=True)
    plain, copied = (
        data.TrainLoader(few, SMALL, 8, 0, 2, 1, 1, CPU, placement=way) for way in ways
    )
    for a, b in zip(plain, copied, strict=True):
        assert torch.equal(a.index, b.index)
        for x, y in zip(a.views, b.views, strict=True):
            assert torch.equal(x, y) and x.stride() == y.stride() and x.dtype == y.dtype
    again = data.TrainLoader(few, SMALL, 8, 0, 2, 1, 1, CPU, placement=ways[1])
    next(again)
    again._pipes = [Spy(*again._pipes)]
    there = {v.data_ptr() for v in next(again).views}
    assert there.isdisjoint(again._pipes[0].pointers)
    with_copies = data.EvalLoader(few, 24, 16, 5, 1, CPU, placement=ways[1])
    for a, b in zip(data.EvalLoader(few, 24, 16, 5, 1, CPU), with_copies, strict=True):
        assert torch.equal(a.views[0], b.views[0])


@pytest.mark.gpu
def test_copied_views_wait_for_nothing_and_are_the_same_on_a_gpu(photos):
    gpu = torch.device("cuda", 0)
    plain, copied = (
        data.TrainLoader(photos, SMALL, 4, 0, 40, 1, 1, gpu, placement=GPU._replace(copy=copy))
        for copy in (False, True)
    )
    # Decoding by the engine or by the cores depends on the place in the batch alone.
    for _ in range(3):
        for x, y in zip(next(plain).views, next(copied).views):
            assert torch.equal(x, y) and y.is_contiguous(memory_format=torch.channels_last)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            # Its memory is torch's again at once, while work on the old values is still queued.
            (next(copied).views[0].float() * 2).sum()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
@pytest.mark.parametrize("name", PLACEMENTS)
def test_gpu_views_are_the_cpus(name, photos, few):
    gpu, placement = torch.device("cuda", 0), PLACEMENTS[name]
    crops = (
        Crop(size=96),
        Crop(size=64, solarize_p=0.5, interpolation="cubic"),
        Crop(size=48, jitter_p=0),
        Crop(size=48, **PLAIN),
    )
    for listing in (photos, few):  # PNG, which nvJPEG does not read, and JPEG
        there = data.TrainLoader(listing, crops, 4, 0, 5, 1, 1, gpu, placement=placement)
        for a, b in zip(make(listing, crops, batch=4, epochs=5), there):
            assert torch.equal(a.index, b.index)
            for crop, x, y in zip(crops, a.views, b.views):
                assert y.device == gpu and y.dtype == (
                    torch.float16 if placement.half else torch.float32
                )
                assert y.is_contiguous(memory_format=torch.channels_last)
                if placement.augment == "cpu":
                    # Float16's rounding of values up to 2.7.
                    assert abs(x - y.cpu().float()).max() < 2e-3
                for one, other in zip(x, y.cpu().float()):
                    assert abs(pixels(one, crop) - pixels(other, crop)).mean() < 3
        for a, b in zip(
            data.EvalLoader(listing, 72, 64, 3, 1, CPU),
            data.EvalLoader(listing, 72, 64, 3, 1, gpu, placement=placement),
        ):
            assert (
                abs(
                    pixels(a.views[0][0], Crop()) - pixels(b.views[0][0].cpu().float(), Crop())
                ).mean()
                < 1.5
            )


@pytest.mark.gpu
def test_halves_are_the_rounded_floats(photos):
    gpu = torch.device("cuda", 0)
    a, b = (
        data.TrainLoader(photos, SMALL, 4, 0, 3, 1, 1, gpu, placement=GPU._replace(half=half))
        for half in (False, True)
    )
    for x, y in zip(a, b):
        for u, v in zip(x.views, y.views):
            # One unit in the last place of values up to 2.7.
            assert abs(u.half().float() - v.float()).max() < 2e-3


@pytest.mark.gpu
def test_taking_batches_waits_for_nothing_and_copies_nothing(photos):
    gpu = torch.device("cuda", 0)
    train = data.TrainLoader(photos, SMALL, 4, 0, 40, 1, 1, gpu, placement=GPU)
    kept = [next(train) for _ in range(3)]
    before = [v.clone() for b in kept for v in b.views]
    train._pipes = [Spy(*train._pipes)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(20):
            batch = next(train)
            assert [v.data_ptr() for v in batch.views] == train._pipes[0].pointers
            (batch.views[0].float() * 2).sum()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # DALI reuses no memory that a tensor holds.
    assert all(torch.equal(a, b) for a, b in zip(before, (v for b in kept for v in b.views)))


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["truncated", "text", "empty", "gif", "header"])
def test_what_the_gpu_decoder_does_with_a_bad_file(kind, few, tmp_path, capfd):
    """Refused with its name, as on the CPU, or, where nvJPEG reads what libjpeg does not, decoded:
    never a crash."""
    root = tmp_path / "train"
    shutil.copytree(few.root, root)
    listing = data.listing(root)
    bad = listing.files[17]
    content = (root / bad).read_bytes()
    if kind == "gif":
        Image.new("RGB", (9, 9)).save(root / bad, "GIF")
    else:
        (root / bad).write_bytes(
            {
                "truncated": content[: len(content) // 2],
                "text": b"no image at all",
                "empty": b"",
                "header": content[:100],
            }[kind]
        )
    train = data.TrainLoader(listing, SMALL, 8, 0, 2, 1, 1, torch.device("cuda", 0), placement=GPU)
    if kind == "truncated":
        said = bad
        try:
            list(train)
        except UserError as e:
            said = str(e)
        # The decoder may as well have taken what is there of it.
        assert bad in said
    else:
        with pytest.raises(UserError) as e:
            list(train)
        one_sentence(e, f"unreadable image {bad}", f"--only {bad}`")
