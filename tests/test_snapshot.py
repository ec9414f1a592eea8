"""A snapshot of the state: torch.save writes the same bytes of it, whatever the training does to the
state meanwhile."""

import copy
import io

import pytest
import torch
from torch import nn

from fastdisco.run import snapshot
from fastdisco.run.snapshot import Snapshots


def written(state):
    f = io.BytesIO()
    torch.save(state, f)
    return f.getvalue()


def state():
    """What torch.save writes in ways of its own."""
    g = torch.Generator().manual_seed(0)
    flat = torch.randn(40, generator=g)
    image = torch.randn(2, 3, 4, 4, generator=g).to(memory_format=torch.channels_last)
    net = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    marked = torch.ones(2)
    marked.mark = "an attribute"
    again = {"of": image}
    return {
        "slices of one storage": [flat[:10], flat[10:].view(5, 6), flat],
        "channels_last": image,
        # Twice the same object, and equal ones.
        "twice": (again, again, copy.deepcopy(again)),
        # With the versions of its modules as an attribute.
        "net": net.state_dict(),
        "expanded": torch.ones(1).expand(5),
        "empty": torch.empty(0),
        "scalar": torch.tensor(3),
        "bf16": image.bfloat16(),
        "marked": marked,
        "weight": nn.Parameter(torch.zeros(3)),
        "plain": {"step": 3, "none": None, "text": "x", "betas": (0.9, 0.999), "on": True},
    }


def change(value):
    if torch.is_tensor(value):
        with torch.no_grad():
            value.zero_()
    for x in value.values() if isinstance(value, dict) else ():
        change(x)
    for x in value if isinstance(value, list | tuple) else ():
        change(x)


def test_its_bytes_are_those_of_the_state():
    found = state()
    before, taken = written(found), Snapshots().take(found)
    change(found)
    assert written(found) != before
    assert written(taken) == before


def test_the_buffers_are_used_again():
    snapshots, found = Snapshots(), state()
    first = snapshots.take(found)
    addresses = [x.data_ptr() for x in snapshot._tensors(first)]
    second = snapshots.take(found)
    assert [x.data_ptr() for x in snapshot._tensors(second)] == addresses
    # A state of other sizes, and fewer.
    other = {"a": torch.arange(7), "b": torch.ones(40)}
    assert written(snapshots.take(other)) == written(other)
    assert len(snapshots._buffers) == 2


def test_a_gpus_tensors_keep_its_name(monkeypatch):
    seen = []
    where = lambda storage, location: seen.append(location) or storage
    monkeypatch.setattr(torch.serialization, "location_tag", lambda storage: "cuda:1")
    taken = Snapshots().take({"x": torch.ones(3)})
    monkeypatch.undo()
    assert torch.load(io.BytesIO(written(taken)), map_location=where)["x"].tolist() == [1.0] * 3
    torch.load(io.BytesIO(written({"x": torch.ones(3)})), map_location=where)
    assert seen == ["cuda:1", "cpu"]


def test_too_little_memory_is_told_apart_from_other_errors():
    with pytest.raises(MemoryError, match="allocate"):
        snapshot._buffer(1 << 60, pinned=False)


@pytest.mark.gpu
def test_a_snapshot_of_a_gpus_state():
    found = {"x": torch.randn(1000, 1000, device="cuda"), "on": torch.ones(3)}
    before, snapshots = written(found), Snapshots()
    for _ in range(2):
        taken = snapshots.take(found)
    found["x"].zero_()
    assert taken["x"].is_pinned() and not taken["on"].is_pinned()
    assert written(taken) == before
