"""The configuration: defaults, checks, overrides, and the shipped files."""

import re

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
    assert "unknown key data.bach; did you mean data.batch?" in error(
        tmp_path, BASE | {"data": {"train": "/t", "bach": 8}}
    )
    # Right key, wrong block.
    assert "did you mean run.epochs?" in error(tmp_path, BASE | {"optim": {"epochs": 3}})
    assert "did you mean optim.lr?" in error(tmp_path, BASE, "optim.lrr=1")
    assert "did you mean method?" in error(tmp_path, BASE | {"metod": {}})
    assert "did you mean view.blur_p?" in error(tmp_path, BASE, "view.blurp=1")


def test_numbers_and_overrides(tmp_path):
    cfg = load(
        tmp_path,
        "run: {name: x}\ndata: {train: /t}\noptim: {lr: 1e-3}\nstudent: {kwargs: {drop_rate: "
        "1e-1}}",
        "optim.weight_decay=2E-5",
        "teacher.file=/a.pth",
        "run.max_steps=null",
    )
    assert (
        cfg.optim.lr == 0.001
        and cfg.optim.weight_decay == 2e-5
        and cfg.student.kwargs == {"drop_rate": 0.1}
    )
    assert str(cfg.teacher.file) == "/a.pth" and cfg.teacher.arch is None
    assert load(tmp_path, BASE | {"teacher": {"file": "/a"}}, "teacher=null").teacher is None
    assert "expected block.key=value" in error(tmp_path, BASE, "lr")
    assert "optim.lr" in error(tmp_path, BASE, "optim.lr=fast")


def test_a_dumped_config_reads_back_equal(tmp_path):
    cfg = load(tmp_path, BASE, "teacher.file=/a", "engine.deepspeed={prescale_gradients: true}")
    assert load(tmp_path, config.dump(cfg)) == cfg


@pytest.mark.parametrize(
    "text, says",
    [
        ("run: [", "not valid YAML"),
        ("- 1", "no blocks"),
        ("run: {name: ../x}\ndata: {train: /t}", "one folder name"),
        ("run: {name: x}\ndata: {}", "data.train is required"),
        ("run: {name: x}\nview: 3", "view: Input should be"),
        ("run: {name: x}\nmethod: {name: [moco]}", "method.name"),
        ("run: {name: x}\nmethod: 3", "method: "),
    ],
)
def test_bad_files(tmp_path, text, says):
    assert says in error(tmp_path, text) and "views is required" not in error(tmp_path, text)


@pytest.mark.parametrize(
    "override, says",
    [
        ("view.scale=[1.0, 0.1]", "view.scale: the smaller number comes first, as in [0.1, 1]"),
        ("view.scale=[0, 1]", "view.scale"),
        ("view.scale=[0.5, 1.5]", "view.scale"),
        ("view.ratio=[0, 1]", "view.ratio"),
        ("view.blur_sigma=[-1, 1]", "view.blur_sigma"),
        ("view.std=[0, 1, 1]", "view.std"),
        ("view.jitter=[0.4, 0.4, 0.4, 0.6]", "view.jitter"),
        ("view.jitter=[-1, 0.4, 0.4, 0.1]", "view.jitter"),
        ("optim.momentum=1", "optim.momentum"),
        ("view.count=2", "the crops of moco have a count of their own"),
    ],
)
def test_values_that_cannot_be(tmp_path, override, says):
    assert says in error(tmp_path, BASE, override)


def test_missing_file(tmp_path):
    with pytest.raises(UserError, match="nothere.yaml"):
        config.load(tmp_path / "nothere.yaml")


def test_a_file_is_laid_over_its_base(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "base.yaml").write_text(
        "data: {train: /t, val: /v}\noptim: {lr: 1, clip: 2}\nteacher: {file: /a, arch: resnet18}"
    )
    (tmp_path / "sub/c.yaml").write_text(
        "base: ../base.yaml\nrun: {name: x}\noptim: {lr: 3, per: epoch}\nteacher: null"
    )
    cfg = config.load(tmp_path / "sub/c.yaml", ["data.val=/w"])
    assert cfg == config.validate(
        {
            "run": {"name": "x"},
            "data": {"train": "/t", "val": "/w"},
            "optim": {"lr": 3, "clip": 2, "per": "epoch"},
        },
        "here",
    )
    # Of a block that was put away nothing comes back.
    assert config.load(tmp_path / "sub/c.yaml", ["teacher.file=/b"]).teacher.arch is None
    assert re.search(
        r"none.yaml: cannot be read .*; correct `base` in .*c.yaml",
        error(tmp_path, BASE | {"base": "none.yaml"}),
    )
    assert "a YAML file beside it is expected (found 3)" in error(tmp_path, BASE | {"base": 3})
    (tmp_path / "d.yaml").write_text("base: sub/c.yaml")
    assert "names one itself" in error(tmp_path, BASE | {"base": "d.yaml"})


def test_impossible_combinations(tmp_path):
    assert "method.queue" in error(tmp_path, BASE, "data.batch=512", "method.queue=256")
    assert "data.val" in error(tmp_path, BASE, "eval.every=10")


@pytest.mark.parametrize(
    "batch, accumulate, world, micro", [(256, 1, 8, 32), (256, 2, 4, 32), (96, 1, 1, 96)]
)
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
    assert (cfg.optim.lr, cfg.run.epochs, cfg.data.batch, cfg.optim.schedule, cfg.optim.per) == (
        0.03,
        200,
        256,
        "cosine",
        "epoch",
    )
    assert (cfg.method.temp, cfg.method.queue, cfg.method.momentum, cfg.method.distill) == (
        0.2,
        65536,
        0.999,
        32.0,
    )
    assert (
        cfg.student.hidden,
        cfg.student.dim,
        cfg.optim.weight_decay,
        cfg.optim.momentum,
        cfg.optim.clip,
    ) == (2048, 128, 1e-4, 0.9, 0.0)
    view = cfg.view
    assert (
        view.size,
        view.scale,
        view.jitter,
        view.jitter_p,
        view.gray_p,
        view.blur_p,
        view.flip_p,
    ) == (224, (0.2, 1.0), (0.4, 0.4, 0.4, 0.1), 0.8, 0.2, 0.5, 0.5)


def test_the_twin_differs_by_the_distillation_alone():
    a, b = (
        config.flatten(config.load(ROOT / f"configs/{n}.yaml").model_dump(mode="json"))
        for n in ("mobv3", "mobv3_moco")
    )
    assert {k.split(".")[0] for k in a | b if a.get(k) != b.get(k)} == {"run", "teacher"}
    assert a["run.name"] != b["run.name"] and b["teacher"] is None


# ---- methods, crops, recipes


def test_a_method_knows_its_own_keys_alone(tmp_path):
    # Moco where no name is given.
    assert load(tmp_path, BASE, "method.queue=512").method == config.Moco(queue=512)
    cfg = load(tmp_path, BASE, "method.name=dino", "method.temp_mean=0.07")
    assert isinstance(cfg.method, config.Dino) and cfg.method.temp_mean == 0.07
    assert "no method is called 'dyno'; did you mean dino?" in error(
        tmp_path, BASE, "method.name=dyno"
    )
    assert (
        "unknown key method.queue for method dino, which is one of moco and swav and seed"
        in error(tmp_path, BASE, "method.name=dino", "method.queue=9")
    )
    assert "unknown key method.tmp; did you mean method.temp?" in error(
        tmp_path, BASE, "method.name=swav", "method.tmp=0.2"
    )
    assert "did you mean method.rkd.angle?" in error(tmp_path, BASE, "method.rkd.angel=1")
    assert "did you mean method.freeze_steps?" in error(tmp_path, BASE, "optim.freeze_steps=1")
    assert (
        "method.temp: " in (said := error(tmp_path, BASE, "method.temp=-1")) and "moco" not in said
    )
    assert "method.prototypes: " in error(tmp_path, BASE, "method={name: swav, prototypes: many}")


def test_crops_are_groups_over_the_view(tmp_path):
    assert "views: moco takes 2 crops of an image here, found 3" in error(
        tmp_path, BASE, "views=[{count: 3}]"
    )
    cfg = load(
        tmp_path,
        BASE,
        "method.name=swav",
        "view.jitter_p=0.5",
        "view.blur_p=0.2",
        "views=[{count: 2, size: 64}, {scale: [0.1, 0.3], blur_p: 0}]",
    )
    found = [(c.size, c.scale, c.jitter_p, c.blur_p) for c in config.crops(cfg)]
    assert found == [(64, (0.2, 1.0), 0.5, 0.2)] * 2 + [(224, (0.1, 0.3), 0.5, 0.0)]


def test_the_recipes_are_the_published_ones(tmp_path):
    swav, dino = (load(tmp_path, BASE, f"method.name={name}") for name in ("swav", "dino"))
    seed = load(tmp_path, BASE, "method.name=seed", "teacher.file=/t")
    crops = config.crops(swav)
    assert [(c.size, c.scale) for c in crops] == [(224, (0.14, 1.0))] * 2 + [(96, (0.05, 0.14))] * 6
    assert {
        (c.jitter, c.jitter_p, c.gray_p, c.blur_p, c.solarize_p, c.interpolation) for c in crops
    } == {((0.8, 0.8, 0.8, 0.2), 0.8, 0.2, 0.5, 0.0, "linear")}
    assert (
        swav.optim.name,
        swav.optim.lr,
        swav.optim.lr_min,
        swav.optim.weight_decay,
        swav.optim.lr_scale,
    ) == ("lars", 0.6, 6e-4, 1e-6, "none")
    assert (
        swav.method.temp,
        swav.method.epsilon,
        swav.method.iterations,
        swav.method.prototypes,
        swav.method.queue,
    ) == (0.1, 0.05, 3, 3000, 3584)
    assert (
        swav.method.distill == pytest.approx(0.5 / (8 * 128))
        and swav.student.head_bn
        and swav.bn.sync
        and swav.data.batch == 512
    )
    crops = config.crops(dino)
    assert [(c.size, c.scale, c.blur_p, c.solarize_p) for c in crops] == [
        (224, (0.4, 1.0), 1.0, 0.0),
        (224, (0.4, 1.0), 0.1, 0.2),
    ] + [(96, (0.05, 0.4), 0.5, 0.0)] * 8
    assert {(c.jitter, c.interpolation) for c in crops} == {((0.4, 0.4, 0.2, 0.1), "cubic")}
    assert (dino.student.head, dino.student.dim, dino.student.kwargs, dino.method.prototypes) == (
        "dino",
        256,
        {"drop_path_rate": 0.1},
        65536,
    )
    assert dino.bn.sync
    assert (dino.optim.name, dino.optim.clip, dino.optim.weight_decay_end, dino.run.epochs) == (
        "adamw",
        3.0,
        0.4,
        100,
    )
    assert (
        len(config.crops(seed)) == 1
        and (seed.optim.warmup_epochs, seed.optim.warmup_from) == (5, "lr")
        and (seed.optim.per, seed.optim.cosine_from) == ("epoch", "start")
        and seed.method.temp_teacher == 0.01
    )


def test_a_run_of_before_keeps_what_it_had(tmp_path):
    """A key that is newer than the run's file has its own default, not a recipe's."""
    cfg = load(tmp_path, BASE, "method.name=seed", "teacher.file=t", "optim.per=step")
    raw = yaml.safe_load(config.dump(cfg))
    for key in ("warmup_from", "cosine_from"):
        del raw["optim"][key]
    (tmp_path / "old.yaml").write_text(yaml.safe_dump(raw))
    old = config.load(tmp_path / "old.yaml")
    assert (old.optim.warmup_from, old.optim.cosine_from) == ("zero", "warmup")
    assert (cfg.optim.warmup_from, cfg.optim.cosine_from) == ("lr", "start")
    assert (
        config.load(tmp_path / "old.yaml", ["optim.warmup_from=lr", "optim.cosine_from=start"])
        == cfg
    )


def test_what_a_configuration_says_goes_over_the_recipe(tmp_path):
    cfg = load(
        tmp_path,
        BASE,
        "method.name=dino",
        "student.kwargs.img_size=64",
        "optim.clip=1.0",
        "view.jitter_p=0.1",
        "data.batch=64",
    )
    assert (
        cfg.student.kwargs == {"drop_path_rate": 0.1, "img_size": 64}
        and cfg.optim.clip == 1.0
        and cfg.optim.name == "adamw"
    )
    assert {c.jitter_p for c in config.crops(cfg)} == {0.1} and cfg.data.batch == 64
    assert "view.size: the crops of dino have a size of their own" in error(
        tmp_path, BASE, "method.name=dino", "view.size=32"
    )
    cfg = load(tmp_path, BASE, "method.name=dino", "view.size=32", "views=[{count: 3}]")
    assert [c.size for c in config.crops(cfg)] == [32] * 3


@pytest.mark.parametrize("name", config.RECIPES)
def test_a_dumped_method_reads_back_equal(tmp_path, name):
    cfg = load(tmp_path, BASE, f"method.name={name}", "teacher.file=/a", "view.jitter_p=0.3")
    again = load(tmp_path, config.dump(cfg))
    assert (
        again == cfg
        and config.crops(again) == config.crops(cfg)
        and config.dump(again) == config.dump(cfg)
    )
    assert {c.jitter_p for c in config.crops(again)} == {0.3}


@pytest.mark.parametrize(
    "overrides, says",
    [
        (["method.name=seed"], "teacher.file: SEED learns from a teacher alone"),
        (
            ["method.name=seed", "teacher.file=/t", "method.contrast=1"],
            "views: seed takes 2 crops of an image here, found 1",
        ),
        (
            [
                "method.name=seed",
                "teacher.file=/t",
                "method.temp_teacher=1e-4",
                "method.queue_dtype=bf16",
            ],
            "method.queue_dtype: bf16 is too coarse",
        ),
        (
            ["method.name=swav", "views=[{}]"],
            "views: swav takes 2 or more crops of an image, found 1",
        ),
        (
            ["method.name=swav", "data.batch=96"],
            "method.queue: 3584 embeddings are no multiple of data.batch 96; nearest: 3552 or 3648",
        ),
        (["method.name=swav", "bn.groups=2"], "bn.sync: "),
        (
            [
                "method.name=swav",
                "method.target=published",
                "teacher.file=t",
                "teacher.cache=replay",
            ],
            "method.target: published needs the lengths",
        ),
        (
            ["method.name=swav", "optim.name=sgd", "engine.stage=1"],
            "set method.freeze_steps=0 or engine.stage=0",
        ),
        (
            ["method.name=dino", "method.freeze_epochs=0", "engine.stage=1"],
            "optim.clip_each: at engine.stage 1",
        ),
        (
            ["optim.weight_decay=0", "optim.weight_decay_end=0.4"],
            "optim.weight_decay_end: a schedule from 0",
        ),
        (
            ["optim.lr_min=1e-6", "optim.schedule=step"],
            "optim.lr_min: the schedule step does not end at 1e-06",
        ),
        (["views=[{size: 32, sise: 3}]"], "unknown key views.0.sise; did you mean views.0.size?"),
        (["views=[]"], "views: "),
    ],
    ids=lambda v: v if isinstance(v, str) else v[-1],
)
def test_what_a_method_cannot_do_is_refused(tmp_path, overrides, says):
    said = error(tmp_path, BASE, *overrides)
    assert says in said and said.count("found {") == 0
