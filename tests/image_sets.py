"""Loaders of small images, what comes out of them, and the placements and graphs of a GPU: what the
tests of fastdisco/data share."""

import numpy as np
import pytest
import torch

from fastdisco import data
from fastdisco.config import Crop, UserError
from fastdisco.data import graph, pipelines, shards
from fastdisco.data.placement import Placement

CPU = torch.device("cpu")
PLAIN = dict(flip_p=0, jitter_p=0, gray_p=0, blur_p=0, solarize_p=0)
SMALL = (Crop(size=24), Crop(size=16))


def make(
    listing, crops=SMALL, batch=8, seed=0, epochs=3, accumulate=1, threads=1, device=CPU, start=0
):
    return data.TrainLoader(listing, crops, batch, seed, epochs, accumulate, threads, device, start)


def stream(loader, steps=None):
    """{(epoch, index): bytes of its views} and the order as [(epoch, index)]."""
    seen, order = {}, []
    for batch in loader:
        epoch = (loader.position - 1) // (loader._per_epoch)
        for i, index in enumerate(batch.index.tolist()):
            order.append((epoch, index))
            seen[order[-1]] = b"".join(v[i].cpu().numpy().tobytes() for v in batch.views)
    assert len(seen) == len(order), "an image came twice in an epoch"
    return seen, order


def pixels(view, crop):
    """[3,S,S] of the network -> [S,S,3] of 0..255."""
    x = view.permute(1, 2, 0).double() * torch.tensor(crop.std) + torch.tensor(crop.mean)
    return (x * 255).numpy()


def one_sentence(error, *parts):
    text = str(error.value)
    assert "\n" not in text and all(p in text for p in parts), text


GPU = Placement("gpu", "gpu", "gpu", True, 0.65, 2)
PLACEMENTS = {
    "gpu": GPU,
    "cpu decode": GPU._replace(decode="cpu"),
    "cpu": GPU._replace(decode="cpu", augment="cpu"),
    "fp32": GPU._replace(half=False),
    "no engine": GPU._replace(hw_load=0.0),
}
RICH = dict(flip_p=1, jitter_p=1, gray_p=1, blur_p=1, solarize_p=1, interpolation="cubic")
MULTI = (
    Crop(),
    Crop(size=96, solarize_p=0.2, blur_p=0.1, scale=(0.05, 0.4)),
    Crop(size=96, **PLAIN),
    Crop(size=96, **RICH),
    Crop(jitter_p=0),
)


def serialised(listing, folder, placement, crops=MULTI, resize=256, size=224):
    """Operators (name, device) of the graphs of training, evaluation and the check; each is
    registered for its device and the graphs serialise."""
    from nvidia.dali import backend

    reader = pipelines.reader(listing, np.arange(40), folder)
    pipe = dict(batch_size=4, num_threads=1, device_id=None)
    known = dict(
        cpu=set(backend.RegisteredCPUOps()),
        gpu=set(backend.RegisteredGPUOps()),
        mixed=set(backend.RegisteredMixedOps()),
    )
    used = []
    for p in (
        graph.train(crops, reader, lambda i: [], placement, **pipe),
        graph.evaluate(resize, size, Crop().mean, Crop().std, reader, placement, **pipe),
        graph.decode(lambda: [], placement, **pipe),
    ):
        assert p.serialize()
        used += [
            (getattr(o._op, "schema_name", type(o._op).__name__), o._op.device) for o in p._ops
        ]
    assert [u for u in used if u[0] not in known[u[1]]] == []
    return set(used)


def refuse(function, *args, parts=(), **kw):
    with pytest.raises(UserError) as e:
        function(*args, **kw)
    one_sentence(e, *map(str, parts))


def places(sizes, bytes_=1024):
    tar = np.repeat(np.arange(len(sizes)), sizes)
    offset = np.concatenate([np.arange(n) * bytes_ for n in sizes])
    mixed = np.random.default_rng(0).permutation(len(tar))  # the listing's order is not the tars'
    return shards.Places(
        [f"{k}.tar" for k in range(len(sizes))], tar[mixed], offset[mixed], np.full(len(tar), 512)
    )


class Spy:
    """A pipeline that notes where its last views lie."""

    def __init__(self, pipe):
        self.pipe = pipe

    def run(self, stream):
        out = self.pipe.run(stream)
        self.pointers = [v.as_tensor().data_ptr() for v in out]
        return out
