"""The configuration: defaults, checks, overrides, and the shipped files."""
import pytest
import yaml

from conftest import ROOT
from fastdisco import config
from fastdisco.config import UserError

BASE = {"run": {"name": "x"}, "data": {"train": "/t"}}


def load(tmp_path, raw, *overrides):
    path = tmp_path / "c.yaml"
    path.write_text(raw if isinstance(raw, str) else yaml.safe_dump(raw))
    return config.load(path, list(overrides))


def error(tmp_path, raw, *overrides):
    with pytest.raises(UserError) as e:
        load(tmp_path, raw, *overrides)
    assert "\n" not in str(e.value)
    return str(e.value)


def test_unknown_keys_are_refused_with_the_nearest(tmp_path):
    assert "unknown key data.bach; did you mean data.batch?" in error(tmp_path, BASE | {"data": {"train": "/t", "bach": 8}})
    assert "did you mean run.epochs?" in error(tmp_path, BASE | {"optim": {"epochs": 3}})  # right key, wrong block
    assert "did you mean optim.lr?" in error(tmp_path, BASE, "optim.lrr=1")
    assert "did you mean method?" in error(tmp_path, BASE | {"metod": {}})
    assert "did you mean view.blur_p?" in error(tmp_path, BASE, "view.blurp=1")


def test_numbers_and_overrides(tmp_path):
    cfg = load(tmp_path, "run: {name: x}\ndata: {train: /t}\noptim: {lr: 1e-3}\nstudent: {kwargs: {drop_rate: 1e-1}}", "optim.weight_decay=2E-5",
               "teacher.file=/a.pth", "run.max_steps=null")
    assert cfg.optim.lr == 0.001 and cfg.optim.weight_decay == 2e-5 and cfg.student.kwargs == {"drop_rate": 0.1}
    assert str(cfg.teacher.file) == "/a.pth" and cfg.teacher.arch is None
    assert load(tmp_path, BASE | {"teacher": {"file": "/a"}}, "teacher=null").teacher is None
    assert "expected block.key=value" in error(tmp_path, BASE, "lr")
    assert "optim.lr" in error(tmp_path, BASE, "optim.lr=fast")


def test_a_dumped_config_reads_back_equal(tmp_path):
    cfg = load(tmp_path, BASE, "teacher.file=/a", "engine.deepspeed={prescale_gradients: true}")
    assert load(tmp_path, config.dump(cfg)) == cfg


@pytest.mark.parametrize("text, says", [("run: [", "not valid YAML"), ("- 1", "no blocks"), ("run: {name: ../x}\ndata: {train: /t}", "one folder name"),
                                         ("run: {name: x}\ndata: {}", "data.train is required")])
def test_bad_files(tmp_path, text, says):
    assert says in error(tmp_path, text)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="nothere.yaml"):
        config.load(tmp_path / "nothere.yaml")


def test_a_file_is_laid_over_its_base(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text("data: {train: /t, val: /v}\noptim: {lr: 1, clip: 2}\nteacher: {file: /a, arch: resnet18}")
    (tmp_path / "sub/c.yaml").write_text("base: ../base.yaml\nrun: {name: x}\noptim: {lr: 3, per: epoch}\nteacher: null")
    cfg = config.load(tmp_path / "sub/c.yaml", ["data.val=/w"])
    assert cfg == config.validate({"run": {"name": "x"}, "data": {"train": "/t", "val": "/w"}, "optim": {"lr": 3, "clip": 2, "per": "epoch"}}, "here")
    assert config.load(tmp_path / "sub/c.yaml", ["teacher.file=/b"]).teacher.arch is None  # of a block that was put away nothing comes back
    assert "none.yaml: cannot be read" in error(tmp_path, BASE | {"base": "none.yaml"})
    assert "a YAML file beside it is expected (found 3)" in error(tmp_path, BASE | {"base": 3})
    (tmp_path / "d.yaml").write_text("base: sub/c.yaml")
    assert "names one itself" in error(tmp_path, BASE | {"base": "d.yaml"})


def test_impossible_combinations(tmp_path):
    assert "method.queue" in error(tmp_path, BASE, "data.batch=512", "method.queue=256")
    assert "data.val" in error(tmp_path, BASE, "eval.every=10")


@pytest.mark.parametrize("batch, accumulate, world, micro", [(256, 1, 8, 32), (256, 2, 4, 32), (96, 1, 1, 96)])
def test_the_micro_batch_is_the_global_batch_divided(tmp_path, batch, accumulate, world, micro):
    cfg = load(tmp_path, BASE, f"data.batch={batch}", f"data.accumulate={accumulate}")
    assert config.micro_batch(cfg, world) == micro


def test_what_does_not_divide_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match="nearest: 248 or 252"):
        config.micro_batch(load(tmp_path, BASE, "data.batch=250"), 4)
    with pytest.raises(UserError, match="divisor of 32"):
        config.micro_batch(load(tmp_path, BASE, "bn.groups=3"), 8)
    with pytest.raises(UserError, match="sees 1 image"):
        config.micro_batch(load(tmp_path, BASE, "bn.groups=32"), 8)


def test_the_papers_recipe():
    cfg = config.load(ROOT / "configs/mobv3.yaml")
    assert (cfg.optim.lr, cfg.run.epochs, cfg.data.batch, cfg.optim.schedule, cfg.optim.per) == (0.03, 200, 256, "cosine", "epoch")
    assert (cfg.method.temp, cfg.method.queue, cfg.method.momentum, cfg.method.distill) == (0.2, 65536, 0.999, 32.0)
    assert (cfg.student.hidden, cfg.student.dim, cfg.optim.weight_decay, cfg.optim.momentum, cfg.optim.clip) == (2048, 128, 1e-4, 0.9, 0.0)
    view = cfg.view
    assert (view.size, view.scale, view.jitter, view.jitter_p, view.gray_p, view.blur_p, view.flip_p) == (
        224, (0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5, 0.5)


def test_the_twin_differs_by_the_distillation_alone():
    a, b = (config.flatten(config.load(ROOT / f"configs/{n}.yaml").model_dump(mode="json")) for n in ("mobv3", "mobv3_moco"))
    assert {k.split(".")[0] for k in a | b if a.get(k) != b.get(k)} == {"run", "teacher"}
    assert a["run.name"] != b["run.name"] and b["teacher"] is None
