"""A run goes on with another number of ranks and at another ZeRO stage: the same losses, each image once
an epoch, the same state; and where it is another computation, that is said."""

import json
import shutil
from collections import Counter

import pytest
import torch
from conftest import ROOT, ranks, tiny
from image_sets import CPU
from training import _told, _train, losses, metrics, train_a_teacher

from fastdisco import config, data, models
from fastdisco.commands import train
from fastdisco.common import dist
from fastdisco.common.errors import UserError
from fastdisco.config import Division
from fastdisco.data.orders import images_of_step
from fastdisco.run import checkpoint, following, launching

# Steps, of three an epoch: the checkpoint lies within the second epoch.
HALF, STEPS, BATCH = 4, 7, 12
# Nothing in this network depends on other images of a batch.  Its numbers of weights divide by
# neither 2 nor 3 nor 4, so that ZeRO's parts are cut and padded.
FREE = (
    f"data.batch={BATCH}",
    f"run.max_steps={STEPS}",
    f"checkpoint.every={HALF}",
    "student={arch: test_convnext, hidden: 7, dim: 5}",
    "method.queue=60",
    "bn={groups: 1, shuffle: off}",
    "optim={name: adamw, lr: 0.002, decay_norm_and_bias: false}",
)


def followed(args):
    """Trains; returns which images this rank saw, by step; what of the restored state is not what the
    checkpoint holds; what was said; and the seed of the random numbers."""
    seen, unequal, seed = {}, [], []
    usual, restore = data.TrainLoader.__next__, checkpoint.restore

    def record(self):
        step = self.position // (self._per_epoch // self.steps_per_epoch)
        batch = usual(self)
        seen.setdefault(step, []).extend(batch.index.tolist())
        return batch

    def compare(run, items, meta):
        start = restore(run, items, meta)
        if start:
            there = models.read(run / "checkpoints" / f"step_{start:08}" / "state.pt")
            unequal.extend(_unequal(items, there))
        seed.append(torch.initial_seed())
        return start

    data.TrainLoader.__next__, checkpoint.restore = record, compare
    said = _told(args)
    return seen, unequal, said, seed[0]


def _unequal(items, there):
    """Names of what was set and is not what the checkpoint holds, once all ranks have put it together
    again."""
    names = [name for name, item in items.items() if not item.own and name != "data"]
    a = config.flatten({name: items[name].get() for name in names})
    b = config.flatten({name: there[name] for name in names})
    assert a.keys() == b.keys()
    same = lambda x, y: torch.equal(x, y) if torch.is_tensor(x) else x == y
    return [k for k in a if not same(a[k], b[k])]


def _images(results):
    """By step, how often each image was seen on all ranks."""
    found = {}
    for seen, *_ in results:
        for step, images in seen.items():
            found.setdefault(step, Counter()).update(images)
    return found


def _from_half(whole, to):
    """A copy of the run that has its checkpoint of step HALF alone."""
    shutil.copytree(whole, to)
    steps = to / "tiny/checkpoints"
    (steps / "last").write_text(f"step_{HALF:08}")
    shutil.rmtree(steps / f"step_{STEPS:08}")


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """STEPS steps on 2 ranks at ZeRO stage 1, never interrupted, with a checkpoint in the middle; and
    what its ranks returned."""
    out = tmp_path_factory.mktemp("whole")
    return out, ranks(2, followed, tiny(folder, out, *FREE, "engine.stage=1"))


# ---- from one checkpoint to each number of ranks


@pytest.mark.parametrize(
    "world, stage, shape", [(1, 0, "6 images x 2"), (3, 2, "4 images x 1"), (4, 3, "3 images x 1")]
)
def test_losses_images_and_state_are_those_of_the_run_that_was_not_interrupted(
    world, stage, shape, whole, folder, tmp_path
):
    out, before = whole
    _from_half(out, tmp_path / "rest")
    args = tiny(folder, tmp_path / "rest", *FREE, f"engine.stage={stage}")
    results = ranks(world, followed, args)
    # Rounding alone: the gradients are summed in another order.
    assert losses(tmp_path / "rest/tiny") == pytest.approx(losses(out / "tiny"), rel=2e-5)
    assert [unequal for _, unequal, _, _ in results] == [[]] * world
    here, there = metrics(tmp_path / "rest/tiny"), metrics(out / "tiny")
    for name in ("step", "train/lr", "train/epoch"):
        assert [m.get(name) for m in here] == [m.get(name) for m in there]
    said = results[0][2]
    assert f"batch 12 = {world} ranks x {shape} accumulated" in said
    assert "the same computation, whose losses differ by rounding alone" in said
    # Each step has the images of the same step, each once.
    listing = data.listing(folder / "train")
    seen, rest = _images(before), _images(results)
    assert sorted(seen) == list(range(STEPS)) and sorted(rest) == list(range(HALF, STEPS))
    for step, images in rest.items():
        assert images == seen[step] == Counter(images_of_step(listing, 0, BATCH, step).tolist())
    # Each rank draws numbers of its own, and not those of the start.
    seeds = [seed for *_, seed in results]
    assert seeds == [dist.mix(dist.mix(0, rank), HALF) for rank in range(world)]
    # Back to 2 ranks and stage 1: what other numbers of ranks have saved is put together again.
    back = tiny(folder, tmp_path / "rest", *FREE, "engine.stage=1")
    (_, unequal, said, _), _ = ranks(2, followed, back)
    assert unequal == [] and "batch 12 = 2 ranks x 6 images x 1 accumulated" in said
    assert "the run began with" not in said


def test_the_same_number_of_ranks_goes_on_to_the_last_bit(whole, folder, tmp_path):
    """At another stage, too: what ranks 0 and 1 saved for themselves is theirs again."""
    out, _ = whole
    _from_half(out, tmp_path / "rest")
    results = ranks(2, followed, tiny(folder, tmp_path / "rest", *FREE, "engine.stage=1"))
    assert losses(tmp_path / "rest/tiny") == losses(out / "tiny")
    assert all(unequal == [] and "began with" not in said for _, unequal, said, _ in results)


def test_three_numbers_of_ranks_in_a_row(whole, folder, tmp_path):
    """2, then 1 for a step, then 4 for a step, then 2: the micro batches are counted anew each time."""
    out, _ = whole
    _from_half(out, tmp_path / "rest")
    seen = {}
    for world, steps in ((1, HALF + 1), (4, HALF + 2), (2, STEPS)):
        args = tiny(folder, tmp_path / "rest", *FREE, f"run.max_steps={steps}")
        seen |= _images(ranks(world, followed, args))
    assert losses(tmp_path / "rest/tiny") == pytest.approx(losses(out / "tiny"), rel=2e-5)
    # The second epoch: its first step on 2 ranks, one on 1, one on 4.
    epoch = sum((_images(whole[1])[HALF - 1], seen[HALF], seen[HALF + 1]), Counter())
    assert len(epoch) == 3 * BATCH and set(epoch.values()) == {1}


# ---- batch norms: groups of 3 images on 2 ranks x 6

NORMS = (
    *(x for x in FREE if not x.startswith(("student", "bn", "optim"))),
    "student.kwargs={}",
    "data.val=null",
    "eval.every=0",
)
GROUPS = "bn={groups: 2, shuffle: off}"


@pytest.fixture(scope="module")
def with_norms(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("norms")
    ranks(2, _train, tiny(folder, out, *NORMS, GROUPS))
    return out


@pytest.mark.parametrize("world, groups", [(1, 2), (4, 1)])
def test_groups_of_batch_norms_stay_as_large(world, groups, with_norms, folder, tmp_path):
    """With 1 rank and 4 the images divide by the groups' 3: the losses stay."""
    _from_half(with_norms, tmp_path / "rest")
    args = tiny(folder, tmp_path / "rest", *NORMS, GROUPS)
    said = ranks(world, _told, args)[0]
    assert "the same computation" in said
    assert losses(tmp_path / "rest/tiny") == pytest.approx(losses(with_norms / "tiny"), rel=1e-3)


def test_another_computation_is_said(with_norms, folder, tmp_path):
    """3 ranks have 4 images each, which groups of 3 do not divide."""
    _from_half(with_norms, tmp_path / "rest")
    said = ranks(3, _told, tiny(folder, tmp_path / "rest", *NORMS, GROUPS))[0]
    assert (
        "the run began with 2 ranks x 6 images x 1 accumulated and goes on with 3 ranks x 4 images "
        "x 1 accumulated, which is another computation: batch norms take 2 images together instead "
        "of 3\n"
    ) in said
    here, there = losses(tmp_path / "rest/tiny"), losses(with_norms / "tiny")
    assert sorted(here) == sorted(there)
    assert here[HALF + 1] != pytest.approx(there[HALF + 1], rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("world, more", [(4, []), (1, ["data.accumulate_follows=false"])])
def test_synchronised_batch_norms(world, more, folder, tmp_path):
    args = tiny(folder, tmp_path / "whole", *NORMS, "bn={groups: 1, sync: true, shuffle: off}")
    ranks(2, _train, args)
    _from_half(tmp_path / "whole", tmp_path / "rest")
    (rest := list(args))[rest.index(f"run.out={tmp_path}/whole")] = f"run.out={tmp_path}/rest"
    assert "the same computation" in ranks(world, _told, [*rest, *more])[0]
    here, there = losses(tmp_path / "rest/tiny"), losses(tmp_path / "whole/tiny")
    assert here == pytest.approx(there, rel=1e-3)


# ---- every method


METHODS = {
    "moco": ["method={name: moco, queue: 60, distill: 4.0}"],
    "seed": ["method={name: seed, queue: 60, contrast: 1.0}", "views=[{count: 2}]"],
    "dino": [
        "method={name: dino, prototypes: 30, temp_warmup_epochs: 3}",
        "views=[{count: 2, size: 32}, {size: 32, scale: [0.1, 0.3]}]",
    ],
    # Codes are balanced over a micro batch.
    "swav": [
        "method={name: swav, prototypes: 20, freeze_steps: 0, queue: 24, queue_epoch: 0}",
        "views=[{count: 2, size: 32}, {size: 32, scale: [0.1, 0.3]}]",
        "data.accumulate_follows=false",
    ],
}


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 3, 4])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_goes_on_as_it_was(name, world, folder, tmp_path):
    """With a teacher: queues that have wrapped, the centre, the codes' queue."""
    train_a_teacher(folder, tmp_path, steps=1)
    more = [
        *METHODS[name],
        "student={arch: test_convnext, head: mlp, head_bn: false, hidden: 7, dim: 8}",
        f"data.batch={BATCH}",
        f"run.max_steps={STEPS}",
        f"checkpoint.every={HALF}",
        "bn={groups: 1, shuffle: off, sync: false}",
        "optim={name: adamw, lr: 0.002, warmup_epochs: 0, clip_each: false}",
        f"teacher.file={tmp_path}/teacher",
        "teacher.arch=test_resnet",
    ]
    ranks(2, _train, tiny(folder, tmp_path / "whole", *more))
    _from_half(tmp_path / "whole", tmp_path / "rest")
    results = ranks(world, followed, tiny(folder, tmp_path / "rest", *more))
    assert [unequal for _, unequal, _, _ in results] == [[]] * world
    here, there = losses(tmp_path / "rest/tiny"), losses(tmp_path / "whole/tiny")
    assert here == pytest.approx(there, rel=1e-4)
    assert "the same computation" in results[0][2]


# ---- the division


def configured(*overrides, batch=BATCH):
    other = any(x.startswith("method=") for x in overrides)
    queue = [] if other else [f"method.queue={20 * batch}"]
    given = ["data.train=/x", f"data.batch={batch}", *queue, *overrides]
    return config.load(ROOT / "tests/tiny.yaml", given)


@pytest.mark.parametrize(
    "batch, began, world, wanted",
    [
        # As many images in a forward as before, in more micro batches.
        (12, (2, 6, 1, 6), 1, (1, 6, 2, 6)),
        (256, (8, 32, 1, 32), 4, (4, 32, 2, 32)),
        (256, (8, 32, 1, 32), 1, (1, 32, 8, 32)),
        # More ranks than that: fewer images.
        (12, (2, 6, 1, 6), 3, (3, 4, 1, 4)),
        (256, (8, 32, 1, 32), 16, (16, 16, 1, 16)),
        # And fewer micro batches.
        (256, (2, 32, 4, 32), 8, (8, 32, 1, 32)),
        # Batch norms over as many images.
        (256, (4, 64, 1, 32), 8, (8, 32, 1, 32)),
        (36, (2, 18, 1, 6), 3, (3, 12, 1, 6)),
        # 9 images would fit, but 6 take the same groups.
        (36, (3, 12, 1, 6), 2, (2, 6, 3, 6)),
        # No such groups: a little fewer.
        (24, (2, 12, 1, 6), 3, (3, 8, 1, 4)),
        (10, (1, 5, 2, 5), 2, (2, 5, 1, 5)),
        # 7 images cannot be divided: more in a forward than before.
        (42, (7, 6, 1, 6), 6, (6, 7, 1, 7)),
    ],
)
def test_how_a_batch_is_divided_anew(batch, began, world, wanted):
    cfg = configured("bn.groups=1", f"data.accumulate={began[2]}", batch=batch)
    cfg = cfg.model_copy(update={"bn": cfg.bn.model_copy(update={"groups": began[1] // began[3]})})
    began = Division(*began)
    found = following.followed(cfg, world, began)
    assert found.now == Division(*wanted) == config.division(found.cfg, world)
    assert found.cfg.data.batch == batch and found.began == began
    # Whatever came between, the way back leads to the same.
    back = following.followed(cfg, began.ranks, Division(*json.loads(found.meta[following.NAME])))
    assert back.now == began and back.cfg == cfg


def test_accumulation_that_stays():
    cfg = configured("bn.groups=1", "data.accumulate_follows=false")
    began = Division(2, 6, 1, 6)
    # Groups of batch norms stay as large.
    assert following.followed(cfg, 1, began).now == Division(1, 12, 1, 6)
    with pytest.raises(UserError, match=r"12 does not divide by 5 ranks.*start 3, 4 or 6|1, 2, 3"):
        following.followed(cfg, 5, began)


def test_an_accumulation_that_is_asked_for_counts_from_then_on():
    """On smaller GPUs, for example."""
    began = Division(2, 6, 1, 6)
    asked = following.followed(configured("bn.groups=1", "data.accumulate=3"), 2, began)
    assert asked.now == Division(2, 2, 3, 2) and asked.cfg.data.accumulate == 3
    kept = Division(*json.loads(asked.meta[following.NAME]))
    assert kept == Division(2, 2, 3, 6)
    one = following.followed(configured("bn.groups=1", "data.accumulate=3"), 1, kept)
    assert one.now == Division(1, 2, 6, 2)
    # Taken back: with the groups that bn.groups has asked for from the start.
    assert following.followed(configured("bn.groups=1"), 2, kept).now == began


@pytest.mark.parametrize(
    "batch, world, says",
    [(8, 3, "1, 2 or 4 ranks"), (12, 5, "1, 2, 3, 4 or 6 ranks"), (2, 3, "1 rank")],
)
def test_what_cannot_be_divided_is_refused_with_what_can(batch, world, says):
    began = Division(1, batch, 1, batch)
    with pytest.raises(
        UserError, match=rf"data.batch: the run's {batch} images .* by {world} ranks"
    ) as e:
        following.followed(configured("bn.groups=1", batch=batch), world, began)
    assert str(e.value).endswith(f"go on with {says}")
    with pytest.raises(UserError, match=f"start {says}$"):
        config.micro_batch(configured("bn.groups=1", batch=batch), world)


@pytest.mark.parametrize("method", ["", "method={name: seed, queue: 60, contrast: 1.0}"])
@pytest.mark.parametrize(
    "overrides, began, now, says",
    [
        ([], (2, 6, 1, 6), (1, 6, 2, 6), "keys are not permuted (bn.shuffle)"),
        ([], (2, 6, 1, 3), (1, 6, 2, 3), "keys are permuted within 6 images instead of 12"),
        (["bn.shuffle=off"], (2, 6, 1, 6), (1, 6, 2, 6), ""),
        ([], (2, 6, 1, 3), (4, 3, 1, 3), ""),
        ([], (2, 6, 1, 6), (4, 3, 1, 3), "batch norms take 3 images together instead of 6"),
        (
            ["bn={groups: 1, sync: true}"],
            (2, 6, 1, 6),
            (1, 6, 2, 6),
            "batch norms take statistics over 6 images instead of 12 (bn.sync)",
        ),
        (["bn={groups: 1, sync: true}"], (2, 6, 1, 6), (3, 4, 1, 4), ""),
    ],
)
def test_what_becomes_another_computation(method, overrides, began, now, says):
    other = [method, "teacher={file: /x}", "views=[{count: 2}]"] if method else []
    other += ["optim.warmup_epochs=0"]
    cfg = configured(*other, "bn.groups=1", *overrides)
    assert "; ".join(_clauses(cfg, began, now, norms=True)) == says
    assert list(_clauses(cfg, began, now, norms=False)) == []


def _clauses(cfg, began, now, norms):
    return following._differences(cfg, Division(*began), Division(*now), norms)


@pytest.mark.parametrize(
    "overrides, says",
    [
        (
            ["method={name: swav, queue: 24}", "views=[{count: 2, size: 32}]"],
            "codes are balanced over 6 images instead of 12",
        ),
        (["method.rkd={angle: 2.0}"], "relations (method.rkd) are among 3 images instead of 6"),
        (
            ["teacher={file: /x, bn: batch, bn_group: 6}"],
            "the teacher's batch norms take 3 images together instead of 6",
        ),
    ],
)
def test_what_else_looks_at_several_images(overrides, says):
    cfg = configured("bn.groups=1", *overrides)
    assert list(_clauses(cfg, (2, 6, 1, 6), (2, 3, 2, 3), norms=False)) == [says]


def test_the_way_out_is_said():
    cfg = configured("bn.groups=1")
    found = following.followed(cfg, 1, Division(2, 6, 1, 6))
    net = models.of(cfg, train=True)
    first, second = following.told(found, [net])
    assert "keys are not permuted (bn.shuffle); dropout and stochastic depth draw" in first
    assert second.startswith("data.accumulate_follows=false keeps the computation")
    assert second.endswith("forwards of 12 images")
    # Where it was asked for, nothing leads back.
    found = following.followed(
        configured("bn.groups=1", "data.accumulate=2"), 2, Division(2, 6, 1, 6)
    )
    assert len(list(following.told(found, [net]))) == 1


# ---- what the checkpoints tell


def test_an_older_checkpoint_tells_its_ranks(tmp_path):
    step = tmp_path / "checkpoints/step_00000004"
    step.mkdir(parents=True)
    (step.parent / "last").write_text(step.name)
    cfg = configured("bn.groups=1", "data.accumulate=2")
    torch.save({"step": 4, "meta": {}, "world": 2}, step / "state.pt")
    assert following.began(cfg, tmp_path) == Division(2, 3, 2, 3)
    torch.save({"step": 4, "meta": {"division": "[3, 2, 2, 2]"}, "world": 2}, step / "state.pt")
    assert following.began(cfg, tmp_path) == Division(3, 2, 2, 2)
    # One that cannot be read is passed over.
    newer = tmp_path / "checkpoints/step_00000005"
    newer.mkdir()
    (newer / "state.pt").write_bytes(b"no zip")
    (step.parent / "last").write_text(newer.name)
    assert following.began(cfg, tmp_path) == Division(3, 2, 2, 2)
    assert following.began(cfg, tmp_path / "none") is None


def test_a_dry_run_says_how_it_goes_on(whole, folder, monkeypatch, capsys):
    out, _ = whole
    args = [str(x) for x in tiny(folder, out, *FREE, "--dry-run")]
    assert train.main(args) == 0
    said = capsys.readouterr().out
    assert "batch       12 = 1 ranks x 6 images x 2 accumulated" in said
    assert "remark      the run began with 2 ranks x 6 images x 1 accumulated" in said
    monkeypatch.setenv("WORLD_SIZE", "5")
    assert train.main(args) == 2
    assert "go on with 1, 2, 3, 4 or 6 ranks" in capsys.readouterr().err


def test_a_supervisor_takes_what_the_batch_allows():
    """3 accumulated micro batches of 2 ranks: 4 ranks can go on, though they could not begin."""
    cfg = configured("bn.groups=1", "data.accumulate=3")
    found = [launching.divisible(cfg, most, goes_on=True) for most in (1, 2, 3, 4, 5, 6)]
    assert found == [1, 2, 3, 4, 4, 6]
    assert launching.divisible(cfg, 5) == 2
    stays = configured("bn.groups=1", "data.accumulate=3", "data.accumulate_follows=false")
    assert launching.divisible(stays, 5, goes_on=True) == 2


# ---- the order of the images, of loaders that read none


@pytest.mark.parametrize("world, accumulate", [(1, 2), (3, 1), (4, 1), (2, 1), (2, 3)])
def test_the_rest_of_an_epoch_has_each_image_once(few, world, accumulate, monkeypatch):
    """43 images of which two are set aside: 3 steps of 12."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    first = _loader(few, 2, 1)
    first.aside.images = {7: "gone", 30: "gone"}
    first.position = 4
    saved = first.state
    wanted = {step: sorted(first.images_of(step).tolist()) for step in (4, 5)}
    monkeypatch.setenv("WORLD_SIZE", str(world))
    found = {}
    for rank in range(world):
        monkeypatch.setenv("RANK", str(rank))
        loader = _loader(few, world, accumulate)
        loader.state = saved
        loader.recount(4)
        assert loader.position == 4 * accumulate
        images = BATCH // (world * accumulate)
        # Of the second epoch, in the order in which the rank takes them.
        mine = loader._order(1)[(loader.position - 3 * accumulate) * images :]
        for i, step in enumerate(mine.reshape(-1, accumulate * images).tolist()):
            found.setdefault(4 + i, []).extend(step)
    assert {step: sorted(images) for step, images in found.items()} == wanted
    rest = [image for images in found.values() for image in images]
    assert len(set(rest)) == 2 * BATCH and not {7, 30} & set(rest)


def _loader(listing, world, accumulate):
    return data.TrainLoader(
        listing,
        config.crops(configured()),
        BATCH // (world * accumulate),
        0,
        4,
        accumulate,
        1,
        CPU,
        bad_limit=0.1,
    )
