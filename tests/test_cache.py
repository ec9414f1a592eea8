"""Recorded teacher embeddings: what is recorded, that a replay trains as the teacher does, on any
ranks and after a stop, and all that is refused."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, ranks, run, tiny
from training import _differences, _fails, _train, losses, metrics, train_a_teacher

from fastdisco import cli, config, data, teacher
from fastdisco.common import files
from fastdisco.config import Crop, UserError
from fastdisco.teacher import cache

CPU = torch.device("cpu")
ROUNDS = 2


def _args(folder, out, made, *overrides):
    """A run that distils from made/teacher, with embeddings in made/cache."""
    return tiny(
        folder,
        out,
        f"teacher.file={made}/teacher",
        "teacher.arch=test_resnet",
        f"teacher.cache_folder={made}/cache",
        f"teacher.cache_rounds={ROUNDS}",
        *overrides,
    )


def _record(args):
    cache.BLOCK = 8  # of 43 images both ranks get some
    return cli.main(["teacher", "record", *map(str, args)])


@pytest.fixture(scope="module")
def made(folder, tmp_path_factory):
    """teacher/, a run; cache/, recorded by two ranks."""
    out = tmp_path_factory.mktemp("made")
    train_a_teacher(folder, out, steps=2)
    assert ranks(2, _record, _args(folder, out, out)) == [0, 0]
    return out


@pytest.fixture
def copy(made, tmp_path):
    """Of made/, to be spoilt."""
    shutil.copytree(made, tmp_path / "made")
    return tmp_path / "made"


def opened(folder, out, made, *overrides):
    """(CachedTeacher, its loader) of that configuration."""
    args = [str(a) for a in _args(folder, out, made, "teacher.cache=replay", *overrides)]
    cfg = config.load(args[1], args[2:])
    loader = data.TrainLoader(
        data.listing(cfg.data.train),
        (cfg.view, cfg.view),
        8,
        cfg.run.seed,
        6,
        1,
        1,
        CPU,
        rounds=cfg.teacher.cache_rounds,
    )
    return teacher.create(cfg.teacher, cfg.student.dim, cfg.engine.precision, loader), loader


# ---- views by round


def test_views_of_an_epoch_are_those_of_its_round_and_the_order_is_its_own(folder):
    listing, crops = data.listing(folder / "train"), (Crop(size=16), Crop(size=16))
    make = lambda rounds: data.TrainLoader(listing, crops, 8, 3, 5, 1, 1, CPU, rounds=rounds)
    epoch = lambda loader, e: (
        [next(loader) for _ in range(5)] if not setattr(loader, "position", 5 * e) else None
    )
    rounds, plain = make(2), make(None)
    for e in range(5):
        seen, order = epoch(rounds, e), epoch(plain, e)
        assert [b.index.tolist() for b in seen] == [b.index.tolist() for b in order]
        assert {b.epoch for b in seen} == {e % 2} and {b.epoch for b in order} == {e}
        # [V,3,S,S] by image.
        want = {
            int(i): v
            for b in plain.views_of(listing.kept, e % 2)
            for i, v in zip(b.index, torch.stack(b.views, 1))
        }
        for b in seen:
            for i, v in zip(b.index.tolist(), torch.stack(b.views, 1)):
                assert torch.equal(v, want[i])
    assert not torch.equal(
        next(iter(plain.views_of(listing.kept, 0))).views[0],
        next(iter(plain.views_of(listing.kept, 1))).views[0],
    )


def test_a_loader_over_rounds_goes_on_in_the_middle(folder):
    listing = data.listing(folder / "train")
    make = lambda start: data.TrainLoader(
        listing, (Crop(size=16),), 8, 3, 6, 1, 1, CPU, start=start, rounds=2
    )
    whole = list(make(0))
    for a, b in zip(whole[13:], make(13), strict=True):
        assert (
            torch.equal(a.views[0], b.views[0])
            and torch.equal(a.index, b.index)
            and a.epoch == b.epoch
        )


# ---- what is recorded


def test_embeddings_are_the_live_teachers(folder, made, tmp_path):
    """Of every image, round and view, from views made by a loader of other batches; two ranks
    recorded."""
    recorded, loader = opened(folder, tmp_path, made)
    live = teacher.load(made / "teacher", "test_resnet", {}, 8)
    seen = 0
    for r in range(ROUNDS):
        for batch in data.TrainLoader(loader.listing, loader.crops, 5, 0, 6, 1, 1, CPU).views_of(
            loader.listing.kept[::-1].copy(), r
        ):
            recorded.at(batch.index, r + 4 * ROUNDS)
            z = recorded(batch.views).z
            assert (
                z.dtype == torch.float32
                and F.cosine_similarity(z, live(batch.views).z, dim=-1).min() >= 0.9999
            )
            assert (z.norm(dim=-1) - 1).abs().max() < 1e-3
            assert torch.equal(recorded(batch.views[:1]).z, z[:1])
            seen += len(batch.index)
    assert seen == 43 * ROUNDS
    sizes = {name: (made / "cache" / name).stat().st_size for name in ("z.f16", "sums.u32")}
    # 43 images in blocks of 8.
    assert sizes == {"z.f16": ROUNDS * 48 * 2 * 8 * 2, "sums.u32": ROUNDS * 48 * 4}
    a, b = (
        F.normalize(
            torch.from_numpy(recorded.files.rows(r, np.arange(43)).astype(np.float32)), dim=-1
        )
        for r in range(2)
    )
    assert (a * b).sum(-1).min() < 0.9999  # rounds have views of their own


def test_recording_on_one_rank_gives_the_same(folder, made, tmp_path):
    assert ranks(
        1, _record, _args(folder, tmp_path, made, f"teacher.cache_folder={tmp_path}/cache")
    ) == [0]
    one, two = (
        np.fromfile(f / "cache" / "z.f16", np.float16).reshape(ROUNDS, 48, 2, 8).astype(np.float32)
        for f in (tmp_path, made)
    )
    assert (
        np.abs(one - two).max() < 2e-3
        and one[:, :43].any(3).all()
        and not one[:, 43:].any()
        and not two[:, 43:].any()
    )
    assert (tmp_path / "cache/cache.json").read_text() == (made / "cache/cache.json").read_text()


# ---- training


@pytest.mark.parametrize("n", [1, 2])
def test_replay_trains_as_the_teacher_does(folder, made, tmp_path, n):
    """For the two epochs whose views are the recorded ones; then it goes on with those."""
    # Batch norm over 2 images, or large steps, would blow up what is rounded.
    calm = "optim.lr=5e-5", "bn.groups=1"
    ranks(n, _train, _args(folder, tmp_path, made, "run.max_steps=10", "run.name=live", *calm))
    ranks(
        n,
        _train_without_teacher,
        _args(
            folder,
            tmp_path,
            made,
            "run.max_steps=12",
            "run.name=replay",
            "teacher.cache=replay",
            *calm,
        ),
    )
    live, replay = (
        [m["train/loss_distill"] for m in metrics(tmp_path / name) if "train/loss_distill" in m]
        for name in ("live", "replay")
    )
    assert len(live) == 10 and len(replay) == 12
    assert replay[:10] == pytest.approx(live, rel=5e-4) and live[9] < 0.9 * live[0]


def _train_without_teacher(args):
    """A teacher's forward, or its move to a device, fails."""

    def forbidden(*_, **__):
        raise AssertionError("the teacher ran")

    teacher.Teacher.__call__ = forbidden
    _train(args)


def test_other_batches_and_another_student_replay_too(folder, made, tmp_path):
    ranks(
        1,
        _train,
        _args(
            folder,
            tmp_path,
            made,
            "run.max_steps=3",
            "teacher.cache=replay",
            "data.batch=12",
            "bn.groups=1",
            "student.arch=test_resnet",
            "student.kwargs={}",
            "optim.name=adamw",
        ),
    )
    assert sorted(losses(tmp_path / "tiny")) == [1, 2, 3]


@pytest.mark.parametrize("n", [1, 2])
def test_resume_in_replay_is_exact(folder, made, tmp_path, n):
    """Stopped in the second epoch, which is the second round, and on into the third, which is the
    first round again."""
    args = lambda where, steps: _args(
        folder, tmp_path / where, made, f"run.max_steps={steps}", "teacher.cache=replay"
    )
    ranks(n, _train, args("whole", 14))
    ranks(n, _train, args("parts", 7))
    ranks(n, _train, args("parts", 14))
    assert _differences(tmp_path / "whole/tiny", tmp_path / "parts/tiny", n) == []


def test_record_in_training_records_what_is_missing_then_replays(folder, copy, tmp_path):
    z = copy / "cache" / "z.f16"
    whole = z.read_bytes()
    sums = np.memmap(copy / "cache" / "sums.u32", np.uint32, "r+").reshape(ROUNDS, 48)
    sums[1, 5:20] = 0
    with z.open("r+b") as f:  # one bit of image 30 in round 0
        f.seek(30 * 32)
        f.write(bytes([whole[30 * 32] ^ 1]))
    args = [str(a) for a in _args(folder, tmp_path, copy, "run.max_steps=2")]
    code, error = ranks(1, _fails, [*args, "teacher.cache=replay"])[0]
    assert (
        code == 2
        and "lacks 15 of the 86 embeddings (2 rounds of 43 images)" in error
        and "fastdisco teacher record" in error
    )
    seen = ranks(1, _recorded_images, [*args, "teacher.cache=record"])[0]
    assert sorted(seen) == [(0, 30)] + [(1, i) for i in range(5, 20)]
    again = np.frombuffer(z.read_bytes(), np.float16).astype(np.float32).reshape(ROUNDS, 48, 2, 8)
    assert (
        np.abs(
            again - np.frombuffer(whole, np.float16).astype(np.float32).reshape(again.shape)
        ).max()
        < 2e-3
    )
    assert sorted(losses(tmp_path / "tiny")) == [1, 2]
    # The run goes on, nothing is recorded.
    assert ranks(1, _recorded_images, [*args, "teacher.cache=record", "run.max_steps=3"])[0] == []


def _recorded_images(args):
    """(round, image) of what the training had the teacher see."""
    seen, views_of = [], data.TrainLoader.views_of

    def watched(self, indices, epoch):
        seen.extend((epoch, int(i)) for i in indices)
        return views_of(self, indices, epoch)

    data.TrainLoader.views_of = watched
    _train(args)
    return seen


def test_more_rounds_extend_a_cache_and_fewer_take_its_first(folder, copy, tmp_path):
    before = (copy / "cache" / "z.f16").read_bytes()
    assert ranks(1, _record, _args(folder, tmp_path, copy, "teacher.cache_rounds=3")) == [0]
    after = (copy / "cache" / "z.f16").read_bytes()
    assert after.startswith(before) and len(after) == len(before) * 3 // 2
    recorded, _ = opened(folder, tmp_path, copy, "teacher.cache_rounds=3")
    # Other views in epoch 2: another run.
    assert recorded.fingerprint != opened(folder, tmp_path, copy)[0].fingerprint
    recorded.at(torch.arange(43), 2)


def test_a_missing_teacher_file_is_told(folder, copy, tmp_path, capsys):
    shutil.rmtree(copy / "teacher")
    opened(folder, tmp_path, copy)
    assert "teacher is not here" in capsys.readouterr().out


# ---- what is refused


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["run.seed=1"], "another seed (0 there, 1 here)"),
        (["view.size=40"], "another views.0.size (32 there, 40 here), another views.1.size"),
        (["view.blur_p=0.1"], "another views.0.blur_p (0.5 there, 0.1 here)"),
        (["engine.precision=bf16"], "another precision (float32 there, bfloat16 here)"),
        (["data.train=FOLDER/val"], "another data ("),
        (["teacher.cache_rounds=3"], "holds 2 rounds and teacher.cache_rounds asks for 3"),
        (["teacher.cache_folder=/nowhere"], "/nowhere: no recorded embeddings there"),
    ],
    ids=lambda v: v if isinstance(v, str) else v[0].split("=")[0],
)
def test_a_cache_of_something_else_is_refused(folder, made, tmp_path, overrides, says):
    with pytest.raises(UserError) as e:
        opened(folder, tmp_path, made, *(o.replace("FOLDER", str(folder)) for o in overrides))
    assert says in str(e.value) and "\n" not in str(e.value)


def test_embeddings_by_batch_statistics_are_refused():
    assert (
        config.Teacher(file="x", cache="replay").bn == "eval"
        and config.Teacher(file="x", bn="batch").cache == "off"
    )
    for mode in ("record", "replay"):
        with pytest.raises(ValueError, match=f"cache: {mode} needs bn: eval"):
            config.Teacher(file="x", cache=mode, bn="batch")


def test_off_is_a_word_in_yaml_too(folder, tmp_path):
    assert (
        config.load(
            ROOT / "tests/tiny.yaml",
            [f"data.train={folder}", "teacher.file=x", "teacher.cache=off"],
        ).teacher.cache
        == "off"
    )


@pytest.mark.parametrize(
    "key, value",
    [("teacher", "f" * 64), ("decode", "gpu"), ("augment", "gpu"), ("dali", "1.0"), ("version", 0)],
)
def test_a_cache_made_otherwise_is_refused(folder, copy, tmp_path, key, value):
    path = copy / "cache" / "cache.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {key: value}))
    with pytest.raises(UserError, match=f"another {key} \\({str(value)[:12]} there"):
        opened(folder, tmp_path, copy)
    assert ranks(1, _record, _args(folder, tmp_path, copy)) == [2]  # nor recorded over


def test_another_teacher_is_refused(folder, copy, tmp_path):
    state = next((copy / "teacher/checkpoints").glob("step_*/state.pt"))
    found = torch.load(state, weights_only=True)
    found["student"]["head.0.bias"] += 1
    torch.save(found, state)
    # Else the file would be taken for damaged.
    about = {"size": state.stat().st_size, "sha256": files.sha256(state)}
    listed = json.loads((state.parent / "manifest.json").read_text())
    listed["files"]["state.pt"] = about
    (state.parent / "manifest.json").write_text(json.dumps(listed))
    with pytest.raises(UserError, match="another teacher \\("):
        opened(folder, tmp_path, copy)


def test_a_damaged_cache_is_refused(folder, copy, tmp_path):
    z = copy / "cache" / "z.f16"
    whole = z.read_bytes()
    z.write_bytes(whole[:-1])
    with pytest.raises(
        UserError, match=f"z.f16: cut short, {len(whole) - 1} of {len(whole)} bytes"
    ):
        opened(folder, tmp_path, copy)
    for bit in (1, 0x80):
        z.write_bytes(whole[: 7 * 32 + 5] + bytes([whole[7 * 32 + 5] ^ bit]) + whole[7 * 32 + 6 :])
        recorded, loader = opened(folder, tmp_path, copy)
        recorded.at(torch.tensor([6, 8]), 0)
        with pytest.raises(
            UserError, match=f"damaged, in round 0 those of {loader.listing.files[7]};"
        ):
            recorded.at(torch.tensor([6, 7, 8]), 0)
    (copy / "cache" / "cache.json").write_text("{")
    with pytest.raises(UserError, match="cache.json: cannot be read"):
        opened(folder, tmp_path, copy)


def test_two_recordings_at_once_are_refused(folder, copy, tmp_path):
    import fcntl

    with (copy / "cache" / "lock").open("w") as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        text = run(
            sys.executable,
            "-m",
            "fastdisco.cli",
            "teacher",
            "record",
            *_args(folder, tmp_path, copy, "teacher.cache_rounds=3"),
            code=2,
        )
    assert "another command is recording there" in text


def test_a_replay_and_a_live_run_are_not_one_run(folder, made, tmp_path):
    args = [str(a) for a in _args(folder, tmp_path, made, "run.max_steps=1")]
    ranks(1, _train, args)
    code, error = ranks(1, _fails, [*args, "run.max_steps=2", "teacher.cache=replay"])[0]
    assert code == 2 and "another teacher than" in error


@pytest.mark.gpu
def test_rows_reach_a_gpu_without_waiting(folder, tmp_path):
    """And are those that a teacher on the GPU gives."""
    args = [str(a) for a in _args(folder, tmp_path, tmp_path)]
    train_a_teacher(folder, tmp_path, steps=2)
    assert ranks(1, _record, args) == [0]
    cfg = config.load(args[1], [*args[2:], "teacher.cache=replay"])
    device = torch.device("cuda", 0)
    loader = data.TrainLoader(
        data.listing(cfg.data.train),
        (cfg.view, cfg.view),
        8,
        cfg.run.seed,
        6,
        1,
        1,
        device,
        rounds=ROUNDS,
    )
    recorded = teacher.create(cfg.teacher, cfg.student.dim, cfg.engine.precision, loader)
    live = teacher.load(tmp_path / "teacher", "test_resnet", {}, 8, teacher.Options(device))
    for batch in loader.views_of(loader.listing.kept, 1):
        want = live(batch.views).z
        torch.cuda.set_sync_debug_mode("error")
        try:
            recorded.at(batch.index, 1)
            z = recorded(batch.views).z
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert F.cosine_similarity(z, want, dim=-1).min() >= 0.9999
