"""The teacher: published and own checkpoint formats against plain forwards with torchvision's
ResNet, and everything that is refused."""

import os
import shlex
import shutil
import types
from functools import partial

import pytest
import torch
import torchvision
import yaml
from torch import nn

from fastdisco import models, teacher
from fastdisco.config import UserError

DIM = 16


@pytest.fixture
def tmp_path(tmp_path):
    """Emptied after each test: its checkpoints have 45 MB each."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def published(arch="resnet18", head="mlp", prefix="module.", name="fc", hidden=24, dim=DIM, seed=0):
    """A torchvision ResNet with a MoCo head as its training saves it, and the network itself in
    eval mode."""
    torch.manual_seed(seed)
    net = torchvision.models.get_model(arch)
    width = net.fc.in_features
    net.fc = (
        nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, dim))
        if head == "mlp"
        else nn.Linear(width, dim)
    )
    with torch.no_grad():
        for m in net.modules():
            # As after training: a load that forgets the statistics must show.
            if isinstance(m, nn.BatchNorm2d):
                m.running_mean.normal_(0, 0.1)
                m.running_var.uniform_(0.5, 2)
                m.num_batches_tracked.fill_(99)
    keys = {
        k: k.replace("fc.", f"{name}.", 1) if k.startswith("fc.") else k for k in net.state_dict()
    }
    state = {f"{prefix}encoder_q.{keys[k]}": v for k, v in net.state_dict().items()}
    return {"epoch": 200, "arch": arch, "state_dict": state}, net.eval()


def save(tmp_path, found, **kwargs):
    torch.save(found, tmp_path / "moco.pth.tar", **kwargs)
    return tmp_path / "moco.pth.tar"


def load(file, arch="resnet18", kwargs=None, dim=DIM):
    return teacher.load(file, arch, kwargs or {}, dim)


def refusal(file, *says, **kwargs):
    with pytest.raises(UserError) as e:
        load(file, **kwargs)
    assert all(s in str(e.value) for s in (*says, "random weights is never used")), str(e.value)
    return str(e.value)


def views(n=2, b=3, size=64):
    gen = torch.Generator().manual_seed(5)
    return [torch.randn(b, 3, size, size, generator=gen) for _ in range(n)]


def own_run(folder, hidden=24, dim=DIM, arch="resnet18", seed=0):
    """A run's folder as the loop leaves it, and the network in it: a torchvision ResNet with a
    head."""
    found, net = published(
        arch, "mlp" if hidden else "linear", "", hidden=hidden, dim=dim, seed=seed
    )
    weights = {k.removeprefix("encoder_q."): v for k, v in found["state_dict"].items()}
    weights = {
        f"head.{k[3:]}" if k.startswith("fc.") else f"backbone.{k}": v for k, v in weights.items()
    }
    step = folder / "checkpoints" / "step_00000007"
    step.mkdir(parents=True)
    cfg = {
        "run": {"name": folder.name},
        "data": {"train": "images"},
        "student": {"arch": arch, "hidden": hidden, "dim": dim},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(cfg))
    (folder / "checkpoints" / "last").write_text("step_00000007\n")
    zeros = {k: torch.zeros_like(v) for k, v in weights.items()}
    torch.save({"step": 7, "student": weights, "ema": zeros, "method": {}}, step / "state.pt")
    return step, net


@pytest.mark.parametrize(
    "head, prefix, name, zipped",
    [
        ("mlp", "module.", "fc", True),
        ("mlp", "", "fc", False),
        ("linear", "module.", "fc", False),
        ("linear", "", "fc", True),
        ("mlp", "module.", "classifier", True),
    ],
)
def test_a_moco_file_gives_the_outputs_of_a_plain_forward(tmp_path, head, prefix, name, zipped):
    found, net = published(head=head, prefix=prefix, name=name)
    t = load(save(tmp_path, found, _use_new_zipfile_serialization=zipped))
    x = views()
    with torch.no_grad():
        torch.testing.assert_close(t(x).z, torch.stack([net(v) for v in x]), rtol=1e-4, atol=1e-5)


def test_a_full_size_resnet50_of_moco_v2(tmp_path):
    found, net = published("resnet50", hidden=2048, dim=128)
    assert found["state_dict"]["module.encoder_q.fc.0.weight"].shape == (2048, 2048)
    t, x = load(save(tmp_path, found), "resnet50", dim=128), views(1, 2)
    with torch.no_grad():
        torch.testing.assert_close(t(x).z[0], net(x[0]), rtol=1e-4, atol=1e-5)


def test_momentum_encoder_queue_and_disco_teachers_are_left_out(tmp_path):
    found, net = published()
    for i, other in enumerate(("encoder_k", "teacher_encoder_q", "teacher_encoder_k"), 1):
        state = published(seed=i)[0]["state_dict"]
        found["state_dict"] |= {k.replace("encoder_q", other): v for k, v in state.items()}
    found["state_dict"] |= {
        "module.queue": torch.randn(DIM, 32),
        "module.queue_ptr": torch.zeros(1, dtype=torch.long),
    }
    found["optimizer"] = {"state": {}, "param_groups": [{"lr": 0.03}]}
    t, x = load(save(tmp_path, found)), views()
    with torch.no_grad():
        torch.testing.assert_close(t(x).z, torch.stack([net(v) for v in x]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("hidden", [24, 0])
def test_a_run_of_our_own_and_one_of_its_checkpoints(tmp_path, monkeypatch, hidden):
    step, net = own_run(tmp_path / "run", hidden)
    monkeypatch.chdir(step)
    x = views()
    with torch.no_grad():
        want = torch.stack([net(v) for v in x])
        for folder in (tmp_path / "run", step, "."):
            torch.testing.assert_close(load(folder)(x).z, want, rtol=1e-4, atol=1e-5)
        student, cfg = models.from_run(tmp_path / "run")
        torch.testing.assert_close(student(x).z, want, rtol=1e-4, atol=1e-5)
        assert not student.training and cfg.student.hidden == hidden
        assert models.from_run(step, "ema")[0].features(x[0]).abs().max() == 0  # written as zeros


def test_the_teacher_is_frozen_in_eval_mode_and_sees_all_views_in_one_forward(tmp_path):
    t = load(save(tmp_path, published()[0]))
    assert not isinstance(t, nn.Module) and not any(m.training for m in t.net.modules())
    convs = [m.weight for m in t.net.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in convs)
    seen, before = [], {k: v.clone() for k, v in t.net.state_dict().items()}
    t.net.backbone.register_forward_hook(lambda m, x, y: seen.append(len(x[0])))
    x = [v.requires_grad_() for v in views(3)]
    z = t(x).z
    assert (
        seen == [9] and not z.requires_grad and not any(p.requires_grad for p in t.net.parameters())
    )
    assert all(torch.equal(v, before[k]) for k, v in t.net.state_dict().items())
    # The other images do not matter.
    torch.testing.assert_close(z[:, :1], t([v[:1] for v in x]).z, rtol=1e-4, atol=1e-5)
    student = torch.zeros_like(z, requires_grad=True)
    # Which saves the targets: tensors of inference_mode would refuse.
    (student * z).sum().backward()
    assert torch.equal(student.grad, z)


def test_loading_leaves_the_random_stream_alone(tmp_path):
    file, (step, _) = save(tmp_path, published()[0]), own_run(tmp_path / "run")
    torch.manual_seed(3)
    want = torch.rand(4)
    torch.manual_seed(3)
    load(file), load(step)
    assert torch.equal(torch.rand(4), want)


def test_the_fingerprint_is_of_the_weights_and_not_of_the_file(tmp_path):
    found, _ = published()
    prints = {
        load(save(tmp_path, f, _use_new_zipfile_serialization=z)).fingerprint
        for f, z in (
            (found, True),
            (found, False),
            (published(prefix="")[0], True),
            (published(name="classifier")[0], True),
        )
    }
    prints |= {load(own_run(tmp_path / "run")[0]).fingerprint}
    # Torch before 0.4.1 had none.
    counters = {
        k: v for k, v in found["state_dict"].items() if not k.endswith("num_batches_tracked")
    }
    prints |= {load(save(tmp_path, {"state_dict": counters})).fingerprint}
    assert len(prints) == 1 and len(min(prints)) == 64
    for key in ("layer3.0.conv1.weight", "bn1.running_var", "fc.2.bias"):
        x = found["state_dict"][f"module.encoder_q.{key}"]
        # The last bit of one number.
        x.view(-1)[0] = torch.nextafter(x.view(-1)[0], torch.tensor(9.0))
        prints |= {load(save(tmp_path, found)).fingerprint}
    assert len(prints) == 4


def moco(**edits):
    """A published file with keys set, or, where None, taken away."""
    found, _ = published()
    state = found["state_dict"]
    for key, value in edits.items():
        key = f"module.{key.replace('__', '.')}"
        state[key] = value
        if value is None:
            del state[key]
    return found


def drop(found, prefix):
    return {
        "state_dict": {
            k: v
            for k, v in found["state_dict"].items()
            if not k.removeprefix("module.encoder_q.").startswith(prefix)
        }
    }


@pytest.mark.parametrize(
    "make, says",
    [
        (
            lambda: moco(encoder_q__conv1__weight=None, encoder_q__fc__0__bias=None),
            ["missing: backbone.conv1.weight, head.0.bias; teacher."],
        ),
        (lambda: moco(encoder_q__bn1__running_var=None), ["missing: backbone.bn1.running_var"]),
        # 19 x (conv + 4 of its norm) - 4.
        (lambda: drop(moco(), "layer"), ["backbone.layer1.0.conv1.weight", " and 91 more"]),
        (
            lambda: moco(encoder_q__layer9__weight=torch.ones(1)),
            ["unexpected: backbone.layer9.weight"],
        ),
        (lambda: moco(prototypes__weight=torch.ones(1)), ["unexpected: prototypes.weight"]),
        (
            lambda: moco(encoder_q__conv1__weight=torch.ones(64, 1, 7, 7)),
            ["another shape: backbone.conv1.weight (64, 1, 7, 7) for (64, 3, 7"],
        ),
        (
            lambda: moco(encoder_q__conv1__weight=3),
            ["another shape: backbone.conv1.weight int for (64, 3, 7, 7)"],
        ),
        (
            lambda: moco(encoder_q__bn1__num_batches_tracked=3),
            ["another shape: backbone.bn1.num_batches_tracked int for ()"],
        ),
        (lambda: moco(encoder_q__fc__0__weight=3), ["head.0.weight"]),
        (
            lambda: moco(encoder_q__fc__2__weight=torch.tensor(3.0)),
            ["another shape: head.2.weight () for (1, 24)"],
        ),
        # Named as we name ours.
        (
            lambda: moco(head__0__bias=torch.ones(24)),
            ["unexpected: head.0.bias (not of encoder_q)"],
        ),
        (
            lambda: moco(backbone__bn1__weight=torch.ones(64)),
            ["unexpected: backbone.bn1.weight (not of encoder_q)"],
        ),
        (
            lambda: moco(encoder_q__classifier__0__bias=torch.ones(24)),
            ["unexpected: encoder_q.classifier.0.bias (twice)"],
        ),
        (
            lambda: {"state_dict": moco()["state_dict"] | {7: torch.ones(1)}},
            ["unexpected: 7 (not of encoder_q)"],
        ),
        (lambda: drop(moco(), "fc."), ["no projection head", "stripped for evaluation"]),
        (lambda: drop(moco(), "fc.2"), ["missing: head.2.weight, head.2.bias"]),
        (
            lambda: published(dim=32)[0],
            ["embeds into 32 numbers and the student into 16", "student.dim=32"],
        ),
        (lambda: published(dim=32, head="linear")[0], ["embeds into 32 numbers"]),
        (
            lambda: published("resnet34")[0],
            [
                "unexpected: backbone.layer1.2.conv1.weight",
                "teacher.arch is resnet18 with {}, but",
                "those of resnet34",
            ],
        ),
        (
            lambda: torchvision.models.resnet18().state_dict(),
            ["holds resnet18 alone", "without the projection head", "docs/teachers.md"],
        ),
        (lambda: {"model": {"a": torch.ones(1)}}, ["holds a, which is no known format"]),
        (lambda: {}, ["holds nothing"]),
        (lambda: [torch.ones(1)], ["holds a list"]),
    ],
)
def test_a_moco_file_that_does_not_fit_is_refused(tmp_path, make, says):
    file = save(tmp_path, make())
    refusal(file, str(file), *says)


def test_another_arch_is_refused(tmp_path):
    file = save(tmp_path, published()[0])
    refusal(file, "of another shape", "teacher.arch is resnet50", arch="resnet50")
    refusal(file, "missing", "teacher.arch is mobilenetv3_small_050", arch="mobilenetv3_small_050")
    refusal(file, "did you mean resnet18", arch="resnet_18")
    refusal(file, "{'stem_type': 'deep'}", kwargs={"stem_type": "deep"})


def break_run(run, step):
    """Ways in which a run's folder can be wrong, and what the refusal must say."""
    cfg = yaml.safe_load((run / "config.yaml").read_text())
    state = torch.load(step / "state.pt", weights_only=True)

    def rewrite(**student):
        (run / "config.yaml").write_text(
            yaml.safe_dump(cfg | {"student": cfg["student"] | student})
        )

    def resave(found):
        torch.save(found, step / "state.pt")

    return {
        "no pointer": ((run / "checkpoints" / "last").unlink, ["no checkpoint of fastdisco here"]),
        "pointer to nothing": (
            partial((run / "checkpoints" / "last").write_text, "step_00000009"),
            ["step_00000009, which holds no"],
        ),
        "no config": ((run / "config.yaml").unlink, ["config.yaml: cannot be read"]),
        "no student": (partial(resave, {"step": 7}), ["holds no weights named student"]),
        "truncated": (partial(os.truncate, step / "state.pt", 5000), ["cut short"]),
        "a weight missing": (
            partial(
                resave,
                state
                | {"student": {k: v for k, v in state["student"].items() if k != "head.2.bias"}},
            ),
            ["missing: head.2.bias", "config.yaml must be the one"],
        ),
        "another head": (
            partial(rewrite, hidden=7),
            ["of another shape: head.0.weight (24, 512) for (7, 512)"],
        ),
        "another width": (partial(rewrite, dim=32), ["of another shape: head.2.weight"]),
        "another arch": (
            partial(rewrite, arch="resnet34"),
            ["missing: backbone.layer1.2.conv1.weight"],
        ),
    }


@pytest.mark.parametrize(
    "case",
    [
        "no pointer",
        "pointer to nothing",
        "no config",
        "no student",
        "truncated",
        "a weight missing",
        "another head",
        "another width",
        "another arch",
    ],
)
def test_a_broken_run_is_refused(tmp_path, case):
    run = tmp_path / "run"
    step, _ = own_run(run)
    act, says = break_run(run, step)[case]
    act()
    refusal(run, str(run), *says)


def test_a_run_of_another_arch_or_width_than_asked_is_refused(tmp_path):
    run = tmp_path / "run"
    own_run(run)
    refusal(
        run,
        "trained resnet18 with {}, not teacher.arch resnet50",
        "set teacher.arch=resnet18",
        arch="resnet50",
    )
    refusal(run, "not teacher.arch resnet18 with {'stem_width': 64}", kwargs={"stem_width": 64})
    refusal(run, "embeds into 16 numbers and the student into 128", "student.dim=16", dim=128)


def test_absent_files_and_folders_are_refused(tmp_path):
    refusal(
        tmp_path / "nothing.pth.tar", "nothing.pth.tar: cannot be read (No such file or directory)"
    )
    refusal(tmp_path, f"{tmp_path}: no checkpoint of fastdisco here")


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("share", [0, 0.001, 0.5, 0.999])
def test_a_file_cut_short_is_refused(tmp_path, share, zipped):
    file = save(tmp_path, published()[0], _use_new_zipfile_serialization=zipped)
    os.truncate(file, int(share * file.stat().st_size))
    refusal(file, str(file), "cut short")


class Evil:
    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch {shlex.quote(str(self.mark))}",)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize(
    "make, asks",
    [
        (Evil, f"{os.name}.system"),
        (lambda mark: types.SimpleNamespace(lr=0.03), "types.SimpleNamespace"),
    ],
)
def test_a_pickle_that_asks_for_more_than_tensors_is_refused_and_not_run(
    tmp_path, make, asks, zipped
):
    found, _ = published()
    file = save(
        tmp_path, found | {"args": make(tmp_path / "mark")}, _use_new_zipfile_serialization=zipped
    )
    refusal(
        file,
        f"its pickle asks for {asks}",
        "throw-away container",
        # Tests of the command itself are in test_pickles.py.
        "python -c ",
    )
    assert not (tmp_path / "mark").exists()
    if make is Evil:  # the test's file does run code where it is allowed to
        torch.load(file, weights_only=False)
        assert (tmp_path / "mark").exists()
