"""Files that are intact and hold something else: checkpoints, and what lies beside them.  Each is
refused in one sentence, or continued from rightly."""

import copy
import json
import random
import types

import pytest
import torch
from conftest import TESTS
from torch import nn

from fastdisco import config, methods
from fastdisco.common.errors import UserError
from fastdisco.run import checkpoint, log
from fastdisco.run import folder as folders
from fastdisco.run.board import Board
from fastdisco.teacher import cache_files

SEEDS = 60
META = {"data": "x", "teacher": "none"}


class Training:
    """A small network with everything that a checkpoint holds, three steps old."""

    def __init__(self, steps=3):
        torch.manual_seed(1)
        net = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 2))
        optimizer = torch.optim.AdamW(net.parameters(), lr=0.1)
        block = config.Moco(queue=8)
        self.method = methods.create("moco", cfg=block, dim=2, seed=0, shuffle="off")
        self.ema = copy.deepcopy(net)
        self.loader = types.SimpleNamespace(state=steps)
        self.student = types.SimpleNamespace(
            module=net,
            basic_optimizer=optimizer,
            zero_optimization=lambda: False,
            zero_optimization_stage=lambda: 0,
            torch_autocast_z0_gradscaler=torch.amp.GradScaler("cpu"),
        )
        for _ in range(steps):
            net(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
        self.items = checkpoint.items(self.student, self.ema, self.method, self.loader)

    def state(self):
        found = {k: item.get() for k, item in self.items.items()}
        return config.flatten(copy.deepcopy(found))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    run = tmp_path_factory.mktemp("run")
    training = Training()
    training.student.torch_autocast_z0_gradscaler.scale(torch.ones(1))
    checkpoint.save(run, 3, training.items, META, 1)
    return run


@pytest.fixture(scope="module")
def saved(run):
    """{file: content}, as an older version's: nothing but the content can be compared."""
    folder = checkpoint.last(run)
    found = {name: torch.load(folder / name) for name in ("state.pt", "rank_0.pt")}
    del found["state.pt"]["world"]
    return found


def _places(x, path=()):
    """The paths of everything in nested dicts."""
    for key, value in x.items():
        yield (*path, key)
        if isinstance(value, dict):
            yield from _places(value, (*path, key))


STRANGE = [None, "x", b"x", -1, 2**70, 1.5, float("nan"), True, [], {}, {"x": 1}, [1, "x"], ()]


def _mutated(rng, x):
    """(the content with one thing lost, replaced, reshaped or of another type; what was done)"""
    x = copy.deepcopy(x)
    *path, key = rng.choice(list(_places(x)))
    holder = x
    for part in path:
        holder = holder[part]
    old = holder[key]
    tensor = isinstance(old, torch.Tensor)
    kinds = ["lost", "replaced", "renamed"] + ["shape", "dtype", "replaced"] * tensor
    if "parameters" in path[:-1]:
        # Other names might be those of an optimizer that treats this weight in another way.
        kinds.remove("renamed")
    kind = rng.choice(kinds)
    if kind == "lost":
        del holder[key]
    elif kind == "renamed":
        holder[f"{key}x"] = holder.pop(key)
    elif kind == "shape":
        holder[key] = rng.choice([old[None], old.flatten()[:1].clone(), old.new_zeros(3, 5)])
    elif kind == "dtype":
        holder[key] = old.to(rng.choice([torch.int32, torch.complex64, torch.bool, torch.float16]))
    else:
        holder[key] = rng.choice([*STRANGE, torch.ones(2, 2), torch.ones(4).to_sparse()])
    return x, f"{kind} {'/'.join(map(str, (*path, key)))}"


def _write(run, content):
    folder = run / "checkpoints/step_00000003"
    folder.mkdir(parents=True)
    for name, x in content.items():
        torch.save(x, folder / name)
    (run / "checkpoints/last").write_text(folder.name)
    return folder


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_checkpoint_of_other_content_is_refused_or_restored(seed, saved, tmp_path):
    rng = random.Random(seed)
    name = rng.choice(["state.pt", "state.pt", "rank_0.pt"])
    content, done = _mutated(rng, saved[name])
    _write(tmp_path, saved | {name: content})
    training, error = Training(steps=0), ""
    try:
        assert checkpoint.restore(tmp_path, training.items, META) == 3
    except UserError as e:
        error = str(e)
    if error:
        assert "\n" not in error and len(error) < 1500, done
        assert name in error or "step_00000003" in error, (done, error)
        return
    # Restored: then it trains, and has what the file says.
    net, optimizer = training.student.module, training.student.basic_optimizer
    for x in (net(torch.randn(8, 4)), training.ema(torch.randn(8, 4))):
        assert x.shape == (8, 2), done
    net(torch.randn(8, 4)).square().mean().backward()
    optimizer.step()
    _write(tmp_path / "again", saved)
    whole = Training(steps=0)
    checkpoint.restore(tmp_path / "again", whole.items, META)
    kinds = [
        {k: (v.dtype, v.shape) if torch.is_tensor(v) else type(v) for k, v in t.state().items()}
        for t in (training, whole)
    ]
    tolerated = ("optimizer", "rank", "world", "scaler")
    differ = [k for k in kinds[0].keys() | kinds[1].keys() if kinds[0].get(k) != kinds[1].get(k)]
    assert not [k for k in differ if not k.startswith(tolerated)], done


def test_what_was_saved_is_restored(run):
    training = Training(0)
    assert checkpoint.restore(run, training.items, META) == 3
    for key, value in Training().state().items():
        found = training.state()[key]
        if not key.startswith(("rng", "scaler")):
            same = torch.equal(found, value) if torch.is_tensor(value) else found == value
            assert same, key


TYPES = {
    "None": None,
    "number": 5,
    "text": "x",
    "list": [],
    "other": {"x": 1},
    "tensor": torch.ones(2),
}
ITEMS = ["student", "ema", "step", "meta", "optimizer", "method", "data"]
CASES = [(item, name) for item in ITEMS for name in TYPES if (item, name) != ("data", "number")]


@pytest.mark.parametrize("what, kind", CASES)
def test_an_item_of_another_type_is_refused(what, kind, saved, tmp_path):
    state = saved["state.pt"] | {what: TYPES[kind]}
    _write(tmp_path, saved | {"state.pt": state})
    with pytest.raises(UserError, match=f"state.pt: {what} is not what") as e:
        checkpoint.restore(tmp_path, Training(0).items, META)
    assert "\n" not in str(e.value)


# ---- beside it


TEXTS = [
    b"",
    b"\xff\xfe",
    b"[1]",
    b"null",
    b"{",
    b'{"x": 1}',
    b"[" * 50_000,
    b"5" * 5000,
    b"- a\n- b",
]


@pytest.mark.parametrize("content", TEXTS, ids=lambda x: repr(x[:8]))
def test_a_configuration_of_another_kind_is_refused(content, tmp_path):
    cfg = config.load(TESTS / "tiny.yaml", ["data.train=/data", f"run.out={tmp_path}"])
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny/config.yaml").write_bytes(content)
    with pytest.raises(UserError) as e:
        folders.claim(cfg)
    assert "config.yaml" in str(e.value)


@pytest.mark.parametrize("content", TEXTS, ids=lambda x: repr(x[:8]))
def test_a_header_of_a_teachers_cache_of_another_kind_is_refused(content, tmp_path):
    (tmp_path / "cache.json").write_bytes(content)
    with pytest.raises(UserError, match="cache.json: cannot be read") as e:
        cache_files.header(tmp_path)
    assert "\n" not in str(e.value)


@pytest.mark.parametrize(
    "line",
    [*(x.decode("latin1") for x in TEXTS[1:]), '{"step": "1"}', '{"step": 1, "eval/knn_top1": []}'],
    ids=lambda x: repr(x[:8]),
)
def test_a_line_of_the_log_that_is_no_entry_is_dropped(line, tmp_path):
    rows = [{"step": i, "train/loss": 1.0} for i in (1, 2)]
    good = [json.dumps(row) for row in rows]
    # The last one lacks its end.
    (tmp_path / "metrics.jsonl").write_text("\n".join([good[0], line, good[1]]))
    with log.Log(tmp_path, 2, 4, [Board(tmp_path / "tb", 2)]) as writes:
        writes.loggers[0].write(3, {"x": 1.0})
    assert (tmp_path / "metrics.jsonl").read_text() == "".join(f"{x}\n" for x in good)
