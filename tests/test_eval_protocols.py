"""The published protocols, written out: the learning rate of every epoch and what else they say."""

import math

import pytest

from fastdisco.common.errors import UserError
from fastdisco.evals import protocols
from fastdisco.evals.protocols import PRESETS, Protocol, preset, rate

MEAN, STD, SWAV_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (0.228, 0.224, 0.225)


def cosine(lr, epochs):
    return [lr * (1 + math.cos(math.pi * e / epochs)) / 2 for e in range(epochs)]


# What the official scripts set in each epoch, from the first to the last.
RATES = {
    "disco": [3.0] * 5
    + [1.5] * 5
    + [0.75] * 5
    + [0.375] * 5
    + [0.1875] * 5
    + [0.09375] * 5
    + [0.046875] * 5
    + [0.0234375] * 5
    + [0.01171875] * 5
    + [0.005859375] * 15
    + [0.0029296875] * 20
    + [0.00146484375] * 20,
    "moco": [30.0] * 60 + [3.0] * 20 + [0.3] * 20,
    "swav": cosine(0.3, 100),
    "dino": cosine(0.004, 100),
    "seed": [30.0] * 60 + [3.0] * 20 + [0.3] * 20,
    "semi": [3.0] * 60 + [1.5] * 20 + [0.75] * 20,
    "finetune-1": [5.0] * 12 + [1.0] * 4 + [0.2] * 4,
    "finetune-10": [0.2] * 12 + [0.04] * 4 + [0.008] * 4,
    "cifar": [3.0] * 200,
}
TRUNK = {
    "finetune-1": [0.02] * 12 + [0.004] * 4 + [0.0008] * 4,
    "finetune-10": [0.01] * 12 + [0.002] * 4 + [0.0004] * 4,
}


@pytest.mark.parametrize("name", PRESETS)
def test_the_learning_rate_of_every_epoch(name):
    p = preset(name)
    assert [rate(p, e) for e in range(p.epochs)] == pytest.approx(RATES[name])
    if name in TRUNK:
        got = [protocols.trunk_rate(p, e) for e in range(p.epochs)]
        assert got == pytest.approx(TRUNK[name])
    else:
        assert p.trunk_lr is None


def test_disco_ends_with_lr_over_2048():
    assert rate(preset("disco"), 99) == 3.0 / 2048


def test_seed_warms_up_to_lr_x_batch_over_256():
    p = preset("seed").model_copy(update={"batch": 1024})
    got = [rate(p, e) for e in (0, 1, 2, 3, 4, 5, 59, 60, 80)]
    assert got == pytest.approx([30, 48, 66, 84, 102, 120, 120, 12, 1.2])


def test_another_lr_keeps_the_schedule():
    p = preset("disco")
    assert [rate(p, e, 0.8) / rate(p, e) for e in (0, 7, 99)] == pytest.approx([0.8 / 3] * 3)


# batch, weight decay, std, interpolation of training and val, short side before the centre crop
@pytest.mark.parametrize(
    "name, batch, decay, std, train, val, resize",
    [
        ("disco", 256, 0, STD, "linear", "linear", 256),
        ("moco", 256, 0, STD, "linear", "linear", 256),
        ("swav", 256, 1e-6, SWAV_STD, "linear", "linear", 256),
        ("dino", 1024, 0, STD, "linear", "cubic", 256),
        ("seed", 256, 0, STD, "linear", "linear", 256),
        ("semi", 256, 0, STD, "linear", "linear", 256),
        ("finetune-1", 256, 0, SWAV_STD, "linear", "linear", 256),
        ("finetune-10", 256, 0, SWAV_STD, "linear", "linear", 256),
        ("cifar", 256, 0, STD, "cubic", "cubic", 224),
    ],
)
def test_what_else_the_scripts_say(name, batch, decay, std, train, val, resize):
    p = preset(name)
    assert (p.batch, p.weight_decay, p.std, p.mean) == (batch, decay, std, MEAN)
    assert (p.train_interpolation, p.val_interpolation, p.resize) == (train, val, resize)
    assert (p.size, p.scale, p.momentum) == (224, (0.08, 1.0), 0.9)
    crop = protocols.crop(p)
    assert (crop.size, crop.scale, crop.flip_p, crop.std) == (224, (0.08, 1.0), 0.5, std)
    assert crop.interpolation == train
    assert crop.ratio == (3 / 4, 4 / 3)
    assert not (crop.jitter_p or crop.gray_p or crop.blur_p or crop.solarize_p)


def test_refusals():
    with pytest.raises(UserError, match="'disko'; did you mean disco"):
        preset("disko")
    with pytest.raises(ValueError, match="224 does not fit into a short side of 200"):
        Protocol(resize=200)
    with pytest.raises(ValueError, match="set lr_scale=linear"):
        Protocol(warmup_epochs=5)
